"""`TPACache` in `transformers`: with an exact codec `generate` gives what it gives with their own cache, whatever it is
asked for; with codes, what our own model gives. Every row of the table in docs/transformers.md is a test here.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import helpers
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", "4.57")

from small_hf import WORKS, Words, ids_of, random_model

import tpa_torch
from tpa_ref import TPAError
from tpa_ref.compress.calibrate import Calibration
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.store import Memory
from tpa_torch.hf import Codec, TPACache, calibrate, calibrate_cache
from tpa_torch.hf import cache as module
from tpa_torch.hf.theirs import find

PROMPT = "a prompt that is longer than the window of its layers"
FAST = pytest.mark.parametrize("fast", [True, False])


def generated(hf: Any, cache: Any = None, ids: Any = None, new: int = 24, **given: Any) -> Any:
    """Ids and, where asked for, logits."""
    given = {"do_sample": False, "max_new_tokens": new, "past_key_values": cache} | given
    torch.manual_seed(3)
    return hf.generate(ids_of(PROMPT) if ids is None else ids, **given)


def same(hf: Any, codec: Any, fast: bool, ids: Any = None, **given: Any) -> None:
    """The ids that their own cache gives."""
    expected = generated(hf, None, ids, **given)
    found = generated(hf, TPACache(codec, hf, fast), ids, **given)
    assert torch.equal(found, expected) and found.shape[1] > (ids_of(PROMPT) if ids is None else ids).shape[1]


# ---- what works ----


@FAST
def test_greedy_and_sampling(hf, codecs, fast):
    same(hf, codecs.exact, fast)
    same(hf, codecs.exact, fast, do_sample=True, temperature=1.5, top_k=50)


def padded(*texts: str) -> dict[str, Any]:
    """Texts side by side, padded on the left."""
    rows = [ids_of(text)[0].tolist() for text in texts]
    most = max(map(len, rows))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])
    return {"ids": ids, "attention_mask": mask}


@FAST
@pytest.mark.parametrize("name", ["exact", "coded"])
def test_batches_with_left_padding(hf, codecs, fast, name):
    """Each row gets what it gets alone: padding takes no place, and the first real token is the exact one."""
    codec = getattr(codecs, name)
    batch = padded("short", PROMPT, "of middle length")
    found = generated(hf, TPACache(codec, hf, fast), **batch)[:, batch["ids"].shape[1] :]
    if name == "exact":
        assert torch.equal(found, generated(hf, None, **batch)[:, batch["ids"].shape[1] :])
    for row, text in zip(found, ("short", PROMPT, "of middle length"), strict=True):
        alone = ids_of(text)
        assert torch.equal(row, generated(hf, TPACache(codec, hf, fast), alone)[0, alone.shape[1] :])


@FAST
@pytest.mark.parametrize("name", ["exact", "coded"])
def test_beam_search(hf, codecs, fast, name, monkeypatch):
    """Rows are reordered, in the codes and in the text that predicts. A cache that forgets to is seen."""
    codec = getattr(codecs, name)
    given = {"num_beams": 3, "num_return_sequences": 2, **padded("short", PROMPT)}
    found = generated(hf, TPACache(codec, hf, fast), **given)
    if name == "exact":
        assert torch.equal(found, generated(hf, None, **given))
    monkeypatch.setattr(TPACache, "reorder_cache", lambda self, rows: None)
    assert not torch.equal(found, generated(hf, TPACache(codec, hf, fast), **given))


@FAST
@pytest.mark.parametrize("how", ["draft", "lookup"])
def test_assisted_generation(hf, codecs, fast, how):
    """Tokens are taken back, also past the window of 11."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 takes no tokens back past a window")
    assisted = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": random_model(1)}
    same(hf, codecs.exact, fast, new=40, **assisted)


