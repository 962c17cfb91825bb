"""A DICOM radiograph as 8-bit grey or RGB, the way a viewer shows it first.

pydicom parses and decodes; here are the rules of display. Only the image's own tags are read, so that no message can
quote the patient's.
"""

from __future__ import annotations

import math
import re
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config, dcmread
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

_GREY = ("MONOCHROME1", "MONOCHROME2")
_KEYWORDS = (
    "Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration BitsAllocated BitsStored HighBit "
    "PixelRepresentation NumberOfFrames PixelAspectRatio PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing "
    "PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter "
    "WindowWidth VOILUTFunction VOILUTSequence PresentationLUTShape FloatPixelData DoubleFloatPixelData PixelData"
).split()
# Where one is given the aspect need not be (PS3.3 C.7.6.3.1.7).
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_SAME_SPACING = 1.01  # how far apart rounding may take two that are meant to be one
# Overlay Bit Position of each of the sixteen overlays that a file may have (PS3.3 C.9.2)
_OVERLAY_BITS = [Tag(0x6000 + 2 * number, 0x0102) for number in range(16)]
# What may be quoted of a number that is none: longer texts may be the patient's, brought here by a damaged length.
_QUOTABLE = re.compile(r"[-+]?[\d.,/ ]{1,10}[A-Za-z%]{0,2}|nan|[-+]?inf", re.IGNORECASE)
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
    left out), and padding is black. MONOCHROME1 is inverted, so that air is dark. Colour of 8 bits is taken as it is.
    Bits above the stored ones are left out where an overlay's tag names them or all pixels have the same, and refused
    otherwise.

    Source: PS3.3 sections C.11.1 (modality), C.11.2 (VOI), C.7.6.3 (pixels), C.7.5.1.1.2 (padding).

    Returns:
        [H, W] or [H, W, 3].

    Raises:
        DicomError: as `size_of_dicom`, a compression that nothing installed decodes, a kind of pixels that no
            radiograph has, values beyond the stored bits, a window or rescale that is no number, two tags that
            contradict each other about which end is white.
    """
    dataset = _header(data)
    try:
        _refuse_what_is_no_radiograph(dataset)
        pixels = _decoded(dataset)
        if dataset.PhotometricInterpretation in _GREY:
            return _displayed(pixels, dataset)
        if pixels.max() > 255:
            raise DicomError(f"values to {pixels.max()}, which BitsStored 8 cannot hold", f"correct it, or {_CONVERT}")
        return pixels.astype(np.uint8)
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
        dataset = dcmread(BytesIO(data), specific_tags=[*map(Tag, _KEYWORDS), *_OVERLAY_BITS])
        missing = [name for name in ("Rows", "Columns", "PhotometricInterpretation") if not dataset.get(name)]
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
    frames = _number(dataset, "NumberOfFrames", 1) or 1
    if frames != 1:
        raise DicomError(
            f"a DICOM file of {frames:g} frames, and a radiograph has one",
            "write the frame that is meant as a file of its own",
        )
    dataset.NumberOfFrames = 1  # as it was read here, and not as the decoder would read it again
    return dataset


def _decoded(dataset: Any) -> NDArray[Any]:
    """Pixels, [H, W] or [H, W, 3]: what is not compressed (but by RLE) with all bits of its words, and else stored
    values.

    Raises:
        DicomError: a compression that nothing installed decodes, or damaged pixels.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    words = not syntax.is_compressed or syntax == RLELossless
    if syntax.is_compressed:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise DicomError(f"compressed as {syntax.name}, which is not decoded here", _CONVERT) from None
        if not decoder.is_available:
            remedy = f"install what reads it ({' or '.join(decoder.missing_dependencies)}), or {_CONVERT}"
            raise DicomError(f"compressed as {syntax.name}, for which no decoder is installed", remedy)
    try:
        # pydicom itself would mask the evidence of values that the stored bits cannot hold
        whole: Any = {"correct_unused_bits": False}
        pixels: NDArray[Any] = get_decoder(syntax).as_array(dataset, **whole)[0] if words else dataset.pixel_array
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
    aspect = _numbers(dataset, "PixelAspectRatio")
    if aspect and (len(aspect) != 2 or aspect[0] != aspect[1]):
        shown = ":".join(f"{number:g}" for number in aspect)
        raise DicomError(f"PixelAspectRatio {shown}: its pixels are not square", "resample it to square pixels")
    for name in _SPACINGS:
        spacing = _numbers(dataset, name)
        if len(spacing) == 2 and not min(spacing) * _SAME_SPACING >= max(spacing) >= 0:
            raise DicomError(
                f"{name} {spacing[0]:g}\\{spacing[1]:g}: its pixels are not square",
                "resample it to square pixels, or correct the tag",
            )
    shape = str(dataset.get("PresentationLUTShape") or "")
    if shape in ("IDENTITY", "INVERSE") and kind in _GREY and (shape == "INVERSE") != (kind == "MONOCHROME1"):
        # PS3.3 C.8.11.3.1.2: INVERSE stands with MONOCHROME1, IDENTITY with MONOCHROME2
        raise DicomError(
            f"PresentationLUTShape {shape} with {kind}: they contradict each other about which end is white",
            "correct the one that is wrong (INVERSE goes with MONOCHROME1)",
        )


