"""Image files -> pixels as Gemma 3 reads them. Lives once and serves both backends; decoding and resizing is Pillow's.

    file -> upright RGB, 8 bits -> 896 x 896, bilinear -> (x / 255 - 0.5) / 0.5

The model sees every image as a square, whatever its shape was. Pan and scan, for long images whose details matter, adds
crops of it as further images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from .config import VisionConfig
from .tokenizer import START_OF_IMAGE, place_images

MAX_PIXELS = 100_000_000  # of a file; beyond it a small file may unpack to fill the memory
CROP_RATIO, CROP_SIZE, MAX_CROPS = 1.2, 256, 4  # pan and scan: as `transformers` does it
CROPS_TEXT = "Here is the original image {} and here are some crops to help you see better {}"


def read_images(
    paths: Sequence[str | Path], vision: VisionConfig, pan_and_scan: bool = False
) -> tuple[np.ndarray, list[int]]:
    """(pixels [i,c,x,y] of all files in -1 ... 1, float32; the number of crops that follow each file's image).

    Any format that Pillow reads; of an animated one the first picture. Without pan_and_scan there are no crops.
    `mark_images` puts them all into a prompt.
    """
    if not paths:
        raise TPAError("images: at least one file is needed, got none")
    pixels, crops = [], []
    for path in paths:
        image = open_image(path)
        boxes = crop_boxes(*image.size) if pan_and_scan else []
        pixels += [pixels_of(part, vision) for part in (image, *map(image.crop, boxes))]
        crops.append(len(boxes))
    return np.stack(pixels), crops


def open_image(path: str | Path) -> Any:
    """A file as an upright RGB `PIL.Image`; one line for what is no image, damaged, or too large."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise TPAError("images: reading them needs Pillow, which is not installed: pip install pillow") from None
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; sizes are judged here
            with Image.open(path) as image:
                if not 0 < image.width * image.height <= MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise TPAError(f"images: {path} must have 1 ... {MAX_PIXELS:,} pixels, got {size}")
                if image.mode == "F":
                    raise TPAError(f"images: {path} must have whole numbers as pixels, got floating point (mode F)")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except TPAError:
        raise
    except FileNotFoundError:
        raise TPAError(f"images: file not found: {path}") from None
    except Image.UnidentifiedImageError:
        raise TPAError(f"images: {path} is not an image in a format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise TPAError(f"images: {path} must have 1 ... {MAX_PIXELS:,} pixels, got far more") from None
    except Exception as problem:  # a damaged file can raise anything
        reason = getattr(problem, "strerror", None) or str(problem).split("\n", 1)[0][:120] or type(problem).__name__
        raise TPAError(f"images: {path} cannot be read: {reason}") from None


def to_rgb(image: Any) -> Any:
    """An image of any mode as RGB: 16 bits scaled to 8 (Pillow would cut them off), transparency laid on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels_of(image: Any, vision: VisionConfig) -> np.ndarray:
    """An RGB image as pixels [c,x,y] in -1 ... 1, resized to the square that the model reads."""
    from PIL import Image

    size = (vision.image_size, vision.image_size)
    pixels_xyc = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    return (pixels_xyc.transpose(2, 0, 1) / 255 - 0.5) / 0.5


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Pan and scan: (left, top, right, bottom) of two to four crops along the longer side of a long image.

    >>> crop_boxes(1000, 500)
    [(0, 0, 500, 500), (500, 0, 1000, 500)]
    >>> crop_boxes(1000, 900), crop_boxes(400, 200)
    ([], [])
    """
    long, short = max(width, height), min(width, height)
    if long / short < CROP_RATIO:
        return []
    count = min(math.floor(long / short + 0.5), long // CROP_SIZE)
    count = min(max(count, 2), MAX_CROPS)
    step = math.ceil(long / count)
    if min(step, short) < CROP_SIZE:
        return []
    stretches = [(start, min(start + step, long)) for start in range(0, long, step)]
    return [(start, 0, end, height) if width >= height else (0, start, width, end) for start, end in stretches]


def mark_images(prompt: str, crops: Sequence[int]) -> str:
    """The prompt with a <start_of_image> for each image and each of its crops.

    >>> mark_images("What is this?", [0])
    '<start_of_image>What is this?'
    """
    marked, *rest = place_images(prompt, len(crops)).split(START_OF_IMAGE)
    for count, part in zip(crops, rest, strict=True):
        whole = CROPS_TEXT.format(START_OF_IMAGE, " ".join([START_OF_IMAGE] * count)) if count else START_OF_IMAGE
        marked += whole + part
    return marked
