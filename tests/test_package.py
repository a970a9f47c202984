"""What importing costs and leaves alone, doctests, the trace comparison, configs against the published files, and what
ships in a wheel.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import numpy as np
import pytest

import tpa_ref
from tpa_ref.gemma.config import VARIANTS, GemmaConfig, VisionConfig
from tpa_ref.trace import Trace, compare, no_trace, scoped

ROOT = Path(__file__).resolve().parent.parent


def python(code, *arguments, cwd=ROOT, path=(".", "cuda")):
    """Run code in a fresh interpreter; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- imports ----


def test_the_reference_needs_no_torch(tmp_path):
    """Importing tpa_ref, loading safetensors, converting, running and saving leave torch (and transformers) alone."""
    folder = helpers.write_folder(tmp_path / "model", tokenizer=helpers.tokenizer_proto())
    code = """if True:
        import sys
        import tpa_ref
        model = tpa_ref.convert(tpa_ref.load(sys.argv[1]))
        text = "".join(tpa_ref.generate(model, "the list", 3))
        tpa_ref.save(model, sys.argv[2])
        tpa_ref.load(sys.argv[2])
        print(sorted({"torch", "transformers", "jax", "tpa_torch"} & set(sys.modules)), "numpy" in sys.modules)
    """
    assert python(code, folder, tmp_path / "saved.safetensors") == "[] True"


