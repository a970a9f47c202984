"""Healing: a short distillation that teaches a converted model to live with its smaller cache.

The dense model is the teacher. Only the maps between a token and its cache are trained, and W_O after it:

    every mode                  W_K and W_V; in `contextual` their product with x is factorized per token
    spectral, latent, fixed-b   encoder, basis, mean and map from tokens to K and V
    fixed-a                     the constant A

Everything else stays as it was. The loss is KL(dense || TPA) of the predictions plus the relative error of the states
after every attention. Codes are rounded on the way forward and passed through on the way back (straight-through).

No cache is needed: pre-RoPE K and V of a whole text are replaced by what the cache would give back, which is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from tpa_ref.atomic import replacing
from tpa_ref.compress.calibrate import calibrate
from tpa_ref.compress.convert import convert
from tpa_ref.errors import TPAError
from tpa_ref.gemma.texts import read_text, text_windows

from .core.banded import BandedLatent
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
    """A healed copy of a converted model. Its `healing` is the history.

    The last windows of the text are not trained on. KL is checked there ten times, and the best state so far, the one
    before the first step included, is what is returned.

    text_or_path: text that neither planning nor evaluation uses. steps of `batch` windows each. learning_rate: relative
    change of a weight per step, at most, falling to zero. state: a file to go on from after an interruption. progress:
    wraps the steps, for instance `tqdm.tqdm`. predict: begin with maps of the tokens in place of constant means;
    a regression on this text finds in minutes what the steps would look for in hours.
    """
    check_arguments(tpa, dense, steps, batch, learning_rate, predict)
    if predict:
        tpa = with_maps_of_tokens(tpa, dense, read_text(text_or_path), None if state is None else Path(state).parent)
    run = Run(tpa, dense, list(text_windows(dense, text_or_path, max_tokens, WINDOW)), steps, learning_rate)
    first = run.resume(state) if state else 0
    if first == 0:
        run.check()
    for step, chosen in zip(progress(range(steps)), batches(run.windows, batch, seed)):
        if step < first:
            continue
        run.step(step, chosen)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            run.check()
        if state and ((step + 1) % 20 == 0 or step + 1 == steps):
            run.save(state)
    return run.healed()


class Run:
    """One healing: what is trained, on which windows, and how far it is. It can be saved and resumed."""

    def __init__(self, tpa: Model, dense: Model, windows: list[list[int]], steps: int, learning_rate: float):
        kept = len(windows) - min(CHECKED, len(windows) // 4)
        self.dense, self.windows, self.aside, self.learning_rate = dense, windows[:kept], windows[kept:], learning_rate
        self.student, self.history = Student(tpa), Healing(steps)
        self.optimizer = torch.optim.AdamW(self.student.theta.values(), learning_rate, (0.9, 0.99), weight_decay=0.0)
        self.best_kl = math.inf
        self.best: dict[str, Tensor] = {}

    def step(self, step: int, windows: list[list[int]]) -> None:
        """Change the weights once, by the mean gradient of some windows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(step, self.history.steps)
        self.optimizer.zero_grad(set_to_none=True)
        kl, states = 0.0, 0.0
        for window in windows:
            kl_part, states_part = losses(self.student, self.dense, window)
            ((kl_part + STATES * states_part) / len(windows)).backward()
            kl, states = kl + kl_part.item() / len(windows), states + states_part.item() / len(windows)
        torch.nn.utils.clip_grad_norm_(self.student.theta.values(), 1.0)
        self.optimizer.step()
        self.history.kl.append(kl)
        self.history.states.append(states)

    @torch.no_grad()
    def check(self) -> None:
        """Measure the windows kept aside, and keep the weights if they are the best; without any the last ones are."""
        done = len(self.history.kl)
        kl = [float(losses(self.student, self.dense, window)[0]) for window in self.aside]
        found = sum(kl) / len(kl) if kl else -float(done)
        self.history.checked += [(done, found)] if kl else []
        if found < self.best_kl:
            self.best_kl, self.best = found, {name: x.detach().clone() for name, x in self.student.theta.items()}

    def healed(self) -> Model:
        """The model with the best weights, and the history."""
        self.student.set_weights(self.best)
        healed = self.student.model()
        healed.healing = self.history
        return healed

    def save(self, path: str | Path) -> None:
        """Write down everything that `resume` needs."""
        content = {
            "theta": {name: value.detach() for name, value in self.student.theta.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": vars(self.history),
            "best": {"kl": self.best_kl, "theta": self.best},
            "tpa": repr(self.student.tpa.tpa),
        }
        with replacing(Path(path)) as temporary:
            torch.save(content, temporary)

    def resume(self, path: str | Path) -> int:
        """The step to go on with: 0 where there is no state; another conversion's or another length's is refused."""
        if not Path(path).is_file():
            return 0
        try:
            content = torch.load(path, weights_only=True)
            if (content["tpa"], content["history"]["steps"]) != (repr(self.student.tpa.tpa), self.history.steps):
                raise TPAError(f"heal: {path} is the state of another healing; remove it or name another file")
            self.student.set_weights(content["theta"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.history = Healing(**content["history"])
            self.best_kl, self.best = content["best"]["kl"], content["best"]["theta"]
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, TypeError, UnpicklingError) as problem:
            raise TPAError(f"heal: {path} holds no state of a healing: {str(problem).splitlines()[0]}") from None
        return len(self.history.kl)


def with_maps_of_tokens(tpa: Model, dense: Model, text: str, cache_dir: Path | None) -> Model:
    """The conversion made anew at the same rate: what the tokens tell of K and V on this text is no longer coded."""
    assert tpa.tpa is not None
    part = spread(text, REGRESSED * 4)
    moments = calibrate(dense, part, max_tokens=REGRESSED, cache_dir=cache_dir, predict=True)
    return convert(dense, replace(tpa.tpa, predict=True, prefer="size", per_layer=None), moments)


def spread(text: str, size: int, pieces: int = 256) -> str:
    """About `size` characters in pieces from everywhere in a text.

    >>> spread("aaaabbbb", 4, pieces=2)
    'aabb'
    """
    if len(text) <= size:
        return text
    starts = np.linspace(0, len(text), pieces, endpoint=False).astype(int)
    return "".join(text[start : start + size // pieces] for start in starts)


def check_arguments(tpa: Model, dense: Model, steps: int, batch: int, learning_rate: float, predict: bool) -> None:
    """Every rule on the arguments of `heal`."""
    if tpa.tpa is None or dense.tpa is not None:
        raise TPAError("heal: a converted model and its dense original are needed, in this order")
    if tpa.config != dense.config:
        raise TPAError("heal: the two models must be of one config, got different ones")
    if tpa.rounded_weights:
        raise TPAError(
            "heal: the weights of this model are rounded to int8; load it without weights='int8' to train it"
        )
    if steps < 1 or batch < 1:
        raise TPAError(f"heal: steps and batch must be >= 1, got {steps} and {batch}")
    if predict and not any(isinstance(pair.k, CodedLatent | BandedLatent) for pair in tpa.pairs):
        raise TPAError("heal: predict wants a spectral conversion; this one stores no spectral codes")
    if not 0 < learning_rate < 1:
        raise TPAError(f"heal: learning_rate must lie in (0, 1), got {learning_rate}")


def batches(windows: list[list[int]], batch: int, seed: int) -> Iterator[list[list[int]]]:
    """Windows in random order, again and again."""
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(rng.permutation(len(windows)) for _ in itertools.count())
    while True:
        yield [windows[index] for index in itertools.islice(order, batch)]


def schedule(step: int, steps: int) -> float:
    """Warm up over the first twentieth, then a half cosine to zero.

    >>> [round(schedule(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.5, 0.0]
    """
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm - 1)))
