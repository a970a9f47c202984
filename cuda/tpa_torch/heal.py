"""Healing: a short distillation that teaches a converted model to live with its smaller cache.

The dense model is the teacher. Trained are only the maps between a token and its cache, and W_O behind it:

    every mode                  W_K and W_V; in `contextual` their product with x is factorized per token
    spectral, latent, fixed-b   encoder, basis, mean and map from tokens to K and V
    fixed-a                     the constant A

everything else stays as it was. The loss is KL(dense || TPA) of the predictions plus the relative error of the states
behind every attention. Codes are rounded on the way forward and passed through on the way back (straight-through).

No cache is needed: pre-RoPE K and V of a whole text are replaced by what the cache would give back, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.atomic import replacing
from tpa_ref.compress.calibrate import calibrate
from tpa_ref.compress.convert import convert
from tpa_ref.errors import TPAError
from tpa_ref.gemma.texts import read_text, text_windows

from .core.spectral import CodedLatent
from .gemma.model import Model
from .student import Student, losses

WINDOW = 512
STATES = 0.1  # weight of the error of the states beside the KL
CHECKED = 8  # windows that are kept aside
CHECKS = 10
REGRESSED = 262_144  # tokens for the maps that predict; more change little


@dataclass
class Healing:
    """How a healing went: the loss of every step (KL in nats, state error), and the checks between them."""

    steps: int = 0
    kl: list[float] = field(default_factory=list)
    states: list[float] = field(default_factory=list)
    checked: list[tuple[int, float]] = field(default_factory=list)  # (steps done, KL on the windows kept aside)


def heal(
    tpa: Model,
    dense: Model,
    text_or_path: str | Path,
    steps: int = 200,
    batch: int = 4,
    learning_rate: float = 0.01,
    seed: int = 0,
    max_tokens: int = 4_000_000,
    state: str | Path | None = None,
    progress: Callable = iter,
    predict: bool = False,
) -> Model:
    """A healed copy of a converted model. What was trained is described above; the history is `healed.healing`.

    The last windows of the text are not trained on. KL is checked there ten times, and the best state so far, the one
    before the first step included, is what is returned.

    text_or_path: text that neither planning nor evaluation uses. steps of `batch` windows each. learning_rate: relative
    change of a weight per step, at most, falling to zero. state: a file to go on from after an interruption. progress:
    wraps the steps, for instance `tqdm.tqdm`. predict: begin with maps of the tokens in place of constant means;
    a regression on this text finds in minutes what the steps would look for in hours.
    """
    check_pair(tpa, dense, steps, batch, learning_rate, predict)
    if predict:
        tpa = with_maps_of_tokens(tpa, dense, read_text(text_or_path), None if state is None else Path(state).parent)
    windows = [window for window in text_windows(dense, text_or_path, max_tokens, WINDOW) if len(window) > 1]
    aside = windows[len(windows) - min(CHECKED, len(windows) // 4) :]
    windows = windows[: len(windows) - len(aside)]
    student = Student(tpa)
    best = Best(student)
    optimizer = torch.optim.AdamW(student.trained(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    history = Healing(steps)
    first = load_state(state, student, optimizer, history, best, tpa) if state else 0
    if first == 0:
        best.check(history, 0, dense, aside)
    draws = batches(windows, batch, seed)
    for step in progress(range(steps)):
        chosen = next(draws)
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        optimizer.zero_grad(set_to_none=True)
        kl, states = 0.0, 0.0
        for window in chosen:
            kl_part, states_part = losses(student, dense, window)
            ((kl_part + STATES * states_part) / len(chosen)).backward()
            kl, states = kl + kl_part.item() / len(chosen), states + states_part.item() / len(chosen)
        torch.nn.utils.clip_grad_norm_(student.trained(), 1.0)
        optimizer.step()
        history.kl.append(kl)
        history.states.append(states)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            best.check(history, step + 1, dense, aside)
        if state and ((step + 1) % 20 == 0 or step + 1 == steps):
            save_state(state, student, optimizer, history, best, tpa)
    best.restore()
    healed = student.model()
    healed.healing = history
    return healed


def with_maps_of_tokens(tpa: Model, dense: Model, text: str, cache_dir: Path | None) -> Model:
    """The conversion made anew at the same rate: what the tokens tell of K and V on this text is no longer coded."""
    assert tpa.tpa is not None
    part = spread(text, REGRESSED * 4)
    moments = calibrate(dense, part, max_tokens=REGRESSED, cache_dir=cache_dir, predict=True)
    return convert(dense, replace(tpa.tpa, predict=True), moments)


def spread(text: str, size: int, pieces: int = 256) -> str:
    """About `size` characters in pieces from everywhere in a text.

    >>> spread("aaaabbbb", 4, pieces=2)
    'aabb'
    """
    if len(text) <= size:
        return text
    starts = np.linspace(0, len(text), pieces, endpoint=False).astype(int)
    return "".join(text[start : start + size // pieces] for start in starts)


def check_pair(tpa: Model, dense: Model, steps: int, batch: int, learning_rate: float, predict: bool = False) -> None:
    """Every rule on the arguments of `heal`."""
    if tpa.tpa is None or dense.tpa is not None:
        raise TPAError("heal: a converted model and its dense original are needed, in this order")
    if tpa.config != dense.config:
        raise TPAError("heal: the two models must be of one config, got different ones")
    if steps < 1 or batch < 1:
        raise TPAError(f"heal: steps and batch must be >= 1, got {steps} and {batch}")
    if predict and not any(isinstance(pair.k, CodedLatent) for pair in tpa.pairs):
        raise TPAError("heal: predict wants a spectral conversion; this one stores no spectral codes")
    if not 0 < learning_rate < 1:
        raise TPAError(f"heal: learning_rate must lie in (0, 1), got {learning_rate}")


def batches(windows: list[list[int]], batch: int, seed: int) -> Iterator[list[list[int]]]:
    """Windows in random order, again and again."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += rng.permutation(len(windows)).tolist()
        yield [windows[order.pop(0)] for _ in range(batch)]


