"""A DICOM radiograph as 8-bit grey or RGB, the way a viewer shows it first.

pydicom parses and decodes; here are the rules of display. Only the image's own tags are read, so that no message can
quote the patient's.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config, dcmread
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian

_GREY = ("MONOCHROME1", "MONOCHROME2")
_KEYWORDS = (
    "Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration BitsAllocated BitsStored HighBit "
    "PixelRepresentation NumberOfFrames PixelAspectRatio PixelPaddingValue PixelPaddingRangeLimit RescaleSlope "
    "RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence FloatPixelData "
    "DoubleFloatPixelData PixelData"
).split()
_CONVERT = "convert it (dcmtk: dcmdjpeg, gdcm: gdcmconv --raw) or take the study out"


# Warnings about values quote them, and where a length is damaged a value runs on into the patient's name.
config.settings.reading_validation_mode = config.IGNORE


class DicomError(ValueError):
    """A DICOM file that cannot be used.

    Attributes:
        what: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what, self.remedy = what, remedy


def is_dicom(data: bytes) -> bool:
    """Whether a file's content is DICOM's: 128 free bytes, then `DICM` (PS3.10, section 7.1)."""
    return data[128:132] == b"DICM"


def size_of_dicom(data: bytes) -> tuple[int, int]:
    """Width and height as the header states them; nothing is decoded.

    Raises:
        DicomError: damaged, or not one whole image: no pixels, several frames, deflated (its size is unknown until it
            is inflated).
    """
    dataset = _header(data)
    return int(dataset.Columns), int(dataset.Rows)


def read_dicom(data: bytes) -> NDArray[np.uint8]:
    """Pixels as a viewer shows them first.

    Grey: stored values (signed or not, unused bits left out), then the modality rescale or LUT, then the first VOI LUT
    or window, 0 and 255 at its ends; without one, the image's own smallest and largest value become 0 and 255 (padding
    left out). MONOCHROME1 is inverted, so that air is dark. Colour of 8 bits is taken as it is.

    Source: PS3.3 sections C.11.1 (modality), C.11.2 (VOI), C.7.6.3 (pixels), C.7.5.1.1.2 (padding).

    Returns:
        [H, W] or [H, W, 3].

    Raises:
        DicomError: as `size_of_dicom`, a compression that nothing installed decodes, or a kind of pixels that no
            radiograph has.
    """
    dataset = _header(data)
    try:
        _refuse_what_is_no_radiograph(dataset)
        pixels = _decoded(dataset)
        return _displayed(pixels, dataset) if dataset.PhotometricInterpretation in _GREY else pixels.astype(np.uint8)
    except DicomError:
        raise
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        # without its words: a damaged length can bring other tags into the value that they quote
        raise DicomError(f"a DICOM file whose image tags cannot be read ({type(error).__name__})", _CONVERT) from None


def _header(data: bytes) -> Any:
    """The image's tags, checked as far as they say how large the image is and where its pixels are."""
    damaged = "fetch it again or take the study out"
    try:
        file = BytesIO(data)
        file.seek(132)
        meta = read_dataset(
            file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag >> 16 != 2
        )
        syntax = meta.get("TransferSyntaxUID")
    except Exception as error:  # a parser meets anything in a damaged file
        raise DicomError(f"a DICOM file whose header is damaged ({type(error).__name__})", damaged) from None
    if not syntax:
        raise DicomError("a DICOM file without a transfer syntax", damaged)
    if syntax == DeflatedExplicitVRLittleEndian:
        raise DicomError(
            f"a DICOM file of transfer syntax {syntax.name}, whose size is not known until it is inflated", _CONVERT
        )
    try:
        dataset = dcmread(BytesIO(data), specific_tags=_KEYWORDS)
        missing = [name for name in ("Rows", "Columns", "PhotometricInterpretation") if not dataset.get(name)]
        frames = int(dataset.get("NumberOfFrames") or 1)
        int(dataset.get("Rows", 0)) * int(dataset.get("Columns", 0))
        for tag in dataset.keys():
            dataset[tag]  # values are converted when they are first asked for
    except Exception as error:  # without its words, which may quote what stands in other tags
        raise DicomError(f"a DICOM file that is damaged ({type(error).__name__})", damaged) from None
    if "PixelData" not in dataset:
        kind = (
            "pixels in floating point"
            if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset
            else "no pixels"
        )
        raise DicomError(f"a DICOM file with {kind} (a report, or a truncated file)", damaged)
    if missing:
        raise DicomError(f"a DICOM file without {' and '.join(missing)}", damaged)
    if frames != 1:
        raise DicomError(
            f"a DICOM file of {frames} frames, and a radiograph has one",
            "write the frame that is meant as a file of its own",
        )
    return dataset


