"""The planner: the smallest cache that keeps a bound on quality, or the best one of a given size.

Calibration knows what every bit is worth (`transform`): a bit goes to the layer and to the coefficient where it
removes most damage for each byte that it takes at the given length of text, so at long context the global layers pay
for themselves and the window layers keep what they need. One number is left to choose, the rate. For a size it follows
by arithmetic; for a bound on KL the whole model is measured on text that calibration has not seen, since the predicted
damage holds only for small errors, and the rate is moved until the measurement holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.banded import Banded, BandedLatent
from ..core.cache import Exact, cache_bytes
from ..core.mode import MODES
from ..core.pair import Joint, Pair
from ..core.spectral import CodedLatent
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.memory import full_bytes, windowed_bytes
from ..gemma.token_vectors import id_dtype
from .bits import damage, gaussian_bound
from .config import DEFAULT_CONTEXT, DEFAULT_RATE, MAX_RATE, PREFER, Spectral, TPAConfig
from .convert import Conversion, allocated, begin_conversion, groups_of, parts_of
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
    trials: list[Trial]
    bound_damage: float  # the least damage that any code of Gaussian coefficients does with as many bits
    met: bool

    @property
    def message(self) -> str:
        """One sentence: the choice, or what could not be met and what the nearest is."""
        kl = "" if self.chosen.kl is None else f", KL {self.chosen.kl:.4f} nats on held-out text"
        ratio = f"{self.chosen.ratio_vs_windowed:.1f}x smaller than windowed at {self.context:,} tokens"
        found = f"rate {self.chosen.rate:.3f}, {ratio}{kl}"
        if self.met:
            return found
        asked = [f"{self.kv_budget:g}x" if self.kv_budget else "", f"KL <= {self.max_kl:g}" if self.max_kl else ""]
        return f"{' with '.join(filter(None, asked))} cannot be met; the nearest is {found}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; bits_per_token: of every layer, None where it is dense."""
        per_layer = self.config.per_layer or ()
        return {
            "context": self.context,
            "kv_budget": self.kv_budget,
            "max_kl": self.max_kl,
            "met": self.met,
            "message": self.message,
            "chosen": vars(self.chosen),
            "bound_damage": self.bound_damage,
            "trials": [vars(trial) for trial in self.trials],
            "bits_per_token": [sum(choice.given) if isinstance(choice, Spectral) else None for choice in per_layer],
            "config": self.config.to_dict(),
        }


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
    near = DEFAULT_RATE if kv_budget is None else min(MAX_RATE, 16 / kv_budget)  # bits of slow K and V hang on it
    curve = Curve(model, moments, replace(base or TPAConfig(), rate=near, context=context, per_layer=None), context)
    budget_rate = None if kv_budget is None else curve.largest_rate("ratio_vs_windowed", kv_budget)
    if kv_budget is not None and budget_rate is None:
        raise TPAError(
            f"plan: kv_budget {kv_budget:g} cannot be reached at {context} tokens even with no bits at all: the exact "
            f"tokens and the layers left dense alone are {curve.trial(LEAST_RATE).ratio_vs_windowed:.1f}x"
        )
    if max_kl is None:
        assert budget_rate is not None
        chosen, met = curve.trial(budget_rate), True
        trials = [chosen]
    else:
        trials = search(curve, holdout, max_kl, budget_rate, progress)
        chosen, met = chosen_trial(trials, max_kl, kv_budget)
    config, bound = curve.config(chosen.rate), curve.bound(chosen.rate)
    return Plan(config, chosen, context, kv_budget, max_kl, trials, bound, met)


def chosen_trial(trials: list[Trial], max_kl: float, kv_budget: float | None) -> tuple[Trial, bool]:
    """(the smallest cache within all bounds, True), or (the nearest to them, False). No trial exceeds the budget, and
    the first one is the budget's.
    """
    within = [trial for trial in trials if (trial.kl or 0) <= max_kl]
    if within:
        return min(within, key=lambda trial: trial.nbytes), True
    return (min(trials, key=lambda trial: trial.kl or 0) if kv_budget is None else trials[0]), False


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
        rate = min(curve.largest_rate("predicted", next_damage(trials, goal)) or LEAST_RATE, budget_rate or MAX_RATE)
        if any(abs(trial.rate - rate) < 1e-3 * rate for trial in trials):
            break
        trials.append(curve.measured(rate, holdout))
        if any(0.97 * goal <= (trial.kl or 0) <= max_kl for trial in trials):
            break
    return trials


def next_damage(trials: list[Trial], goal: float) -> float:
    """The predicted damage at which KL = goal, by the power law through the two trials nearest to it."""
    if not trials:
        return goal
    logs = [(float(np.log(trial.predicted)), float(np.log(max(trial.kl or 0, 1e-12)))) for trial in trials]
    (x, y), *others = sorted(logs, key=lambda point: abs(point[1] - np.log(goal)))
    slope = 1.0
    if others and abs(x - others[0][0]) > 1e-6:
        slope = float(np.clip((y - others[0][1]) / (x - others[0][0]), 0.5, 2.0))
    return float(np.exp(x + (np.log(goal) - y) / slope))