@FAST
@pytest.mark.parametrize("name", ["exact", "coded"])
def test_a_prefix_is_read_once(hf, codecs, fast, name):
    """A copy of a cache that has read a prefix goes on as one that reads the whole text; the original stays."""
    codec = getattr(codecs, name)
    prefix, texts = ids_of(PROMPT), (" and this", " or that")
    first = TPACache(codec, hf, fast)
    with torch.no_grad():
        hf(prefix, past_key_values=first)
    held = first.nbytes
    for text in texts:
        whole = torch.cat([prefix, ids_of(text)[:, 1:]], 1)
        found = generated(hf, copy.deepcopy(first), whole)
        assert torch.equal(found, generated(hf, TPACache(codec, hf, fast), whole))
        if name == "exact":
            assert torch.equal(found, generated(hf, None, whole))
    assert first.nbytes == held and first.get_seq_length() == prefix.shape[1]


@FAST
@pytest.mark.parametrize("name", ["exact", "coded"])
def test_chat_over_turns(hf, codecs, fast, name):
    """The cache is kept between turns: each turn gives what the whole conversation, read at once, gives."""
    codec = getattr(codecs, name)
    cache, said = TPACache(codec, hf, fast), ids_of(PROMPT)
    for question in ("first?", "and then?", "why?"):
        said = torch.cat([said, ids_of(question)[:, 1:]], 1)
        expected = generated(hf, TPACache(codec, hf, fast) if name == "coded" else None, said, new=8)
        said = generated(hf, cache, said, new=8)
        assert torch.equal(said, expected)