def test_without_torch_a_pt_is_refused_with_the_way_out(tmp_path):
    """Neither reading nor writing .pt works without torch; both say so in one line and leave nothing behind."""
    folder = helpers.write_folder(tmp_path / "model")
    (tmp_path / "there.pt").write_bytes(b"x")
    code = """if True:
        import sys
        sys.modules["torch"] = None  # importing it now fails, as if it were not installed
        import tpa_ref
        for call in (lambda: tpa_ref.load(sys.argv[2]), lambda: tpa_ref.save(tpa_ref.load(sys.argv[1]), sys.argv[3])):
            try:
                call()
            except tpa_ref.TPAError as problem:
                print(str(problem))
    """
    lines = python(code, folder, tmp_path / "there.pt", tmp_path / "new.pt").splitlines()
    assert len(lines) == 2 and all("torch" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there.pt"]


@pytest.fixture
def nvidia(tmp_path):
    """A stand-in for NVIDIA's `cuda` package: a namespace package that holds `cuda.bindings`."""
    (tmp_path / "site" / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "site" / "cuda" / "bindings" / "__init__.py").write_text("WHO = 'nvidia'\n")
    return tmp_path / "site"


@pytest.mark.parametrize("path", [(".",), (".", "cuda"), ()])
def test_nvidias_cuda_package_stays_importable(nvidia, path):
    """Our folder is called cuda as well; with the repository root in front on the path, NVIDIA's still answers."""
    code = "import sys; sys.path.append(sys.argv[1]); import cuda.bindings, tpa_ref; print(cuda.bindings.WHO)"
    assert python(code, nvidia, path=path) == "nvidia"
    assert python(code, nvidia, path=(*path, nvidia)) == "nvidia"


def test_there_is_no_package_called_cuda_here():
    """An __init__.py in cuda/ would hide NVIDIA's package."""
    assert (ROOT / "cuda" / "tpa_torch" / "__init__.py").is_file()
    assert not (ROOT / "cuda" / "__init__.py").exists()


@pytest.mark.skipif(not helpers.has_torch(), reason="needs torch")
def test_both_packages_import_side_by_side(nvidia):
    """tpa_torch from cuda/ on the path, tpa_ref from the root, and NVIDIA's package, in one interpreter."""
    code = (
        "import sys; sys.path.append(sys.argv[1]); import tpa_torch, tpa_ref, cuda.bindings;"
        "print(tpa_torch.TPAError is tpa_ref.TPAError, cuda.bindings.WHO)"
    )
    assert python(code, nvidia) == "True nvidia"


def test_both_packages_offer_the_same_names():
    """The twin has the names of the reference, and its version; only torch trains (`heal`)."""
    pytest.importorskip("torch")
    ours, theirs = ({name for name in package.__all__ if name[0] != "_"} for package in helpers.backends())
    assert theirs - ours == {"heal"} and ours <= theirs and len(ours) >= 12
    assert all(hasattr(package, name) for package in helpers.backends() for name in [*ours, "__version__"])


# ---- doctests ----


def modules_of(package):
    """Every module of a package, in all its folders; Triton's kernels only where Triton is."""
    found = [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    triton = importlib.util.find_spec("triton")
    return [package.__name__, *(name for name in found if triton or "triton" not in name)]


@pytest.mark.parametrize("name", [name for package in helpers.backends() for name in modules_of(package)])
def test_doctests(name):
    """Every example in a docstring is true."""
    if name.endswith("plots"):
        pytest.importorskip("matplotlib")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_doctests_are_found():
    """The test above would pass if there were none."""
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in modules_of(tpa_ref)}
    documented = (
        "compress.config core.contextual core.quantize core.rope core.cache core.masks gemma.memory gemma.config"
    )
    assert min(attempted[f"tpa_ref.{name}"] for name in [*documented.split(), "trace", "gemma.tokenizer"]) >= 1
    assert sum(attempted.values()) >= 60, attempted


# ---- the trace ----


def test_compare_prints_a_verdict_per_stage_and_returns_the_first_bad_one():
    """[OK], [SHAPE], [MISSING] and [DIFF] in the order of the reference; what only the other has does not matter."""
    reference = {"a": np.ones((2, 3)), "b": np.ones(4), "c": np.zeros(2), "d": np.array([1.0, 2.0, 4.0])}
    other = {"d": np.array([1.0, 2.0, 5.0]), "a": np.ones((2, 3)) + 1e-7, "b": np.ones((4, 1)), "e": np.ones(1)}
    lines = []
    assert compare(reference, other, show=lines.append) == "b"
    assert [line.split()[:2] for line in lines] == [
        ["[OK]", "a"],
        ["[SHAPE]", "b"],
        ["[MISSING]", "c"],
        ["[DIFF]", "d"],
    ]
    assert "(4,) and (4, 1)" in lines[1]
    assert "max 2.5e-01" in lines[3] and "mean 8.3e-02" in lines[3]  # |5 - 4| / 4, and a third of it


def test_compare_of_equal_traces_returns_none(capsys):
    """All stages equal: None, and one [OK] line each on the screen."""
    stages = {"a": np.ones(2), "empty": np.ones((0, 3)), "zero": np.zeros(3)}
    assert compare(stages, {name: array.copy() for name, array in stages.items()}) is None
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["[OK]"] * 3


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1 + 2e-5])
def test_compare_never_calls_nan_or_too_much_ok(wrong):
    """NaN on either side, infinity, and an error just above the tolerance; just below it is fine."""
    good, bad = {"x": np.array([1.0, 1.0])}, {"x": np.array([1.0, wrong])}
    silent = [].append
    assert compare(good, bad, show=silent) == "x"
    assert compare(bad, good, show=silent) == "x"
    assert compare(good, {"x": np.array([1.0, 1 + 0.9e-5])}, show=silent) is None
    assert compare(good, {"x": np.array([1.0, 1.5])}, tolerance=0.6, show=silent) is None


def test_a_trace_names_every_stage_by_layer():
    """Stages of a real forward pass come in order, each layer under its number; without a tracer nothing is kept."""
    trace = Trace()
    helpers.model(tpa_ref, helpers.config(num_layers=2))(helpers.tokens(3), trace=trace)
    names = list(trace.stages)
    assert names[0] == "embed.x_bqm" and names[-1] == "logits_bqv"
    assert [name for name in names if name.endswith("K_bkgd")] == ["layers.0.attn.K_bkgd", "layers.1.attn.K_bkgd"]
    assert scoped(no_trace, "layers.0") is no_trace
    array = np.ones(1)
    assert no_trace("x", array) is array


