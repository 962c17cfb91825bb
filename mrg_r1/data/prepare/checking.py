"""The images of many studies, read once each before they are put into a manifest; and whether an interrupted run read
the same files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from mrg_r1.data.images import image_problem
from mrg_r1.data.prepare.conversion import JOURNAL_FILE
from mrg_r1.types import Study

CheckImages = Literal["none", "size", "open"]
Item = TypeVar("Item")
_BATCH = 64  # studies whose images are read at a time: all threads are busy, and little is lost when a run is killed


def image_problems(
    items: Iterable[Item], study_of: Callable[[Item], Study | None]
) -> Iterator[tuple[Item, str | None]]:
    """Each item in its order, with what is wrong with the first bad image of its study.

    Args:
        items: any number; read a batch at a time.
        study_of: the item's study, or None where there is nothing to check.
    """
    iterator = iter(items)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        while batch := list(islice(iterator, _BATCH)):
            yield from zip(batch, pool.map(lambda item: _problem(study_of(item)), batch), strict=True)


def problem_of_image(path: Path, study_id: str, check: CheckImages) -> str | None:
    """What is wrong with an image, or None: nothing is looked at, or that it is there and not empty, or all of it."""
    if check == "open":
        return image_problem(path, study_id)
    if check == "none":
        return None
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return f"{path}: an empty file or none at all; fetch it again"
    except OSError as error:
        return f"{path}: {error.strerror}; fetch the image or take the study out"
    return None


def refuse_changed_sources(output: Path, sources: Sequence[Path]) -> None:
    """Stop where a conversion into `output` was interrupted and a file that it reads has changed since.

    Raises:
        ValueError: what an earlier run has settled would be mixed with the new content.
        OSError: a file cannot be looked at.
    """
    journal = output / JOURNAL_FILE
    if not journal.is_file():
        return
    files = (file for source in sources for file in (source.rglob("*.xml") if source.is_dir() else (source,)))
    for source in files:
        if source.stat().st_mtime > journal.stat().st_mtime:
            remedy = f"remove {journal} to begin anew"
            raise ValueError(
                f"{source}: changed after a run that was interrupted, whose work lies in {output}; {remedy}"
            )


def _problem(study: Study | None) -> str | None:
    if study is None:
        return None
    problems = (image_problem(image.path, study.id) for image in study.images)
    return next((problem for problem in problems if problem is not None), None)