@FAST
def test_images(fast):
    """The layout of 4B: tokens of an image see each other, whatever cache holds them."""
    hf = helpers.hf_model(helpers.hf_config())
    given = {"mode": "fixed-a", "k_rank": 2, "v_rank": 2, "kv_dtype": "float32", "text": helpers.CALIBRATION}
    codec = calibrate_cache(hf, Words(), tokens=300, **given)
    layout = "5 i 9 i 4"
    ids = torch.tensor([helpers.text(layout)])
    seen = {
        "pixel_values": torch.from_numpy(helpers.pixels(helpers.images_in(layout))),
        "token_type_ids": (ids == helpers.IMAGE).long(),
        "attention_mask": torch.ones_like(ids),
    }
    expected = generated(hf, None, ids, new=12, **seen)
    found = generated(hf, TPACache(codec, hf, fast), ids, new=12, **seen)
    assert torch.equal(found, expected)
    without = generated(hf, TPACache(codec, hf, fast), ids, new=12, **seen | {"pixel_values": -seen["pixel_values"]})
    assert not torch.equal(found, without)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters(merged):
    """Calibration sees the adapters: K and V of the first layer are those of the adapted model, and so is the text."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_alpha=16)
    adapted = peft.get_peft_model(random_model(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    model = adapted.merge_and_unload() if merged else adapted
    exact = {"mode": "fixed-a", "k_rank": 2, "v_rank": 2, "kv_dtype": "float32"}
    text = {"text": helpers.CALIBRATION, "tokens": 300}
    for fast in (True, False):
        same(model, calibrate_cache(model, Words(), **text, **exact), fast)
    coded = calibrate_cache(model, Words(), **text, rate=6.0, prefer="size")
    assert coded.pairs[0].token_bytes == 0  # the first layer follows from the tokens
    dense, found = (logits_of(model, cache) for cache in (None, TPACache(coded, model)))
    without = logits_of(random_model(), None)
    assert np.abs(found - dense).mean() < 0.1 * np.abs(without - dense).mean()


def test_pipeline(hf, codecs, tmp_path):
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(helpers.tokenizer_proto())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    assert len(tokenizer("the return value is").input_ids) > 5
    say = transformers.pipeline("text-generation", model=hf, tokenizer=tokenizer)
    given = {"do_sample": False, "max_new_tokens": 16, "return_full_text": False}
    expected = say("the return value is", **given)
    assert say("the return value is", past_key_values=TPACache(codecs.exact, hf), **given) == expected


def test_offloaded_weights(codecs, tmp_path):
    """Weights that accelerate keeps on disk and brings to the device layer by layer; each layer's codes lie where its
    keys are, and constants are moved there.
    """
    accelerate = pytest.importorskip("accelerate")
    hf = random_model()
    expected = generated(hf, None)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer > 2 else "cpu" for layer in range(7)}
    places |= {"model.embed_tokens": "disk", "lm_head": "disk"}
    spread = accelerate.dispatch_model(hf, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert spread.model.layers[5].self_attn.k_proj.weight.device.type == "meta"
    exact = {"mode": "fixed-a", "k_rank": 2, "v_rank": 2, "kv_dtype": "float32"}
    codec = calibrate_cache(spread, Words(), helpers.CALIBRATION, tokens=300, **exact)
    cache = TPACache(codec, spread)
    assert torch.equal(generated(spread, cache), expected)
    assert all(layer.held.device == torch.device("cpu") for layer in cache.layers)
    coded = calibrate_cache(spread, Words(), helpers.CALIBRATION, tokens=300, rate=4.0)
    assert generated(spread, TPACache(coded, spread)).shape == expected.shape


@pytest.mark.parametrize("hidden", [656, 1168])
def test_larger_models_predict_less(hidden):
    """Above a hidden size of 640 only the first layer is known from the tokens, above 1,152 none is."""
    larger = random_model(hidden_size=hidden, num_hidden_layers=2, intermediate_size=16)
    codec = calibrate_cache(larger, Words(), helpers.CALIBRATION, tokens=100, rate=4.0, prefer="size")
    assert (codec.pairs[0].token_bytes == 0) == (hidden < 1_152)
    assert codec.pairs[1].k.predictor is None
    assert generated(larger, TPACache(codec, larger), new=4).shape[1] == ids_of(PROMPT).shape[1] + 4


def test_each_layer_lives_on_its_device(hf, codecs, monkeypatch):
    """A device that is only pretended: what a layer asks for goes where its keys are, layer by layer."""
    asked: list[Any] = []
    right = module.ours.Cache

    class Seen(right):  # type: ignore[misc, valid-type]
        def __init__(
            self, pairs: Any, windows: Any, batch: int, room: int, exact: Any, ids: Any, device: Any, *more: Any
        ):
            asked.append((device, pairs[0].k.arrays()))
            super().__init__(pairs, windows, batch, room, exact, ids, "cpu", *more)

    monkeypatch.setattr(module.ours, "Cache", Seen)
    cache = TPACache(codecs.plain, hf)
    for layer, device in zip(cache.layers, ["cpu", "meta"] * 3 + ["cpu"], strict=True):
        layer.lazy_initialization(torch.zeros(1, 2, 3, 16, device=device))
    for layer, (device, arrays) in enumerate(asked):
        assert device.type == ("meta" if layer % 2 else "cpu")
        assert all(x is None or x.device == device for x in arrays.values())


@pytest.mark.parametrize("name", ["exact", "plain"])
def test_ten_thousand_tokens(hf, codecs, name):
    """In pieces and one by one: bytes are those of the codes, with an eighth of room, and text still follows."""
    codec = getattr(codecs, name)
    cache, rng = TPACache(codec, hf), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(25):
            hf(torch.randint(3, 300, (1, 396), generator=rng), past_key_values=cache, logits_to_keep=1)
            for _ in range(4):
                hf(torch.randint(3, 300, (1, 1), generator=rng), past_key_values=cache)
    assert cache.get_seq_length() == 10_000
    expected = codec.nbytes_at(10_000)
    assert expected <= cache.nbytes <= 1.2 * expected


# ---- the numbers of our own model ----


def logits_of(model: Any, cache: Any, text: str = PROMPT, piece: int = 9) -> np.ndarray:
    """Logits of a text read in pieces, then token by token."""
    ids, found = ids_of(text), []
    with torch.no_grad():
        if cache is None:
            return helpers.to_numpy(model(ids).logits)
        for start in range(0, 27, piece):
            found.append(model(ids[:, start : start + piece], past_key_values=cache).logits)
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(27, ids.shape[1])]
    return helpers.to_numpy(torch.cat(found, 1))


@pytest.fixture(scope="module")
def own(hf, tmp_path_factory):
    """The same weights in this package."""
    hf.save_pretrained(tmp_path_factory.mktemp("own") / "model")
    model = tpa_torch.load(tmp_path_factory.getbasetemp() / "own0" / "model")
    model.tokenizer = helpers.Bytes()
    return model


@FAST
def test_exact_int8_gives_the_logits_of_our_own_model(hf, codecs, own, fast):
    """Within 1e-4, in whatever pieces; and codes on a coarser grid are seen."""
    ours = tpa_torch.convert(own, TPAConfig(mode="fixed-a", k_rank=2, v_rank=2, kv_dtype="int8"))
    expected = helpers.logits(ours, ids_of(PROMPT).numpy())
    found = logits_of(hf, TPACache(codecs.int8, hf, fast))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - helpers.logits(own, ids_of(PROMPT).numpy())).max() > 1e-3 * np.abs(expected).max()


def test_moments_are_those_of_our_own_calibration(hf, own):
    """Their passes, hooks and autograd against our layers one by one: the same sums, from the same drawn tokens."""
    windows = [ids_of(helpers.CALIBRATION[at : at + 150])[0].tolist() for at in (0, 300, 600)]
    found = calibrate.measured(calibrate.mirror(find(hf), Words(), True), windows, 2, True, iter)
    passes = Calibration(own, windows, Memory(), 0, 310, True)
    passes.run()
    assert passes.backwards == 2
    for layer in range(own.config.num_layers):
        expected = passes.of_layer(layer).arrays()
        assert found.of_layer(layer).arrays().keys() == expected.keys()
        for name, x in found.of_layer(layer).arrays().items():
            assert helpers.relative(x, expected[name]) < 1e-4, (layer, name)
    assert helpers.relative(found.of_tokens.S_zz, passes.of_tokens.S_zz) < 1e-5
    assert helpers.relative(found.of_tokens.mean_z, passes.of_tokens.mean_z) < 1e-5 and found.tokens == passes.tokens


@pytest.mark.parametrize("name", ["coded", "plain"])
def test_codes_are_those_of_our_own_model(hf, codecs, own, name):
    """With the same constants, the same K and V leave the same bytes in every layer, past the window as well."""
    codec = getattr(codecs, name)
    ours = tpa_torch.Model(own.config, own.weights, own.tokenizer, codec.tpa, codec.pairs)
    ids = ids_of(PROMPT)
    held, cache = ours.new_cache(1, 64), TPACache(codec, hf)
    expected = helpers.logits(ours, ids.numpy(), cache=held)
    with torch.no_grad():
        found = helpers.to_numpy(hf(ids, past_key_values=cache).logits)
    for layer, mine in zip(cache.layers, held.layers, strict=True):
        for kind, ring in mine.rings.items():
            for part, array in ring.arrays.items():
                got = layer.held.layers[0].rings[kind].arrays[part][:, : array.shape[1]]
                if part.endswith("codes") and array.numel():  # a number may lie between two codes
                    assert (got[:, : ids.shape[1]] == array[:, : ids.shape[1]]).float().mean() > 0.97
    assert helpers.relative(found, expected) < 0.02


# ---- what is refused, and files ----


def test_a_codec_is_saved_and_loaded(hf, codecs, tmp_path):
    for name in ("exact", "coded"):
        codec = getattr(codecs, name)
        loaded = Codec.load(codec.save(tmp_path / f"{name}.codec"))
        assert torch.equal(generated(hf, TPACache(loaded, hf)), generated(hf, TPACache(codec, hf)))
        assert loaded.nbytes_at(100) == codec.nbytes_at(100)
    saved = tpa_torch.save(tpa_torch.convert(own_copy(hf, tmp_path), TPAConfig(rate=4.0)), tmp_path / "tpa")
    with pytest.raises(TPAError, match="holds no codec"):
        Codec.load(next(saved.glob("*.safetensors")))
    assert isinstance(TPACache(Codec.of(saved), hf), TPACache)


def own_copy(hf: Any, folder: Any) -> Any:
    """Their model as one of ours."""
    hf.save_pretrained(folder / "copy")
    return tpa_torch.load(folder / "copy")


@pytest.mark.parametrize("damage", ["short", "metadata", "shape"])
def test_damaged_codecs_are_refused(codecs, tmp_path, damage):
    """One line each."""
    from safetensors.torch import load_file, save_file

    path = codecs.coded.save(tmp_path / "x.codec")
    if damage == "short":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "metadata":
        save_file(load_file(path), path, {"format": "tpa-codec", "codec": "{}"})
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["tpa.layers.3.k.basis"] = tensors["tpa.layers.3.k.basis"][:, :1].contiguous()
        save_file(tensors, path, metadata)
    with pytest.raises(TPAError) as caught:
        Codec.load(path)
    assert "\n" not in str(caught.value)


REFUSED = {
    "another model": (lambda hf, codec: TPACache(codec, random_model(5)), "another model"),
    "another size": (lambda hf, codec: TPACache(codec, random_model(num_hidden_layers=6)), "num_layers is 7"),
    "no Gemma": (lambda hf, codec: TPACache(codec, torch.nn.Linear(2, 2)), "got Linear"),
    "no model": (lambda hf, codec: TPACache(codec, "gemma"), "got str"),
    "no codec": (lambda hf, codec: TPACache(*["codec", hf]), "got str"),
    "a static cache": (lambda hf, codec: TPACache(codec, hf, max_cache_len=100), "max_cache_len"),
    "an offloaded cache": (lambda hf, codec: TPACache(codec, hf, offloading=True), "offloading"),
    "no tokenizer": (lambda hf, codec: calibrate_cache(hf, None, rate=2), "tokenizer"),
    "a rate and a budget": (lambda hf, _: calibrate_cache(hf, Words(), rate=2.0, kv_budget=3, tokens=50), "kv_budget"),
    "gradients": (lambda hf, codec: hf(ids_of(PROMPT), past_key_values=TPACache(codec, hf)), "gradients"),
    "embeddings": (
        lambda hf, codec: hf(inputs_embeds=torch.zeros(1, 3, 48), past_key_values=TPACache(codec, hf)),
        "input_ids",
    ),
    "another model runs": (
        lambda hf, codec: generated(random_model(), TPACache(codec, hf)), "another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_one_sentence(hf, codecs, name):
    call, words = REFUSED[name]
    with pytest.raises(TPAError, match=words) as caught:
        call(hf, codecs.coded)
    assert "\n" not in str(caught.value)


def test_plans(hf):
    """A size by arithmetic, and a bound on KL that their own model measures."""
    given = {"text": helpers.CALIBRATION, "tokens": 600, "sensitivity_tokens": 300, "context": 64}
    small = calibrate_cache(hf, Words(), kv_budget=3.0, **given)
    assert 3.0 <= small.ratio_at(64) < 3.2
    bound = calibrate_cache(hf, Words(), max_kl=0.005, holdout=helpers.CALIBRATION[700:1100] + "\n", **given)
    text = helpers.CALIBRATION[700:1100]
    dense, found = (
        torch.from_numpy(logits_of(hf, cache, text)).log_softmax(-1) for cache in (None, TPACache(bound, hf))
    )
    assert 0.003 < float((dense.exp() * (dense - found)).sum(-1).mean()) < 0.007


@pytest.mark.parametrize("mode", ["contextual", "fixed-b", "latent", "V alone", "newest exact"])
@FAST
def test_every_mode(hf, own, mode, fast):
    """The logits of our own model with the same constants, in pieces and token by token."""
    choices: dict[str, Any] = {
        "contextual": {"mode": "contextual", "k_rank": 1, "v_rank": 2, "kv_dtype": "float32"},
        "fixed-b": {"mode": "fixed-b", "k_rank": 12, "v_rank": 9, "kv_dtype": "float32"},
        "latent": {"mode": "latent", "k_rank": 20, "v_rank": 24, "kv_dtype": "float32"},
        "V alone": {"k_mode": "fixed-a", "rate": 6.0, "k_dtype": "float32"},
        "newest exact": {"mode": "latent", "k_rank": 24, "v_rank": 24, "kv_dtype": "float32", "sinks": 2, "recent": 3},
    }
    codec = calibrate_cache(hf, Words(), helpers.CALIBRATION, tokens=300, **choices[mode])
    ours = tpa_torch.Model(own.config, own.weights, own.tokenizer, codec.tpa, codec.pairs)
    expected = helpers.logits(ours, ids_of(PROMPT).numpy())
    found = logits_of(hf, TPACache(codec, hf, fast), piece=1 if mode == "newest exact" else 9)
    assert helpers.relative(found, expected) < (2e-2 if mode == "V alone" else 2e-3)


def test_the_table_of_what_works_is_that_of_the_docs():
    """docs/transformers.md names what is tested here, and every test exists."""
    page = (helpers.ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    for what, test in WORKS.items():
        assert f"| {what} |" in page and test in globals()


def test_a_text_without_bos_is_warned_of(hf, codecs):
    """Once a text, and not where there is one, behind padding or not."""
    with pytest.warns(UserWarning, match="does not begin with BOS, token 2"):
        generated(hf, TPACache(codecs.coded, hf), torch.tensor([[7, 8, 9]]), new=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generated(hf, TPACache(codecs.coded, hf), **padded("a", "longer"), new=3)


# ---- what users do ----


def step(hf: Any, cache: Any, ids: Any, **given: Any) -> np.ndarray:
    """Logits of some tokens."""
    with torch.no_grad():
        return helpers.to_numpy(hf(ids, past_key_values=cache, **given).logits)


def test_a_model_in_training_mode_is_calibrated_at_rest():
    """Dropout of an adapter does not reach the codec, and the mode is as it was."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], lora_alpha=64, lora_dropout=0.9)
    torch.manual_seed(0)
    model = peft.get_peft_model(random_model(), config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    made = [calibrate_cache(model, Words(), helpers.CALIBRATION, tokens=100, rate=4.0, prefer="size") for _ in range(2)]
    assert model.training and torch.equal(*(codec.pairs[0].k.predictor for codec in made))


@pytest.mark.parametrize("recent", [0, 6])
def test_tokens_are_taken_back_past_the_window(hf, recent):
    """In all rings, also that of the newest tokens; and rings stay short, however long the prompt was."""
    exact = {"mode": "latent", "k_rank": 24, "v_rank": 24, "kv_dtype": "int8", "recent": recent}
    codec = calibrate_cache(hf, Words(), helpers.CALIBRATION, tokens=100, **exact)
    ids = ids_of(helpers.CALIBRATION[:600])
    cache, fresh = TPACache(codec, hf), TPACache(codec, hf)
    cache.activate_past_recording()
    step(hf, cache, ids[:, :580])
    step(hf, cache, ids[:, 580:584])
    cache.crop(-4)
    step(hf, fresh, ids[:, :580])
    assert cache.get_seq_length() == 580
    found, expected = (step(hf, of, ids[:, 590:591]) for of in (cache, fresh))
    assert helpers.relative(found, expected) < 1e-5
    windows = [layer.held.nbytes for layer in cache.layers if layer.window]
    one = [layer.held.nbytes for layer in fresh.layers if layer.window]
    assert sum(windows) <= sum(one) * (11 + module.SPARE + 1 + 2 * recent + module.SPARE * bool(recent)) / 11


@pytest.mark.parametrize("q", [1, 2, 12])
def test_masks_that_hide_what_is_cached_are_refused(hf, codecs, q):
    cache, ids = TPACache(codecs.exact, hf), ids_of(PROMPT)
    step(hf, cache, ids[:, :40])
    mask = torch.ones(1, 40 + q, dtype=torch.long)
    mask[:, 20:30] = 0
    with pytest.raises(TPAError, match="hides tokens"):
        step(hf, cache, ids[:, 40 : 40 + q], attention_mask=mask)


def test_a_mask_of_four_dimensions_is_obeyed(hf, codecs):
    """As with their own cache: K and V are given back then, and their attention masks."""
    ids = ids_of(PROMPT)
    mask = torch.zeros(1, 1, 1, 41)
    mask[..., 5:30] = torch.finfo(torch.float32).min
    masks = {"full_attention": mask, "sliding_attention": mask[..., -11:]}
    found = []
    for cache in (transformers.DynamicCache(config=hf.config), TPACache(codecs.exact, hf)):
        step(hf, cache, ids[:, :40])
        given = {"attention_mask": masks, "position_ids": torch.tensor([[40]])}
        found.append(step(hf, cache, ids[:, 40:41], **given))
    assert helpers.relative(found[1], found[0]) < 1e-4
    cache = TPACache(codecs.exact, hf)
    step(hf, cache, ids[:, :40])
    assert helpers.relative(step(hf, cache, ids[:, 40:41]), found[0]) > 1e-3


def test_padding_on_the_right_is_no_prefix(hf, codecs):
    """It is read as theirs is, but no text goes on behind it."""
    ids = torch.cat([ids_of(PROMPT)[:, :20], torch.tensor([[*ids_of("short")[0].tolist(), *[0] * 14]])])
    mask = (ids > 0).long()
    expected = step(hf, None, ids, attention_mask=mask)
    cache = TPACache(codecs.exact, hf)
    found = step(hf, cache, ids, attention_mask=mask)
    assert np.abs((found - expected)[mask.numpy() > 0]).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(TPAError, match="on the left"):
        step(hf, cache, ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1))


