"""Studies of collections that come with labels: drafts of many studies, gathered from rows of images, are settled.

What the tables of CheXpert, NIH and PadChest say enters, kept and refused studies of a `Conversion` leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

from mrg_r1.console import progress
from mrg_r1.data.prepare.checking import CheckImages, problem_of_image
from mrg_r1.data.prepare.conversion import Conversion, Counts, print_outcome
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.types import Study, StudyImage

Said = tuple[int | None, ...]  # 14 values in CheXbert's order
_AT_ONCE = 256  # studies that are held while threads look at their images


@dataclass(frozen=True)
class ImageChoices:
    """Which images a study is made of, and what is looked at of them."""

    views: Literal["frontal", "all"] = "frontal"
    """`frontal`: no study without one; `all`: a frontal, a lateral, then the others."""
    max_images: int = 2
    """Images a study, at most."""
    check_images: CheckImages = "size"
    """Of the images taken: nothing, that they are there and not empty, or that they can be decoded (hours)."""

    def chosen(self, images: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
        """Of a study's images (path and view) those that it is shown with; none where it has to be refused."""
        frontal = [image for image in images if image[1] == "frontal"]
        if self.views == "frontal":
            return frontal[: self.max_images]
        # a frontal and a lateral say more than two frontals
        pair = [*frontal[:1], *[image for image in images if image[1] == "lateral"][:1]]
        return [*pair, *(image for image in images if image not in pair)][: self.max_images]


@dataclass(slots=True)
class Draft:
    """A study as the rows of its images have it, before anybody has looked at them."""

    id: str
    patient_id: str
    split: str
    where: str  # the row that names it first
    said: Said | None
    images: list[tuple[str, str | None]] = field(default_factory=list)  # absolute path, view
    report: str | None = None
    fault: str | None = None  # the first thing that is wrong with it, and the remedy
    fault_where: str = ""

    def refuse(self, fault: str, where: str) -> None:
        """The first fault stands."""
        if self.fault is None:
            self.fault, self.fault_where = fault, where


@dataclass(frozen=True)
class Nameless:
    """A row whose study cannot be told."""

    reason: str
    where: str


@dataclass(frozen=True)
class Prepared:
    """What a converter of labelled studies did."""

    counts: Counts
    found: int  # studies that an interrupted run had settled
    notes: list[str]  # what somebody who trains on them should know

    def show(self, title: str, output: Path) -> None:
        """What was read, kept and refused, and the notes."""
        if self.found:
            print(f"{output}: went on after the {self.found:,} studies of the run that was interrupted")
        print_outcome(title, self.counts, output)
        for note in self.notes:
            print(f"note: {note}")


def check_folders(root: Path, images: Path, choices: ImageChoices) -> None:
    """
    Raises:
        ValueError: no image a study.
        OSError: a folder that is not there.
    """
    if choices.max_images < 1:
        raise ValueError(f"at most {choices.max_images} images a study; a study needs one")
    for folder, what in ((root, "the collection"), (images, "images")):
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: no such folder of {what}; give the folder that it was unpacked into")


def table_of(root: Path, name: str) -> Path | None:
    """The table NAME or NAME.gz of a folder, or None.

    Raises:
        ValueError: both are there.
    """
    found = [path for path in (root / name, root / f"{name}.gz") if path.is_file()]
    if len(found) > 1:
        raise ValueError(f"{root}: both {found[0].name} and {found[1].name}; leave one of them there")
    return found[0] if found else None


def said_of_cells(cells: Sequence[str]) -> tuple[Said, str | None]:
    """14 cells of CheXpert's convention (1.0, 0.0, -1.0 or nothing) as values in CheXbert's order, and what is wrong
    with the first bad one.

    Args:
        cells: in CheXbert's order.
    """
    values: list[int | None] = []
    for name, cell in zip(OBSERVATIONS, cells, strict=True):
        known, value = _value(cell)
        if not known:
            return (), f"column {name}: {cell!r}; a label is 1.0 (positive), 0.0 (negative), -1.0 (uncertain) or empty"
        values.append(value)
    try:
        classes_of_values(values)
    except ValueError as error:
        return (), f"column {error}"
    return tuple(values), None


