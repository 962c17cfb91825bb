"""What the tags of a DICOM file say of its numbers is checked before it is used: windows, stored bits, padding,
polarity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataelem import DataElement
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from mrg_r1.data.images import load_image
from tests.data.test_dicom import RAMP, dicom, lut, refused, shown, written

WINDOW = {"WindowCenter": "2048.0", "WindowWidth": "2049.0"}


def with_text(dataset: Any, name: str, text: str) -> Any:
    """The tag as its bytes stand in a file, whatever pydicom would say of them."""
    from pydicom import config

    dataset[name] = DataElement(name, "DS", None)
    dataset[name]._value = text
    assert config.settings.reading_validation_mode == config.IGNORE
    return dataset


def windowed(**texts: str) -> Any:
    dataset = dicom(RAMP, stored=12)
    for name, text in {**WINDOW, **texts}.items():
        with_text(dataset, name, text)
    return dataset


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WindowCenter", "2048,0"),
        ("WindowCenter", " 2048 "),
        ("WindowCenter", "2.048e3"),
        ("WindowWidth", "2049,00"),
        ("WindowWidth", "+2049"),
        ("WindowWidth", "2049\\9"),
        ("WindowWidth", "2049\\"),
        ("WindowCenter", "2048\\ \\7"),
        ("RescaleSlope", "1,0"),
        ("RescaleIntercept", "0,0"),
        ("RescaleIntercept", ""),
    ],
)
def test_a_number_is_read_where_it_can_only_mean_one(tmp_path: Path, name: str, text: str) -> None:
    expected = shown(tmp_path, windowed())
    assert np.array_equal(shown(tmp_path, windowed(**{name: text})), expected)
    assert expected.tolist() == [[0, 0, 128, 255]]


@pytest.mark.parametrize("name", ["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize(
    "text", ["1400HU", "1 400", "1400/0", "1,400", "12,345", "1.400,0", "nan", "inf", "-Infinity", "1_400", "width"]
)
def test_what_is_no_number_is_refused_by_its_tag(tmp_path: Path, name: str, text: str) -> None:
    assert name in refused(tmp_path, windowed(**{name: text}))


@pytest.mark.parametrize(("vr", "value"), [("OB", b"2048"), ("PN", "2048"), ("LO", "2048"), ("US", 2048)])
def test_a_number_under_another_vr_is_not_taken_apart_into_its_letters(tmp_path: Path, vr: str, value: Any) -> None:
    dataset = windowed()
    dataset.add_new("WindowCenter", vr, value)
    if vr == "OB":
        assert "WindowCenter" in refused(tmp_path, dataset)
    else:
        assert shown(tmp_path, dataset).tolist() == [[0, 0, 128, 255]]


@pytest.mark.parametrize(
    ("text", "read"), [("1.0", True), ("1,0", True), ("0", True), ("Doe^Jane", False), ("1\\1", False)]
)
def test_the_number_of_frames_is_read_like_other_numbers(tmp_path: Path, text: str, read: bool) -> None:
    dataset = dicom(RAMP, stored=12)
    dataset["NumberOfFrames"] = DataElement("NumberOfFrames", "IS", None)
    dataset["NumberOfFrames"]._value = text
    if read:
        assert shown(tmp_path, dataset).tolist() == [[0, 64, 128, 255]]
    else:
        assert "NumberOfFrames" in refused(tmp_path, dataset)


@pytest.mark.parametrize("name", ["PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"])
def test_pixels_that_their_spacing_says_are_not_square_are_refused(tmp_path: Path, name: str) -> None:
    for text in ("0.1\\0.2", "0,2\\0,1", "0\\0.1", "-0.1\\0.1"):
        assert name in refused(tmp_path, with_text(dicom(RAMP, stored=12), name, text))
    for text in ("0.143\\0.143", "0,143\\0,1431", "0.143", "", "0\\0"):
        assert shown(tmp_path, with_text(dicom(RAMP, stored=12), name, text)).tolist() == [[0, 64, 128, 255]]


@pytest.mark.parametrize("text", ["", "7\\8\\"])
def test_a_window_without_a_value_is_no_window(tmp_path: Path, text: str) -> None:
    if text:
        assert "WindowCenter" in refused(tmp_path, windowed(WindowCenter="\\7"))
        assert "RescaleSlope" in refused(tmp_path, windowed(RescaleSlope="1\\2"))
    else:
        alone = shown(tmp_path, dicom(RAMP, stored=12))
        assert np.array_equal(shown(tmp_path, windowed(WindowCenter="", WindowWidth="")), alone)


def test_an_aspect_that_is_no_pair_of_numbers_is_refused(tmp_path: Path) -> None:
    for text in ("11", "1:1"):
        dataset = dicom(RAMP, stored=12)
        dataset["PixelAspectRatio"] = DataElement("PixelAspectRatio", "IS", None)
        dataset["PixelAspectRatio"]._value = text
        assert "PixelAspectRatio" in refused(tmp_path, dataset)


@pytest.mark.parametrize("tag", ["WindowCenter", "WindowWidth"])
def test_a_text_from_elsewhere_is_not_quoted(tmp_path: Path, tag: str) -> None:
    for text in ("Doe^Jane", "MRN-0042", "7 Doe^Jane"):
        assert tag in refused(tmp_path, windowed(**{tag: text}))


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize(("stored", "highest"), [(10, 2400), (12, 4200), (9, 513), (15, 32_900)])
def test_values_beyond_the_stored_bits_are_refused_also_uncompressed(
    tmp_path: Path, kind: Any, rle: bool, stored: int, highest: int
) -> None:
    lowest = -(2 ** (stored - 1)) if kind == np.int16 else 0
    highest = min(highest, np.iinfo(kind).max)
    if lowest + 2**stored > highest:
        pytest.skip("no value of 16 bits is beyond")
    dataset = dicom(np.linspace(lowest, highest, 64).astype(kind).reshape(8, 8), stored=stored)
    if rle:
        dataset.compress(RLELossless)
    assert f"BitsStored {stored}" in refused(tmp_path, dataset)


def test_one_value_beyond_is_enough_and_positive_values_of_a_signed_image_do_not_wrap(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    pixels[3, 3] = 1024
    assert "1024" in refused(tmp_path, dicom(pixels, stored=10))
    assert "600" in refused(tmp_path, dicom((np.arange(64) + 537).astype(np.int16).reshape(8, 8), stored=10))


def test_colour_beyond_its_stored_bits_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint16)
    for highest in (255, 256, 700):
        pixels[3, 3, 1] = highest
        dataset = dicom(pixels, stored=8)
        if highest > 255:
            assert "BitsStored 8" in refused(tmp_path, dataset)
        else:
            assert np.array_equal(np.asarray(load_image(written(tmp_path, dataset), "s")), pixels)


def test_an_overlay_that_its_tag_names_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (8, 8)).astype(np.uint16)
    expected = shown(tmp_path, dicom(pixels, stored=12))
    drawn = pixels | (rng.integers(0, 2, (8, 8)) << 14).astype(np.uint16)
    assert "BitsStored" in refused(tmp_path, dicom(drawn, stored=12))
    for group in (0x6000, 0x6002, 0x601E):
        dataset = dicom(drawn, stored=12)
        dataset.add_new((group, 0x0102), "US", 14)
        assert np.array_equal(shown(tmp_path, dataset), expected)
    dataset.add_new((0x6000, 0x0102), "US", 13)
    del dataset[0x601E, 0x0102]
    assert "BitsStored" in refused(tmp_path, dataset)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("limit", [None, -1900])
@pytest.mark.parametrize("unsigned_tag", [False, True])
def test_padding_of_signed_pixels_does_not_set_the_scale(
    tmp_path: Path, syntax: Any, limit: int | None, unsigned_tag: bool
) -> None:
    pixels = np.array([[-2000, -2000 if limit is None else -1950, -100, 0, 100]], dtype=np.int16)
    dataset = dicom(pixels, stored=16, syntax=syntax)
    vr, wrap = ("US", 2**16) if unsigned_tag else ("SS", 0)
    dataset.add_new("PixelPaddingValue", vr, -2000 + wrap)
    if limit is not None:
        dataset.add_new("PixelPaddingRangeLimit", vr, limit + wrap)
    assert shown(tmp_path, dataset).tolist() == [[0, 0, 0, 128, 255]]


def test_padding_of_unsigned_pixels_that_a_signed_tag_states(tmp_path: Path) -> None:
    pixels = np.array([[63536, 100, 200, 300]], dtype=np.uint16)
    dataset = dicom(pixels, stored=16)
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    assert shown(tmp_path, dataset)[0, 1:].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [-2000, 2000])
def test_padding_is_black_whichever_end_is_white(tmp_path: Path, kind: str, padding: int) -> None:
    pixels = np.array([[padding, -100, 0, 100]], dtype=np.int16)
    expected = [0, 0, 128, 255] if kind == "MONOCHROME2" else [0, 255, 128, 0]
    for window in ({}, {"WindowCenter": "0.5", "WindowWidth": "201"}):
        dataset = dicom(pixels, stored=16, PhotometricInterpretation=kind, **window)
        dataset.add_new("PixelPaddingValue", "SS", padding)
        assert np.abs(shown(tmp_path, dataset).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_padding_beyond_the_stored_bits_is_padding_all_the_same(tmp_path: Path, kind: Any) -> None:
    padding = 65535 if kind == np.uint16 else -32768
    dataset = dicom(np.array([[padding, 100, 200, 300]]).astype(kind), stored=12)
    dataset.add_new("PixelPaddingValue", "US" if kind == np.uint16 else "SS", padding)
    assert shown(tmp_path, dataset)[0, 1:].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("kind", "shape"), [("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "IDENTITY")])
def test_a_presentation_that_agrees_changes_nothing_and_one_that_does_not_is_refused(
    tmp_path: Path, kind: str, shape: str
) -> None:
    alone = shown(tmp_path, dicom(RAMP, stored=12, PhotometricInterpretation=kind))
    both = dicom(RAMP, stored=12, PhotometricInterpretation=kind, PresentationLUTShape=shape)
    assert np.array_equal(shown(tmp_path, both), alone)
    both.PresentationLUTShape = "IDENTITY" if shape == "INVERSE" else "INVERSE"
    message = refused(tmp_path, both)
    assert "PresentationLUTShape" in message and kind in message


def test_the_first_value_of_a_table_is_negative_where_its_values_are(tmp_path: Path) -> None:
    pixels = np.array([[-4, -2, 0, 3]], dtype=np.int16)
    entries = [0, 10, 20, 30, 40, 50, 60, 70]
    expected = shown(tmp_path, dicom(pixels, stored=12, VOILUTSequence=lut(-4, entries, 8, signed=True)))
    assert expected.tolist() == [[0, 73, 146, 255]]
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        assert np.array_equal(shown(tmp_path, dicom(pixels, stored=12, **{name: lut(2**16 - 4, entries, 8)})), expected)


@pytest.mark.parametrize("slope", ["0", "0.0", "0,0", "1e400", "1e308"])
def test_a_rescale_that_leaves_nothing_is_refused_by_its_tag(tmp_path: Path, slope: str) -> None:
    assert "RescaleSlope" in refused(tmp_path, windowed(RescaleSlope=slope))


@pytest.mark.parametrize("center", ["-9000", "90000"])
def test_a_window_beside_the_values_shows_nothing_and_is_refused(tmp_path: Path, center: str) -> None:
    refused(tmp_path, windowed(WindowCenter=center))


@pytest.mark.parametrize("tag", ["PixelPaddingValue", "PixelPaddingRangeLimit"])
def test_several_values_of_padding_are_refused_by_the_tag(tmp_path: Path, tag: str) -> None:
    dataset = dicom(RAMP, stored=12)
    dataset.add_new("PixelPaddingValue", "US", 0)
    dataset.add_new(tag, "US", [0, 7])
    assert tag in refused(tmp_path, dataset)
