"""A small random Gemma 3 of `transformers`, and the table of what works with our cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WORKS = {  # what stands in docs/transformers.md, and the tests that it rests on
    "greedy and sampling": "test_greedy_and_sampling",
    "batches with left padding": "test_batches_with_left_padding",
    "beam search, several sequences a prompt": "test_beam_search",
    "assisted generation, with a draft model or by prompt lookup": "test_assisted_generation",
    "prefixes read once": "test_a_prefix_is_read_once",
    "chat over several turns": "test_chat_over_turns",
    "images": "test_images",
    "LoRA adapters of PEFT, merged or not": "test_adapters",
    "`pipeline`": "test_pipeline",
    "`device_map` and offloaded weights of accelerate": "test_offloaded_weights",
    "10,000 tokens in one cache": "test_ten_thousand_tokens",
}


class Words:
    """A tokenizer as theirs are called: byte b is token 3 + b."""

    bos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, Any]:
        return {"input_ids": [3 + byte for byte in text.encode()]}


def ids_of(text: str) -> Any:
    """Ids [1,q] of a text behind BOS."""
    return torch.tensor([[2, *(3 + byte for byte in text.encode())]])


def random_model(seed: int = 0, **changes: Any) -> Any:
    """Seven layers, one of them global, with a window of 11."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 21,
        "max_position_embeddings": 16_384, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    hf = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config | changes)).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(0, 0.3) if "norm" in name else weight.mul_(4)
    hf.generation_config.pad_token_id = 0
    return hf
