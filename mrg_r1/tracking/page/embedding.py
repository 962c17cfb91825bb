"""JSON inside HTML: nothing in it can end its element or begin another."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def embedded(content: Any) -> str:
    """`content` as JSON without `<`, `>` and `&`: a report that says `</script>` or `<!--` stays a report.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter, escape in _ESCAPES.items():
        text = text.replace(letter, escape)
    return text


def size_of(content: Any) -> int:
    """Bytes of `embedded(content)` in the file."""
    return len(embedded(content).encode("utf-8", errors="backslashreplace"))


def source_hash(text: str) -> str:
    """How a content security policy names an inline script or style: no other one runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
