"""How the K and V of one model are cached: what calibration has found, without the model's weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpa_ref.atomic import replacing
from tpa_ref.compress.config import TPAConfig
from tpa_ref.core.cache import Exact, cache_bytes
from tpa_ref.errors import TPAError
from tpa_ref.files.pairs import describe, named_arrays, saved_pair
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.token_vectors import id_dtype

from ..files.checkpoint import load
from ..gemma.model import Model
from ..lasting import lasting
from .theirs import Theirs, sample

FORMAT = "tpa-codec"
SAME_GAINS, SAME_SAMPLES = 0.02, 0.2  # how far apart those of one model may be: it may be tuned further, or rounded
SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "is_global", "sliding_window")


@dataclass(frozen=True, eq=False)
class Codec:
    """tpa: what was asked for. pairs: how each layer caches. k_norm_ld, samples_ln: what its model is known by again,
    the gains of its K norms and `Theirs.samples`.

    >>> Codec.load("gemma.codec").ratio_at(32_768)                             # doctest: +SKIP
    5.3
    """

    config: GemmaConfig
    tpa: TPAConfig = field(repr=False)
    pairs: Sequence[Any] = field(repr=False)
    k_norm_ld: Tensor = field(repr=False)
    samples_ln: Tensor = field(repr=False)
    moved: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # pairs by layer and device

    @classmethod
    def of(cls, model: Any) -> Codec:
        """From a model with a TPA cache of this package, or the path of one that was saved."""
        if isinstance(model, str | Path):
            model = load(model)
        if model.tpa is None:
            raise TPAError("codec: the model has no TPA cache; convert it, or use calibrate_cache")
        k_norm_ld = torch.stack([torch.as_tensor(w.k_norm_d).float().cpu() for w in model.weights.layers])
        unit_m = sample(model.config.hidden_size)
        samples = [
            torch.cat([torch.as_tensor(W).float().cpu().flatten(0, 1) @ unit_m for W in (w.WK_gdm, w.WV_gem)])
            for w in model.weights.layers
        ]
        return cls(model.config, model.tpa, model.pairs, k_norm_ld, torch.stack(samples))

    @property
    def exact(self) -> Exact:
        """Which tokens are kept as they are."""
        return Exact(*self.tpa.exact_tokens)

    def nbytes_at(self, tokens: int, batch: int = 1) -> int:
        """Bytes of a cache of so many tokens."""
        ids = id_dtype(self.config.vocab_size)
        return cache_bytes(self.pairs, self.config.windows, tokens, batch, self.exact, ids)

    def ratio_at(self, tokens: int) -> float:
        """How many times smaller than the best dense cache (bfloat16, windows where layers have them)."""
        return windowed_bytes(self.config, tokens) / self.nbytes_at(tokens)

    def pair_on(self, layer: int, device: torch.device) -> Any:
        """How a layer caches, its constants on a device; made once for all caches."""
        if (layer, device) not in self.moved:
            pair = self.pairs[layer]
            with lasting():
                self.moved[layer, device] = type(pair)(*(moved_to(mode, device) for mode in pair.modes))
        return self.moved[layer, device]

    def check(self, theirs: Theirs) -> None:
        """One line if it was made for another model."""
        for name in SHAPE:
            ours, other = getattr(self.config, name), getattr(theirs.config, name)
            if ours != other:
                raise TPAError(f"cache: the codec is for a model whose {name} is {ours}, this one's is {other}")
        gains = apart(1 + self.k_norm_ld, 1 + theirs.k_norms)
        if not gains < SAME_GAINS:
            raise TPAError(
                f"cache: the codec was calibrated on another model: gains of the K norms differ by {100 * gains:.0f} %"
            )
        samples = apart(self.samples_ln, theirs.samples)
        if not samples < SAME_SAMPLES:
            raise TPAError(
                f"cache: the codec was calibrated on another model, or before it was trained further: K and V of one "
                f"vector differ by {100 * samples:.0f} %"
            )

    def save(self, path: str | Path) -> Path:
        """One .safetensors file, whatever its name."""
        tensors = {name: x for layer, pair in enumerate(self.pairs) for name, x in named_arrays(pair, layer)}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()} | {
            "k_norm": self.k_norm_ld, "samples": self.samples_ln,
        }  # fmt: skip
        said = {
            "config": self.config.to_hf(), "tpa": self.tpa.to_dict(), "factors": [describe(p) for p in self.pairs],
            "tensors": sorted(tensors),
        }  # fmt: skip
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "codec": json.dumps(said)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """What `save` wrote."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as problem:
            raise TPAError(f"codec: cannot read {path}: {problem}") from None
        if metadata.get("format") != FORMAT:
            raise TPAError(f"codec: {path} holds no codec; Codec.of(path) takes a saved TPA model")
        try:
            said = json.loads(metadata["codec"])
            config, tpa = GemmaConfig.from_hf(said["config"]), TPAConfig.from_dict(said["tpa"])
            if lost := set(said["tensors"]) ^ set(tensors):
                raise TPAError(f"codec: {path} is damaged: {min(lost)} is missing, or should not be there")
            if broken := [name for name, x in tensors.items() if not torch.isfinite(x).all()]:
                raise TPAError(f"codec: {path} is damaged: {broken[0]} must be finite")
            k_norm_ld, samples_ln, factors = tensors.pop("k_norm"), tensors.pop("samples"), said["factors"]
            made = [saved_pair(Model, entry, tensors, config, layer) for layer, entry in enumerate(factors)]
        except (KeyError, ValueError, TypeError) as problem:
            raise TPAError(f"codec: {path} is damaged: {problem!r}") from None
        if len(made) != config.num_layers:
            raise TPAError(f"codec: {path} must hold {config.num_layers} layers, got {len(made)}")
        return cls(config, tpa, made, k_norm_ld, samples_ln)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """How far, relative to ours."""
    return float((ours - theirs).norm() / ours.norm())


def moved_to(mode: Any, device: torch.device) -> Any:
    """A mode with its constants on a device."""
    return mode.with_arrays({name: None if x is None else x.to(device) for name, x in mode.arrays().items()})