def said_of_names(
    names: Iterable[str], observation_of: Mapping[str, str | None], normal: str, column: str
) -> tuple[Said | None, str | None, list[str]]:
    """A list of findings as 14 values: 1 for what it names, null for the rest, as a list that does not name a finding
    does not deny it.

    Args:
        names: as the table has them.
        observation_of: name -> observation; None where no observation is of it.
        normal: the name that says that there is no finding, alone.
        column: for messages.

    Returns:
        The values, or None and what is wrong with the list; and the names without an observation.
    """
    found = list(dict.fromkeys(names))
    if unknown := [name for name in found if name not in observation_of]:
        return None, f"column {column}: {unknown[0]!r}; the labels are {', '.join(observation_of)}", []
    if normal in found and len(found) > 1:
        others = ", ".join(name for name in found if name != normal)
        return None, f"column {column}: {normal!r} beside {others}; keep what is right", []
    unmapped = [name for name in found if observation_of[name] is None]
    said = {observation_of[name] for name in found} - {None}
    if not said:
        what = f"none of the 14 observations is of {', '.join(unmapped)}, so there is nothing to compare with"
        return None, f"column {column}: {what}", unmapped
    return tuple(1 if name in said else None for name in OBSERVATIONS), None, unmapped


def unmapped_note(unmapped: Mapping[str, int], studies: int) -> list[str]:
    """What to say of findings that no observation is of: each with its number of studies, the most frequent first."""
    if not unmapped:
        return []
    told = ", ".join(f"{name} ({count:,})" for name, count in sorted(unmapped.items(), key=lambda item: -item[1]))
    return [f"left out, as none of the 14 observations is of them (of {studies:,} studies): {told}"]


def refuse_other_convention(path: Path) -> NoReturn:
    """A table of which not one label is empty, though its labels are what reports say.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{path}: not one label of its rows is empty, so its 0 is silence as well as denial (0 and 1 alone, or the "
        "class numbers 0 to 3); write 1 (positive), 0 (denied), -1 (uncertain) and nothing for what is not mentioned"
    )


def settle(
    drafts: Collection[Draft], nameless: Iterable[Nameless], conversion: Conversion, choices: ImageChoices
) -> None:
    """Keep or refuse every draft that is not settled yet."""
    for draft, found in progress(_looked_at(drafts, conversion, choices), "reading studies", total=len(drafts)):
        if draft.fault is not None:
            conversion.refuse(draft.id, draft.split, draft.fault, draft.fault_where, draft.report)
        elif isinstance(found, Study):
            conversion.keep(found, draft.where)
        elif found is not None:
            conversion.refuse(draft.id, draft.split, found, draft.where, draft.report)
    for row in nameless:
        conversion.refuse("", "", row.reason, row.where)


def seeded_split(patient: str, seed: int, shares: Sequence[tuple[str, float]]) -> str:
    """The split of a patient, by a hash of the two alone: neither order nor which other patients there are moves it.

    Args:
        shares: split and its share; the shares add up to 1.
    """
    place = int.from_bytes(hashlib.sha256(f"{seed} {patient}".encode()).digest()[:8]) / 2**64
    for split, share in shares[:-1]:
        if place < share:
            return split
        place -= share
    return shares[-1][0]


@lru_cache(maxsize=1024)
def _value(cell: str) -> tuple[bool, int | None]:
    """Whether a cell is a label, and which."""
    cell = cell.strip()
    try:
        number = float(cell) if cell else None
    except ValueError:
        return False, None
    return number in (None, 1, 0, -1), None if number is None or number not in (1, 0, -1) else int(number)


def _looked_at(
    drafts: Iterable[Draft], conversion: Conversion, choices: ImageChoices
) -> Iterator[tuple[Draft, Study | str | None]]:
    """Every draft with its study, the reason why there is none, or None where it is settled already."""

    def look(draft: Draft) -> Study | str | None:
        return None if draft.fault is not None or conversion.done(draft.id) else _study(draft, choices)

    iterator = iter(drafts)
    if choices.check_images == "none":
        yield from ((draft, look(draft)) for draft in iterator)
        return
    with ThreadPoolExecutor() as pool:  # files of a network are waited for together, and Pillow decodes in parallel
        while batch := list(islice(iterator, _AT_ONCE)):
            yield from zip(batch, pool.map(look, batch), strict=True)


def _study(draft: Draft, choices: ImageChoices) -> Study | str:
    if (draft.said is None or all(value is None for value in draft.said)) and draft.report is None:
        return "no label: each of the 14 is empty, so there is nothing to learn from or to compare with"
    images = tuple(StudyImage(Path(path), view) for path, view in choices.chosen(draft.images))
    if not images:
        return "no frontal image among its views; --views all takes the others"
    for image in images:
        problem = problem_of_image(image.path, draft.id, choices.check_images)
        if problem is not None:
            return problem
    return Study(
        id=draft.id,
        patient_id=draft.patient_id,
        images=images,
        report=draft.report,
        split=draft.split,
        said=draft.said,
    )