def test_the_first_differing_stage_of_two_models_is_found(backend):
    """The reason for traces: a change in layer 4 shows at that layer and no earlier."""
    right, wrong = (helpers.model(backend, dtype="float64") for _ in range(2))
    layer = wrong.weights.layers[4]
    layer.WV_gem = layer.WV_gem * 1.01
    traces = []
    for model in (right, wrong):
        traces.append(Trace())
        model(helpers.tokens(6), trace=traces[-1])
    assert compare(traces[0].stages, traces[1].stages, show=[].append) == "layers.4.attn.V_bkge"


# ---- configs ----

# The text part of the published multimodal 4B config.json says no more than this.
SPARSE_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def test_the_sparse_published_4b_config_is_read_with_the_defaults_of_transformers():
    """What the file leaves out are the class defaults; only the vocabulary has 64 rows more than the tokenizer."""
    found = GemmaConfig.from_hf(SPARSE_4B)
    assert found.vocab_size == 262_208
    assert found.vision == VisionConfig()  # the published image tower is the default one
    assert dataclasses.replace(found, vocab_size=262_144, vision=None) == GemmaConfig.gemma3_4b()
    assert found.variant == "4b"


def test_both_generations_of_rope_keys_mean_the_same():
    """rope_theta, rope_local_base_freq and rope_scaling of old; rope_parameters by kind of layer today."""
    config = dataclasses.replace(GemmaConfig.gemma3_12b(), rope_base_local=12_345.0, rope_base_global=543_210.0)
    old = config.to_hf()
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 12_345.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 543_210.0},
    }
    assert GemmaConfig.from_hf(new) == GemmaConfig.from_hf(old) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_round_trip(variant, tmp_path):
    """to_hf and from_hf undo each other for every published size, through a file as well."""
    import json

    config = GemmaConfig.of_variant(variant)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert GemmaConfig.from_hf(config.to_hf()) == GemmaConfig.from_hf(tmp_path / "config.json") == config
    assert config.variant == variant


def test_an_unpublished_config_makes_the_round_trip():
    """Other bases, an odd pattern of layers, a query scale of its own: nothing is replaced by a default."""
    config = helpers.config(
        is_global=(True, False, False, True, False, False, False),
        rope_base_local=5_000.0,
        rope_base_global=77_000.0,
        rope_scale_global=2.5,
        query_pre_attn_scalar=21,
        rms_eps=1e-5,
    )
    assert GemmaConfig.from_hf(config.to_hf()) == config


