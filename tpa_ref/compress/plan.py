"""The planner: the smallest cache that keeps a bound on quality, or the best one of a given size.

Calibration knows what every bit is worth (`spectral`): a bit goes to the layer and to the coefficient where it
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
from ..core.factorize import Factorization
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.memory import full_bytes, windowed_bytes
from ..gemma.model import dense_layer
from . import transform as spectral
from .calibrate import Moments
from .config import DEFAULT_CONTEXT, MAX_RATE, LayerConfig, TPAConfig, chosen_layers
from .convert import allocated, words_of
from .transform import Spectrum

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
    return [None if choice is None else sum(choice.k_widths) for choice in config.per_layer or ()]


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
    from .convert import convert, layer_spectrum
    from .evaluate import evaluate

    return planned(
        convert, evaluate, layer_spectrum, model, moments, kv_budget, max_kl, context, holdout, base, progress
    )


def planned(
    convert: Callable,
    evaluate: Callable,
    layer_spectrum: Callable,
    model: Any,
    moments: Moments,
    kv_budget: float | None,
    max_kl: float | None,
    context: int,
    holdout: str | Path | None,
    base: TPAConfig | None,
    progress: Callable,
) -> Plan:
    """`make_plan` for either backend."""
    check_bounds(kv_budget, max_kl, context, holdout)
    base = replace(base or TPAConfig(rate=1.0), context=context, per_layer=None)
    text = words_of(base, moments)
    curve = Curve(model.config, base, lambda layer: layer_spectrum(model, layer, moments.of_layer(layer), text))
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

    def measure(rate: float) -> Trial:
        converted = convert(model, curve.config(rate), moments)
        return replace(
            curve.trial(rate), kl=evaluate(model, converted, holdout, recall_prompts=0, max_tokens=8192)["kl"]
        )

    trials = list(search(curve, measure, max_kl, budget_rate, progress))
    within = [trial for trial in trials if trial.kl is not None and trial.kl <= max_kl]
    held = [trial for trial in within if kv_budget is None or trial.ratio_vs_windowed >= kv_budget]
    if held:
        chosen = min(held, key=lambda trial: trial.nbytes)
    elif kv_budget is not None:
        chosen = next(trial for trial in trials if trial.rate == budget_rate)
    else:
        chosen = min(trials, key=lambda trial: trial.kl or 0.0)
    found = curve.config(chosen.rate), chosen, context, kv_budget, max_kl, trials, curve.bound(chosen.rate), bool(held)
    return Plan(*found)


def search(
    curve: Curve, measure: Callable[[float], Trial], max_kl: float, budget_rate: float | None, progress: Callable
) -> list[Trial]:
    """Trials on the way to the smallest rate whose KL is just below the bound.

    KL is nearly a power of the predicted damage, so each step goes where the trials so far put the bound: at first
    KL = damage, then through the last two. The rate of the budget, if there is one, is tried first.
    """
    goal = MARGIN * max_kl
    trials = [] if budget_rate is None else [measure(budget_rate)]
    if trials and trials[0].kl > max_kl:  # type: ignore[operator]
        return trials
    for _ in progress(range(TRIALS)):
        rate = curve.rate_of_damage(next_damage(trials, goal))
        rate = min(rate, budget_rate) if budget_rate is not None else rate
        if any(abs(trial.rate - rate) < 1e-3 * rate for trial in trials):
            break
        trials.append(measure(rate))
        below = [trial for trial in trials if trial.kl is not None and trial.kl <= max_kl]
        if any(trial.kl >= 0.97 * goal for trial in below):  # type: ignore[operator]
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
    """Rate -> bytes and predicted damage of one model at one context. All transforms are made once."""

    def __init__(self, config: GemmaConfig, base: TPAConfig, spectrum: Callable[[int], Spectrum]):
        self.model_config, self.base = config, base
        self.layers = sorted(chosen_layers(base.layers, config))
        self.variances, self.predicted = {}, set()
        for layer in self.layers:
            found = spectrum(layer)
            self.variances[layer] = found.variance_s
            if found.predictor_zgd is not None:
                self.predicted.add(layer)

    def config(self, rate: float) -> TPAConfig:
        """The configuration of a rate."""
        config = replace(self.base, rate=rate, per_layer=None)
        per_layer = allocated(self.model_config, config, self.variances, bool(self.predicted))
        return replace(config, per_layer=per_layer)

    def trial(self, rate: float) -> Trial:
        """What is known of a rate without running the model."""
        config, context = self.config(rate), self.base.context or DEFAULT_CONTEXT
        held = cache_bytes(self.model_config, self._factors(config), context, exact=Exact(*config.exact_tokens))
        windowed, full = windowed_bytes(self.model_config, context), full_bytes(self.model_config, context)
        return Trial(rate, held, windowed / held, full / held, self._damage(config))

    def bound(self, rate: float) -> float:
        """The Gaussian rate-distortion bound of the damage with as many bits as a rate gives."""
        context = self.base.context or DEFAULT_CONTEXT
        entries = [self.model_config.slots(layer, context) for layer in self.layers]
        bits = sum(sum(given) * held for given, held in zip(self._widths(self.config(rate)), entries, strict=True))
        return spectral.gaussian_bound(list(self.variances.values()), entries, bits)

    def rate_of_ratio(self, ratio: float) -> float | None:
        """The largest rate whose cache is at least so many times smaller than `windowed`; None if there is none."""
        return self._bisect(lambda rate: self.trial(rate).ratio_vs_windowed >= ratio)

    def rate_of_damage(self, damage: float) -> float:
        """The smallest rate (up to rounding) with at most this predicted damage; the largest if none has."""
        return self._bisect(lambda rate: self.trial(rate).predicted > damage) or LEAST_RATE

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
        return spectral.damage(variances, [(*w, *[0] * (len(variance) - len(w))) for w, variance in kept])

    def _widths(self, config: TPAConfig) -> list[tuple[int, ...]]:
        """Bits of the coefficients that have any, for each converted layer."""
        assert config.per_layer is not None
        return [choice.k_widths for choice in config.per_layer if choice]

    def _factors(self, config: TPAConfig) -> list[tuple[Factorization, Factorization]]:
        assert config.per_layer is not None
        return [
            spectral_layer(choice, layer in self.predicted) if choice else dense_layer("bfloat16")
            for layer, choice in enumerate(config.per_layer)
        ]


def spectral_layer(choice: LayerConfig, predicted: bool = False) -> tuple[Factorization, Factorization]:
    """What a choice of widths caches, without its constant arrays: enough to count bytes."""
    rank, W = len(choice.k_widths), np.empty(0) if predicted else None
    return (
        Factorization("latent", rank, "spectral", widths=choice.k_widths, predictor=W),
        Factorization("latent", rank, "shared", predictor=W),
    )


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
        if choice is None:
            lines.append(f"{layer:>5} {kind:<7}{'dense':>7}")
            continue
        bits = sum(choice.k_widths)
        lines.append(f"{layer:>5} {kind:<7}{bits:>7}{bits / numbers:>13.2f}{choice.k_rank:>7}")
    return "\n".join(lines)
