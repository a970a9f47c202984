"""Both commands have one set of option names, and the defaults that depend on size stand in one place."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest

from tpa_ref.cli import demo, options, run
from tpa_ref.gemma.config import GemmaConfig

FEW = {"calibration_tokens": 16_384, "eval_tokens": 2048, "recall_prompts": 2}
MANY = {"calibration_tokens": 32_768, "eval_tokens": 16_384, "recall_prompts": 10}


def parser_of(module):
    """The parser that a command builds."""
    built = []

    def parse_args(parser):
        built.append(parser)
        raise SystemExit

    with mock.patch.object(options.Parser, "parse_args", parse_args), pytest.raises(SystemExit):
        module.parse_arguments()
    return built[0]


def test_one_set_of_names():
    """What both commands have is called alike, spelt alike and means the same kind of value."""
    ours, theirs = ({name: a for a in parser_of(m)._actions for name in a.option_strings} for m in (demo, run))
    shared = set(ours) & set(theirs)
    assert {"--ckpt", "--rate", "--calibration", "--context", "--chat", "--output", "--save-tpa"} <= shared
    for name in shared - {"--prompt", "--help", "-h"}:
        assert (ours[name].type, ours[name].choices) == (theirs[name].type, theirs[name].choices), name
    assert set(ours) - shared == {"--eval-text", "--eval-tokens", "--recall-prompts", "--timing-rounds", "--plot"}


def found(variant, stored):
    """A checkpoint as `inspect` finds it."""
    config = GemmaConfig.tiny() if variant == "tiny" else GemmaConfig.of_variant(variant)
    return SimpleNamespace(config=config, stored_dtype=stored)


@pytest.mark.parametrize(
    "variant, stored, backend, device, dtype, expected, rounds, context",
    [
        ("tiny", "bfloat16", "torch", "cpu", "float32", MANY, 3, 2048),
        ("270m", "bfloat16", "torch", "cpu", "bfloat16", FEW, 1, 32_768),
        ("270m", "float32", "torch", "cpu", "float32", FEW, 1, 32_768),
        ("1b", "bfloat16", "numpy", "cpu", "float32", FEW, 1, 32_768),
        ("4b", "bfloat16", "torch", "cuda", "bfloat16", MANY, 1, 32_768),
    ],
)
def test_defaults(variant, stored, backend, device, dtype, expected, rounds, context, monkeypatch):
    """By size, device and how the weights are stored."""
    args = Namespace(backend=backend)
    monkeypatch.setattr(options, "multiplies_bfloat16", lambda: True)
    options.fill_defaults(args, demo.USES, found(variant, stored), device)
    assert vars(args) == expected | {"backend": backend, "dtype": dtype, "timing_rounds": rounds, "context": context}


@pytest.mark.parametrize(
    ("variant", "device", "dtype"),
    [("270m", "cpu", "float32"), ("4b", "cpu", "bfloat16"), ("270m", "cuda", "bfloat16")],
)
def test_a_cpu_without_bfloat16(variant, device, dtype, monkeypatch):
    """Computes in float32 what fits in memory so; a GPU does not care."""
    args = Namespace(backend="torch")
    monkeypatch.setattr(options, "multiplies_bfloat16", lambda: False)
    options.fill_defaults(args, ("dtype",), found(variant, "bfloat16"), device)
    assert args.dtype == dtype


def test_what_is_given_wins_and_the_rest_is_printed(monkeypatch):
    """Zero counts as given."""
    monkeypatch.setattr(options, "multiplies_bfloat16", lambda: True)
    args = Namespace(backend="torch", dtype=None, calibration_tokens=None, eval_tokens=100, recall_prompts=0)
    uses = ("dtype", "calibration_tokens", "eval_tokens", "recall_prompts")
    line = options.fill_defaults(args, uses, found("270m", "bfloat16"), "cpu")
    assert line == "defaults for 270m on cpu: bfloat16, calibration tokens 16,384"
    filled = {"dtype": "bfloat16", "calibration_tokens": 16_384, "eval_tokens": 100, "recall_prompts": 0}
    assert vars(args) == filled | {"backend": "torch"}


def test_underscores_and_hyphens():
    """--k_rank is --k-rank; a value keeps its underscores."""
    args = options.shared_parser(None).parse_args(["--k_rank", "3", "--ckpt=a_b", "--max_new_tokens=5"])
    assert (args.k_rank, args.ckpt, args.max_new_tokens) == (3, "a_b", 5)


@pytest.mark.parametrize(
    ("module", "given", "words"),
    [
        (demo, ["--plot", "picture.foo"], ["--plot", ".png"]),
        (demo, ["--recall-prompts", "-1"], ["--recall-prompts", ">= 0"]),
        (demo, ["--ckpt", ""], ["--ckpt", "empty"]),
        (run, ["--save-tpa", ""], ["--save-tpa", "empty"]),
        (run, ["--convert", "--save-tpa", "here", "--export", "here"], ["--export", "different places"]),
        (run, ["--prompt", "caf\udce9"], ["UTF-8"]),
        (run, ["--top-p", "2", "--convert", "--save-tpa", "there"], ["top_p"]),
    ],
)
def test_refused_before_any_work(module, given, words, monkeypatch, tmp_path, capsys):
    """One line and exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["command", "--backend", "numpy", *given])
    with pytest.raises(SystemExit) as ended:
        options.run(module.main)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1 and all(word in line for word in words), line
    assert not list(tmp_path.iterdir())