def test_inference_mode_and_then_not(hf, codecs):
    """A prefix read under inference_mode, grown, reordered and continued outside of it."""
    cache = TPACache(codecs.coded, hf)
    with torch.inference_mode():
        hf(ids_of(PROMPT), past_key_values=cache)
        hf(torch.randint(3, 300, (1, 300)), past_key_values=cache)
        cache.batch_repeat_interleave(2)
    assert step(hf, cache, torch.tensor([[5], [6]])).shape == (2, 1, 300)


def test_a_cache_that_is_empty_again_takes_any_batch(hf, codecs):
    """After a call that failed, after crop to nothing, after reset."""
    for codec in (codecs.exact, codecs.coded):
        cache = TPACache(codec, hf)
        with pytest.raises(TPAError, match="gradients"):
            hf(ids_of(PROMPT), past_key_values=cache)
        step(hf, cache, ids_of("two").repeat(2, 1))
        cache.crop(-4)
        step(hf, cache, ids_of("three").repeat(3, 1))
        cache.reset()
        expected = step(hf, TPACache(codec, hf), ids_of(PROMPT))
        assert np.array_equal(step(hf, cache, ids_of(PROMPT)), expected)


def test_the_model_can_be_changed_pickled_and_saved(codecs, tmp_path):
    """The hook is no hindrance, and a larger vocabulary is looked up anew."""
    model = random_model()
    generated(model, TPACache(codecs.coded, model), new=4)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(*(generated(of, TPACache(codecs.coded, of)) for of in (model, again)))
    model.resize_token_embeddings(310)
    step(model, TPACache(codecs.coded, model), torch.tensor([[2, 305, 309]]))


