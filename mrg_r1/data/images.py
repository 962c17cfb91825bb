"""Radiographs from files, as people have them: by content rather than extension, always RGB, broken ones refused by
name.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mrg_r1.data.dicom import DicomError, is_dicom, read_dicom, size_of_dicom

# Only formats that Pillow decodes itself: EPS, for one, would start Ghostscript on a file from outside.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
# Below Pillow's own warning (89 million). The largest detectors give about 20 million pixels.
MAX_PIXELS = 80_000_000
# Qwen2-VL's image processor refuses longer strips, hours into a run and without the study's id.
MAX_ASPECT = 200
# What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A radiograph that cannot be used; the message names the study, the file and the remedy."""


def load_image(path: Path, study_id: str) -> Image.Image:
    """Read one radiograph as 8-bit RGB, upright.

    The format is read from the content, the extension is not looked at. EXIF orientation is applied. Transparency is
    laid over black. Palettes are resolved. Greyscale of more than 8 bits is scaled so that the image's own minimum and
    maximum become 0 and 255 (12-bit data in 16-bit files would be near black under a fixed scale). Of a file with
    several frames the first is read. DICOM files come as a viewer shows them first (`data.dicom`).

    Args:
        path: the file.
        study_id: named in errors.

    Returns:
        An RGB image, decoded in memory; the file is closed.

    Raises:
        ImageError: missing, unreadable, not an image, truncated, more than `MAX_PIXELS` pixels, a side more than
            `MAX_ASPECT` times the other, a colour mode that cannot be turned into RGB, or a DICOM file that is no
            radiograph or that nothing installed decodes.
    """
    image = _decode(path, study_id)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODING_ERRORS as error:
        raise _refusal(
            path, study_id, f"mode {image.mode!r} cannot be read as RGB ({error})", "save it as an 8-bit PNG"
        ) from error


def check_image(path: Path, study_id: str) -> None:
    """Read the whole file once as `load_image` would, checksums included, and keep nothing.

    Raises:
        ImageError: as `load_image`, or a checksum that does not match.
    """
    data = _read(path, study_id)
    try:
        if not is_dicom(data):
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                image.verify()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        pass  # _decode says it better
    except _DECODING_ERRORS as error:
        raise _damaged(path, study_id, error) from error
    _decode(path, study_id, data)


def image_problem(path: Path, study_id: str) -> str | None:
    """What `check_image` says against a file, or None."""
    try:
        check_image(path, study_id)
    except ImageError as error:
        return str(error)
    return None


def _decode(path: Path, study_id: str, data: bytes | None = None) -> Image.Image:
    if data is None:
        data = _read(path, study_id)
    try:
        if is_dicom(data):
            _check_size(path, study_id, *size_of_dicom(data))
            return Image.fromarray(read_dicom(data))
        image = Image.open(BytesIO(data), formats=FORMATS)
        _check_size(path, study_id, *image.size)
        if any(";16" in str(tile.args) for tile in image.tile if image.mode in ("RGB", "RGBA", "LA")):
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image).astype(np.float64)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """[H, W] float64 -> [H, W] uint8, minimum to 0 and maximum to 255; a constant image is black."""
    if not np.isfinite(pixels).all():
        raise ValueError("a pixel is not finite")
    low, high = pixels.min(), pixels.max()
    if high == low:
        return np.zeros(pixels.shape, dtype=np.uint8)
    scaled: np.ndarray = np.rint((pixels - low) * (255.0 / (high - low))).astype(np.uint8)
    return scaled


def _bomb(path: Path, study_id: str, what: str) -> ImageError:
    return _refusal(
        path, study_id, f"too many pixels to be a radiograph ({what})", f"make it smaller than {MAX_PIXELS:,} pixels"
    )


def _damaged(path: Path, study_id: str, error: Exception) -> ImageError:
    return _refusal(path, study_id, f"truncated or damaged ({error})", "fetch the image again or take the study out")


def _refusal(path: Path, study_id: str, what: str, remedy: str) -> ImageError:
    return ImageError(f"study {study_id!r}: {path}: {what}; {remedy}")
