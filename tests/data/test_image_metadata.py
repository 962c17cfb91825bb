"""What a file says beside its pixels: polarity and padding of deep grey, profiles and texts of any size; and images
that show nothing.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin, TiffTags

from mrg_r1.data.images import ImageError, check_image, load_image
from tests.data.test_images import noise, pixels, saved

DEEP = np.array([[100, 1000, 1900, 1900]], dtype=np.uint16)
PHOTOMETRIC, LOWEST, HIGHEST, NO_DATA = 262, 280, 281, 42113


def tiff(folder: Path, array: np.ndarray, compression: str | None = None, **tags: Any) -> Path:
    """A TIFF with these tags, given as `t262=0`."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        if name != "t262":  # set below: Pillow would turn the pixels round
            if isinstance(value, str):
                directory.tagtype[int(name[1:])] = TiffTags.ASCII
            directory[int(name[1:])] = value
    path = folder / "image.tif"
    Image.fromarray(array).save(path, tiffinfo=directory, compression=compression)
    if "t262" in tags:
        data = bytearray(path.read_bytes())
        place = data.index(struct.pack("<HHI", PHOTOMETRIC, 3, 1)) + 8
        data[place : place + 2] = struct.pack("<H", tags["t262"])
        path.write_bytes(data)
        with Image.open(path) as written:
            assert written.tag_v2[PHOTOMETRIC] == tags["t262"]  # type: ignore[attr-defined]
    return path


def refused(path: Path) -> str:
    messages = []
    for read in (load_image, check_image):
        with pytest.raises(ImageError) as error:
            read(path, "study-7")
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"study 'study-7': {path}: ") and "; " in messages[0]
    return messages[0]


def stored(
    folder: Path,
    array: np.ndarray,
    *,
    big: bool = False,
    photometric: int = 1,
    bits: int = 0,
    data: bytes = b"",
    **tags: int,
) -> Path:
    """A TIFF of one strip, written byte by byte, of kinds that Pillow does not write. Tags are given as `t339=2`."""
    order = ">" if big else "<"
    rows, columns = array.shape
    strip = data or array.astype(array.dtype.newbyteorder(order)).tobytes()
    sample = 2 if array.dtype.kind == "i" else 3 if array.dtype.kind == "f" else 1
    entries = {256: columns, 257: rows, 258: bits or 8 * array.dtype.itemsize, 259: 1, 262: photometric, 277: 1}
    entries |= {278: rows, 279: len(strip), 339: sample, **{int(name[1:]): value for name, value in tags.items()}}
    entries[273] = 14 + 12 * (len(entries) + 1)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, value in sorted(entries.items()):
        short = tag in (258, 259, 262, 277, 339)
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}i", value)
        head += struct.pack(f"{order}HHI", tag, 3 if short else 9 if value < 0 else 4, 1) + packed
    (folder / "image.tif").write_bytes(head + struct.pack(f"{order}I", 0) + strip)
    return folder / "image.tif"


@pytest.mark.parametrize("kind", ["u2", "i2", "i4", "f4"])
@pytest.mark.parametrize("big", [False, True])
def test_deep_grey_of_either_byte_order_sign_and_polarity(tmp_path: Path, kind: str, big: bool) -> None:
    array = np.array([[-900, 0, 900, 900]]).astype(kind) if kind != "u2" else DEEP.astype(kind)
    for photometric, expected in ((1, [0, 128, 255, 255]), (0, [255, 128, 0, 0])):
        assert pixels(stored(tmp_path, array, big=big, photometric=photometric))[0, :, 0].tolist() == expected


def test_packed_twelve_bits_of_either_polarity(tmp_path: Path) -> None:
    data = bytes([0, 0, 0, 0x80, 0x0F, 0xFF])  # 0, 0, 2048, 4095
    array = np.zeros((1, 4), dtype=np.uint16)
    for photometric, expected in ((1, [0, 0, 128, 255]), (0, [255, 255, 127, 0])):
        assert (
            pixels(stored(tmp_path, array, photometric=photometric, bits=12, data=data))[0, :, 0].tolist() == expected
        )


@pytest.mark.parametrize("big", [False, True])
def test_numbers_that_would_be_read_as_others_are_refused(tmp_path: Path, big: bool) -> None:
    assert "SampleFormat" in refused(stored(tmp_path, np.array([[-3, 0, 3]], dtype=np.int8), big=big))
    refused(stored(tmp_path, np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32), big=big))
    assert pixels(stored(tmp_path, np.array([[0, 128, 255]], dtype=np.uint8), big=big))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path: Path, kind: Any, compression: str | None) -> None:
    for photometric, expected in ((1, [0, 128, 255, 255]), (0, [255, 128, 0, 0])):
        path = tiff(tmp_path, DEEP.astype(kind), compression, t262=photometric)
        assert pixels(path)[0, :, 0].tolist() == expected


