"""Radiographs from files, as people have them: by content rather than extension, always RGB, broken ones refused by
name.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mrg_r1.data.dicom import DicomError, is_dicom, read_dicom, size_of_dicom
from mrg_r1.data.metadata import bits_of_jpeg, without_texts
from mrg_r1.data.tiff import zero_as_black

# Only formats that Pillow decodes itself: EPS, for one, would start Ghostscript on a file from outside.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
# Below Pillow's own warning (89 million). The largest detectors give about 20 million pixels.
MAX_PIXELS = 80_000_000
# Qwen2-VL's image processor refuses longer strips, hours into a run and without the study's id.
MAX_ASPECT = 200
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_FORMAT, _TIFF_NO_DATA = 258, 262, 339, 42113
_TIFF_LOWEST = {280: "MinSampleValue", 340: "SMinSampleValue"}
_TIFF_HIGHEST = {281: "MaxSampleValue", 341: "SMaxSampleValue"}
_TIFF_SIGNED = 2  # of SampleFormat
_ZERO_IS_WHITE = "zero is white"  # in an image's `info`
# What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A radiograph that cannot be used; the message names the study, the file and the remedy."""


def load_image(path: Path, study_id: str) -> Image.Image:
    """Read one radiograph as 8-bit RGB, upright.

    The format is read from the content, the extension is not looked at. EXIF orientation is applied. Transparency is
    laid over black. Palettes are resolved. Greyscale of more than 8 bits is scaled so that the image's own minimum and
    maximum become 0 and 255 (12-bit data in 16-bit files would be near black under a fixed scale); values that a tag
    marks as no data are left out of that and are black, and a TIFF whose 0 is white is inverted. Of a file with several
    frames the first is read. DICOM files come as a viewer shows them first (`data.dicom`).

    Args:
        path: the file.
        study_id: named in errors.

    Returns:
        An RGB image, decoded in memory; the file is closed.

    Raises:
        ImageError: missing, unreadable, not an image, truncated, more than `MAX_PIXELS` pixels, a side more than
            `MAX_ASPECT` times the other, a colour mode that cannot be turned into RGB, every pixel the same, or a
            DICOM file that is no radiograph or that nothing installed decodes.
    """
    return _shown(path, study_id, _decode(path, study_id))


def check_image(path: Path, study_id: str) -> None:
    """Read the whole file once as `load_image` would, checksums included, and keep nothing.

    Raises:
        ImageError: as `load_image`, or a checksum that does not match.
    """
    data = _readable(path, study_id)
    try:
        if not is_dicom(data):
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                image.verify()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        pass  # _decode says it better
    except _DECODING_ERRORS as error:
        raise _damaged(path, study_id, error) from error
    _shown(path, study_id, _decode(path, study_id, data))


def image_problem(path: Path, study_id: str) -> str | None:
    """What `check_image` says against a file, or None."""
    try:
        check_image(path, study_id)
    except ImageError as error:
        return str(error)
    return None


def _decode(path: Path, study_id: str, data: bytes | None = None) -> Image.Image:
    if data is None:
        data = _readable(path, study_id)
    try:
        if is_dicom(data):
            _check_size(path, study_id, *size_of_dicom(data))
            return Image.fromarray(read_dicom(data))
        turned = zero_as_black(data)
        image = Image.open(BytesIO(data if turned is None else turned), formats=FORMATS)
        image.info[_ZERO_IS_WHITE] = turned is not None
        _check_size(path, study_id, *image.size)
        if any(";16" in str(tile.args) for tile in image.tile if image.mode[0] not in "IF"):
            # Pillow keeps the upper 8 bits of each: 12-bit data would be near black
            remedy = "save it as grey of 16 bits or colour of 8"
            raise _refusal(path, study_id, f"16 bits a channel of {image.mode}, of which only 8 would be read", remedy)
        image.load()
    except ImageError:
        raise
    except DicomError as error:
        raise _refusal(path, study_id, error.what, error.remedy) from error
    except Image.DecompressionBombError as error:
        raise _bomb(path, study_id, str(error)) from error
    except Image.UnidentifiedImageError as error:
        if (bits := bits_of_jpeg(data)) not in (None, 8):
            remedy = "save it as grey of 16 bits (PNG or TIFF)"
            raise _refusal(path, study_id, f"a JPEG of {bits} bits a sample, of which 8 are read", remedy) from error
        remedy = f"replace it by DICOM or one of {', '.join(FORMATS)}, or take the study out"
        raise _refusal(
            path, study_id, f"not an image that can be read (it begins with {data[:8]!r})", remedy
        ) from error
    except _DECODING_ERRORS as error:
        raise _damaged(path, study_id, error) from error
    return image


