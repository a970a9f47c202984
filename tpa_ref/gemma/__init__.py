"""Gemma 3: its config, weights and forward pass, images and text."""
