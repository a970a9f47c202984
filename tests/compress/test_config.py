"""How a cache is to be compressed: keywords, `FixedRank` and `Spectral` in, one choice for every layer out.

By the rules that the docstrings state, for the small model of `helpers.config` (7 layers, the sixth global; g = 2,
h = 4, d = 16); what is wrong is refused with one line that names the setting, the rule and the value.
"""

from __future__ import annotations

import json

import helpers
import pytest
from helpers import MODES, refused

import tpa_ref
from tpa_ref.compress.config import (
    DEFAULT_RATE,
    DEFAULT_SINKS,
    FixedRank,
    Side,
    Spectral,
    TPAConfig,
    chosen_layers,
    exact_rank,
    width_counts,
    widths_of,
)
from tpa_ref.gemma.texts import read_text

CONFIG = helpers.config()
EXACT = {"contextual": 2, "fixed-a": 2, "fixed-b": 16, "latent": 32}


def fixed(mode, rank=None, dtype="bfloat16"):
    """K and V cached the same way."""
    return FixedRank(Side(mode, rank, dtype), Side(mode, rank, dtype))


# ---- keywords -> a choice ----

CHOICES = [
    ({}, Spectral(DEFAULT_RATE)),
    ({"rate": 1.5}, Spectral(1.5)),
    ({"rate": 8}, Spectral(8)),
    ({"rate": 1.0, "mode": "latent"}, Spectral(1.0)),
    ({"rate": 1.0, "k_mode": "latent", "v_mode": "latent"}, Spectral(1.0)),
    ({"rate": 1.0, "predict": True}, Spectral(1.0, predict=True)),
    ({"predict": False}, Spectral(DEFAULT_RATE, predict=False)),
    ({"layers": "global", "sinks": 2}, Spectral(DEFAULT_RATE)),
    ({"rate": 1.0, "k_mode": "fixed-a"}, Spectral(1.0, Side("fixed-a", None, "int8"))),
    ({"rate": 1.0, "k_mode": "fixed-b", "k_rank": 3, "k_dtype": "int4"}, Spectral(1.0, Side("fixed-b", 3, "int4"))),
    ({"mode": "latent"}, fixed("latent")),
    ({"k_rank": 2}, FixedRank(Side("contextual", 2), Side("contextual"))),
    ({"v_rank": 2}, FixedRank(Side("contextual"), Side("contextual", 2))),
    ({"kv_dtype": "int8"}, fixed("latent", dtype="int8")),
    ({"k_mode": "fixed-a"}, FixedRank(Side("fixed-a"), Side("latent"))),
    ({"mode": "fixed-b", "v_mode": "latent", "k_rank": 4}, FixedRank(Side("fixed-b", 4), Side("latent"))),
    (
        {"mode": "latent", "kv_dtype": "int8", "v_dtype": "int4"},
        FixedRank(Side("latent", None, "int8"), Side("latent", None, "int4")),
    ),
]


@pytest.mark.parametrize(("keywords", "choice"), CHOICES, ids=str)
def test_keywords_mean_a_choice(keywords, choice):
    """What is asked of every layer, and whether it is spectral: then four sinks are kept unless told otherwise."""
    tpa = TPAConfig(**keywords)
    assert tpa.choice == choice
    assert tpa.spectral == isinstance(choice, Spectral)
    assert tpa.exact_tokens == (keywords.get("sinks", DEFAULT_SINKS if tpa.spectral else 0), 0)


@pytest.mark.parametrize("choice", [None, Spectral(), *(choice for _, choice in CHOICES)], ids=str)
def test_a_choice_is_taken_as_it_is(choice):
    """`TPAConfig.of` makes the configuration that asks for this choice."""
    assert TPAConfig.of(choice).choice == (choice or Spectral())
    assert TPAConfig.of(TPAConfig.of(choice)) == TPAConfig.of(choice)


def test_exact_tokens():
    """With a rate sinks are the default, with fixed ranks there are none; both can be chosen."""
    assert TPAConfig().exact_tokens == TPAConfig(rate=1.0).exact_tokens == (1, 0)
    assert TPAConfig(mode="latent").exact_tokens == (0, 0)
    assert TPAConfig(mode="latent", sinks=2, recent=3).exact_tokens == (2, 3)
    assert TPAConfig(sinks=0, recent=64).exact_tokens == (0, 64)
    assert TPAConfig(per_layer=(None, Spectral())).exact_tokens == (1, 0)
    assert TPAConfig(per_layer=(None, fixed("latent", 1))).exact_tokens == (0, 0)


