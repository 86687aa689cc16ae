"""Encoded images of every usual kind against pixels that are known, and those that are refused, by their row."""

import struct
import zlib

import numpy as np
import PIL
import pyarrow as pa
import pytest
from PIL import Image, ImageFile

from rwalk.bench.data import load
from rwalk.bench.images import FORMATS
from stored import encoded, features, row, splits, write

NEWER = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 cannot read these, and we refuse")

RNG = np.random.default_rng(0)
GREY, COLOUR = (RNG.integers(0, 256, shape).astype(np.uint8) for shape in ((5, 4), (5, 4, 3)))
WIDE = np.array([[0, 1, 17], [2048, 4000, 4095]], np.uint16)
"""Of 12 bits, as in many X-rays."""


def loaded(folder, images, test=None):
    labels = [k % 2 for k in range(len(images))]
    known = {"image": images, "label": labels}
    return load(splits(folder / "d", known, {"image": test, "label": [0] * len(test)} if test else None))


def one(folder, image):
    """The pixels of a data set of one image, (channels, height, width)."""
    return loaded(folder, [image]).train_x[0].numpy()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, lines, *more):
    """A PNG file by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    return row(b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + chunk(b"IEND", b""))


def tiff(width, height, bits, data, photometric=1, sample=1, channels=1):
    """An uncompressed TIFF file by hand, little-endian."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, channels), (278, height)]
    tags += [(279, len(data)), *([(338, 1)] if channels == 2 else []), (339, sample)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    if channels == 2:
        entries[2] = struct.pack("<HHIHH", 258, 3, 2, bits, bits)
    if channels == 3:
        entries[2] = struct.pack("<HHII", 258, 3, 3, 8 + len(data) + 2 + 12 * len(entries) + 4)
    tail = struct.pack("<HHH", bits, bits, bits) if channels == 3 else b""
    table = struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    return row(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + tail)


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize(("form", "options"), [
    ("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("WEBP", {"lossless": True}),
], ids=str)  # fmt: skip
def test_pixels_of_8_bits_are_those_that_were_stored_over_255_bit_for_bit(tmp_path, pixels, form, options):
    expected = (pixels if pixels.ndim == 3 else pixels[..., None]).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    came = one(tmp_path, encoded(pixels, form, **options))
    if form == "WEBP":  # which has no grey
        expected = np.broadcast_to(expected, (3, 5, 4))
    assert came.dtype == np.float32
    assert np.array_equal(came, expected)


def clear(mode, colour, alpha):
    """A picture of one colour whose left half is opaque and whose right half is not."""
    image = Image.new(mode, (4, 2), (*colour, 255))
    image.paste((*colour, alpha), (2, 0, 4, 2))
    return image


@pytest.mark.parametrize("alpha", [0, 100, 254])
@pytest.mark.parametrize(("mode", "colour", "form"), [
    ("RGBA", (0, 0, 0), "PNG"), ("RGBA", (10, 200, 30), "TIFF"), ("LA", (0,), "PNG"), ("LA", (90,), "TIFF"),
    ("RGBA", (40, 50, 60), "WEBP"),
])  # fmt: skip
def test_what_is_transparent_is_seen_on_white(tmp_path, mode, colour, form, alpha):
    """Against the equation of Porter and Duff; black on a transparent ground does not become blank."""
    came = one(
        tmp_path, encoded(clear(mode, colour, alpha), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    )
    assert len(came) == len(colour)
    for c, value in enumerate(colour):
        assert came[c, 0, 0] == pytest.approx(value / 255)
        assert came[c, 0, 3] == pytest.approx((value * alpha + 255 * (255 - alpha)) / 255**2, abs=1 / 255)


@NEWER
def test_grey_that_was_multiplied_by_its_opacity_is_seen_on_white(tmp_path):
    """Truth: what is seen is the number in the file, and white as far as it is clear; Pillow rounds twice on its way."""
    alpha = np.array([0, 1, 64, 128, 200, 255], np.uint8)
    grey = (alpha * np.array([1, 0.5, 1, 0.5, 0.25, 0.5])).astype(np.uint8)
    came = one(tmp_path, tiff(3, 2, 8, np.stack([grey, alpha], 1).tobytes(), channels=2))
    assert came.shape == (1, 2, 3)
    np.testing.assert_allclose(came.flatten(), (grey + 255.0 - alpha) / 255, atol=1.01 / 255)


def test_few_levels_in_colour_span_all_of_black_to_white(tmp_path):
    came = one(tmp_path, row(b"P6 2 1 3\n\0\1\2\3\3\0"))
    np.testing.assert_allclose(came[:, 0].T, [[0, 1 / 3, 2 / 3], [1, 1, 0]], atol=0.5 / 255)


def palette_with_alpha():
    """A clear pixel and an opaque red one."""
    image = Image.frombytes("PA", (2, 1), b"\0\0\1\xff")
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def test_transparent_colours_and_palettes_are_seen_on_white_too(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    red = [[1, 1], [1, 0], [1, 0]]
    for image in (
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "PNG", transparency=b"\x00\xff"),
        encoded(palette, "GIF", transparency=0),
        png(2, 1, 8, 2, [b"\0\0\0\xff\0\0"], chunk(b"tRNS", b"\0" * 6)),
        encoded(palette_with_alpha(), "TIFF"),
    ):
        came = one(tmp_path, image)[:, 0]
        assert came[:, 0].tolist() == [1, 1, 1]
    assert one(tmp_path, encoded(palette, "PNG", transparency=0))[:, 0].tolist() == red
    assert one(tmp_path, png(2, 1, 8, 0, [b"\x07\x08"], chunk(b"tRNS", b"\0\x07")))[0, 0].tolist() == [
        1,
        pytest.approx(8 / 255),
    ]


@pytest.mark.parametrize(("mode", "pixel", "form", "expected"), [
    ("1", 1, "PNG", [1]), ("1", 0, "TIFF", [0]), ("1", 1, "PPM", [1]), ("P", 0, "PNG", [0, 0, 0]),
    ("CMYK", (0, 255, 255, 0), "TIFF", [1, 0, 0]), ("CMYK", (0, 0, 0, 255), "JPEG", [0, 0, 0]),
    pytest.param("YCbCr", (255, 128, 128), "TIFF", [1, 1, 1], marks=NEWER), ("LAB", (255, 128, 128), "TIFF", [1, 1, 1]),
    ("LAB", (0, 128, 128), "TIFF", [0, 0, 0]), ("F", 0.25, "TIFF", [0.25]), ("I", 7, "TIFF", [1]),
])  # fmt: skip
def test_other_modes_become_grey_or_colour(tmp_path, mode, pixel, form, expected):
    came = one(tmp_path, encoded(Image.new(mode, (8, 8), pixel), form))
    assert came[:, 3, 3].tolist() == pytest.approx(expected, abs=0.02)


def packed(values):
    """Two samples of 12 bits in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    return bytes(b for x, y in pairs for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))


TWELVE = np.array([[0, 1], [17, 2048], [4000, 1000]], np.uint16)


@pytest.mark.parametrize(("image", "raw", "white"), [
    (encoded(WIDE), WIDE, 4095),
    (encoded(WIDE, "TIFF"), WIDE, 4095),
    (encoded(WIDE, "TIFF", compression="tiff_adobe_deflate"), WIDE, 4095),
    (encoded(WIDE.astype(np.int32), "TIFF"), WIDE, 4095),
    (encoded(WIDE // 9), WIDE // 9, 511),
    (encoded(WIDE * 16), WIDE * 16, 65535),
    (encoded(WIDE.astype(np.int32) * 100, "TIFF"), WIDE * 100.0, 2**19 - 1),
    (tiff(2, 3, 12, packed(TWELVE)), TWELVE, 4095),
    (tiff(3, 2, 32, (WIDE.astype("<u4") * 1000003).tobytes()), WIDE * 1000003.0, 2**32 - 1),
    (row(b"P5 3 2 65535\n" + WIDE.astype(">u2").tobytes()), WIDE, 4095),
    (encoded((WIDE / 4095).astype(np.float32), "TIFF"), WIDE / 4095, 1),
    (encoded(WIDE.astype(np.float32), "TIFF"), WIDE, 4095),
    (row(b"Pf 3 2 -1.0\n" + (WIDE[::-1] / 8192).astype("<f4").tobytes()), WIDE / 8192, 1),
    (tiff(3, 2, 32, (WIDE - 4095.0).astype("<f4").tobytes(), sample=3), WIDE, 4095),
    (tiff(3, 2, 16, (WIDE.astype(int) - 2000).astype("<i2").tobytes(), sample=2), WIDE, 4095),
])  # fmt: skip
def test_wide_pixels_keep_all_their_levels(tmp_path, image, raw, white):
    """Over the largest number of the bits that are used, or over the range."""
    came = one(tmp_path, image)
    assert came.shape == (1, *raw.shape)
    np.testing.assert_allclose(came[0], raw / white, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_one_scale_holds_for_all_images_and_comes_from_those_for_training(tmp_path, kind):
    """A dark picture stays dark, and what is brighter in test than all for training is not cut."""
    form = "PNG" if kind == np.uint16 else "TIFF"
    bright, dark, more = (encoded((WIDE / by).astype(kind), form) for by in (1, 16, 0.5))
    data = loaded(tmp_path, [bright, dark], [more, dark])
    top = (WIDE / 16).astype(kind).max()
    assert data.train_x.amax((1, 2, 3)).tolist() == pytest.approx([1, top / 4095])
    assert data.test_x.amax((1, 2, 3)).tolist() == pytest.approx([2, top / 4095])


def test_a_dark_picture_of_8_bits_stays_dark(tmp_path):
    assert one(tmp_path, encoded(GREY // 64)).max() == pytest.approx(3 / 255)


def test_grey_and_colour_may_be_mixed_and_other_kinds_of_numbers_may_not(tmp_path):
    colour = encoded(np.repeat(GREY[..., None], 3, 2))
    for picture in loaded(tmp_path, [encoded(GREY), colour]).train_x:
        np.testing.assert_allclose(picture, np.broadcast_to(GREY / 255, (3, 5, 4)), atol=1e-6)
    kinds = {"whole numbers": encoded(GREY.astype(np.uint16)), "floating point": encoded(GREY.astype(np.float32), "TIFF")}
    for kind, picture in kinds.items():
        with pytest.raises(ValueError, match=f"an image of {kind} among images of 8 bits .row 1 of train.parquet"):
            loaded(tmp_path, [colour, picture])
        with pytest.raises(ValueError, match=f"an image of {kind} among images of 8 bits .row 0 of test.parquet"):
            loaded(tmp_path, [colour], [picture])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("turn", "steps"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_pictures_are_turned_as_their_camera_says(tmp_path, form, turn, steps):
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 255
    came = one(tmp_path, encoded(np.repeat(stored[..., None], 3, 2), form, exif=exif))[0]
    np.testing.assert_allclose(came, np.rot90(stored / 255, steps), atol=0.1)


def bomb(side):
    return png(side, side, 8, 0, [])


NOISE = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)


def half(form):
    content = encoded(NOISE, form)["bytes"]
    return row(content[: len(content) // 2])


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), 99)]}
PLAIN = Image.new("RGB", (16, 16))
WHITE = clear("RGBA", (255, 255, 255), 0)
RGB16 = np.repeat(WIDE[..., None], 3, 2)
UNFIT = {
    "nothing": (None, "no image"),
    "a path": ({"bytes": None, "path": "a.png"}, "no image, or only the path"),
    "no bytes": (row(b""), "cannot be read"),
    "a page": (row(b"<html>not found</html>"), "cannot be read"),
    "400 Mpx": (bomb(20_000), "too large.*16,777,216 pixels"),
    "100 Mpx": (bomb(10_000), "too large.*16,777,216 pixels"),
    "25 Mpx": (bomb(5_000), "too large.*16,777,216 pixels"),
    **{f"half a {form}": (half(form), "cannot be (read|decoded)") for form in FORMATS},
    **{
        form: (encoded(PLAIN, form), "another format")
        for form in ("JPEG2000", "ICO", "TGA", "PCX", "EPS", "ICNS", "DDS", "SGI")
    },
    **{f"moving {form}": (encoded(PLAIN, form, **FRAMES), "several frames") for form in ("GIF", "PNG", "WEBP", "TIFF")},
    "16 bits in colour": (png(3, 2, 16, 2, [line.astype(">u2").tobytes() for line in RGB16]), "more than 8 bits"),
    "16 bits in colour, TIFF": (tiff(3, 2, 16, RGB16.astype("<u2").tobytes(), 2, channels=3), "more than 8 bits"),
    "16 bits and alpha": (png(3, 2, 16, 4, [line[:, :2].astype(">u2").tobytes() for line in RGB16]), "more than 8 bits"),
    "16 bits, one clear": (
        png(3, 2, 16, 0, [line.astype(">u2").tobytes() for line in WIDE], chunk(b"tRNS", b"\0\1")),
        "more than 8 bits",
    ),
    "16 bits, 0 is white": (tiff(3, 2, 16, WIDE.astype("<u2").tobytes(), photometric=0), "0 for white"),
    "floats, 0 is white": (tiff(3, 2, 32, (WIDE / 4095).astype("<f4").tobytes(), photometric=0, sample=3), "0 for white"),
    "16 bits in colour, PPM": (row(b"P6 3 2 65535\n" + RGB16.astype(">u2").tobytes()), "more than 8 bits"),
    "10 bits in colour, PPM": (row(b"P3 3 2 1000\n" + b"0 1 2 " * 6), "more than 8 bits"),
    "8 bits with a sign": (tiff(3, 2, 8, np.arange(-3, 3, dtype=np.int8).tobytes(), sample=2), "8 bits with a sign"),
    "white on white": (encoded(WHITE), "white on white"),
    "nan": (encoded(np.full((2, 2), np.nan, np.float32), "TIFF"), "missing or infinite"),
}


SIZES = {"white on white": (2, 4), "nan": (2, 2)} | {f"half a {form}": (64, 64) for form in FORMATS}
"""Of the images beside those whose pixels are wrong."""


@pytest.mark.parametrize("what", UNFIT)
@pytest.mark.parametrize("split", ["train", "test"])
def test_unfit_images_are_refused_by_file_and_row(tmp_path, what, split):
    image, match = UNFIT[what]
    fine = encoded(np.zeros(SIZES.get(what, (2, 3)), np.uint8))
    for name in ("train-0", "train-1", "test"):
        bad = [image] if name.startswith(split) and name != "train-0" else [fine]
        write(tmp_path / "d", f"{name}.parquet", {"image": [fine, *bad], "label": [0, 1]})
    with pytest.raises(ValueError, match=f"(?s)`d` has .*{match}") as caught:
        load(str(tmp_path / "d"))
    name = "train-1" if split == "train" else "test"
    assert f"(row 1 of {name}.parquet, counted from 0). " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_are_compared_before_anything_is_decoded(tmp_path, monkeypatch):
    def load_(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_)
    for images, test in ((([2, 2], [2, 2], [3, 2]), None), (([2, 2], [2, 2]), ([2, 2], [3, 2]))):
        some = [[encoded(np.zeros(size, np.uint8)) for size in sizes] for sizes in (images, test or images)]
        where = "row 1 of test.parquet" if test else "row 2 of train.parquet"
        with pytest.raises(ValueError, match=f"sizes 2 x 2, 3 x 2 .{where}"):
            loaded(tmp_path, *some)


def test_a_photo_with_its_preview_is_one_picture(tmp_path):
    assert one(tmp_path, encoded(PLAIN, "MPO", **FRAMES)).shape == (3, 16, 16)


def test_which_columns_are_images(tmp_path):
    content = [encoded(GREY), encoded(GREY)]
    bare = [image["bytes"] for image in content]
    fine = {"image": content, "label": [0, 1], "name": ["a", "b"], "width": [4, 4]}
    sound = pa.array(content, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    assert load(splits(tmp_path / "a", fine, metadata=features(image={"_type": "Image"}))).train_x.shape == (2, 1, 5, 4)
    for name, columns, mark, match in (
        ("b", {"left": content, "right": content}, {}, "images in column `left` beside `right`"),
        ("c", {"image": [[image] for image in content]}, {}, "`image` of `c` holds list<"),
        ("d", {"image": bare}, {}, "`image` of `d` holds binary"),
        ("e", {"sound": sound}, {"sound": {"_type": "Audio"}}, "`sound` of `e` holds struct"),
        ("f", {"image": ["a.png", "b.png"]}, {"image": {"_type": "Image"}}, "columns `image` .string"),
    ):
        folder = splits(tmp_path / name, columns | {"label": [0, 1]}, metadata=features(**mark) if mark else None)
        with pytest.raises(ValueError, match=match):
            load(folder)
