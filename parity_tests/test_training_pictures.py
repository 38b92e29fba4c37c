"""Pictures are read as they look, whatever their mode, depth and orientation, or not at all."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parity_tests.test_training_data import message
from training import data

DIGIT = data.digits().test.images[7, :, :, 0]
LARGE = np.kron(DIGIT, np.ones((8, 8), np.uint8))
WIDE = LARGE.astype(np.uint16) * 257
TURNED = Image.Exif()
TURNED[0x112] = 6  # the camera was turned


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(picture, name="picture.png", channels=1, **options):
    picture.save(name, **options)
    return data.read_picture(Path(name), (8, 8, channels))


def scaled(pixels):
    return np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS))


def strokes(ink, mode="RGBA"):
    """The digit in one colour, on a transparent ground of the same colour."""
    pixels = np.full((*LARGE.shape, 4), ink, np.uint8)
    pixels[..., 3] = LARGE
    return Image.fromarray(pixels).convert(mode)


def palette(ink):
    """A pixel of one colour on a transparent ground of the same colour."""
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([ink] * 6)
    picture.putpixel((3, 3), 1)
    return picture


PIXEL = np.zeros((8, 8), np.uint8)
PIXEL[3, 3] = 255

READABLE = {
    "8 bits": (Image.fromarray(LARGE), "a.png", {}, LARGE),
    "colours": (Image.fromarray(LARGE).convert("RGB"), "a.png", {}, LARGE),
    "white, transparent": (strokes(255), "a.png", {}, LARGE),
    "black, transparent": (strokes(0), "a.png", {}, 255 - LARGE),
    "gray and alpha": (strokes(255, "LA"), "a.png", {}, LARGE),
    "white, palette": (palette(255), "a.png", {"transparency": 0}, PIXEL),
    "black, palette": (palette(0), "a.gif", {"transparency": 0}, 255 - PIXEL),
    "16 bits": (Image.fromarray(WIDE), "a.png", {}, LARGE),
    "16 bits, dark": (Image.fromarray(WIDE // 257 * 100), "a.png", {}, np.round(LARGE / 2.57)),
    "16 bits, TIFF": (Image.fromarray(WIDE), "a.tif", {}, LARGE),
    "16 bits, PGM": (Image.fromarray(WIDE), "a.pgm", {}, LARGE),
    "32 bits": (Image.fromarray(LARGE.astype(np.int32)), "a.tif", {}, LARGE),
    "32 bits, wide": (Image.fromarray(WIDE.astype(np.int32)), "a.tif", {}, LARGE),
    "float to 1": (Image.fromarray(LARGE.astype(np.float32) / 255), "a.tif", {}, LARGE),
    "float to 255": (Image.fromarray(LARGE.astype(np.float32)), "a.tif", {}, LARGE),
    "float to 65535": (Image.fromarray(WIDE.astype(np.float32)), "a.tif", {}, LARGE),
    "turned": (Image.fromarray(LARGE), "a.png", {"exif": TURNED}, np.rot90(LARGE, -1)),
}


@pytest.mark.parametrize(
    ("picture", "name", "options", "expected"), READABLE.values(), ids=READABLE
)
def test_a_picture_is_read_as_it_looks(picture, name, options, expected):
    expected = scaled(expected.astype(np.uint8))
    seen = read(picture, name, **options)[:, :, 0]
    np.testing.assert_allclose(seen.astype(int), expected, atol=1)
    in_colours = data.read_picture(Path(name), (8, 8, 3))
    np.testing.assert_allclose(in_colours.astype(int), np.stack([expected] * 3, -1), atol=1)


def test_colours_show_through_what_is_half_transparent():
    red = read(Image.new("RGBA", (9, 9), (255, 0, 0, 128)), channels=3)  # dark, so it is on white
    np.testing.assert_array_equal(red[4, 4], [255, 127, 127])


def png(width, height, pixels=b""):
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def saved(picture, **options):
    file = BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def floats(value):
    return saved(Image.fromarray(np.full((4, 4), value, np.float32)), format="TIFF")


JPEG = saved(Image.fromarray(LARGE), format="JPEG")
BOMB = "could be decompression bomb DOS attack"
UNREADABLE = {
    "bomb": (png(50_000, 50_000), BOMB),
    "large": (png(10_000, 10_000), BOMB),
    "no pixels": (png(0, 0), "cannot identify image file"),
    "few pixels": (png(9, 9), "image file is truncated"),
    "cut PNG": (saved(Image.fromarray(LARGE), format="PNG")[:60], "truncated"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "runcated"),
    "cut TIFF": (floats(0.5)[:40], ""),
    "empty": (b"", "cannot identify image file"),
    "negative": (floats(-0.5), "its values must be finite and not negative"),
    "not a number": (floats(np.nan), "its values must be finite and not negative"),
    "of no known scale": (floats(1.5), "its values must be from 0 to 1, 255 or 65535"),
    "transparent": (saved(Image.new("RGBA", (4, 4)), format="PNG"), "it is transparent everywhere"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_reported_in_a_line(content, reason):
    Path("picture").write_bytes(content)
    text = message(data.read_picture, Path("picture"), (8, 8, 1))
    assert text.startswith("Cannot read picture as a picture: ")
    assert reason in text
    assert "\n" not in text


def test_random_damage_is_read_or_reported_in_a_line():
    rng = np.random.default_rng(0)
    contents = [saved(READABLE[name][0], format="PNG") for name in ("8 bits", "16 bits")]
    contents += [JPEG, floats(0.5), saved(strokes(255), format="PNG")]
    for number in range(200):
        content = bytearray(contents[number % len(contents)])
        for _ in range(3):
            content[rng.integers(len(content))] = rng.integers(256)
        Path("picture").write_bytes(content)
        try:
            data.read_picture(Path("picture"), (8, 8, 1))
        except data.TrainingError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_digit_in_dark_ink_is_inverted(capsys):
    Image.fromarray(255 - LARGE).save("ink.png")
    seen = data.read_picture(Path("ink.png"), (8, 8, 1), light_on_dark=True)
    np.testing.assert_allclose(seen[:, :, 0].astype(int), scaled(LARGE), atol=1)
    assert capsys.readouterr().out == (
        "ink.png is dark on light, and the images of the data set are not: it is inverted\n"
    )
    Image.fromarray(LARGE).save("light.png")
    same = data.read_picture(Path("light.png"), (8, 8, 1), light_on_dark=True)
    np.testing.assert_array_equal(same, data.read_picture(Path("light.png"), (8, 8, 1)))
    assert capsys.readouterr().out == ""


def test_no_digit_has_a_light_border():
    train, test, _ = data.digits()
    for image in (*train.images, *test.images):
        assert not data.has_light_border(image)
        assert data.has_light_border(255 - image)