class Curve:
    """Rate -> bytes, predicted damage and, where it is asked for, the measured KL of one model at one context. All
    transforms are made once.
    """

    def __init__(self, model: Any, moments: Moments, base: TPAConfig, context: int):
        self.model, self.moments, self.base, self.context = model, moments, base, context
        self.model_config: GemmaConfig = model.config
        self.store = Memory()
        transforms = Conversion(begin_conversion(model, base), moments, self.store)
        transforms.find_spectra()
        found = transforms.variances()
        self.variances = {layer: arrays["variance"] for layer, arrays in found.items()}
        self.predicted = {layer for layer, arrays in found.items() if "predictor" in arrays}

    def config(self, rate: float) -> TPAConfig:
        config = replace(self.base, rate=rate)
        return replace(config, per_layer=allocated(self.model_config, config, self.variances, bool(self.predicted)))

    def trial(self, rate: float) -> Trial:
        """What is known of a rate without running the model."""
        config, shape, context = self.config(rate), self.model_config, self.context
        choices = enumerate(config.per_layer or ())
        known = {layer for layer, variance_s in self.variances.items() if not len(variance_s)}
        pairs = [planned_pair(choice, shape, layer in self.predicted, layer in known) for layer, choice in choices]
        exact, ids = Exact(*config.exact_tokens), id_dtype(shape.vocab_size)
        held = cache_bytes(pairs, shape.windows, context, exact=exact, ids=ids)
        predicted = damage(self.parts(), widths(config))
        return Trial(rate, held, windowed_bytes(shape, context) / held, full_bytes(shape, context) / held, predicted)

    def measured(self, rate: float, holdout: Any) -> Trial:
        """The same with the KL of the whole model on a text."""
        figures = evaluate(self.model, self.converted(rate), holdout, recall_prompts=0, max_tokens=8192)
        return replace(self.trial(rate), kl=figures["kl"])

    def converted(self, rate: float) -> Any:
        """The model with this cache."""
        converted = begin_conversion(self.model, self.config(rate))
        Trials(converted, self.moments, self.store).run()
        return converted

    def bound(self, rate: float) -> float:
        """The Gaussian rate-distortion bound of the damage with as many bits as a rate gives."""
        entries = [self.model_config.slots(layer, self.context) for layer in self.variances]
        config = self.config(rate)
        choices = [choice for choice in config.per_layer or () if isinstance(choice, Spectral)]
        held = [entry * groups_of(self.model_config, choice) for entry, choice in zip(entries, choices, strict=True)]
        bits = sum(sum(choice.given) * n for choice, n in zip(choices, held, strict=True))
        return gaussian_bound(list(self.variances.values()), held, bits)

    def parts(self) -> list[np.ndarray]:
        """The variances of all strings of codes."""
        choice = self.base.choice
        assert isinstance(choice, Spectral)
        of_layers = (parts_of(self.model_config, choice, layer, x) for layer, x in self.variances.items())
        return [part for parts in of_layers for part in parts]

    def largest_rate(self, figure: str, limit: float, steps: int = 24) -> float | None:
        """The largest rate at which a figure of its trial is at least `limit`, None where no rate is low enough. Every
        figure but the bytes falls as the rate rises.
        """
        low, high = LEAST_RATE, float(MAX_RATE)
        if getattr(self.trial(low), figure) < limit:
            return None
        if getattr(self.trial(high), figure) >= limit:
            return high
        for _ in range(steps):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if getattr(self.trial(middle), figure) >= limit else (low, middle)
        return low


def by_preference(model: Any, moments: Moments, config: TPAConfig, context: int) -> dict[str, Trial]:
    """What either choice of `prefer` comes to at the rate of a configuration, without running the model; empty where
    there is no such choice.
    """
    choice = config.choice
    if not isinstance(choice, Spectral) or choice.k is not None:
        return {}
    found = {}
    for prefer in PREFER:
        predict = config.predict if prefer == "size" else None
        base = replace(config, rate=choice.rate, prefer=prefer, predict=predict, context=context, per_layer=None)
        found[prefer] = Curve(model, moments, base, context).trial(choice.rate)
    return found


def widths(config: TPAConfig) -> list[tuple[int, ...]]:
    """Bits of the coefficients that have any, for each string of codes of a plan."""
    choices = [choice for choice in config.per_layer or () if isinstance(choice, Spectral)]
    return [widths for choice in choices for widths in choice.of_strings]


class Trials(Conversion):
    """A conversion that keeps its transforms for the next trial."""

    def finished(self, layer: int) -> None:
        pass


def planned_pair(choice: Any, config: GemmaConfig, predicted: bool = False, known: bool = False) -> Pair:
    """How a layer caches, without its constant arrays: enough to count bytes. known: it follows from the tokens."""
    g, d = config.num_kv_heads, config.head_dim
    if choice is None:
        return Pair.dense(g, d)
    if choice.banded:
        given, groups = (choice.of_strings[:-1], choice.of_strings[-1:]), groups_of(config, choice)
        k, v = (
            BandedLatent(
                g, d, sum(map(len, x)), "spectral", widths=sum(x, ()), strings=tuple(map(len, x)), groups=groups
            )
            for x in given
        )
        return Banded(k, v)
    W, k_norm = (np.empty(0) if given else None for given in (predicted, known))
    coded = CodedLatent(g, d, len(choice.widths), "spectral", widths=choice.widths, predictor=W, k_norm=k_norm)
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
        bits, rank = sum(choice.given), len(choice.given)
        lines.append(f"{layer:>5} {kind:<7}{bits:>7}{bits / numbers:>13.2f}{rank:>7}")
    return "\n".join(lines)