def _displayed(pixels: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    """Pixels [H, W] -> [H, W] uint8, through a table of all values that the stored bits can hold."""
    stored, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
    lowest = -(2 ** (stored - 1)) if signed else 0
    index, padding = _stored_values(pixels.astype(np.int64), dataset)
    index -= lowest
    present = np.zeros(2**stored, dtype=bool)  # which values the image has
    present[index[~padding]] = True
    values = np.arange(2**stored, dtype=np.float64) + lowest  # the table: a value a place, from here to its grey
    if modality := dataset.get("ModalityLUTSequence"):
        values = _through(values, *_lut(modality[0], dataset, negative=lowest < 0))
    else:
        slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
        if slope == 0:
            raise DicomError("RescaleSlope 0: every pixel becomes the same", "correct or remove the rescale")
        with np.errstate(over="ignore"):
            values = values * slope + intercept
        if not np.isfinite(values).all():
            raise DicomError(
                f"RescaleSlope {slope:g} and RescaleIntercept {intercept:g} make values that are not finite",
                "correct or remove the rescale",
            )
    window = [_numbers(dataset, name) for name in ("WindowCenter", "WindowWidth")]
    if voi := dataset.get("VOILUTSequence"):
        first, table = _lut(voi[0], dataset, negative=bool(values.min() < 0))
        values, ends = _through(np.rint(values), first, table), (table.min(), table.max())
    elif all(window):
        values, ends = _windowed(values, window[0][0], window[1][0], dataset), (0.0, 1.0)
    else:
        shown = values[present]
        ends = (shown.min(), shown.max()) if len(shown) else (0.0, 0.0)
    low, high = ends
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    if dataset.PhotometricInterpretation == "MONOCHROME1" and high > low:
        scaled = 1 - scaled
    greys: NDArray[np.uint8] = np.rint(scaled * 255).astype(np.uint8)[index]
    greys[padding] = 0
    return greys


def _stored_values(words: NDArray[np.int64], dataset: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Words -> the values that their stored bits hold, and which pixels only fill the place around the image.

    Raises:
        DicomError: bits above the stored ones that belong to the values.
    """
    stored, allocated, signed = (
        int(dataset[name].value) for name in ("BitsStored", "BitsAllocated", "PixelRepresentation")
    )
    values = words & (2**stored - 1)
    if signed:
        values = np.where(values >= 2 ** (stored - 1), values - 2**stored, values)
    padding = _is_padding(words, dataset) | _is_padding(values, dataset)
    overlays = sum(1 << position for position in _overlay_positions(dataset) if position >= stored)
    above = (2**allocated - 1) & ~(2**stored - 1) & ~overlays
    beyond = ((words ^ values) & above != 0) & ~padding
    if beyond.any():
        unused, syntax = (words & above)[~padding], dataset.file_meta.TransferSyntaxUID
        # The same in every pixel says nothing; but zeros beside a sign bit are what a large value has, and a codec
        # other than RLE has no unused bits.
        codec = syntax.is_compressed and syntax != RLELossless
        if codec or unused.min() != unused.max() or unused.flat[0] == 0:
            found = words[~padding]
            raise DicomError(
                f"values from {found.min()} to {found.max()}, which BitsStored {stored} cannot hold",
                f"correct BitsStored, or {_CONVERT}",
            )
    return values, padding


def _overlay_positions(dataset: Any) -> list[int]:
    """Bits of a pixel's word that hold an overlay."""
    return [int(dataset[tag].value) for tag in _OVERLAY_BITS if tag in dataset and dataset[tag].value is not None]


def _is_padding(values: NDArray[np.int64], dataset: Any) -> NDArray[np.bool_]:
    """Which pixels only fill the place around the image."""
    if not _numbers(dataset, "PixelPaddingValue"):
        return np.zeros(values.shape, dtype=bool)
    given = _number(dataset, "PixelPaddingValue", 0)
    limit = _number(dataset, "PixelPaddingRangeLimit", given)
    low, high = sorted(_as_pixel(int(value), dataset) for value in (given, limit))
    return (values >= low) & (values <= high)


def _as_pixel(value: int, dataset: Any) -> int:
    """A tag of 16 bits as a pixel's value: scanners write -2000 as 63536 beside signed pixels, and the reverse."""
    stored, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    lowest = -(2 ** (stored - 1)) if signed else 0
    for same in (value, value - 2**16, value + 2**16, *((value - 2**stored,) if signed else ())):
        if lowest <= same < lowest + 2**stored:
            return same
    return (value + 2**15) % 2**16 - 2**15 if signed else value % 2**16


def _numbers(dataset: Any, name: str) -> list[float]:
    """The numbers of a tag; empty where it is not there or has no value. Values behind the first may be empty and are
    passed over.

    A comma as the decimal mark is read as a point, but for three digits behind it, which could be thousands.

    Raises:
        DicomError: a value that is no finite number.
    """
    value = dataset.get(name)
    if value is None or value == "":
        return []
    numbers = []
    # a text or bytes under another VR are one value, and not the numbers of their letters
    for place, part in enumerate(value if isinstance(value, (MultiValue, list, tuple)) else [value]):
        text = str(part).strip()
        if place and not text:
            continue
        if re.fullmatch(r"[-+]?\d*,\d+", text) and not re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", text):
            text = text.replace(",", ".")
        # as PS3.5 writes decimal strings; Python's float would take more, such as 1_400
        number = float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII) else math.nan
        if not math.isfinite(number):
            quoted = repr(text) if not text or _QUOTABLE.fullmatch(text) else "a text"
            raise DicomError(f"{name} is {quoted}, which is no number", "correct the tag, or remove it")
        numbers.append(number)
    return numbers


def _number(dataset: Any, name: str, default: float) -> float:
    """The one number of a tag, or the default where it is not there.

    Raises:
        DicomError: not a number, or several.
    """
    numbers = _numbers(dataset, name)
    if len(numbers) > 1:
        raise DicomError(f"{name} has {len(numbers)} values, and it has one", "correct the tag, or remove it")
    return numbers[0] if numbers else default


def _lut(item: Any, dataset: Any, *, negative: bool) -> tuple[int, NDArray[np.float64]]:
    """A Modality or VOI LUT: the value that its first entry is for, and the entries.

    Args:
        negative: what goes through it may be below 0, so that a first value above 32767 is a negative one.
    """
    count, first, _ = (int(number) for number in item.LUTDescriptor)
    count = count % 2**16 or 2**16
    if negative and first >= 2**15:
        first -= 2**16
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


def _windowed(values: NDArray[np.float64], center: float, width: float, dataset: Any) -> NDArray[np.float64]:
    """A window, as numbers from 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
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
