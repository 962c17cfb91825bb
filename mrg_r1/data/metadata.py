"""A PNG or JPEG 2000 without the texts and profiles that their decoders refuse the whole file for.

Nothing here reads pixels. What a file says about itself beside them (a colour profile, XMP, comments) is not looked at,
but for the orientation, whose chunk stays.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"iTXt", b"zTXt", b"tEXt")
_UNUSED = (b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs")  # of colour and size on paper
_LARGEST = 2**20  # bytes of one text, inflated: Pillow's limit (PngImagePlugin.MAX_TEXT_CHUNK)
_LARGEST_TOGETHER = 2**25  # well below Pillow's (MAX_TEXT_MEMORY)
_JPEG2000 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_LARGEST_BOX = 2**19  # OpenJPEG passes over a box of less than a megabyte


def without_texts(data: bytes) -> bytes:
    """A file as it is, or, where it is a PNG or JPEG 2000, without what its decoder would refuse it for.

    Texts are inflated no further than the limit. A chunk whose checksum is wrong stays, so that it is still found.
    """
    if data.startswith(_PNG):
        spans = list(_of_png(data))
    elif data.startswith(_JPEG2000):
        spans = list(_of_jpeg2000(data))
    else:
        return data
    kept, begin = [], 0
    for start, end in spans:
        kept.append(data[begin:start])
        begin = end
    return b"".join((*kept, data[begin:])) if kept else data


def bits_of_jpeg(data: bytes) -> int | None:
    """Bits a sample that the frame header of a JPEG states (ITU-T T.81, B.2.2); None where there is none."""
    place = 2
    while data.startswith(b"\xff\xd8\xff") and place + 5 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables and extensions
            return data[place + 4]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def _of_png(data: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk that is to be left out."""
    together = 0
    for kind, start, end in _chunks(data):
        if kind in _TEXTS:
            size = _inflated(kind, memoryview(data)[start + 8 : end - 4])
            if size <= _LARGEST and together + size <= _LARGEST_TOGETHER:
                together += size
                continue
        elif kind not in _UNUSED:
            continue
        if zlib.crc32(memoryview(data)[start + 4 : end - 4]) == struct.unpack(">I", data[end - 4 : end])[0]:
            yield start, end


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each chunk that is whole (PNG specification, section 5.3)."""
    start = len(_PNG)
    while start + 12 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        if start + 12 + length > len(data):
            return
        yield data[start + 4 : start + 8], start, start + 12 + length
        start += 12 + length


def _inflated(kind: bytes, content: memoryview) -> int:
    """Bytes of a chunk's text, inflated where it is packed; more than `_LARGEST` where it is larger, or packed by a
    method that there is not.
    """
    name, _, rest = bytes(content).partition(b"\0")
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        if rest[:1] not in (b"", b"\0"):
            return _LARGEST + 1
        packed, rest = True, rest[1:]
    else:
        packed = False
    if not packed:
        return len(name) + len(rest)
    inflater = zlib.decompressobj()
    try:
        size = len(inflater.decompress(rest, _LARGEST))
    except zlib.error:
        return 0  # damaged: Pillow passes over it
    return _LARGEST + 1 if inflater.unconsumed_tail else size


def _of_jpeg2000(data: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each box before the pixels that is neither needed nor small (ISO 15444-1, annex I.4)."""
    start = 0
    while start + 16 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        if length == 1:
            (length,) = struct.unpack(">Q", data[start + 8 : start + 16])
        if kind == b"jp2c" or length < 8 or start + length > len(data):
            return
        if kind not in (b"jP  ", b"ftyp", b"jp2h") and length > _LARGEST_BOX:
            yield start, start + length
        start += length