def test_a_piece_of_padding_alone(hf, codecs):
    """Prompts that are read in pieces, padded to a multiple of them."""
    whole = padded(PROMPT[:10])
    ids = torch.cat([torch.zeros(1, 6, dtype=torch.long), whole["ids"]], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), whole["attention_mask"]], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = TPACache(codecs.exact, hf)
    for part in (slice(0, 6), slice(6, 17)):
        found = step(hf, cache, ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part])
    expected = step(hf, None, whole["ids"])
    assert helpers.relative(found[:, -1], expected[:, -1]) < 1e-4


def test_a_forward_pass_that_calls_it_cache(hf, codecs, monkeypatch):
    """The argument's other name."""
    right = hf.model.forward

    def forward(input_ids: Any = None, cache: Any = None, use_cache: bool = True) -> Any:
        return right(input_ids=input_ids, past_key_values=cache, use_cache=use_cache)

    with torch.no_grad():
        expected = find(hf).run(ids_of(PROMPT), TPACache(codecs.coded, hf))
        monkeypatch.setattr(hf.model, "forward", forward)
        found = find(hf).run(ids_of(PROMPT), TPACache(codecs.coded, hf))
    assert torch.equal(found, expected)


def tuned_model(noise: float) -> Any:
    """The random model, trained further."""
    model = random_model()
    torch.manual_seed(8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight += noise * weight.std() * torch.randn_like(weight)
    return model


def test_a_codec_knows_its_model(codecs, hf, tmp_path):
    """Also with the same norms; a model that was tuned a little is still the same."""
    TPACache(codecs.exact, tuned_model(0.02))
    with pytest.raises(TPAError, match="trained further"):
        TPACache(codecs.exact, tuned_model(0.5))
    ours = tpa_torch.convert(own_copy(hf, tmp_path), TPAConfig(rate=4.0))
    assert torch.allclose(Codec.of(ours).samples_ln, codecs.exact.samples_ln, atol=1e-5)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_the_models_own_attention_stays(codecs, how):
    """One that attends eagerly goes on doing so, and can still tell its weights."""
    model = random_model()
    model.set_attn_implementation(how)
    expected = generated(model, None)
    assert torch.equal(generated(model, TPACache(codecs.exact, model)), expected)
    assert model.model.config._attn_implementation == {"eager": "eager", "sdpa": "tpa"}[how]
    with torch.no_grad():
        weights = model(ids_of(PROMPT), past_key_values=TPACache(codecs.exact, model), output_attentions=how == "eager")
    assert how == "sdpa" or weights.attentions[0].shape[1:] == (4, 54, 54)
    assert torch.equal(generated(model, None), expected)


def test_compiled(codecs):
    """torch.compile breaks its graph at the cache."""
    model = random_model(num_hidden_layers=6)
    codec = calibrate_cache(model, Words(), helpers.CALIBRATION, tokens=100, mode="fixed-a", k_rank=2, v_rank=2)
    expected = generated(model, TPACache(codec, model), new=4)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generated(model, TPACache(codec, model), new=4), expected)