# ---- a choice for every layer ----


@pytest.mark.parametrize("mode", MODES)
def test_ranks_are_resolved(mode):
    """Half of the exact rank where none is given, the exact one where more is asked, and a note that names both."""
    exact = exact_rank(mode, CONFIG)
    assert exact == EXACT[mode]
    for asked, given in ((None, exact // 2), (1, 1), (exact, exact), (exact + 1, exact), (10**6, exact)):
        choices, notes = TPAConfig(mode=mode, k_rank=asked, v_rank=asked).resolve(CONFIG)
        assert choices == (fixed(mode, given),) * 7
        expected = [
            f"{side}_rank {asked} is above the exact bound {exact} of {mode}: clamped to {exact}" for side in "kv"
        ]
        assert notes == (expected if asked and asked > exact else [])


def test_half_of_a_rank_is_at_least_one():
    """One KV head has nothing to halve."""
    choices, notes = TPAConfig(mode="fixed-a").resolve(helpers.config(num_kv_heads=1))
    assert choices[0] == fixed("fixed-a", 1) and notes == []


def test_the_rank_of_k_beside_a_rate():
    """Exact where none is given; clamped like others."""
    for asked, given in ((None, 2), (1, 1), (9, 2)):
        choices, notes = TPAConfig(rate=1.0, k_mode="fixed-a", k_rank=asked).resolve(CONFIG)
        assert choices == (Spectral(1.0, Side("fixed-a", given, "int8")),) * 7
        assert len(notes) == (asked == 9)
    assert "k_rank 9" in notes[0] and "clamped to 2" in notes[0]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", range(7)), ("global", [5]), ("local", [0, 1, 2, 3, 4, 6]), ("5,1", [1, 5]), ("0", [0]), (3, [3])],
)
def test_layers_that_are_converted(layers, chosen):
    """All, those of a kind, or numbers; the others stay dense."""
    assert chosen_layers(layers, CONFIG) == set(chosen)
    choices, _ = TPAConfig(mode="latent", layers=layers).resolve(CONFIG)
    assert [layer for layer, choice in enumerate(choices) if choice] == sorted(chosen)


def test_a_complete_choice_is_taken_as_it_is():
    """per_layer is not changed, and wins over everything else."""
    per_layer = (None, fixed("latent", 5), Spectral(widths=(4, 3, 1)), *[None] * 4)
    assert TPAConfig(per_layer=per_layer, layers="global").resolve(CONFIG) == (per_layer, [])


@pytest.mark.parametrize(("asked", "given"), [(None, 4), (1, 1), (4, 4), (77, 4)])
def test_the_rank_of_q(asked, given):
    """Exact where none is given; above it a note."""
    rank, notes = TPAConfig(q_rank=asked).resolve_q_rank(CONFIG)
    expected = ["q_rank 77 is above the exact bound 4 (query heads): clamped to 4"]
    assert rank == given and notes == (expected if asked == 77 else [])


# ---- in a model ----


def test_a_converted_model_holds_its_choices(backend):
    """Pairs are what was resolved; ranks above the exact one are clamped and said, which is no error."""
    model = backend.convert(helpers.model(backend), TPAConfig(k_rank=9, v_rank=2, q_rank=77))
    assert model.choices == [fixed("contextual", 2)] * 7
    assert [(pair.k.rank, pair.v.rank, pair.k.dtype) for pair in model.pairs] == [(2, 2, "bfloat16")] * 7
    assert len(model.notes) == 2 and "k_rank 9" in model.notes[0] and "q_rank 77" in model.notes[1]


def test_dense_layers_of_a_converted_model(backend):
    """Layers that are not converted are held in bfloat16, as the baselines are, or in full precision where it was asked
    for.
    """
    for dtype, held in (("int8", "bfloat16"), ("float32", "float32")):
        model = backend.convert(helpers.model(backend), TPAConfig(mode="latent", kv_dtype=dtype, layers="5"))
        assert [pair.k.dtype for pair in model.pairs] == [*[held] * 5, dtype, held]
        assert [pair.is_dense for pair in model.pairs] == [layer != 5 for layer in range(7)]


@pytest.mark.parametrize(
    "choice", [fixed("fixed-b", 3, "int8"), Spectral(1.0, Side("fixed-a", 2, "int8")), Spectral(1.0)]
)
def test_convert_takes_a_choice(backend, choice):
    """`convert(model, choice)` is `convert` of the configuration that asks for it."""
    model, ids = helpers.model(backend), helpers.tokens(20)
    one, other = backend.convert(model, choice), backend.convert(model, TPAConfig.of(choice))
    assert one.choices == other.choices and one.tpa == other.tpa
    assert (helpers.logits(one, ids) == helpers.logits(other, ids)).all()


def test_a_rate_chooses_widths(backend):
    """After a conversion every layer has its widths, and the configuration says so."""
    model = backend.convert(helpers.model(backend), TPAConfig(rate=1.0, layers="global"))
    assert model.tpa.per_layer == tuple(model.choices)
    assert [choice is not None for choice in model.choices] == list(CONFIG.is_global)
    strings = *model.pairs[5].k.widths_of_strings, *model.pairs[5].v.widths_of_strings
    assert model.choices[5] == Spectral(1.0, strings=strings) and sum(strings, ())
    joint = backend.convert(helpers.model(backend), TPAConfig(rate=1.0, layers="global", prefer="size"))
    assert joint.choices[5] == Spectral(1.0, widths=joint.pairs[5].k.widths) and joint.pairs[5].k.widths


def test_a_tpa_model_is_not_converted_again(backend):
    """Its weights are the dense ones, but its factors are not; and calibration needs a tokenizer."""
    model = helpers.model(backend)
    converted = backend.convert(model)
    refused(lambda: backend.convert(converted), "convert", "already")
    refused(lambda: backend.calibrate(converted, "some text"), "calibrate", "already")
    refused(lambda: backend.convert(model, calibration="some text to calibrate on"), "tokenizer")


# ---- JSON ----

ROUND_TRIPS = [
    *(TPAConfig(**keywords) for keywords, _ in CHOICES),
    TPAConfig(q_rank=3, layers="5,6", context=100, sinks=1, recent=2, rate=3.0),
    TPAConfig(per_layer=(None, fixed("latent", 5, "int4"), Spectral(widths=(8, 8, 3, 1)), Spectral(widths=()))),
    TPAConfig(per_layer=(None, Spectral(k=Side("fixed-a", 2, "int8"), widths=(2, 1, 1))), sinks=0),
    TPAConfig(rate=1.5, predict=True, per_layer=(Spectral(1.5, predict=True, widths=(2, 2)),)),
]


@pytest.mark.parametrize("tpa", ROUND_TRIPS, ids=str)
def test_through_json_and_back(tpa):
    """A saved configuration is the same one."""
    assert TPAConfig.from_dict(json.loads(json.dumps(tpa.to_dict()))) == tpa


def test_entries_of_saved_models():
    """The names that saved models have always had; "shared": V's coefficients are those of K; widths are counts."""
    none, counts = [], [1, 0, 0, 0, 0, 0, 2, 0]
    entries = [
        (fixed("latent", 5, "int4"), ("latent", 5, "int4", none), ("latent", 5, "int4", none)),
        (Spectral(widths=(8, 2, 2)), ("latent", 3, "spectral", counts), ("latent", 3, "shared", none)),
        (
            Spectral(k=Side("fixed-a", 2, "int8"), widths=(8, 2, 2)),
            ("fixed-a", 2, "int8", none),
            ("latent", 3, "spectral", counts),
        ),
    ]
    names = ("mode", "rank", "dtype", "widths")
    for choice, k, v in entries:
        (entry,) = TPAConfig(per_layer=(choice,)).to_dict()["per_layer"]
        assert entry == {f"k_{n}": x for n, x in zip(names, k)} | {f"v_{n}": x for n, x in zip(names, v)}
    both = {
        "k_mode": "latent",
        "v_mode": "latent",
        "k_rank": 3,
        "v_rank": 1,
        "k_dtype": "spectral",
        "v_dtype": "spectral",
    }
    widths = {"k_widths": counts, "v_widths": [0] * 7 + [1]}  # format 2: K and V have codes of their own
    assert TPAConfig.from_dict({"per_layer": [both | widths]}).per_layer == (Spectral(widths=(8, 2, 2)),)


@pytest.mark.parametrize("widths", [(), (1,), (8,) * 5, (8, 7, 6, 5, 4, 3, 2, 1), (3, 3, 1)])
def test_widths_are_counted(widths):
    """Counts of 8, 7 ... 1 bits, and back."""
    assert widths_of(width_counts(widths)) == widths
    assert len(width_counts(widths)) == (8 if widths else 0)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"mode": "pca"}, ("mode", *MODES, "'pca'")),
        ({"k_mode": "dense"}, ("k_mode", "'dense'")),
        ({"k_mode": "spectral"}, ("k_mode", "'spectral'")),
        ({"v_mode": ""}, ("v_mode", "''")),
        ({"kv_dtype": "fp8"}, ("kv_dtype", "float32", "bfloat16", "int8", "int4", "'fp8'")),
        ({"k_dtype": "float16"}, ("k_dtype", "'float16'")),
        ({"v_dtype": 8}, ("v_dtype", "8")),
        ({"k_rank": 0}, ("k_rank", ">= 1", "0")),
        ({"v_rank": -3}, ("v_rank", ">= 1", "-3")),
        ({"q_rank": 0}, ("q_rank", ">= 1", "0")),
        ({"k_rank": 1.5}, ("k_rank", "whole", "1.5")),
        ({"k_rank": True}, ("k_rank", "True")),
        ({"k_rank": "2"}, ("k_rank", "'2'")),
        ({"k_rank": 2**31 + 1}, ("k_rank", 2**31 + 1)),
        ({"sinks": 65}, ("sinks", "0 ... 64", "65")),
        ({"sinks": -1}, ("sinks", "0 ... 64", "-1")),
        ({"recent": None}, ("recent", "None")),
        ({"recent": 65}, ("recent", "64", "65")),
        ({"context": 0}, ("context", ">= 1", "0")),
        ({"rate": 0}, ("rate", "(0, 8]", "0")),
        ({"rate": 8.5}, ("rate", "8", "8.5")),
        ({"rate": float("nan")}, ("rate", "nan")),
        ({"rate": True}, ("rate", "True")),
        ({"rate": "2"}, ("rate", "'2'")),
        ({"rate": 1.0, "kv_dtype": "int8"}, ("rate", "excludes kv_dtype", "int8")),
        ({"rate": 1.0, "mode": "contextual"}, ("rate", "mode", "contextual")),
        ({"rate": 1.0, "v_mode": "fixed-a"}, ("rate", "v_mode", "fixed-a")),
        ({"rate": 1.0, "k_mode": "latent", "k_rank": 3}, ("rate", "excludes k_rank", "3")),
        ({"rate": 1.0, "k_mode": "fixed-a", "v_rank": 3}, ("rate", "excludes v_rank", "3")),
        ({"rate": 1.0, "k_mode": "fixed-a", "predict": True}, ("tokens predict K and V together", "'fixed-a'")),
        ({"mode": "latent", "predict": True}, ("predict wants a rate",)),
        ({"rate": 1.0, "predict": "yes"}, ("predict must be true, false or not given", "'yes'")),
    ],
    ids=str,
)
def test_keywords_that_mean_nothing(keywords, words):
    """One line with the name, the rule and the value, before any model is looked at."""
    refused(lambda: TPAConfig(**keywords), "tpa config", *words)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (fixed("pca", 1), ("k_mode", "'pca'")),
        (FixedRank(Side("latent"), Side("latent", 0)), ("v_rank", ">= 1", "0")),
        (FixedRank(Side("latent"), Side("latent", 1, "fp8")), ("v_dtype", "'fp8'")),
        (Spectral(9), ("rate", "8", "9")),
        (Spectral(1.0, Side("fixed-a", 2), predict=True), ("tokens predict K and V together",)),
        (Spectral(1.0, Side("latent", 2)), ("rate", "excludes")),
        (Spectral(1.0, widths=(8, 2)), ("widths", "per_layer")),
        ("latent", ("TPAConfig", "FixedRank", "Spectral", "'latent'")),
        (FixedRank(Side("latent"), "latent"), ("Side", "'latent'")),
        (Side("latent", 2), ("TPAConfig", "Side(mode='latent'")),
        ("", ("TPAConfig", "''")),
    ],
    ids=str,
)
def test_choices_that_mean_nothing(backend, choice, words):
    """The same lines as of keywords."""
    refused(lambda: backend.convert(helpers.model(backend), choice), "tpa config", *words)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"layers": "most"}, ("layers", "all, global, local", "5,11", "'most'")),
        ({"layers": "0,7"}, ("layers", "0 ... 6", "7")),
        ({"layers": "-1"}, ("layers", "0 ... 6", "-1")),
        ({"layers": ""}, ("layers", "''")),
        ({"per_layer": ()}, ("per_layer", "got 0", "7 layers")),
        ({"per_layer": (None,) * 8}, ("per_layer", "got 8", "7 layers")),
    ],
    ids=str,
)
def test_choices_that_do_not_fit_the_model(backend, keywords, words):
    """Layers that it does not have."""
    model, tpa = helpers.model(backend), TPAConfig(**keywords)
    refused(lambda: tpa.resolve(CONFIG), "tpa config", *words)
    refused(lambda: backend.convert(model, tpa), "tpa config", *words)


