"""A TIFF whose 0 is white, of a kind that Pillow knows with 0 as black alone."""

from __future__ import annotations

import struct

_BITS, _PHOTOMETRIC, _SHORT = 258, 262, 3


def zero_as_black(data: bytes) -> bytes | None:
    """The same file, said to have black at 0, where it is a TIFF of one channel with more than 8 bits whose 0 is white
    (TIFF 6.0, section 3); None for any other. Its pixels are then to be turned round.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return None
    (start,) = struct.unpack(f"{order}I", data[4:8])
    if start + 2 > len(data):
        return None
    (count,) = struct.unpack(f"{order}H", data[start : start + 2])
    place, deep = None, False
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, values, value = struct.unpack(f"{order}HHIH", data[entry : entry + 10])
        if (kind, values) == (_SHORT, 1):
            place = entry + 8 if (tag, value) == (_PHOTOMETRIC, 0) else place
            deep = deep or (tag == _BITS and value > 8)
    if place is None or not deep:
        return None
    return data[:place] + struct.pack(f"{order}H", 1) + data[place + 2 :]