def _check_size(path: Path, study_id: str, width: int, height: int) -> None:
    """Refuse what would fill the memory, or the image processor would refuse later, before it is decoded."""
    if width * height > MAX_PIXELS:
        raise _bomb(path, study_id, f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        remedy = "crop it to the radiograph"
        raise _refusal(
            path, study_id, f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other", remedy
        )


def _readable(path: Path, study_id: str) -> bytes:
    """A file's content, without texts and profiles for which its decoder would refuse it."""
    return without_texts(_read(path, study_id))


def _read(path: Path, study_id: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _refusal(path, study_id, "no such file", "fetch the image or take the study out") from error
    except OSError as error:
        raise _refusal(path, study_id, f"cannot be read ({error.strerror})", "make it a readable file") from error
    if not data:
        raise _refusal(path, study_id, "the file is empty", "fetch it again or take the study out")
    return data


def _shown(path: Path, study_id: str, image: Image.Image) -> Image.Image:
    """A decoded image as upright RGB that shows something."""
    meaning = _meaning(path, study_id, image)
    try:
        shown = _to_rgb(_upright(image), *meaning)
    except _DECODING_ERRORS as error:
        raise _refusal(
            path, study_id, f"mode {image.mode!r} cannot be read as RGB ({error})", "save it as an 8-bit PNG"
        ) from error
    ends: Any = shown.getextrema()  # of each channel
    if all(low == high for low, high in ends):
        what = f"nothing to see: every pixel is {shown.getpixel((0, 0))} once it is shown"
        remedy = "look at its transparency, window and rescale, fetch it again, or take the study out"
        raise _refusal(path, study_id, what, remedy)
    return shown


def _upright(image: Image.Image) -> Image.Image:
    """As its orientation says. One that cannot be read says nothing, and its pixels are whole: as viewers show it."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):
        return image


def _meaning(path: Path, study_id: str, image: Image.Image) -> tuple[bool, float | None]:
    """Of grey of more than 8 bits, which Pillow hands over as it is stored: whether 0 is white, and the value that
    stands where there is no image.

    Raises:
        ImageError: pixels beyond the ends that the file states, a value for no data that is no number, numbers that
            Pillow reads as others (signed ones of 8 bits, the upper half of unsigned ones of 32).
    """
    signed = image.format == "TIFF" and _TIFF_SIGNED in image.tag_v2.get(_TIFF_FORMAT, ())  # type: ignore[attr-defined]
    if image.mode[0] not in "IF":
        if signed:
            what = f"signed numbers of 8 bits (SampleFormat, tag {_TIFF_FORMAT}, is {_TIFF_SIGNED})"
            raise _refusal(path, study_id, what, "save it unsigned, or with 16 bits")
        return False, None
    clear = image.info.get("transparency")  # of a grey PNG
    no_data = float(clear) if isinstance(clear, int) else None
    if image.format != "TIFF":
        return False, no_data
    tags = image.tag_v2  # type: ignore[attr-defined]  # a TIFF's
    if _TIFF_NO_DATA in tags:
        no_data = _stated(path, study_id, tags[_TIFF_NO_DATA], "GDAL_NODATA", _TIFF_NO_DATA)
    pixels = np.asarray(image)
    if image.mode == "I" and not signed and pixels.min() < 0:
        what = f"pixels over {2**31 - 1:,} (BitsPerSample, tag {_TIFF_BITS}, is 32)"
        raise _refusal(path, study_id, what, "save it with 16 bits")
    pixels = pixels[pixels != no_data]
    for tag, name in (_TIFF_LOWEST | _TIFF_HIGHEST).items():
        if not pixels.size or tag not in tags:
            continue
        stated = _stated(path, study_id, tags[tag], name, tag)
        if pixels.min() < stated if tag in _TIFF_LOWEST else pixels.max() > stated:
            what = f"{name} (tag {tag}) is {stated:g}, and its pixels go from {pixels.min()} to {pixels.max()}"
            raise _refusal(path, study_id, what, "correct the tag, or what fills the place around the image")
    return image.info[_ZERO_IS_WHITE] or tags.get(_TIFF_PHOTOMETRIC) == 0, no_data


def _stated(path: Path, study_id: str, value: Any, name: str, tag: int) -> float:
    """The number that a TIFF's tag states for its one channel, written as a number or as a text."""
    written = str(value[0] if isinstance(value, tuple) and len(value) == 1 else value).strip("\0 ")
    try:
        return float(written)
    except ValueError:
        what = f"{name} (tag {tag}) is {written[:20]!r}, which is no number"
        raise _refusal(path, study_id, what, "correct or remove the tag") from None


def _to_rgb(image: Image.Image, zero_is_white: bool, no_data: float | None) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _to_eight_bits(np.asarray(image).astype(np.float64), zero_is_white, no_data)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _to_eight_bits(pixels: np.ndarray, zero_is_white: bool, no_data: float | None) -> np.ndarray:
    """[H, W] float64 -> [H, W] uint8: minimum to 0 and maximum to 255, or the reverse; black where there is no data."""
    absent = np.isnan(pixels) if no_data is not None and np.isnan(no_data) else pixels == no_data
    there = pixels[~absent]
    if not np.isfinite(there).all():
        raise ValueError("a pixel is not finite")
    if not there.size or there.min() == there.max():
        return np.zeros(pixels.shape, dtype=np.uint8)
    low, high = there.min(), there.max()
    scaled = (np.where(absent, low, pixels) - low) * (255.0 / (high - low))
    shown: np.ndarray = np.rint(255.0 - scaled if zero_is_white else scaled).astype(np.uint8)
    shown[absent] = 0
    return shown


def _bomb(path: Path, study_id: str, what: str) -> ImageError:
    return _refusal(
        path, study_id, f"too many pixels to be a radiograph ({what})", f"make it smaller than {MAX_PIXELS:,} pixels"
    )


def _damaged(path: Path, study_id: str, error: Exception) -> ImageError:
    return _refusal(path, study_id, f"truncated or damaged ({error})", "fetch the image again or take the study out")


def _refusal(path: Path, study_id: str, what: str, remedy: str) -> ImageError:
    return ImageError(f"study {study_id!r}: {path}: {what}; {remedy}")