ENTRY = {"k_mode": "latent", "v_mode": "latent", "k_rank": 1, "v_rank": 1, "k_dtype": "spectral", "v_dtype": "shared"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"modes": "latent"}, ("unreadable", "modes")),
        ({"per_layer": 3}, ("unreadable",)),
        ({"per_layer": [3]}, ("unreadable",)),
        ({"per_layer": ["dense"]}, ("unreadable",)),
        ({"per_layer": [{"k_mode": "latent"}]}, ("unreadable",)),
        (None, ("unreadable",)),
        ([1], ("unreadable",)),
        ("latent", ("unreadable",)),
        ({"rate": "2", "per_layer": [ENTRY]}, ("rate", "'2'")),
        *(
            ({"per_layer": [ENTRY | {"k_widths": counts}]}, ("widths must be 8 counts", "of 8 to 1 bits"))
            for counts in ([1] * 7, [1] * 9, [0] * 7 + [-1], [0.5] * 8, [True] * 8, "11111111", 8, [0] * 7 + [2**20])
        ),
    ],
    ids=str,
)
def test_json_that_is_no_configuration(content, words):
    """Entries missing, unknown or of the wrong kind."""
    refused(lambda: TPAConfig.from_dict(content), "tpa config", *words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("latent", ("per_layer", "FixedRank", "Spectral", "None", "'latent'")),
        (TPAConfig(), ("per_layer", "FixedRank", "TPAConfig(")),
        (fixed("pca", 1), ("k_mode", *MODES, "'pca'")),
        (Spectral(k=Side("pca", 1), widths=(2,)), ("k_mode", "'pca'")),
        (FixedRank(Side("latent", 1), Side("latent", 0)), ("v_rank", ">= 1", "0")),
        (FixedRank(Side("latent", 1), Side("latent", 1, "fp8")), ("v_dtype", "'fp8'")),
    ],
    ids=str,
)
def test_entries_of_layers_that_mean_nothing(entry, words):
    """The lines of keywords again, when the configuration is made."""
    refused(lambda: TPAConfig(per_layer=(None, entry)), "tpa config", *words)


