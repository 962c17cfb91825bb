"""Bad input is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refuses(*named: object, error: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """The block ends in `error`, which names every file, field and value of `named`; the words around them are free."""
    with pytest.raises(error) as raised:
        yield
    for name in named:
        assert str(name) in str(raised.value), str(raised.value)
