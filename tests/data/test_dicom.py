"""DICOM radiographs come out as a viewer shows them first; what is no radiograph is refused by name. All files are made
here.
"""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from mrg_r1.data.dicom import is_dicom
from mrg_r1.data.images import ImageError, check_image, load_image

PATIENT = "Doe^Jane"


def dicom(
    pixels: np.ndarray, *, stored: int | None = None, syntax: Any = ExplicitVRLittleEndian, **tags: Any
) -> Dataset:
    """A digital radiograph of these stored values; `tags` are added, or taken out where None."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.PatientName = PATIENT
    dataset.PatientID = "MRN-0042"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    dataset.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = dataset.BitsAllocated if stored is None else stored
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


def written(folder: Path, dataset: Dataset, name: str = "image.png") -> Path:
    """The dataset as a file, whose name says nothing of what is in it."""
    dcmwrite(folder / name, dataset, enforce_file_format=True, overwrite=True)
    return folder / name


def shown(folder: Path, dataset: Dataset) -> np.ndarray:
    """[H, W] of the grey that is shown; also checked as `check_image` would."""
    path = written(folder, dataset)
    check_image(path, "s")
    image = load_image(path, "s")
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert (array[..., 0] == array[..., 1]).all() and (array[..., 0] == array[..., 2]).all()
    return array[..., 0]


def refused(folder: Path, dataset: Dataset) -> str:
    path = written(folder, dataset)
    messages = []
    for read in (load_image, check_image):
        with pytest.raises(ImageError) as error:
            read(path, "study-7")
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"study 'study-7': {path}: ") and "; " in messages[0]
    assert "Doe" not in messages[0] and "MRN" not in messages[0]
    return messages[0]


RAMP = np.array([[0, 1024, 2048, 4095]], dtype=np.uint16)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_without_a_window_the_images_own_ends_are_black_and_white(tmp_path: Path, bits: int, syntax: Any) -> None:
    top = 2**bits - 1
    pixels = np.array([[100, 100 + (top - 100) // 4, top]], dtype=np.uint16)
    assert shown(tmp_path, dicom(pixels, stored=bits, syntax=syntax)).tolist() == [[0, 64, 255]]
    middle = 2 ** (bits - 1)
    signed = (pixels.astype(np.int32) - middle).astype(np.int16)
    assert shown(tmp_path, dicom(signed, stored=bits, syntax=syntax)).tolist() == [[0, 64, 255]]


def test_eight_bits_are_shown_and_a_constant_image_is_refused(tmp_path: Path) -> None:
    assert shown(tmp_path, dicom(np.array([[0, 128, 255]], dtype=np.uint8))).tolist() == [[0, 128, 255]]
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        refused(tmp_path, dicom(np.full((2, 2), 7, dtype=np.uint8), PhotometricInterpretation=kind))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    assert shown(tmp_path, dicom(RAMP, stored=12, PhotometricInterpretation="MONOCHROME1")).tolist() == [
        [255, 191, 127, 0]
    ]
    windowed = dicom(RAMP, stored=12, PhotometricInterpretation="MONOCHROME1", WindowCenter=1024, WindowWidth=2048)
    assert shown(tmp_path, windowed).tolist() == [[255, 127, 0, 0]]


def test_bits_that_are_not_stored_are_left_out(tmp_path: Path) -> None:
    """Old machines keep overlays in the upper four bits of twelve-bit data."""
    assert shown(tmp_path, dicom(RAMP | 0x5000, stored=12)).tolist() == shown(tmp_path, dicom(RAMP, stored=12)).tolist()
    signed = np.array([[-2048, 0, 2047]], dtype=np.int16)
    garbage = ((signed.view(np.uint16) & 0x0FFF) | 0x3000).view(np.int16)
    assert shown(tmp_path, dicom(garbage, stored=12)).tolist() == [[0, 128, 255]]


def test_the_first_window_is_applied_after_the_rescale(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [500, 9], "WindowWidth": [2001, 1]}
    # -1000, 1048, 3096, 7190 in a window from -500 to 1500
    assert shown(tmp_path, dicom(RAMP, stored=12, **tags)).tolist() == [[0, 197, 255, 255]]
    linear = dicom(RAMP, stored=12, **tags)
    linear.VOILUTFunction = "LINEAR_EXACT"
    assert shown(tmp_path, linear).tolist() == [[0, 197, 255, 255]]
    assert shown(tmp_path, dicom(RAMP, stored=12, WindowCenter=2048, WindowWidth=1)).tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_windows_agree_with_pydicoms_own(tmp_path: Path, function: str | None, signed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 30)) - (2048 if signed else 0)
    pixels = values.astype(np.int16 if signed else np.uint16)
    tags = {"WindowCenter": "310.5", "WindowWidth": "1800", "RescaleSlope": "0.5", "RescaleIntercept": "17"}
    dataset = dicom(pixels, stored=12, **tags, **({} if function is None else {"VOILUTFunction": function}))
    ours = shown(tmp_path, dataset).astype(float)
    theirs = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset)
    lowest, highest = (-2048, 2047) if signed else (0, 4095)
    lowest, highest = lowest * 0.5 + 17, highest * 0.5 + 17
    assert np.abs(ours - (theirs - lowest) / (highest - lowest) * 255).max() <= 0.5 + 1e-9
    assert ours.std() > 20


def lut(first: int, entries: list[int], bits: int, *, signed: bool = False, packed: bool = False) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(entries) % 2**16, first, bits])
    data = bytes(entries) if packed else struct.pack(f"<{len(entries)}H", *entries)
    item.add_new("LUTData", "OW", data)
    return [item]


def test_a_voi_lut_goes_before_a_window(tmp_path: Path) -> None:
    entries = [0, 10, 40, 90, 160, 250, 360, 490, 640, 1023]
    tags = {"VOILUTSequence": lut(3, entries, 10), "WindowCenter": 2, "WindowWidth": 2}
    pixels = np.array([[0, 3, 5, 7, 12, 200]], dtype=np.uint16)
    expected = np.rint(np.array([0, 0, 40, 160, 1023, 1023]) / 1023 * 255)
    assert shown(tmp_path, dicom(pixels, stored=12, **tags)).tolist() == [expected.tolist()]
    # pydicom's own, where the table is whole
    dataset = dicom(pixels, stored=12, VOILUTSequence=lut(0, list(range(0, 4096)), 12))
    assert np.abs(shown(tmp_path, dataset) - apply_voi_lut(pixels, dataset) / 4095 * 255).max() <= 0.5


def test_a_voi_lut_of_eight_bit_entries_for_twelve_bit_values(tmp_path: Path) -> None:
    entries = [value // 16 for value in range(4096)]
    for packed in (False, True):
        dataset = dicom(RAMP, stored=12, VOILUTSequence=lut(0, entries, 8, packed=packed))
        assert shown(tmp_path, dataset).tolist() == [[0, 64, 128, 255]]


def test_a_modality_lut_goes_before_everything(tmp_path: Path) -> None:
    entries = [4095 - value for value in range(4096)]  # a detector whose values fall with what is seen
    assert shown(tmp_path, dicom(RAMP, stored=12, ModalityLUTSequence=lut(0, entries, 12))).tolist() == [
        [255, 191, 127, 0]
    ]
    windowed = dicom(RAMP, stored=12, ModalityLUTSequence=lut(0, entries, 12), WindowCenter=1024, WindowWidth=2048)
    assert shown(tmp_path, windowed).tolist() == [[255, 255, 255, 0]]


def test_padding_does_not_set_the_scale(tmp_path: Path) -> None:
    pixels = np.array([[0, 0, 1000, 1500, 2000]], dtype=np.uint16)
    assert shown(tmp_path, dicom(pixels, stored=12)).tolist() == [[0, 0, 128, 191, 255]]
    assert shown(tmp_path, dicom(pixels, stored=12, PixelPaddingValue=0)).tolist() == [[0, 0, 0, 128, 255]]
    spread = np.array([[0, 7, 1000, 1500, 2000]], dtype=np.uint16)
    assert shown(tmp_path, dicom(spread, stored=12, PixelPaddingValue=0, PixelPaddingRangeLimit=9)).tolist() == [
        [0, 0, 0, 128, 255]
    ]


def test_colour_of_eight_bits_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path = written(tmp_path, dicom(pixels))
    assert np.array_equal(np.asarray(load_image(path, "s")), pixels)


def compressed(pixels: np.ndarray, syntax: Any, **options: Any) -> Dataset:
    dataset = dicom(pixels, syntax=syntax, **options.pop("tags", {}))
    file = BytesIO()
    Image.fromarray(pixels).save(file, **options)
    dataset.PixelData = encapsulate([file.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    return dataset


def test_compressed_pixels_that_pillow_and_pydicom_decode(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:64, 0:96]
    smooth = (rows * 2 + columns).astype(np.uint8)
    jpeg = shown(
        tmp_path,
        compressed(smooth, JPEGBaseline8Bit, format="JPEG", quality=95, tags={"WindowCenter": 128, "WindowWidth": 256}),
    )
    assert np.abs(jpeg.astype(int) - smooth).max() <= 4
    deep = (rows * 40 + columns).astype(np.uint16)
    plain = shown(tmp_path, dicom(deep, stored=16))
    assert np.array_equal(
        shown(tmp_path, compressed(deep, JPEG2000Lossless, format="JPEG2000", irreversible=False, no_jp2=True)), plain
    )
    rle = dicom(deep, stored=16)
    rle.compress(RLELossless)
    assert np.array_equal(shown(tmp_path, rle), plain)


def test_a_compression_without_a_decoder_is_refused_with_the_package(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint16)
    dataset = compressed(pixels, JPEG2000Lossless, format="JPEG2000")
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    message = refused(tmp_path, dataset)
    assert "JPEG Lossless" in message and "pylibjpeg" in message
    video = compressed(pixels, JPEG2000Lossless, format="JPEG2000")
    video.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4
    assert "not decoded here" in refused(tmp_path, video)
    twelve = compressed(pixels.astype(np.uint8), JPEGExtended12Bit, format="JPEG")
    twelve.BitsAllocated, twelve.BitsStored, twelve.HighBit = 16, 12, 11
    assert "12-bit" in refused(tmp_path, twelve)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"NumberOfFrames": 3}, "of 3 frames"),
        ({"PixelData": None}, "no pixels"),
        ({"Rows": None}, "without Rows"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"HighBit": 15}, "HighBit 15 with BitsStored 12"),
        ({"BitsStored": None}, "BitsStored None"),
        ({"PixelAspectRatio": ["2", "1"]}, "PixelAspectRatio 2:1"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "WindowWidth 0"),
        ({"WindowCenter": 1, "WindowWidth": 5, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000"),
        ({"Rows": 1, "Columns": 300}, " 200 "),
        ({"Rows": 9}, "decoded"),  # fewer pixels than it says
    ],
)
def test_what_is_no_radiograph_is_refused(tmp_path: Path, tags: dict[str, Any], expected: str) -> None:
    assert re.search(expected, refused(tmp_path, dicom(np.zeros((4, 4), dtype=np.uint16), stored=12, **tags)))


def test_values_beyond_the_stored_bits_are_refused_where_the_decoder_lets_them_through(tmp_path: Path) -> None:
    dataset = compressed(np.full((8, 8), 60_000, dtype=np.uint16), JPEG2000Lossless, format="JPEG2000", no_jp2=True)
    dataset.BitsStored, dataset.HighBit = 12, 11
    assert "BitsStored 12" in refused(tmp_path, dataset)


def test_a_deflated_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    small = written(tmp_path, dicom(np.zeros((4, 4), dtype=np.uint16), syntax=DeflatedExplicitVRLittleEndian))
    data = small.read_bytes()
    assert dcmread(small).Rows == 4  # pydicom itself would
    meta = data[: data.index(zlib_start(data))]
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    # a thousand times its size
    bomb = b"".join(compressor.compress(bytes(2**24)) for _ in range(8)) + compressor.flush()
    path = tmp_path / "bomb"
    path.write_bytes(meta + bomb)
    with pytest.raises(ImageError, match="study 's'.*inflated"):
        load_image(path, "s")


def zlib_start(data: bytes) -> bytes:
    """What follows the file's group 2 (PS3.10: its length stands in its first element)."""
    (length,) = struct.unpack("<I", data[140:144])
    return data[144 + length : 144 + length + 16]


def test_every_truncation_is_refused_and_no_message_names_the_patient(tmp_path: Path) -> None:
    whole = written(tmp_path, dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), stored=12)).read_bytes()
    assert is_dicom(whole) and PATIENT.encode() in whole
    path = tmp_path / "cut"
    for length in range(0, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError) as error:
            load_image(path, "s")
        assert "Doe" not in str(error.value) and "MRN" not in str(error.value)


def test_damaged_bytes_are_read_or_refused_and_nothing_else(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    whole = written(
        tmp_path, dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), stored=12, WindowCenter=30, WindowWidth=60)
    ).read_bytes()
    rng, path, refusals = np.random.default_rng(0), tmp_path / "damaged", 0
    for _ in range(1000):
        data = bytearray(whole)
        for place in rng.integers(132, len(whole) - 128, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            load_image(path, "s")
        except ImageError as error:
            refusals += 1
            assert "Doe" not in str(error) and "MRN" not in str(error)
    assert refusals > 200
    spoken = [str(warning.message) for warning in recwarn] + caplog.messages
    assert not [text for text in spoken if "Doe" in text or "MRN" in text]