def test_the_front_is_one_for_both_backends():
    """The twin has no configuration of its own."""
    tpa_torch = pytest.importorskip("tpa_torch")
    for name in ("TPAConfig", "FixedRank", "Spectral", "Side", "convert"):
        assert getattr(tpa_torch, name) is getattr(tpa_ref, name)


def test_per_layer_choices_are_resolved_and_checked():
    """Ranks that nobody gave are filled in, larger ones clamped; widths that no code could have are refused."""
    shape = helpers.config()
    free = FixedRank(Side("latent"), Side("fixed-a", 50))
    choices, notes = TPAConfig(per_layer=(free,) * shape.num_layers).resolve(shape)
    assert choices[0] == FixedRank(Side("latent", 16), Side("fixed-a", 2)) and len(notes) == 1
    for widths in ((9,), (0,), (1, 2), (2.5,), [1]):
        refused(lambda widths=widths: Spectral(widths=widths), "widths")
    many = TPAConfig(per_layer=(Spectral(widths=(1,) * 65),) * shape.num_layers)
    refused(lambda: many.resolve(shape), "at most 64", "65")


def test_a_mistyped_path_is_no_text():
    refused(lambda: read_text("/no/such/calibration.txt"), "no such file")
    assert read_text("a text. It has spaces") == "a text. It has spaces"
