"""A radiograph as a small data URI."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from mrg_r1.data.images import ImageError, load_image

_SIDE = 384  # pixels of the longer side on the page
_AS_PNG = 128  # smaller images are kept to the last bit


@lru_cache(maxsize=1024)
def picture(path: Path, study_id: str) -> str | None:
    """The radiograph in grey, at most `_SIDE` pixels; None where it cannot be read, which must not cost the page of a
    long run.
    """
    try:
        small = load_image(path, study_id).convert("L")
    except ImageError:
        return None
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(small.size) <= _AS_PNG else "jpeg"
    small.save(buffer, format=kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
