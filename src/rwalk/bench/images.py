"""Encoded images as tensors: sizes are compared before anything is decoded, and one scale holds for the whole data set.

Pixels of 8 bits are divided by 255. Wider ones are divided by the largest number of the bits that the file declares, else of
the bits that the training images use. Floating-point pixels stay as they are if those for training are in [0, 1]; else, as with
integers below 0, the range of the training images becomes [0, 1]. What is transparent is seen on white.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rwalk._errors import explain

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What is decoded; PPM includes PGM, PBM and grey PFM."""
MOST = 2**24
"""Pixels that an image may have, 4096 x 4096: far more than these networks take, far less than a decompression bomb has."""
ORIENTATION, BITS, PHOTOMETRIC, SAMPLES = 274, 258, 262, 339
"""Tags of Exif and TIFF: how the picture is turned, bits of a sample, whether 0 is white, and what numbers samples are."""

A = TypeVar("A")
B = TypeVar("B")


class Encoded(NamedTuple):
    """The encoded images of a split, None where there is none, and a function that names the place of each."""

    images: Sequence[bytes | None]
    where: Callable[[int], str]


class Opened(NamedTuple):
    """An image whose header has been read, and its height and width as it is seen."""

    image: Any
    size: tuple[int, int]


class Pixels(NamedTuple):
    """A decoded image, (channels, height, width), and its largest possible value where that is known."""

    values: np.ndarray
    white: int | None = None

    @property
    def group(self) -> str:
        """Which scale holds: its own, or that of all "integers" or "floats" of the data set."""
        return "own" if self.white else "floats" if self.values.dtype.kind == "f" else "integers"


class Scale(NamedTuple):
    """Values become (values - lowest) / span."""

    lowest: float
    span: float


class _Unfit(Exception):  # noqa: N818 - it becomes an error once the image's place is known
    """What is wrong with an image, what was expected, and what to do."""


