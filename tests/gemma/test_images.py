"""Image files: what Gemma's own preprocessing makes of them, every odd kind of file, prompts, and the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zlib
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from helpers import ROOT, refused

pytest.importorskip("PIL")
from PIL import Image

from tpa_ref import TPAError
from tpa_ref.gemma.chat import chat_text
from tpa_ref.gemma.config import VisionConfig
from tpa_ref.gemma.conversation import Conversation
from tpa_ref.gemma.images import crop_boxes, mark_images, open_image, pixels_of, read_images, to_rgb
from tpa_ref.gemma.tokenizer import START_OF_IMAGE, Tokenizer

VISION = VisionConfig(image_size=56, tokens_per_image=4, image_token=500, start_token=6, end_token=7)


def picture(width=40, height=30, mode="RGB", seed=0):
    """A smooth random image, so that resizing does not average everything away."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


# ---- pixels ----


@pytest.mark.parametrize("size", [(40, 30), (200, 56), (56, 56), (7, 300)], ids=str)
@pytest.mark.parametrize("pan_and_scan", [False, True])
def test_pixels_are_those_of_transformers(tmp_path, size, pan_and_scan):
    """Bilinear resize, scale and shift, and the crops of pan and scan, as the published processor does them."""
    pytest.importorskip("transformers")
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    size = tuple(side * 10 for side in size) if pan_and_scan else size
    picture(*size).save(tmp_path / "x.png")
    processor = Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_pan_and_scan=pan_and_scan,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    theirs = processor(Image.open(tmp_path / "x.png"), return_tensors="np")
    pixels, crops = read_images([tmp_path / "x.png"], VISION, pan_and_scan)
    assert crops == list(theirs["num_crops"]) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, theirs["pixel_values"], rtol=0, atol=1e-6)
    assert bool(crops[0]) == (pan_and_scan and size == (2000, 560))  # of the others none is long and large enough


@pytest.mark.parametrize("size", [(1000, 500), (500, 1000), (3000, 300), (770, 600), (512, 256), (5000, 1001)], ids=str)
def test_crops_cover_the_image(size):
    """Two to four crops that lie side by side along the longer side and leave nothing out."""
    boxes = crop_boxes(*size)
    assert 2 <= len(boxes) <= 4
    along = 0 if size[0] >= size[1] else 1
    assert [box[along] for box in boxes] == [0, *[box[along + 2] for box in boxes[:-1]]]
    assert boxes[-1][2:] == size and all(box[1 - along] == 0 and box[3 - along] == size[1 - along] for box in boxes)


def test_several_files_and_their_order(tmp_path):
    """Pixels come in the order of the files, each followed by its crops."""
    picture(600, 300).save(tmp_path / "long.png")
    picture(30, 30, seed=1).save(tmp_path / "square.png")
    pixels, crops = read_images([tmp_path / "long.png", tmp_path / "square.png"], VISION, pan_and_scan=True)
    assert pixels.shape == (4, 3, 56, 56) and crops == [2, 0]
    np.testing.assert_array_equal(pixels[3], read_images([tmp_path / "square.png"], VISION)[0][0])
    left = pixels_of(picture(600, 300).crop((0, 0, 300, 300)), VISION)
    np.testing.assert_array_equal(pixels[1], left)


# ---- odd files ----


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return folder / name


def near(image, expected, tolerance=3):
    image, expected = (np.asarray(x, np.int16) for x in (image, expected))
    assert image.shape == expected.shape and np.abs(image - expected).max() <= tolerance


