"""Encoded images as tensors: sizes are compared before anything is decoded, and one scale holds for the whole data set.

Pixels of 8 bits are divided by 255. Wider whole numbers are divided by the largest number with as many bits as the training
images use. Floating-point pixels stay as they are if those for training are in [0, 1]; otherwise, as for whole numbers below 0,
the range of the training images becomes [0, 1]. Anything transparent is seen on white.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rwalk._errors import printable

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What is decoded; PPM includes PGM, PBM and grey PFM."""
MOST = 2**24
"""Pixels that an image may have, 4096 x 4096: far more than these networks take, far less than a decompression bomb has."""
ORIENTATION, PHOTOMETRIC, SAMPLES = 274, 262, 339
"""Tags of Exif and TIFF: how the picture is turned, whether 0 is white, and what numbers samples are."""

A = TypeVar("A")
B = TypeVar("B")


class Encoded(NamedTuple):
    """The encoded images of a split, None for each that is missing, and a function that names the place of each."""

    images: Sequence[bytes | None]
    where: Callable[[int], str]


class _Unfit(Exception):  # noqa: N818 - it becomes an error once the image's place is known
    """What is wrong with an image, and what to do."""


def tensors(name: str, *splits: Encoded) -> list[Tensor]:
    """Decode the images for training, and those of other splits in the same form and scale.

    Args:
        name: of the data set, for messages.
        splits: the images of each split; the first is for training.

    Returns:
        For each split float32 (images, channels, height, width), in [0, 1] for training: one channel if all images are grey,
        else three.

    Raises:
        ValueError: if an image cannot be read, is too large, or differs from the first one in size or kind of numbers.
    """

    def each(step: Callable[[A], B], parts: Iterable[Iterable[A]]) -> list[list[B]]:
        return [_each(name, split.where, step, part) for split, part in zip(splits, parts, strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = each(_open, [split.images for split in splits])
    size = _size(opened[0][0])
    each(lambda image: _compare(size, _size(image)), opened)
    grey = all(_grey(image) for some in opened for image in some)
    decoded = each(lambda image: _decode(image, size, grey), opened)
    kind = _kind(decoded[0][0])
    each(lambda pixels: _same_kind(kind, _kind(pixels)), decoded)
    lowest, span = _scale(decoded[0])
    return [_stacked(some, lowest, span) for some in decoded]


def _each(name: str, where: Callable[[int], str], step: Callable[[A], B], values: Iterable[A]) -> list[B]:
    """Apply a step to all images of a split, and name the place of one that is unfit."""
    done: list[B] = []
    for value in values:
        try:
            done.append(step(value))
        except _Unfit as unfit:
            came, remedy = unfit.args
            raise ValueError(printable(f"`{name}` has {came} ({where(len(done))}). {remedy}", keep="")) from None
    return done


def _open(encoded: bytes | None) -> Any:
    """Read an image's header, and refuse what must not or cannot be decoded as it is."""
    if encoded is None:
        raise _Unfit("no image, or only the path of one", "Fill or drop this row.")
    large = _Unfit("an image that is too large", f"Make it smaller than {MOST:,} pixels, or drop this row.")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        height, width = _size(image)
        frames = getattr(image, "is_animated", False)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise large from None
    except Exception as error:  # each decoder has its own
        raise _Unfit(f"an image that cannot be read: {_reason(error)}", f"It has to be one of {', '.join(FORMATS)}.") from None
    if height * width > MOST:
        raise large
    if frames and image.format != "MPO":  # a photo with its preview
        raise _Unfit("an image of several frames", "Make each frame a row.")
    if _misread(image):
        came = "an image of more than 8 bits in colour, with transparency or with 0 for white, or of 8 bits with a sign"
        raise _Unfit(came, "Convert it to 8 bits without a sign, or to plain grey.")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it has another format, or is none"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _size(image: Any) -> tuple[int, int]:
    """Return height and width of an image as it is seen; where there is Exif, it is known without decoding."""
    width, height = image.size
    turned = image.format != "TIFF" and "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _misread(image: Any) -> bool:
    """Return whether Pillow would drop the lower bits or transparency, take white for black, or miss a sign."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode[0] in "IF":
        return "transparency" in image.info or tags.get(PHOTOMETRIC) == 0
    levels = [part for tile in image.tile if image.format == "PPM" for part in tile[3] if isinstance(part, int)]
    samples = tags.get(SAMPLES, 1)
    return (
        ";16" in str(image.tile) or max(levels, default=0) > 255 or 2 in (samples if isinstance(samples, tuple) else (samples,))
    )


def _compare(first: tuple[int, int], mine: tuple[int, int]) -> None:
    if mine != first:
        some = ", ".join(f"{h} x {w}" for h, w in sorted((first, mine)))
        raise _Unfit(f"images of sizes {some}", "Resize them to one size beforehand.")


def _grey(image: Any) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _decode(image: Any, size: tuple[int, int], grey: bool) -> np.ndarray:
    """Return the pixels of an image, (channels, height, width), and free its memory."""
    try:
        image.load()
        seen = ImageOps.exif_transpose(image) if "exif" in image.info else image
        _compare(size, (seen.height, seen.width))
        pixels = _wide(image, np.asarray(seen)[None]) if image.mode[0] in "IF" else _eight(seen, grey)
    except _Unfit:
        raise
    except Exception as error:  # each decoder has its own, and each conversion
        raise _Unfit(f"an image that cannot be decoded: {_reason(error)}", "Check this row.") from None
    image.close()
    return pixels


def _wide(image: Any, values: np.ndarray) -> np.ndarray:
    """Return grey pixels of more than 8 bits, or of floating point."""
    if image.format == "TIFF" and values.dtype == np.int32 and image.tag_v2.get(SAMPLES, (1,))[0] == 1:
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise _Unfit("an image whose pixels are missing or infinite", "Check this row.")
    return values


def _eight(image: Any, grey: bool) -> np.ndarray:
    """Return pixels of 8 bits, grey or in colour, on white where they are transparent."""
    if image.mode == "La":  # grey that was multiplied by its opacity, which Pillow converts to this mode alone
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        least, most = clear.getchannel("A").getextrema()
        if least < most and all(extrema == (255, 255) for extrema in image.getextrema()):
            came = "a picture in white on a transparent ground, which would be white on white"
            raise _Unfit(came, "Give it a ground of another colour.")
    values = np.asarray(image.convert("L" if grey else "RGB"))
    return values[None] if grey else values.transpose(2, 0, 1)


def _kind(pixels: np.ndarray) -> str:
    return "8 bits" if pixels.dtype == np.uint8 else "floating point" if pixels.dtype.kind == "f" else "whole numbers"


def _same_kind(first: str, mine: str) -> None:
    if first != mine:
        raise _Unfit(f"an image of {mine} among images of {first}", "Convert all images to one kind.")


def _scale(known: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return what is subtracted from pixels, and what the rest is divided by."""
    if known[0].dtype == np.uint8:
        return 0, 255
    lowest, highest = float(min(p.min() for p in known)), float(max(p.max() for p in known))
    if lowest >= 0 and _kind(known[0]) == "whole numbers":
        return 0, 2 ** max(1, int(highest).bit_length()) - 1
    return (0, 1) if lowest >= 0 and highest <= 1 else (lowest, highest - lowest or 1)


def _stacked(images: Sequence[np.ndarray], lowest: float, span: float) -> Tensor:
    if images[0].dtype == np.uint8:
        return torch.from_numpy(np.stack(images)).float().div_(span)
    return torch.from_numpy(np.stack([((pixels.astype(np.float64) - lowest) / span).astype(np.float32) for pixels in images]))