def tensors(name: str, *splits: Encoded) -> list[Tensor]:
    """Decode the images for training, and those of other splits in the same form and scale.

    Args:
        name: of the data set, for messages.
        splits: the images of each split; the first is for training.

    Returns:
        For each split float32 (images, channels, height, width), in [0, 1] for training: one channel if all images are grey,
        else three.

    Raises:
        ValueError: if an image cannot be read, is too large, differs from the first one in size, or has no known scale.
    """
    from PIL import Image

    def each(step: Callable[[A], B], parts: Iterable[Iterable[A]]) -> list[list[B]]:
        return [_each(name, split.where, step, part) for split, part in zip(splits, parts, strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = each(_open, [split.images for split in splits])
    size = opened[0][0].size
    each(lambda one: _compare(size, one.size), opened)
    grey = all(_grey(one.image) for some in opened for one in some)
    decoded = each(lambda one: _decode(one.image, size, grey), opened)
    scales = _scales(decoded[0])
    each(lambda pixels: _known(scales, pixels), decoded)
    return [_stacked(some, scales, 1 if grey else 3) for some in decoded]


def _each(name: str, where: Callable[[int], str], step: Callable[[A], B], values: Iterable[A]) -> list[B]:
    """Apply a step to all images of a split, and name the place of one that is unfit."""
    done: list[B] = []
    for value in values:
        try:
            done.append(step(value))
        except _Unfit as unfit:
            came, expected, remedy = unfit.args
            raise ValueError(explain(f"`{name}` with {came} ({where(len(done))})", expected, remedy)) from None
    return done


def _open(encoded: bytes | None) -> Opened:
    """Read an image's header, and refuse what must not or cannot be decoded as it is."""
    from PIL import Image

    expected = f"encoded images in the file itself ({', '.join(FORMATS)})"
    if encoded is None:
        raise _Unfit("no image, or only the path of one", expected, "Fill or drop this row.")
    large = _Unfit("an image that is too large", f"at most {MOST:,} pixels", "Make it smaller, or drop this row.")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        size, frames = _size(image), getattr(image, "is_animated", False)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise large from None
    except Exception as error:  # each decoder has its own
        raise _Unfit(f"an image that cannot be read: {_reason(error)}", expected, "Check this row.") from None
    if size[0] * size[1] > MOST:
        raise large
    if frames and image.format != "MPO":  # a photo with its preview
        raise _Unfit("an image of several frames", "one picture in each row", "Make each frame a row.")
    if _misread(image):
        came = "an image of more than 8 bits in colour, with transparency or with 0 for white, or of 8 bits with a sign"
        raise _Unfit(came, "8 bits without a sign in each channel, or more in plain grey", "Convert it.")
    return Opened(image, size)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it has another format, or is none"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _size(image: Any) -> tuple[int, int]:
    """Return height and width of an image as it is seen; where there is Exif, it is known without decoding."""
    width, height = image.size
    turned = image.format != "TIFF" and "exif" in image.info and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _misread(image: Any) -> bool:
    """Tell whether Pillow would drop the lower bits or transparency, take white for black, or miss a sign."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode[0] in "IF":
        return "transparency" in image.info or tags.get(PHOTOMETRIC) == 0
    levels = [part for tile in image.tile if image.format == "PPM" for part in tile[3] if isinstance(part, int)]
    return ";16" in str(image.tile) or max(levels, default=0) > 255 or 2 in _several(tags.get(SAMPLES, 1))


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _compare(first: tuple[int, int], mine: tuple[int, int]) -> None:
    if mine != first:
        some = ", ".join(f"{h} x {w}" for h, w in sorted((first, mine)))
        raise _Unfit(f"images of sizes {some}", "images of one size", "Resize them beforehand.")


def _grey(image: Any) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _decode(image: Any, size: tuple[int, int], grey: bool) -> Pixels:
    """Decode an image, and let go of its memory."""
    from PIL import ImageOps

    try:
        image.load()
        seen = ImageOps.exif_transpose(image) if "exif" in image.info else image
        _compare(size, (seen.height, seen.width))
        pixels = _wide(image, np.asarray(seen)[None]) if image.mode[0] in "IF" else Pixels(_eight(seen, grey), 255)
    except _Unfit:
        raise
    except Exception as error:  # each decoder has its own, and each conversion
        raise _Unfit(f"an image that cannot be decoded: {_reason(error)}", "whole images", "Check this row.") from None
    image.close()
    return pixels


def _wide(image: Any, values: np.ndarray) -> Pixels:
    """Return grey pixels of more than 8 bits, or of floating point."""
    white = 65535 if image.format == "PPM" and image.mode == "I" else None  # Pillow scales by the maximum in the file
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS, (16,))[0]
        white = 2**bits - 1 if bits < 16 else None
        if values.dtype == np.int32 and image.tag_v2.get(SAMPLES, (1,))[0] == 1:
            values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise _Unfit("an image whose pixels are missing or infinite", "finite numbers", "Check this row.")
    return Pixels(values, white)


def _eight(image: Any, grey: bool) -> np.ndarray:
    """Return pixels of 8 bits, grey or in colour, on white where they are transparent."""
    from PIL import Image

    if image.mode == "La":  # grey that was multiplied by its opacity, which has a way to this mode alone
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        least, most = clear.getchannel("A").getextrema()
        if least < most and all(extrema == (255, 255) for extrema in image.getextrema()):
            came = "a picture in white on a transparent ground, which would be white on white"
            raise _Unfit(came, "a picture that can be seen on white", "Give it a ground of another colour.")
    values = np.asarray(image.convert("L" if grey else "RGB"))
    return values[None] if grey else values.transpose(2, 0, 1)


def _scales(known: Sequence[Pixels]) -> dict[str, Scale]:
    """Return the scale of each group of images, for those whose range is not known from the images for training."""
    scales = {"own": Scale(0, 1)}
    for group in ("integers", "floats"):
        mine = [pixels.values for pixels in known if pixels.group == group]
        if mine:
            scales[group] = _scale(group, min(float(v.min()) for v in mine), max(float(v.max()) for v in mine))
    return scales


def _scale(group: str, lowest: float, highest: float) -> Scale:
    if lowest >= 0 and group == "integers":
        return Scale(0, 2 ** max(1, int(highest).bit_length()) - 1)
    if lowest >= 0 and highest <= 1:
        return Scale(0, 1)
    return Scale(lowest, highest - lowest or 1)


def _known(scales: dict[str, Scale], pixels: Pixels) -> None:
    if pixels.group not in scales:
        came = f"an image of {pixels.group} of unknown range, while no training image has any"
        raise _Unfit(came, "images of one kind", "Convert them alike.")


def _stacked(images: Sequence[Pixels], scales: dict[str, Scale], channels: int) -> Tensor:
    """Return images in [0, 1] as one tensor."""
    if all(pixels.white == 255 for pixels in images):
        return torch.from_numpy(np.stack([pixels.values for pixels in images])).float().div_(255)
    parts = []
    for pixels in images:
        lowest, span = Scale(0, pixels.white) if pixels.white else scales[pixels.group]
        scaled = ((pixels.values.astype(np.float64) - lowest) / span).astype(np.float32)
        parts.append(torch.from_numpy(scaled).expand(channels, -1, -1))
    return torch.stack(parts)