# (layers, global ones, width, query heads, KV heads, head size, MLP width, window, query scale^-2, positions, scale)
PUBLISHED = {
    "270m": (18, 3, 640, 4, 1, 256, 2048, 512, 256, 32_768, 1.0),
    "1b": (26, 4, 1152, 4, 1, 256, 6912, 512, 256, 32_768, 1.0),
    "4b": (34, 5, 2560, 8, 4, 256, 10_240, 1024, 256, 131_072, 8.0),
    "12b": (48, 8, 3840, 16, 8, 256, 15_360, 1024, 256, 131_072, 8.0),
    "27b": (62, 10, 5376, 32, 16, 128, 21_504, 1024, 168, 131_072, 8.0),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_sizes(variant):
    """The table of the Gemma 3 report, and five local layers before every global one."""
    c = GemmaConfig.of_variant(variant)
    found = (c.num_layers, c.num_global, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size)
    found += (c.sliding_window, c.query_pre_attn_scalar, c.max_positions, c.rope_scale_global)
    assert found == PUBLISHED[variant]
    assert [layer for layer, is_global in enumerate(c.is_global) if is_global] == list(range(5, c.num_layers, 6))
    assert c.rope(0) == (10_000.0, 1.0) and c.rope(5) == (1_000_000.0, PUBLISHED[variant][-1])
    assert c.window(0) == PUBLISHED[variant][7] and c.window(5) is None
    assert c.vocab_size == 262_144


def test_the_query_scale_of_27b_is_not_its_head_size():
    """168 = 5376 / 32, the width over the heads: q . k / sqrt(168), where head_dim is 128."""
    c = GemmaConfig.gemma3_27b()
    assert c.query_scale == pytest.approx(168**-0.5, rel=1e-15)
    assert c.query_pre_attn_scalar == c.hidden_size // c.num_heads == 168 != c.head_dim == 128
    assert c.queries_per_kv == 2
    others = ("270m", "1b", "4b", "12b")
    assert all(GemmaConfig.of_variant(name).query_scale == pytest.approx(1 / 16) for name in others)


def test_the_query_scale_is_applied(backend):
    """A model whose query_pre_attn_scalar is four times as large has logits of attention half as large."""
    traces = []
    for scalar in (16, 64):
        traces.append(Trace())
        model = helpers.model(backend, helpers.config(query_pre_attn_scalar=scalar, num_layers=1), "float64")
        model(helpers.tokens(5), trace=traces[-1])
    one, four = (helpers.back(trace.stages["layers.0.attn.L_bhqk"]) for trace in traces)
    seen = np.broadcast_to(np.tril(np.ones((5, 5), bool)), one.shape)
    np.testing.assert_allclose(four[seen], one[seen] / 2, rtol=1e-12)


# ---- what ships ----


def test_both_packages_ship_their_type_marker():
    """py.typed is there and packaged, so that type checkers use the annotations."""
    tomllib = pytest.importorskip("tomllib")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, folder in (("tpa_ref", "tpa_ref"), ("tpa_torch", "cuda/tpa_torch")):
        assert (ROOT / folder / "py.typed").is_file()
        assert package in setup["packages"] and "py.typed" in setup["package-data"][package]


def test_the_citation_is_of_this_version():
    """CITATION.cff names the version of the package and the paper."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {tpa_ref.__version__}\n" in citation and "2501.06425" in citation


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy, since setuptools would leave its build folder in the tree."""
    pytest.importorskip("setuptools", "77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tpa_ref", "cuda", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python("import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))", out, cwd=source, path=())
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything(wheel):
    """Every module of both packages, the C++ source, the type markers and the tiny model with its licences."""
    held = set(zipfile.ZipFile(wheel).namelist())
    for place, package in ((ROOT / "tpa_ref", "tpa_ref"), (ROOT / "cuda" / "tpa_torch", "tpa_torch")):
        files = [
            path.relative_to(place).as_posix()
            for suffix in ("py", "cpp", "typed")
            for path in place.rglob(f"*.{suffix}")
        ]
        missing = {f"{package}/{name}" for name in files} - held
        assert len(files) > 20 and not missing
    tiny = ROOT / "assets" / "tiny-gemma3"
    shipped = {path.relative_to(tiny).as_posix() for path in tiny.rglob("*") if path.is_file()} - {"training.png"}
    assert {name.removeprefix("tpa_ref/tiny/") for name in held if name.startswith("tpa_ref/tiny/")} == shipped
    assert not [name for name in held if name.startswith(("cuda", "tests", "assets", "scripts"))]


def test_commands_run_from_the_wheel(wheel, tmp_path):
    """Installed elsewhere and called from an empty folder, both commands answer, and find the tiny model inside."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel.absolute())], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def said(name, *arguments):
        command = [site / "bin" / name, *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said("tpa-demo", "--version") == f"tpa-gemma3 {tpa_ref.__version__}\n"
    assert "--eval-tokens" in said("tpa-demo", "--help")
    answer = said("tpa", "--backend", "numpy", "--prompt", "Return the number of", "--max-new-tokens", "2")
    assert "Gemma 3 tiny" in answer and "\n\nReturn the number of" in answer
    assert python("import tpa_ref; print(tpa_ref.__file__)", cwd=empty, path=(site,)).startswith(str(site))


def test_memory_where_the_system_does_not_tell():
    """Without /proc and without the module `resource` (Windows) peak memory is 0 and no error."""
    code = """if True:
        import sys
        from pathlib import Path
        sys.modules["resource"] = None
        def unreadable(*_, **__): raise OSError
        Path.read_text = unreadable
        from tpa_ref.cli.machine import anonymous_memory
        print(anonymous_memory())
    """
    assert python(code) == "0"
