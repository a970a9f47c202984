"""The small files beside the weights that say how a model is used: stop tokens, chat template, added tokens.

They are kept as they are, and go along wherever a model is saved or exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import TPAError
from .tokenizer import DEFAULT_STOP, EOS

KEPT = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class SideFiles:
    """Files by name.

    >>> SideFiles({"generation_config.json": b'{"eos_token_id": [1, 50]}'}).stop_tokens == {1, 50}
    True
    """

    files: Mapping[str, bytes] = field(default_factory=dict)

    def check(self) -> None:
        """Read everything that is used, so that what is damaged shows at once."""
        _ = self.stop_tokens, self.chat_template, self.added_tokens, self.hidden_tokens, self.special_tokens

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json that came with the weights."""
        return self._json("config.json")

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a text, as `transformers` finds them: 1 if config.json names none; Gemma's two without one."""
        text = self.config.get("text_config")
        for content in (self._json("generation_config.json"), self.config, text if isinstance(text, dict) else {}):
            found = content.get("eos_token_id")
            if found is None:
                continue
            tokens = found if isinstance(found, list) else [found]
            if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
                raise TPAError(f"load: eos_token_id must be a token id or a list of them, got {str(found)[:60]}")
            return frozenset(tokens)
        return frozenset({EOS}) if self.config else DEFAULT_STOP

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own Jinja template for conversations, if it has one."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode("utf-8", "replace")
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = self._json(name).get("chat_template")
            if isinstance(found, list):  # several, each with a name
                named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
                found = named.get("default")
            if isinstance(found, str):
                return found
        return None

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that a tokenizer.model does not have: text -> id."""
        found: dict[Any, Any] = dict(self._json("added_tokens.json"))
        found |= {entry.get("content"): token for token, entry in self._decoder()}
        return {text: token for text, token in found.items() if isinstance(text, str) and text and type(token) is int}

    @cached_property
    def hidden_tokens(self) -> frozenset[int]:
        """Ids that tokenizer_config.json calls special: no part of a decoded text."""
        return frozenset(token for token, entry in self._decoder() if entry.get("special") is True)

    def _decoder(self) -> list[tuple[int, dict[str, Any]]]:
        """The added tokens of tokenizer_config.json."""
        found = self._json("tokenizer_config.json").get("added_tokens_decoder")
        entries = found.items() if isinstance(found, dict) else ()
        named = [(token, entry) for token, entry in entries if token.isdecimal() and isinstance(entry, dict)]
        return [(int(token), entry) for token, entry in named if isinstance(entry.get("content"), str)]

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and so on, as a chat template names them."""
        found = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        for said in (self._json("tokenizer_config.json"), self._json("special_tokens_map.json")):
            found |= {name: token for name, token in said.items() if name.endswith("_token")}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}  # null: there is none

    def _json(self, name: str) -> dict[str, Any]:
        """The object in a file; empty where there is none."""
        try:
            content = json.loads(self.files.get(name, b"{}").decode("utf-8-sig"))
        except (ValueError, RecursionError) as problem:
            raise TPAError(f"load: {name} is not valid JSON: {problem}") from None
        if not isinstance(content, dict):
            raise TPAError(f"load: {name} must hold a JSON object, got {type(content).__name__}")
        return content