def test_eight_bits_whose_zero_is_white_are_inverted_once(tmp_path: Path) -> None:
    array = np.array([[0, 100, 255]], dtype=np.uint8)
    assert pixels(tiff(tmp_path, array, t262=0))[0, :, 1].tolist() == [255, 155, 0]


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("fill", [0, 65535])
def test_what_a_tiff_calls_no_data_is_black_and_does_not_set_the_scale(
    tmp_path: Path, fill: int, photometric: int
) -> None:
    array = np.concatenate([np.full((1, 2), fill, dtype=np.uint16), DEEP], axis=1)
    path = tiff(tmp_path, array, t262=photometric, t42113=str(fill))
    expected = [0, 128, 255, 255] if photometric else [255, 128, 0, 0]
    assert pixels(path)[0, :, 0].tolist() == [0, 0, *expected]


def test_no_data_of_floats_may_be_nan_and_a_word_is_refused(tmp_path: Path) -> None:
    array = np.array([[np.nan, -1, 0, 1]], dtype=np.float32)
    assert pixels(tiff(tmp_path, array, t42113="nan"))[0, :, 0].tolist() == [0, 0, 128, 255]
    assert str(NO_DATA) in refused(tiff(tmp_path, array, t42113="none"))


def test_pixels_beyond_the_ends_that_a_tiff_states_are_refused(tmp_path: Path) -> None:
    array = np.concatenate([DEEP, np.full((1, 1), 65535, dtype=np.uint16)], axis=1)
    assert "MaxSampleValue" in refused(tiff(tmp_path, array, t281=4095))
    assert "MinSampleValue" in refused(tiff(tmp_path, DEEP, t280=500))
    assert "MaxSampleValue" in refused(tiff(tmp_path, DEEP, t281="4095HU"))
    signed = np.array([[-2000, -100, 0, 100]], dtype=np.int16)
    assert "SMinSampleValue" in refused(stored(tmp_path, signed, t340=-100))
    assert "SMaxSampleValue" in refused(stored(tmp_path, signed, t341=50))
    tags = {f"t{LOWEST}": 0, f"t{HIGHEST}": 4095}
    assert pixels(tiff(tmp_path, DEEP, **tags))[0, :, 0].tolist() == [0, 128, 255, 255]
    assert pixels(tiff(tmp_path, array, t42113="65535", **tags))[0, :, 0].tolist() == [0, 128, 255, 255, 0]


def test_the_clear_value_of_a_deep_png_is_black_and_does_not_set_the_scale(tmp_path: Path) -> None:
    array = np.concatenate([np.full((1, 2), 65535, dtype=np.uint16), DEEP], axis=1)
    path = saved(tmp_path, Image.fromarray(array), transparency=65535)
    with Image.open(path) as written:
        assert written.info["transparency"] == 65535
    assert pixels(path)[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]


def test_sixteen_bits_of_cmyk_are_refused_like_other_colour(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    tags = {256: 2, 257: 2, 258: (16,) * 4, 259: 1, 262: 5, 277: 4, 278: 2, 279: 32}
    count = len(tags) + 1
    rest, entries = b"", []
    base = 8 + 2 + 12 * count + 4
    for tag, value in sorted({**tags, 273: base + 8}.items()):
        if isinstance(value, tuple):
            entries.append(struct.pack("<HHII", tag, 3, len(value), base))
            rest += struct.pack(f"<{len(value)}H", *value)
        else:
            entries.append(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value))
    strip = np.arange(16, dtype="<u2").tobytes()
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, count) + b"".join(entries) + struct.pack("<I", 0) + rest + strip)
    with Image.open(path) as written:
        assert written.mode == "CMYK"
    assert "16 bits" in refused(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


NOISE = np.random.default_rng(1).integers(0, 256, 3 * 2**20, dtype=np.uint8).tobytes()
TEXT = b"<x:xmpmeta>" + b"word " * 400_000
BOMB = zlib.compress(bytes(2**26), 9)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"iCCP", b"profile\0\0" + zlib.compress(NOISE)),
        (b"iCCP", b"profile\0\0" + BOMB),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + TEXT),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0word\0" + BOMB),
        (b"zTXt", b"Comment\0\0" + zlib.compress(TEXT)),
        (b"zTXt", b"Comment\0\0" + BOMB),
        (b"tEXt", b"Comment\0" + TEXT),
    ],
    ids=lambda value: value[:4].decode("latin-1") if isinstance(value, bytes) and len(value) == 4 else "",
)
def test_a_png_is_read_whatever_the_size_of_its_profile_and_texts(
    tmp_path: Path, kind: bytes, content: bytes, last: bool
) -> None:
    plain = saved(tmp_path, noise(32, 40))
    expected, data = pixels(plain), plain.read_bytes()
    place = len(data) - 12 if last else 33  # before IEND, behind IHDR
    path = tmp_path / "large.png"
    path.write_bytes(data[:place] + chunk(kind, content) + data[place:])
    check_image(path, "s")
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *((b"iCCP", content) for content in (b"", b"profile\0", b"profile\0\7" + NOISE[:99])),
        (b"zTXt", b"Comment\0\7" + NOISE[:99]),
        *((kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs")),
        *((b"eXIf", content) for content in (b"", b"Exif", NOISE[:99], b"II*\0\xff\xff\xff\x7f")),
    ],
    ids=lambda value: value[:4].decode() if value[:1].isalpha() else "",
)
def test_what_a_png_says_beside_its_pixels_may_be_unreadable(tmp_path: Path, kind: bytes, content: bytes) -> None:
    plain = saved(tmp_path, noise(32, 40))
    expected, data = pixels(plain), plain.read_bytes()
    path = tmp_path / "odd.png"
    path.write_bytes(data[:33] + chunk(kind, content) + data[33:])
    check_image(path, "s")
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("kind", [b"xml ", b"uuid"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_jpeg2000_with_a_large_text_is_read(tmp_path: Path, kind: bytes, wide: bool) -> None:
    plain = saved(tmp_path, noise(32, 40), "image.jp2", irreversible=False)
    expected, data = pixels(plain), plain.read_bytes()
    size = len(NOISE) + (16 if wide else 8)
    box = struct.pack(">I4sQ", 1, kind, size) if wide else struct.pack(">I4s", size, kind)
    path = tmp_path / "large.jp2"
    for before in (b"jp2h", b"jp2c"):
        place = data.index(before) - 4
        path.write_bytes(data[:place] + box + NOISE + data[place:])
        check_image(path, "s")
        assert np.array_equal(pixels(path), expected)


def test_an_orientation_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    image = noise(32, 40).convert("RGB")
    path = saved(tmp_path, image, "image.webp", lossless=True, exif=b"Exif\0\0" + NOISE[:99])
    check_image(path, "s")
    assert np.array_equal(pixels(path), np.asarray(image))


def test_many_texts_that_are_too_large_together_are_passed_over(tmp_path: Path) -> None:
    plain = saved(tmp_path, noise(32, 40))
    data = plain.read_bytes()
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20 - 100)))
    path = tmp_path / "many.png"
    path.write_bytes(data[:33] + packed * 100 + data[33:])
    check_image(path, "s")
    assert np.array_equal(pixels(path), pixels(plain))