def schedule(step: int, steps: int) -> float:
    """Warm up over the first twentieth, then a half cosine to zero.

    >>> [round(schedule(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.5, 0.0]
    """
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm - 1)))


class Best:
    """The weights with the least KL on the windows kept aside, so far."""

    def __init__(self, student: Student):
        self.student, self.kl = student, math.inf
        self.theta: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self, history: Healing, step: int, dense: Model, windows: list[list[int]]) -> None:
        """Measure, and keep the weights if they are the best; without windows the last ones are."""
        kl = [float(losses(self.student, dense, window)[0]) for window in windows]
        found = sum(kl) / len(kl) if kl else -float(step)
        history.checked += [(step, found)] if kl else []
        if found < self.kl:
            self.kl, self.theta = found, {name: x.detach().clone() for name, x in self.student.theta.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the student the best weights back."""
        for name, value in self.theta.items():
            self.student.theta[name].copy_(value)


# ---- going on after an interruption ----


def save_state(path: str | Path, student: Student, optimizer: Any, history: Healing, best: Best, tpa: Model) -> None:
    content = {
        "theta": {name: value.detach() for name, value in student.theta.items()},
        "optimizer": optimizer.state_dict(),
        "history": vars(history),
        "best": {"kl": best.kl, "theta": best.theta},
        "tpa": repr(tpa.tpa),
    }
    with replacing(Path(path)) as temporary:
        torch.save(content, temporary)


def load_state(path: str | Path, student: Student, optimizer: Any, history: Healing, best: Best, tpa: Model) -> int:
    """The step to go on with: 0 where there is no state; another conversion's or another length's is refused."""
    if not Path(path).is_file():
        return 0
    try:
        content = torch.load(path, weights_only=True)
        same = content["tpa"] == repr(tpa.tpa) and content["history"]["steps"] == history.steps
        if not same:
            raise TPAError(f"heal: {path} is the state of another healing; remove it or name another file")
        with torch.no_grad():
            for name, value in student.theta.items():
                value.copy_(content["theta"][name])
        optimizer.load_state_dict(content["optimizer"])
        history.kl, history.states = content["history"]["kl"], content["history"]["states"]
        history.checked = content["history"]["checked"]
        best.kl, best.theta = content["best"]["kl"], content["best"]["theta"]
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, TypeError, UnpicklingError) as problem:
        raise TPAError(f"heal: {path} holds no state of a healing: {str(problem).splitlines()[0]}") from None
    return len(history.kl)
