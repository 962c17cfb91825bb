"""What of patients may leave the machine by a backend: nothing by default, a few reports or radiographs where the
recipe says so (`tracking.share_text`, `tracking.share_images`), never a study's id or a folder's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from PIL import Image

from mrg_r1.data.images import load_image
from mrg_r1.types import Study

Sample = tuple[Study, Mapping[str, Any]]  # a study of the validation split, and its prediction

SHARED = 8  # reports or studies a validation
SIDE = 224  # pixels of a shared radiograph


@dataclass(frozen=True)
class Shared:
    """What a backend may pass on of one validated study.

    Attributes:
        number: in place of the study's id, which may be a patient's.
        report: what the policy wrote, and `reference` what the radiologist wrote; None unless text is shared.
    """

    number: int
    report: str | None
    reference: str | None
    _study: Study | None

    @property
    def has_image(self) -> bool:
        return self._study is not None

    def image(self) -> Image.Image:
        """The study's first radiograph, at most `SIDE` pixels a side.

        Raises:
            ValueError: images are not shared.
        """
        if self._study is None:
            raise ValueError("tracking.share_images is off")
        image = load_image(self._study.images[0].path, self._study.id)
        image.thumbnail((SIDE, SIDE))
        return image


def shared_of(samples: Sequence[Sample], *, text: bool, images: bool) -> list[Shared]:
    """The first `SHARED` of a validation's studies, with what may leave; none where nothing may."""
    if not (text or images):
        return []
    return [
        Shared(number, row["text"] if text else None, study.report if text else None, study if images else None)
        for number, (study, row) in enumerate(samples[:SHARED])
    ]


def what_is_shared(*, text: bool, images: bool) -> str:
    """In words, for the line that says where it goes."""
    what = [f"sampled reports and their references of up to {SHARED} studies"] if text else []
    what += [f"radiographs (at most {SIDE} pixels) of up to {SHARED} studies"] if images else []
    return " and ".join(what)


def without_paths(value: Any, key: str = "") -> Any:
    """A recipe in which every path is cut to its last part: folders may be named after patients. The prompt's
    instruction stays.
    """
    if isinstance(value, Mapping):
        return {without_paths(str(name)): without_paths(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and key != "instruction" and ("/" in value or "\\" in value):
        return PurePath(value.replace("\\", "/")).name
    return value
