"""IU X-Ray as Open-i gives it: one XML a report, in NLMCXR_reports.tgz or in a folder.

Files from outside are read with care: nothing is unpacked, sizes are bounded, and an XML with a document type is not
read.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from xml.etree import ElementTree

from mrg_r1.data.prepare.headings import Headings, nearest
from mrg_r1.data.prepare.iu_xray.study import (
    OTHER_COLLECTION,
    IuCollection,
    IuImage,
    IuRefusal,
    IuStudy,
    image_of_another,
    study_number,
    without_repeats,
)
from mrg_r1.data.prepare.other_collections import names_another
from mrg_r1.data.study import ManifestError
from mrg_r1.labels.missing import is_missing

MAX_XML = 1_000_000  # bytes of one report; the largest of the collection has 8,967
MAX_ARCHIVE = 256 * 1024 * 1024  # bytes of the unpacked archive; the collection's has 40 million
_SECTIONS = {"FINDINGS": "findings", "IMPRESSION": "impression", "INDICATION": "indication", "COMPARISON": "comparison"}
_FETCH = "fetch NLMCXR_reports.tgz again"

# An XML file by name: its bytes, or why they were not read.
_File = tuple[str, bytes | None, str]


def read_open_i(source: Path) -> IuCollection:
    """Every XML of an archive or a folder, as a study or as a refusal.

    Args:
        source: NLMCXR_reports.tgz, the same as a plain tar, or a folder with `*.xml` in it at any depth.

    Returns:
        Studies with id `CXR<number>`, texts verbatim, images by Open-i's ids without views: the reports do not say
        which image is which (most of those with one image are captioned "PA and lateral").

    Raises:
        ManifestError: an archive that is damaged, cut short or unpacks to more than `MAX_ARCHIVE` bytes; no XML in it.
        OSError: it cannot be read.
    """
    files = _folder_files(source) if source.is_dir() else _archive_files(source)
    studies: list[IuStudy] = []
    refusals: list[IuRefusal] = []
    headings = Headings()
    for name, data, problem in files:
        where = f"{source}, {name}"
        number = study_number(PurePosixPath(name).stem)
        study_id = f"CXR{number}" if number else name
        if data is None:
            refusals.append(IuRefusal(study_id, where, problem))
            continue
        try:
            studies.append(_study(data, where, number, headings))
        except ValueError as error:
            refusals.append(IuRefusal(study_id, where, str(error)))
    if not studies and not refusals:
        raise ManifestError([f"{source}: no XML reports in it; {_FETCH}, or give the folder of its *.xml"])
    kept, repeats = without_repeats(studies)
    return IuCollection(source, "open-i", "Open-i reports (XML)", tuple(kept), (*refusals, *repeats), headings=headings)


def _study(data: bytes, where: str, number_of_file: str | None, headings: Headings) -> IuStudy:
    root = _parse(data)
    if root.tag != "eCitation":
        raise ValueError(f"element <{root.tag}>; an Open-i report is an <eCitation>")
    ids = [element.get("id") or "" for element in root.iter("uId")]
    number = study_number(ids[0]) if len(ids) == 1 else None
    if number is None:
        raise ValueError(f"element <uId>: {ids}; a report has one, such as CXR1000")
    if names_another(ids[0]):
        raise ValueError(f"element <uId>: {ids[0]!r:.80}: Open-i's layout, but {OTHER_COLLECTION}")
    if number_of_file is not None and number != number_of_file:
        raise ValueError(
            f"element <uId>: {ids[0]!r}, but the file is named for {number_of_file}; two ids for one study, fetch "
            "it again"
        )
    texts: dict[str, str] = {}
    for element in root.iter("AbstractText"):
        label = (element.get("Label") or "").strip().upper()
        if label not in _SECTIONS:
            meant = nearest(label, _SECTIONS, twice=("FINDINGS", "IMPRESSION"))
            if meant is None:
                if "".join(element.itertext()).strip():
                    headings.count((), (label or "(none)",))
                continue
            headings.count(((label, _SECTIONS[meant]),), ())
            label = meant
        if _SECTIONS[label] in texts:
            raise ValueError(f"<AbstractText Label={label!r}> stands twice; one report has one")
        texts[_SECTIONS[label]] = "".join(element.itertext())
    images = []
    for element in root.iter("parentImage"):
        name = (element.get("id") or "").strip()
        if not name:
            raise ValueError("element <parentImage> without an id; fetch the report again")
        if other := image_of_another(name, number):
            raise ValueError(f"<parentImage id={name!r}> is of study {other}, the report is {number}'s; fetch it again")
        images.append(IuImage(name))
    return IuStudy(
        id=f"CXR{number}",
        where=where,
        images=tuple(images),
        **{section: text for section, text in texts.items() if not is_missing(text, words=False)},
    )


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity that a file could define or fetch."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(
            f"<!DOCTYPE {name}>: a report has none, and one could define entities that fill the memory; fetch it again"
        )


def _parse(data: bytes) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(data)
        root: ElementTree.Element = parser.close()
    except ElementTree.ParseError as error:  # a SyntaxError
        raise ValueError(f"broken XML ({error}); fetch the report again") from error
    except LookupError as error:
        raise ValueError(f"broken XML ({error}); save it as UTF-8") from error
    return root


def _folder_files(folder: Path) -> Iterator[_File]:
    for path in sorted(folder.rglob("*.xml"), key=lambda path: (len(path.name), path.name, path)):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith("._"):  # left beside every file by macOS archives
            continue
        if not path.is_file():
            yield name, None, "not a file; take it out of the folder"
        elif path.stat().st_size > MAX_XML:
            yield name, None, _too_large(path.stat().st_size)
        else:
            yield name, path.read_bytes(), ""


def _archive_files(path: Path) -> Iterator[_File]:
    """The XML members of a tar, read one after the other straight from the stream."""
    number = 0
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw, path)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    number += 1
                    if (
                        not member.isdir()
                        and member.name.endswith(".xml")
                        and not PurePosixPath(member.name).name.startswith("._")
                    ):
                        yield _member(archive, member)
                # at a damaged header tarfile stops as at the end; reading on also checks gzip's checksum
                while rest := archive.fileobj.read(1 << 16):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("a member's header is damaged")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ManifestError(
            [f"{path}: damaged or no archive ({error or type(error).__name__}), after {number:,} members; {_FETCH}"]
        ) from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> _File:
    name = member.name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return name, None, f"member {name!r} points outside of the archive's folder; {_FETCH}"
    if not member.isreg():
        return name, None, f"member {name!r} is a link or a device and no file; {_FETCH}"
    if member.size > MAX_XML:
        return name, None, _too_large(member.size)
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return name, file.read(), ""


def _too_large(size: int) -> str:
    return f"{size:,} bytes, a report has at most {MAX_XML:,}; {_FETCH}"


class _Bounded:
    """What tarfile reads from: ends an archive that unpacks to more than `MAX_ARCHIVE` bytes, whatever its headers
    claim.
    """

    def __init__(self, stream: BinaryIO | gzip.GzipFile, path: Path) -> None:
        self._stream, self._path, self._read = stream, path, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        if self._read > MAX_ARCHIVE:
            raise ManifestError(
                [f"{self._path}: unpacks to more than {MAX_ARCHIVE:,} bytes, the reports to 40 million; {_FETCH}"]
            )
        return data
