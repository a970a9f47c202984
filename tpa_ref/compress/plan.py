"""The planner: the smallest cache that keeps a bound on quality, or the best one of a given size.

Calibration knows what every bit is worth (`transform`): a bit goes to the layer and to the coefficient where it
removes most damage for each byte that it takes at the given length of text, so at long context the global layers pay
for themselves and the window layers keep what they need. One number is left to choose, the rate. For a size it follows
by arithmetic; for a bound on KL the whole model is measured on text that calibration has not seen, since the predicted
damage holds only for small errors, and the rate is moved until the measurement holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.cache import Exact, cache_bytes
from ..core.mode import MODES
from ..core.pair import Joint, Pair
from ..core.spectral import CodedLatent
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.memory import full_bytes, windowed_bytes
from ..gemma.token_vectors import id_dtype
from .bits import damage, gaussian_bound
from .config import DEFAULT_CONTEXT, MAX_RATE, Spectral, TPAConfig
from .convert import Conversion, allocated, begin_conversion
from .evaluate import evaluate
from .moments import Moments
from .store import Memory

MARGIN = 0.95  # of the bound: other text differs a little from what is measured here
LEAST_RATE = 0.02
TRIALS = 8


@dataclass(frozen=True)
class Trial:
    """One rate: bytes at the planned context, ratios, predicted damage, and the KL if it was measured."""

    rate: float
    nbytes: int
    ratio_vs_windowed: float
    ratio_vs_full: float
    predicted: float
    kl: float | None = None


@dataclass
class Plan:
    """What the planner chose, what it tried on the way, and whether the bounds are met."""

    config: TPAConfig
    chosen: Trial
    context: int
    kv_budget: float | None
    max_kl: float | None
    trials: list[Trial] = field(default_factory=list)
    bound_damage: float = 0.0  # the least damage that any code of Gaussian coefficients does with as many bits
    met: bool = True

    @property
    def message(self) -> str:
        """One sentence: the choice, or what could not be met and what the nearest is."""
        kl = "" if self.chosen.kl is None else f", KL {self.chosen.kl:.4f} nats on held-out text"
        found = (
            f"rate {self.chosen.rate:.3f}, {self.chosen.ratio_vs_windowed:.1f}x smaller than windowed at "
            f"{self.context:,} tokens{kl}"
        )
        if self.met:
            return found
        asked = [f"{self.kv_budget:g}x" if self.kv_budget else "", f"KL <= {self.max_kl:g}" if self.max_kl else ""]
        return f"{' with '.join(filter(None, asked))} cannot be met; the nearest is {found}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "context": self.context,
            "kv_budget": self.kv_budget,
            "max_kl": self.max_kl,
            "met": self.met,
            "message": self.message,
            "chosen": vars(self.chosen),
            "bound_damage": self.bound_damage,
            "trials": [vars(trial) for trial in self.trials],
            "bits_per_token": bits_per_token(self.config),
            "config": self.config.to_dict(),
        }


def bits_per_token(config: TPAConfig) -> list[int | None]:
    """Bits of a token in every layer, K and V together; None where it is dense."""
    return [sum(choice.widths or ()) if isinstance(choice, Spectral) else None for choice in config.per_layer or ()]


def plan(
    model: Any,
    moments: Moments,
    kv_budget: float | None = None,
    max_kl: float | None = None,
    context: int = DEFAULT_CONTEXT,
    holdout: str | Path | None = None,
    base: TPAConfig | None = None,
    progress: Callable = iter,
) -> TPAConfig:
    """A TPAConfig with `per_layer` filled. See `make_plan`, which also tells how it was found."""
    return make_plan(model, moments, kv_budget, max_kl, context, holdout, base, progress).config


def make_plan(
    model: Any,
    moments: Moments,
    kv_budget: float | None = None,
    max_kl: float | None = None,
    context: int = DEFAULT_CONTEXT,
    holdout: str | Path | None = None,
    base: TPAConfig | None = None,
    progress: Callable = iter,
) -> Plan:
    """Plan the cache of a dense model.

    kv_budget: at least so many times smaller than `windowed` at `context` tokens. max_kl: at most this mean KL to the
    dense model, in nats, on the text `holdout` (or its path). Both: the smallest cache within both; where there is
    none, the one of the budget. base: layers, sinks and newest tokens to plan with. progress: wraps the trials.
    """
    check_bounds(kv_budget, max_kl, context, holdout)
    curve = Curve(model, moments, replace(base or TPAConfig(rate=1.0), context=context, per_layer=None), context)
    budget_rate = None if kv_budget is None else curve.rate_of_ratio(kv_budget)
    if kv_budget is not None and budget_rate is None:
        raise TPAError(
            f"plan: kv_budget {kv_budget:g} cannot be reached at {context} tokens even with no bits at all: the exact "
            f"tokens and the layers left dense alone are {curve.trial(LEAST_RATE).ratio_vs_windowed:.1f}x"
        )
    if max_kl is None:
        assert budget_rate is not None
        trial = curve.trial(budget_rate)
        return Plan(curve.config(budget_rate), trial, context, kv_budget, None, [trial], curve.bound(budget_rate))
    trials = list(search(curve, holdout, max_kl, budget_rate, progress))
    chosen, met = chosen_trial(trials, max_kl, kv_budget, budget_rate)
    found = curve.config(chosen.rate), chosen, context, kv_budget, max_kl, trials, curve.bound(chosen.rate), met
    return Plan(*found)


def chosen_trial(
    trials: list[Trial], max_kl: float, kv_budget: float | None, budget_rate: float | None
) -> tuple[Trial, bool]:
    """(the smallest cache within all bounds, True), or (the nearest to them, False)."""
    within = [trial for trial in trials if trial.kl is not None and trial.kl <= max_kl]
    held = [trial for trial in within if kv_budget is None or trial.ratio_vs_windowed >= kv_budget]
    if held:
        return min(held, key=lambda trial: trial.nbytes), True
    if kv_budget is not None:
        return next(trial for trial in trials if trial.rate == budget_rate), False
    return min(trials, key=lambda trial: trial.kl or 0.0), False


def search(curve: Curve, holdout: Any, max_kl: float, budget_rate: float | None, progress: Callable) -> list[Trial]:
    """Trials on the way to the smallest rate whose KL is just below the bound.

    KL is nearly a power of the predicted damage, so each step goes where the trials so far put the bound: at first
    KL = damage, then through the last two. The rate of the budget, if there is one, is tried first.
    """
    goal = MARGIN * max_kl
    trials = [] if budget_rate is None else [curve.measured(budget_rate, holdout)]
    if trials and (trials[0].kl or 0) > max_kl:
        return trials
    for _ in progress(range(TRIALS)):
        rate = curve.rate_of_damage(next_damage(trials, goal))
        rate = min(rate, budget_rate) if budget_rate is not None else rate
        if any(abs(trial.rate - rate) < 1e-3 * rate for trial in trials):
            break
        trials.append(curve.measured(rate, holdout))
        below = [trial for trial in trials if trial.kl is not None and trial.kl <= max_kl]
        if any((trial.kl or 0) >= 0.97 * goal for trial in below):
            break
    return trials


def next_damage(trials: list[Trial], goal: float) -> float:
    """The predicted damage at which KL = goal, by the power law through the two trials nearest to it."""
    known = sorted(
        (abs(np.log(max(trial.kl or 0, 1e-12) / goal)), np.log(trial.predicted), np.log(max(trial.kl or 0, 1e-12)))
        for trial in trials
    )
    if not known:
        return goal
    slope = 1.0
    if len(known) > 1 and abs(known[0][1] - known[1][1]) > 1e-6:
        slope = float(np.clip((known[0][2] - known[1][2]) / (known[0][1] - known[1][1]), 0.5, 2.0))
    return float(np.exp(known[0][1] + (np.log(goal) - known[0][2]) / slope))


class Curve:
    """Rate -> bytes, predicted damage and, where it is asked for, the measured KL of one model at one context. All
    transforms are made once.
    """

    def __init__(self, model: Any, moments: Moments, base: TPAConfig, context: int):
        self.model, self.moments, self.base, self.context = model, moments, base, context
        self.model_config: GemmaConfig = model.config
        self.store = Memory()
        transforms = Conversion(begin_conversion(model, base), moments, self.store)
        for layer in transforms.spectral:
            self.store.put("spectrum", layer, transforms.spectrum(layer))
        self.layers = transforms.spectral
        found = {layer: self.store.get("spectrum", layer) for layer in self.layers}
        self.variances = {layer: arrays["variance"] for layer, arrays in found.items()}
        self.predicted = {layer for layer, arrays in found.items() if "predictor" in arrays}

    def config(self, rate: float) -> TPAConfig:
        """The configuration of a rate."""
        config = replace(self.base, rate=rate, per_layer=None)
        per_layer = allocated(self.model_config, config, self.variances, bool(self.predicted))
        return replace(config, per_layer=per_layer)

    def trial(self, rate: float) -> Trial:
        """What is known of a rate without running the model."""
        config, shape, context = self.config(rate), self.model_config, self.context
        held = cache_bytes(
            self._pairs(config),
            shape.windows,
            context,
            exact=Exact(*config.exact_tokens),
            ids=id_dtype(shape.vocab_size),
        )
        windowed, full = windowed_bytes(shape, context), full_bytes(shape, context)
        return Trial(rate, held, windowed / held, full / held, self._damage(config))

    def measured(self, rate: float, holdout: Any) -> Trial:
        """The same with the KL of the whole model on a text."""
        converted = begin_conversion(self.model, self.config(rate))
        Trials(converted, self.moments, self.store).run()
        figures = evaluate(self.model, converted, holdout, recall_prompts=0, max_tokens=8192)
        return replace(self.trial(rate), kl=figures["kl"])

    def bound(self, rate: float) -> float:
        """The Gaussian rate-distortion bound of the damage with as many bits as a rate gives."""
        entries = [self.model_config.slots(layer, self.context) for layer in self.layers]
        bits = sum(sum(given) * held for given, held in zip(self._widths(self.config(rate)), entries, strict=True))
        return gaussian_bound(list(self.variances.values()), entries, bits)

    def rate_of_ratio(self, ratio: float) -> float | None:
        """The largest rate whose cache is at least so many times smaller than `windowed`; None if there is none."""
        return self._bisect(lambda rate: self.trial(rate).ratio_vs_windowed >= ratio)

    def rate_of_damage(self, limit: float) -> float:
        """The smallest rate (up to rounding) with at most this predicted damage; the largest if none has."""
        return self._bisect(lambda rate: self.trial(rate).predicted > limit) or LEAST_RATE

    def _bisect(self, holds: Callable[[float], bool], steps: int = 24) -> float | None:
        """The largest rate of which something holds that holds for all smaller ones."""
        if not holds(LEAST_RATE):
            return None
        low, high = LEAST_RATE, float(MAX_RATE)
        if holds(high):
            return high
        for _ in range(steps):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def _damage(self, config: TPAConfig) -> float:
        variances = list(self.variances.values())
        kept = zip(self._widths(config), variances, strict=True)
        return damage(variances, [(*w, *[0] * (len(variance) - len(w))) for w, variance in kept])

    def _widths(self, config: TPAConfig) -> list[tuple[int, ...]]:
        """Bits of the coefficients that have any, for each converted layer."""
        return [choice.widths or () for choice in config.per_layer or () if isinstance(choice, Spectral)]

    def _pairs(self, config: TPAConfig) -> list[Pair]:
        per_layer = config.per_layer or ()
        return [
            planned_pair(choice, self.model_config, layer in self.predicted) for layer, choice in enumerate(per_layer)
        ]


class Trials(Conversion):
    """A conversion whose transforms serve the next trial, too."""

    def finished(self, layer: int) -> None:
        pass


def planned_pair(choice: Any, config: GemmaConfig, predicted: bool = False) -> Pair:
    """How a layer caches, without its constant arrays: enough to count bytes."""
    g, d = config.num_kv_heads, config.head_dim
    if choice is None:
        return Pair.dense(g, d)
    W = np.empty(0) if predicted else None
    widths = tuple(choice.widths or ())
    coded = CodedLatent(g, d, len(widths), "spectral", widths=widths, predictor=W)
    if choice.k is None:
        return Joint(coded, coded)
    return Pair(MODES[choice.k.mode](g, d, choice.k.rank or 0, choice.k.dtype), coded)


def check_bounds(kv_budget: float | None, max_kl: float | None, context: int, holdout: Any) -> None:
    """Every rule on the arguments of `plan`."""
    if kv_budget is None and max_kl is None:
        raise TPAError("plan: kv_budget or max_kl must be given, got neither")
    for name, value in (("kv_budget", kv_budget), ("max_kl", max_kl)):
        if value is not None and not 0 < value < float("inf"):
            raise TPAError(f"plan: {name} must be a number above 0, got {value}")
    if context < 1:
        raise TPAError(f"plan: context must be >= 1, got {context}")
    if max_kl is not None and holdout is None:
        raise TPAError("plan: max_kl is measured on text that calibration has not seen; give holdout")


def table(found: Plan, config: GemmaConfig) -> str:
    """The plan, layer by layer: bits of a token, bits per number of K and V, and how many coefficients have any."""
    numbers = 2 * config.num_kv_heads * config.head_dim
    lines = [f"{'layer':>5} {'kind':<7}{'bits':>7}{'bits/number':>13}{'rank':>7} of {numbers}"]
    for layer, choice in enumerate(found.config.per_layer or ()):
        kind = "global" if config.is_global[layer] else "window"
        if not isinstance(choice, Spectral):
            lines.append(f"{layer:>5} {kind:<7}{'dense':>7}")
            continue
        widths = choice.widths or ()
        lines.append(f"{layer:>5} {kind:<7}{sum(widths):>7}{sum(widths) / numbers:>13.2f}{len(widths):>7}")
    return "\n".join(lines)