def test_a_large_text_that_is_damaged_is_still_found_by_the_check(tmp_path: Path) -> None:
    data = saved(tmp_path, noise(32, 40)).read_bytes()
    damaged = bytearray(chunk(b"tEXt", b"Comment\0" + TEXT))
    damaged[100] ^= 1
    path = tmp_path / "large.png"
    path.write_bytes(data[:33] + damaged + data[33:])
    with pytest.raises(ImageError):
        check_image(path, "s")


def test_the_orientation_beside_a_large_profile_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "word " * 400_000, zip=True)
    path = saved(tmp_path, noise(20, 40), exif=exif, pnginfo=texts, icc_profile=NOISE)
    assert pixels(path).shape == (40, 20, 3)


@pytest.mark.parametrize("name", ["image.jpg", "image.webp", "image.tif"])
def test_other_formats_with_large_profiles_and_texts_are_read(tmp_path: Path, name: str) -> None:
    image = noise(32, 40).convert("RGB")
    options: dict[str, Any] = {"lossless": True} if name == "image.webp" else {}
    expected = pixels(saved(tmp_path, image, name, **options))
    path = saved(tmp_path, image, name, icc_profile=NOISE, **options)
    if name == "image.jpg":  # as many segments of 64 kB as will be
        segment = b"\xff\xe1" + struct.pack(">H", 65_535) + (b"http://ns.adobe.com/xmp/extension/\0" + NOISE)[:65_533]
        data = path.read_bytes()
        path.write_bytes(data[:2] + segment * 60 + data[2:])
    assert path.stat().st_size > 2**21
    check_image(path, "s")
    assert np.array_equal(pixels(path), expected)


def flat(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (6, 5), value)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (flat("L", 0), "black.png"),
        (flat("L", 255), "white.jpg"),
        (flat("RGB", (10, 20, 30)), "colour.png"),
        (flat("I;16", 900), "deep.png"),
        (flat("F", 0.5), "float.tif"),
        (flat("1", 1), "bit.tif"),
        (flat("P", 3), "palette.gif"),
        (flat("CMYK", (1, 2, 3, 4)), "print.tif"),
    ],
)
def test_an_image_of_one_value_is_refused(tmp_path: Path, image: Image.Image, name: str) -> None:
    refused(saved(tmp_path, image, name))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_image_that_is_transparent_everywhere_is_refused_and_one_clear_pixel_is_not(
    tmp_path: Path, mode: str
) -> None:
    image = noise(8, 9).convert(mode)
    image.putalpha(0)
    refused(saved(tmp_path, image))
    image.putpixel((0, 0), (200, 200, 200, 255) if mode == "RGBA" else (200, 255))
    assert pixels(saved(tmp_path, image)).max() == 200


def test_one_pixel_that_differs_is_enough(tmp_path: Path) -> None:
    image = flat("L", 90)
    image.putpixel((2, 2), 91)
    assert pixels(saved(tmp_path, image)).max() == 91
    assert pixels(saved(tmp_path, Image.fromarray(np.array([[7, 7], [7, 8]], dtype=np.uint16)))).max() == 255
