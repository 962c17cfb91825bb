"""Radiographs as people have them come out as upright 8-bit RGB; broken ones are refused by name."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrg_r1.data.images import ImageError, check_image, load_image
from mrg_r1.policy.load import load_image_processor
from tests.shared_data import shared_data


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))


def pixels(path: Path) -> np.ndarray:
    image = load_image(path, "s")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_the_content_and_not_the_extension_decides_the_format(tmp_path: Path) -> None:
    image = noise(20, 30)
    path = saved(tmp_path, image, "wrong.jpg", format="PNG")
    assert np.array_equal(pixels(path), np.stack([np.asarray(image)] * 3, axis=-1))
    shutil.copy(path, tmp_path / "none")
    assert load_image(tmp_path / "none", "s").size == (30, 20)


def test_transparency_is_laid_over_black(tmp_path: Path) -> None:
    array = np.full((1, 3, 4), 200, dtype=np.uint8)
    array[0, :, 3] = (255, 0, 51)  # opaque, clear, one fifth
    assert pixels(saved(tmp_path, Image.fromarray(array, "RGBA")))[0, :, 0].tolist() == [200, 0, 40]
    grey = np.array([[[200, 255], [200, 0]]], dtype=np.uint8)
    assert pixels(saved(tmp_path, Image.fromarray(grey, "LA")))[0, :, 1].tolist() == [200, 0]


def test_palettes_are_resolved(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert pixels(saved(tmp_path, image)).tolist() == [[[200, 100, 50], [10, 20, 30]]]
    assert pixels(saved(tmp_path, image, transparency=1)).tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_twelve_bits_in_a_sixteen_bit_file_use_the_whole_range(tmp_path: Path) -> None:
    array = np.array([[0, 1024, 4095]], dtype=np.uint16)
    for name in ("image.png", "image.tif"):
        assert pixels(saved(tmp_path, Image.fromarray(array), name))[0, :, 0].tolist() == [0, 64, 255]
    floats = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32))
    assert pixels(saved(tmp_path, floats, "float.tif"))[0, :, 2].tolist() == [0, 128, 255]


def test_a_pixel_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)), "f.tif")
    with pytest.raises(ImageError, match="study 's'"):
        load_image(path, "s")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (40, 20))
    image.paste(255, (0, 0, 20, 20))  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    array = pixels(saved(tmp_path, image, "image.jpg", exif=exif, quality=95))
    assert array.shape == (40, 20, 3)
    assert array[:18].min() > 240 and array[22:].max() < 15  # bright on top


@pytest.mark.parametrize(("mode", "value", "expected"), [("1", 1, 255), ("L", 77, 77), ("CMYK", (0, 0, 0, 0), 255)])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, value: Any, expected: int) -> None:
    image = Image.new(mode, (8, 8), value)
    image.putpixel((7, 7), (255, 255, 255, 255) if mode == "CMYK" else 0)
    array = pixels(saved(tmp_path, image, "image.tif"))
    assert (array[:7] == expected).all() and (array[7, 7] == 0).all()


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif", "image.webp"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = saved(tmp_path, noise(200, 200).convert("RGB"), name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for read in (load_image, check_image):
        with pytest.raises(ImageError) as error:
            read(path, "study-7")
        assert "study 'study-7'" in str(error.value) and str(path) in str(error.value) and "; " in str(error.value)


def test_a_flipped_pixel_is_found_when_training_reads_it_and_a_flipped_checksum_by_the_check(tmp_path: Path) -> None:
    path = saved(tmp_path, noise(64, 64), compress_level=0)
    whole = path.read_bytes()
    for position, reads in (
        (len(whole) // 2, (load_image, check_image)),
        (len(whole) - 13, (check_image,)),
    ):  # 12 bytes of IEND are last
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        for read in reads:
            with pytest.raises(ImageError, match="study 's'"):
                read(path, "s")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"<html>404 not found</html>", "not an image"),
        (b"\0" * 128 + b"DICM" + b"\0" * 64, "a DICOM file"),
        (b"\0" * 128 + b"DICM", "a DICOM file"),
        # a JPEG's frame header of 12 bits, behind an application segment
        (b"\xff\xd8\xff\xe0\0\x04ab\xff\xc1\0\x0b\x0c\0\x08\0\x08\x01\x01\x11\0", "a JPEG of 12 bits a sample"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start Ghostscript
    ],
)
def test_what_is_no_image_is_refused_with_a_remedy(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    for read in (load_image, check_image):
        with pytest.raises(ImageError) as error:
            read(path, "study-7")
        assert expected in str(error.value) and "study 'study-7'" in str(error.value) and str(path) in str(error.value)


def test_a_folder_in_place_of_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="study 's'"):
        load_image(tmp_path, "s")


def png(width: int, height: int, data: bytes, *, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG with this header and these rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_of_colour_are_refused_and_not_read_near_black(
    tmp_path: Path, colour: int, channels: int
) -> None:
    """Pillow keeps the upper eight bits: of twelve-bit data the upper four."""
    path = tmp_path / "image.png"
    row = b"\0" + np.full((4, channels), 4095, dtype=">u2").tobytes()
    path.write_bytes(png(4, 4, row * 4, bits=16, colour=colour))
    for read in (load_image, check_image):
        with pytest.raises(ImageError, match="study 's'.*16 bits"):
            read(path, "s")
    row = b"\0" + np.arange(100, 100 + 4 * channels, dtype=np.uint8).tobytes()
    path.write_bytes(png(4, 4, row * 4, bits=8, colour=colour))
    assert load_image(path, "s").size == (4, 4)


@pytest.mark.parametrize("side", [9_100, 50_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, b"\0" * 100))  # promises what it does not carry
    for read in (load_image, check_image):
        with pytest.raises(ImageError, match="study 's'.*pixels"):
            read(path, "s")


def test_a_strip_that_the_image_processor_would_refuse_is_refused_with_its_study(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="study 's'.* 200 "):
        load_image(saved(tmp_path, Image.new("L", (2010, 10))), "s")


def test_every_real_radiograph_loads_at_its_own_size_and_its_first_half_is_refused(tmp_path: Path) -> None:
    folder = shared_data()
    paths = sorted(path for path in (folder / "radiographs").iterdir() if path.suffix != ".csv")
    paths += sorted((folder / "iu_xray" / "images").iterdir())
    assert len(paths) > 60
    for path in paths:
        check_image(path, path.name)
        image = load_image(path, path.name)
        assert image.mode == "RGB" and min(image.size) > 200
        assert np.asarray(image).std() > 10  # neither black nor white
        half = tmp_path / "half"
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError):
            load_image(half, path.name)


def check_processed(processor: Any, image: Image.Image, *, largest: int) -> None:
    """At most `largest` pixels reach the policy, and neither side is off its share by more than the 28 pixels of a
    token.
    """
    features = processor(images=[image], return_tensors="pt")
    ((time, rows, columns),) = features["image_grid_thw"].tolist()
    height, width = rows * 14, columns * 14
    assert time == 1 and height * width <= largest and features["pixel_values"].shape[0] == rows * columns
    scale = (height * width / (image.width * image.height)) ** 0.5
    assert abs(height - scale * image.height) <= 28 and abs(width - scale * image.width) <= 28


@pytest.mark.parametrize("size", [(3000, 2400), (2048, 2496), (500, 500), (1200, 300), (60, 90), (10, 12)])
@pytest.mark.parametrize("largest", [56 * 56, 262_144, 401_408])
def test_the_aspect_is_kept_and_max_pixels_respected(
    tiny_policy_directory: Path, size: tuple[int, int], largest: int
) -> None:
    processor = load_image_processor(tiny_policy_directory, min_pixels=28 * 28, max_pixels=largest)
    check_processed(processor, Image.new("RGB", size, (90, 90, 90)), largest=largest)


def test_real_radiographs_keep_their_aspect_below_max_pixels(tiny_policy_directory: Path) -> None:
    folder = shared_data() / "radiographs"
    processor = load_image_processor(tiny_policy_directory, min_pixels=56 * 56, max_pixels=262_144)
    paths = sorted(path for path in folder.iterdir() if path.suffix != ".csv")[::4]
    for path in paths:
        check_processed(processor, load_image(path, path.name), largest=262_144)
    assert len(paths) > 15