@pytest.mark.parametrize(("mode", "name"), [("L", "x.png"), ("P", "x.gif"), ("1", "x.png"), ("CMYK", "x.tiff"),
                                            ("LAB", "x.tiff"), ("YCbCr", "x.jpg"), ("RGB", "x.webp")])  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    """Grey, palette, one bit, four inks, Lab, YCbCr: the same picture in RGB."""
    image = Image.new("RGB", (8, 6), (200, 200, 200)) if mode in ("L", "1", "LAB") else picture(8, 6)
    if mode == "LAB":
        image = Image.merge("LAB", [Image.new("L", (8, 6), value) for value in (200, 128, 128)])
    converted = image if mode == "LAB" else image.convert(mode)
    options = {"x.webp": {"lossless": True}, "x.jpg": {"quality": 95, "subsampling": 0}}.get(name, {})
    opened = open_image(saved(tmp_path, converted, name, **options))
    assert opened.mode == "RGB" and opened.size == (8, 6)
    if mode != "LAB":
        near(opened, converted.convert("RGB"), 12 if mode == "YCbCr" else 0)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    """A 16-bit grey image of half brightness is half bright in 8 bits."""
    grey = np.linspace(0, 65_535, 48).astype(np.uint16).reshape(6, 8)
    opened = open_image(saved(tmp_path, Image.fromarray(grey)))
    near(opened, np.repeat((grey // 257)[:, :, None], 3, 2), 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "palette"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """In every mode that has transparency, whatever colour lies under it."""
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "palette":
        image = image.convert("L").convert("P")
        opened = open_image(saved(tmp_path, image, transparency=image.getpixel((3, 0))))
    else:
        opened = open_image(saved(tmp_path, image)) if mode == "RGBA" else to_rgb(image.convert(mode))
    opened = np.asarray(opened)
    assert (opened[:, 2:] == 255).all() and (opened[:, :2] < 8).all()


def test_the_first_picture_of_an_animation(tmp_path):
    """An animated GIF is its first picture."""
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    near(open_image(path), frames[0], 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """A photograph is turned as its camera says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    opened = np.asarray(open_image(saved(tmp_path, image, exif=exif)))
    assert opened.shape == ((4, 6, 3) if orientation < 5 else (6, 4, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert opened[corner[orientation]].min() == 255


def png_of_size(width, height):
    """A PNG whose header says this size, and that holds next to nothing."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def damaged(name, cut=0.5):
    """The first bytes of an image file."""
    out = io.BytesIO()
    picture(100, 80).save(out, name)
    content = bytearray(out.getvalue())
    return bytes(content[: int(len(content) * cut)])


BAD = {
    "empty": (b"", "not an image"),
    "text": (b"hello, this is no image\n" * 10, "not an image"),
    "truncated PNG": (damaged("PNG"), "cannot be read"),
    "truncated JPEG": (damaged("JPEG"), "cannot be read"),
    "truncated GIF": (damaged("GIF"), "cannot be read"),
    "truncated TIFF": (damaged("TIFF"), "x.png"),
    "bomb": (png_of_size(15_000, 15_000), "pixels"),
    "huge bomb": (png_of_size(2_000_000, 2_000_000), "pixels"),
    "no width": (png_of_size(0, 10), "x.png"),
    "too little data": (png_of_size(300, 300), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_in_one_line(tmp_path, name):
    """The file is named, and what is wrong with it."""
    content, words = BAD[name]
    (tmp_path / "x.png").write_bytes(content)
    refused(lambda: read_images([tmp_path / "x.png"], VISION), "x.png", words)


def test_no_file_a_folder_and_floats(tmp_path):
    """What is not there, what is no file, and pixels without a scale."""
    refused(lambda: read_images([tmp_path / "none.png"], VISION), "not found", "none.png")
    refused(lambda: read_images([tmp_path], VISION), "cannot be read")
    refused(lambda: read_images([], VISION), "at least one")
    refused(
        lambda: read_images([saved(tmp_path, Image.new("F", (3, 3), 0.5), "x.tiff")], VISION),
        "x.tiff",
        "floating point",
    )


def test_bytes_changed_at_random(tmp_path):
    """Any damage gives an image or one line, never a traceback."""
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        content = bytearray(damaged(kind, 1))
        for _ in range(12):
            changed = bytearray(content)
            for at in rng.integers(0, min(len(content), 400), 3):
                changed[at] = rng.integers(0, 256)
            (tmp_path / "x").write_bytes(changed)
            try:
                assert open_image(tmp_path / "x").mode == "RGB"
            except TPAError as problem:
                assert "\n" not in str(problem)


def test_without_pillow(monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(lambda: read_images(["x.png"], VISION), "Pillow", "pip install pillow")


# ---- prompts ----


def test_an_image_in_a_prompt():
    """Start, soft tokens and end, with an empty line before and after; BOS once; the rest as without an image."""
    tokenizer = Tokenizer(helpers.tokenizer_proto(400, turns=True))
    soft = [VISION.start_token, *[VISION.image_token] * 4, VISION.end_token]
    ids = tokenizer.encode(chat_text([("user", f"{START_OF_IMAGE}What is this?")]), vision=VISION)
    before = tokenizer.encode("<start_of_turn>user\n\n\n")
    after = tokenizer.encode("\n\nWhat is this?<end_of_turn>\n<start_of_turn>model\n", bos=False)
    assert ids == before + soft + after
    two = tokenizer.encode(f"a {START_OF_IMAGE} b {START_OF_IMAGE}", vision=VISION)
    parts = [tokenizer.encode(text, bos=False) for text in ("a \n\n", "\n\n b \n\n", "\n\n")]
    assert two == [2, *parts[0], *soft, *parts[1], *soft, *parts[2]]
    assert tokenizer.encode("no image", vision=VISION) == tokenizer.encode("no image")


def test_images_in_the_chat_template():
    """An image stands at the beginning of the user's turn, or where the prompt has a mark."""
    said = chat_text([("user", mark_images("What is this?", [0]))])
    assert said == f"<start_of_turn>user\n{START_OF_IMAGE}What is this?<end_of_turn>\n<start_of_turn>model\n"
    assert mark_images(f"a {START_OF_IMAGE} b {START_OF_IMAGE}", [0, 2]).count(START_OF_IMAGE) == 4
    refused(lambda: mark_images(f"a {START_OF_IMAGE}", [0, 0]), "got 1 for 2 images")


@pytest.mark.parametrize("crops", [0, 2, 4])
def test_crops_are_announced_as_by_transformers(crops):
    """What stands in a prompt for an image and its crops is what the published processor puts there."""
    processing = pytest.importorskip("transformers.models.gemma3.processing_gemma3").Gemma3Processor
    if not hasattr(processing, "replace_image_token"):
        pytest.skip("another version of transformers")
    theirs = processing.replace_image_token(
        SimpleNamespace(full_image_sequence=START_OF_IMAGE), {"num_crops": [crops]}, 0
    )
    assert mark_images(f"{START_OF_IMAGE}What?", [crops]) == f"{theirs}What?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random model that reads images of 32 x 32, with a tokenizer."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    helpers.saved(folder, text={"vocab_size": 400}, image_token_index=401, boi_token_index=6, eoi_token_index=7)
    (folder / "tokenizer.model").write_bytes(helpers.tokenizer_proto(400, turns=True))
    return folder


def test_generate_with_images(backend, checkpoint):
    """Images change what is said; where the prompt has marks they go there; several prompts each get all of them."""
    model = backend.load(checkpoint)
    images = helpers.pixels(2)

    def ask(prompt, temperature=1.0, **more):
        return "".join(backend.generate(model, prompt, 12, temperature, **more))

    alone = ask("the list", images=images, chat=True)
    assert alone != ask("the list", images=-np.ones_like(images), chat=True)
    placed = f"{START_OF_IMAGE}{START_OF_IMAGE}the list"
    assert alone == ask(placed, images=images, chat=True) != ask("the list", chat=True)
    rows = ["", ""]
    options = {"temperature": 0.0, "chat": True, "images": images}
    for row, piece in backend.generate_batch(model, ["the list", "return"], 12, **options):
        rows[row] += piece
    assert rows == [ask(prompt, **options) for prompt in ("the list", "return")]
    refused(lambda: ask(f"{START_OF_IMAGE} the list", images=images), "got 1 for 2 images")
    refused(lambda: ask(f"{START_OF_IMAGE} the list"), "got 1 for 0 images")
    text_only = helpers.model(backend)
    text_only.tokenizer = model.tokenizer
    refused(lambda: "".join(backend.generate(text_only, "the list", images=images)), "text only")


def test_the_readmes_example_runs(backend, checkpoint, tmp_path, monkeypatch, capsys):
    """The lines about images, as printed."""
    text = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    code = text[text.index("## Images in Python") :].split("```python\n", 1)[1].split("```", 1)[0]
    picture().save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    model = backend.load(checkpoint)
    tokens_bq = [[5, 6, *[model.config.vision.image_token] * 4, 7]]
    exec(code, {"tpa": backend, "model": model, "tokens_bq": tokens_bq})
    assert capsys.readouterr().out.strip()


def test_a_conversation_about_images(backend, checkpoint):
    """What was shown stays in the cache; undo, also past the window, takes images back with their turn."""
    model = backend.load(checkpoint)

    def talk():
        return Conversation(model, 300, max_new_tokens=6)

    first, second = helpers.pixels(1), helpers.pixels(2, seed=1)
    one = talk()
    said = ["".join(one.say("the list", first)), "".join(one.say("return", second)), "".join(one.say("value"))]
    again = talk()
    assert "".join(again.say("the list", first)) == said[0]
    assert "".join(again.say("something else", helpers.pixels(1, seed=5))) is not None
    assert again.undo()  # far past the window of 11: the text is read anew, with its image
    assert ["".join(again.say("return", second)), "".join(again.say("value"))] == said[1:]
    for text, images, words in (
        (f"{START_OF_IMAGE} x", None, "got 1 for 0 images"),
        ("x", helpers.pixels(1, size=16), "[1, 3, 16, 16]"),
        ("x", helpers.pixels(50), "exceed the 300"),
    ):
        length = len(one.ids)
        refused(lambda text=text, images=images: "".join(one.say(text, images)), words)
        assert len(one.ids) == length  # and the conversation goes on


# ---- the command line ----


def run(*arguments, cwd, stdin=""):
    command = [sys.executable, str(ROOT / "scripts" / "run_tpa.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=stdin, env=environment)


def test_run_tpa_with_images(checkpoint, tmp_path):
    """Convert, save, load, show two images; then a conversation with one more. The tokens of images are counted."""
    pytest.importorskip("torch")
    picture(600, 300).save(tmp_path / "a.png")
    picture(20, 20, "CMYK").save(tmp_path / "b.jpg")
    options = ["--chat", "--max-new-tokens", "5", "--image", "a.png"]
    more = ["--image", "b.jpg", "--pan-and-scan", "--prompt", "the list", "--calibration", "none"]
    done = run("--ckpt", checkpoint, "--convert", "--save_tpa", "tpa", *options, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "4 images in each prompt: 4 x 4 = 16 tokens" in done.stdout and "images of 32 x 32 as 4 tokens" in done.stdout
    )
    assert "one image" in done.stdout and "the list" in done.stdout
    lines = "what is it\n/image b.jpg\n/image none.png\nand that\n"
    done = run("--load_tpa", "tpa", *options, cwd=tmp_path, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 image in each prompt: 1 x 4 = 4 tokens") == 2
    assert done.stderr.strip() == "error: images: file not found: none.png"


def test_images_that_cannot_be_shown(checkpoint, tmp_path):
    """To a text model, without a prompt, damaged: one line and exit code 2, before anything is converted."""
    pytest.importorskip("torch")
    picture().save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(damaged("PNG"))
    for arguments, words in (
        (["--image", "a.png", "--prompt", "x"], "text only"),  # the shipped tiny model
        (["--ckpt", checkpoint, "--image", "bad.png", "--prompt", "x"], "bad.png"),
        (["--ckpt", checkpoint, "--image", "a.png", "--convert", "--save_tpa", "t"], "--prompt is not given"),
        (["--ckpt", checkpoint, "--pan-and-scan", "--prompt", "x"], "--image is not given"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_reading_images_imports_no_torch():
    """The reference reads them with NumPy and Pillow alone, and Pillow only when it is asked to."""
    code = "import sys, tpa_ref.gemma.images, tpa_ref.gemma.vision; print(sorted({'torch', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
