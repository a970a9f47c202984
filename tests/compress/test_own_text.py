"""Text that the model writes to be calibrated on: what it begins with, where it ends, and that it is drawn as it is."""

from __future__ import annotations

import helpers
import numpy as np
import pytest

from tpa_ref.cli import demo
from tpa_ref.compress.own_text import own_text
from tpa_ref.gemma.side_files import SideFiles
from tpa_ref.gemma.tokenizer import END_OF_TURN, Tokenizer


def model_of(backend, chat=False):
    """A random model with a tokenizer of pieces and bytes."""
    model = helpers.model(backend, helpers.config(vocab_size=400))
    model.tokenizer = Tokenizer(helpers.tokenizer_proto(400, turns=True))
    files = {"generation_config.json": b'{"eos_token_id": [1, 106]}'}
    template = {"chat_template.jinja": b"{{ messages }}"} if chat else {}
    model.side_files = SideFiles(files | template)
    return model


@pytest.mark.parametrize("chat", [False, True])
def test_how_it_begins_and_ends(backend, chat, monkeypatch):
    """BOS alone, or a user's turn, which the model also ends, and goes on; seeded."""
    model, begun = model_of(backend, chat), []
    from tpa_ref.compress import own_text as module

    right = module.generate_rows

    def watched(model, rows, new, sampling, stop):
        begun.append((rows[0], stop, sampling))
        return right(model, rows, new, sampling, stop=stop)

    monkeypatch.setattr(module, "generate_rows", watched)
    text = own_text(model, 200)
    rows, stop, sampling = begun[0]
    assert rows == model.tokenizer.encode("<start_of_turn>user\n" if chat else "")
    assert (END_OF_TURN in stop) != chat and 1 in stop and sampling.temperature == 1.0
    assert text.count("<start_of_turn>user\n") >= (module.ROWS if chat else 0)
    assert text == own_text(model, 200) != own_text(model, 200, seed=1)


def test_as_many_tokens_as_are_asked_for(backend, monkeypatch):
    """Texts that end early are followed by others, from other seeds."""
    from tpa_ref.compress import own_text as module

    model = model_of(backend)
    calls = []

    def short(model, rows, new, sampling, stop):
        calls.append((new, sampling.seed))
        yield from ([300] * len(rows), [301] * len(rows), [None] * len(rows))

    monkeypatch.setattr(module, "generate_rows", short)
    own_text(model, 10 * module.ROWS)
    assert [new for new, _ in calls] == [10] * 5 and len({seed for _, seed in calls}) == 5


def test_it_is_drawn_from_the_model(backend):
    """Ids are as frequent as the model's own probabilities say: nothing is cut off."""
    model = model_of(backend)
    from tpa_ref.compress import own_text as module

    ids = []
    right = module.generate_rows

    def watched(*args, **more):
        for chosen in right(*args, **more):
            ids.append(chosen)
            yield chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate_rows", watched)
        patch.setattr(module, "ROWS", 400)
        own_text(model, 400)
    p = np.exp(helpers.to_numpy(model([[2]]))[0, -1])
    found = np.bincount([token for token in ids[0] if token is not None], minlength=400) / 400
    assert np.abs(found - p / p.sum()).sum() < np.abs(found - 1 / 400).sum() + 0.2
    assert abs(float((p / p.sum()).max()) - found.max()) < 0.1


def test_on_the_command_line(monkeypatch, capsys, tmp_path):
    """`--calibration self` says from how many tokens the constants are, and converts."""
    from tpa_ref.compress import own_text as module

    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.chdir(tmp_path)
    few = ["--calibration-tokens", "12", "--eval-tokens", "40", "--recall-prompts", "0", "--timing-rounds", "1"]
    monkeypatch.setattr(
        "sys.argv", ["demo", "--backend", "numpy", "--calibration", "self", *few, "--max-new-tokens", "2"]
    )
    demo.main()
    assert "model constants from" in capsys.readouterr().out
