"""Which factors, and how many bits: from a dense model to one with a small cache."""
