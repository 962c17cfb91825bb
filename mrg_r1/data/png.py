"""A PNG without the texts and profiles that are too large for Pillow, which refuses the whole file for them.

Nothing here reads pixels. What a file says about itself beside them (a colour profile, XMP, comments) is not looked at,
but for the orientation, whose chunk stays.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"iCCP", b"iTXt", b"zTXt", b"tEXt")
_LARGEST = 2**20  # bytes of one, inflated: Pillow's limit (PngImagePlugin.MAX_TEXT_CHUNK)
_LARGEST_TOGETHER = 2**25  # well below Pillow's (MAX_TEXT_MEMORY)


def without_large_texts(data: bytes) -> bytes:
    """A file as it is, or, where it is a PNG, without the texts and profiles that Pillow would refuse it for.

    They are inflated no further than the limit. A chunk whose checksum is wrong stays, so that it is still found.
    """
    if not data.startswith(_SIGNATURE):
        return data
    kept, begin, together = [], 0, 0
    for kind, start, end in _chunks(data):
        if kind not in _TEXTS:
            continue
        content = memoryview(data)[start + 8 : end - 4]
        size = _inflated(kind, content)
        if size <= _LARGEST and together + size <= _LARGEST_TOGETHER:
            together += size
        elif zlib.crc32(data[start + 4 : end - 4]) == struct.unpack(">I", data[end - 4 : end])[0]:
            kept.append(data[begin:start])
            begin = end
    return b"".join((*kept, data[begin:])) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each chunk that is whole (PNG specification, section 5.3)."""
    start = len(_SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        if start + 12 + length > len(data):
            return
        yield data[start + 4 : start + 8], start, start + 12 + length
        start += 12 + length


def _inflated(kind: bytes, content: memoryview) -> int:
    """Bytes of a chunk's text or profile, inflated where it is packed; more than `_LARGEST` where it is larger."""
    name, _, rest = bytes(content).partition(b"\0")
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    else:
        packed, rest = kind != b"tEXt", rest[1:] if kind != b"tEXt" else rest
    if not packed:
        return len(name) + len(rest)
    inflater = zlib.decompressobj()
    try:
        size = len(inflater.decompress(rest, _LARGEST))
    except zlib.error:
        return 0  # damaged: Pillow says so, or passes over it
    return _LARGEST + 1 if inflater.unconsumed_tail else size