def _decoded(dataset: Any) -> NDArray[Any]:
    """Stored values, [H, W] or [H, W, 3].

    Raises:
        DicomError: a compression that nothing installed decodes, or damaged pixels.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise DicomError(f"compressed as {syntax.name}, which is not decoded here", _CONVERT) from None
        if not decoder.is_available:
            remedy = f"install what reads it ({' or '.join(decoder.missing_dependencies)}), or {_CONVERT}"
            raise DicomError(f"compressed as {syntax.name}, for which no decoder is installed", remedy)
    try:
        pixels: NDArray[Any] = dataset.pixel_array
    except Exception as error:  # whatever a decoder stumbles over in a damaged file; it speaks of pixels
        raise DicomError(
            f"its pixels ({syntax.name}) cannot be decoded ({error})", f"fetch it again, or {_CONVERT}"
        ) from error
    return pixels


def _refuse_what_is_no_radiograph(dataset: Any) -> None:
    """
    Raises:
        DicomError: neither grey of 1 to 16 bits nor colour of 8, or pixels that are not square.
    """
    kind, stored = dataset.PhotometricInterpretation, dataset.get("BitsStored")
    samples, signed = dataset.get("SamplesPerPixel"), dataset.get("PixelRepresentation")
    grey = kind in _GREY and samples == 1 and stored in range(1, 17) and signed in (0, 1)
    colour = (kind == "RGB" or kind.startswith("YBR_")) and samples == 3 and stored == 8 and signed == 0
    if not grey and not colour:
        what = (
            f"PhotometricInterpretation {str(kind)[:16]}, SamplesPerPixel {samples}, BitsStored {stored}, "
            f"PixelRepresentation {signed}"
        )
        raise DicomError(f"{what}: neither grey of at most 16 bits nor RGB of 8", _CONVERT)
    if dataset.get("HighBit") != stored - 1:
        raise DicomError(
            f"HighBit {dataset.get('HighBit')} with BitsStored {stored}: it is not said where the values stand",
            _CONVERT,
        )
    aspect = dataset.get("PixelAspectRatio")
    if aspect and aspect[0] != aspect[1]:
        raise DicomError(
            f"PixelAspectRatio {aspect[0]}:{aspect[1]}: its pixels are not square", "resample it to square pixels"
        )


def _displayed(pixels: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    """Stored values [H, W] -> [H, W] uint8, through a table of all values that the stored bits can hold."""
    stored, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
    lowest = -(2 ** (stored - 1)) if signed else 0
    found = int(pixels.min()), int(pixels.max())
    if found[0] < lowest or found[1] >= lowest + 2**stored:
        remedy = f"correct BitsStored, or {_CONVERT}"
        raise DicomError(f"values from {found[0]} to {found[1]}, which BitsStored {stored} cannot hold", remedy)
    present = np.zeros(2**stored, dtype=bool)  # which values the image has
    index = pixels.astype(np.int32) - lowest
    present[index] = True
    values = np.arange(2**stored, dtype=np.float64) + lowest  # the table: a value a place, from here to its grey
    present &= ~_is_padding(values, dataset)
    if modality := dataset.get("ModalityLUTSequence"):
        values = _through(values, *_lut(modality[0], dataset))
    else:
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        values = values * (1.0 if slope is None else float(slope)) + (0.0 if intercept is None else float(intercept))
    if voi := dataset.get("VOILUTSequence"):
        first, table = _lut(voi[0], dataset)
        values, ends = _through(np.rint(values), first, table), (table.min(), table.max())
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        values, ends = _windowed(values, dataset), (0.0, 1.0)
    else:
        shown = values[present]
        ends = (shown.min(), shown.max()) if len(shown) else (0.0, 0.0)
    low, high = ends
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    if dataset.PhotometricInterpretation == "MONOCHROME1" and high > low:
        scaled = 1 - scaled
    greys: NDArray[np.uint8] = np.rint(scaled * 255).astype(np.uint8)
    return greys[index]


def _is_padding(values: NDArray[np.float64], dataset: Any) -> NDArray[np.bool_]:
    """Which stored values only fill the place around the image."""
    padding = dataset.get("PixelPaddingValue")
    if padding is None:
        return np.zeros(values.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit", padding)
    return (values >= min(padding, limit)) & (values <= max(padding, limit))


def _lut(item: Any, dataset: Any) -> tuple[int, NDArray[np.float64]]:
    """A Modality or VOI LUT: the value that its first entry is for, and the entries."""
    count, first, _ = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    entries = item.LUTData
    if isinstance(entries, bytes):
        # 8 bits may be packed
        order, width = ("<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">", len(entries) // count)
        entries = np.frombuffer(entries[: count * width], dtype=f"{order}u{width}")
    table = np.asarray(entries, dtype=np.float64)
    if len(table) < count:
        raise ValueError(f"a LUT of {len(table)} entries, where its descriptor says {count}")
    return first, table[:count]


def _through(values: NDArray[np.float64], first: int, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values through a LUT: the first entry for all below it, the last for all above."""
    return table[np.clip(values - first, 0, len(table) - 1).astype(np.int64)]


def _windowed(values: NDArray[np.float64], dataset: Any) -> NDArray[np.float64]:
    """The first window, as numbers from 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR":
        if width < 1:
            raise DicomError(f"WindowWidth {width:g}, and it is at least 1", "correct or remove the window")
        center, width = center - 0.5, width - 1
    elif width <= 0 or function not in ("LINEAR_EXACT", "SIGMOID"):
        raise DicomError(f"VOILUTFunction {function[:16]} with WindowWidth {width:g}", "correct or remove the window")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -50, 50)))
    if width == 0:  # a threshold
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _first(value: Any) -> float:
    return float(value if isinstance(value, (int, float)) else value[0])