def test_a_cache_is_of_one_text(hf, codecs):
    """Another prompt in the same cache is refused where that can be seen, and says what to do."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 fails before it asks the cache")
    cache = TPACache(codecs.exact, hf)
    generated(hf, cache)
    with pytest.raises(TPAError, match="reset"):
        generated(hf, cache, ids_of("short"))


def test_a_short_text_takes_little(hf, codecs):
    for codec in (codecs.exact, codecs.coded):
        cache = TPACache(codec, hf)
        step(hf, cache, ids_of("a few words"))
        assert cache.nbytes <= codec.nbytes_at(12 + module.ROOM)


def test_copies_are_independent(hf, codecs):
    cache = TPACache(codecs.coded, hf)
    step(hf, cache, ids_of(PROMPT))
    for how in (copy.copy, copy.deepcopy):
        other = how(cache)
        step(hf, other, ids_of("x")[:, 1:])
        assert other.get_seq_length() == cache.get_seq_length() + 1


def test_calibration_under_inference_mode(hf, codecs):
    with torch.inference_mode():
        made = calibrate_cache(
            hf, Words(), helpers.CALIBRATION, tokens=600, sensitivity_tokens=300, rate=4.0, prefer="size", context=64
        )
    assert torch.equal(made.pairs[3].k.basis, codecs.coded.pairs[3].k.basis)


def test_few_tokens_are_warned_of(hf):
    with pytest.warns(UserWarning, match="on 41 tokens alone"):
        calibrate_cache(hf, Words(), "a text of forty characters, no more, I f\n"[:40], rate=2.0)


BAD = {
    "keyword": ({"ratio": 3}, "'ratio'"),
    "queries": ({"rate": 3.0, "q_rank": 4}, "q_rank"),
    "tokens": ({"tokens": "2048"}, "tokens"),
    "negative": ({"tokens": -5}, "tokens"),
    "holdout": ({"holdout": "nowhere.txt"}, "holdout"),
    "file": ({"text": "data/mine"}, "no such file"),
    "folder": ({"text": "/tmp"}, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_mean_nothing(hf, name):
    given, words = BAD[name]
    with pytest.raises(TPAError, match=words) as caught:
        calibrate_cache(hf, Words(), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_a_codec_without_all_of_its_numbers(codecs, tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = codecs.coded.save(tmp_path / "x.codec")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = "tpa.layers.2.k.predictor"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name][0, 0, 0] = float("nan")
    save_file(tensors, path, metadata)
    with pytest.raises(TPAError, match=name):
        Codec.load(path)
