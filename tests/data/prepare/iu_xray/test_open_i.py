"""Open-i's XMLs: every file is a study or a refusal, texts verbatim, and an archive from outside can do no harm."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mrg_r1.data.prepare.iu_xray import open_i as iu_open_i
from mrg_r1.data.prepare.iu_xray.open_i import MAX_XML, read_open_i
from mrg_r1.data.study import ManifestError
from tests.shared_data import shared_data

FINDINGS = "Heart &lt; normal.  XXXX opacity,\n maybe edema. "


def report(
    number: int,
    *,
    findings: str = FINDINGS,
    images: tuple[str, ...] = ("IM-0001-1001", "IM-0001-2001"),
    uid: str | None = None,
) -> bytes:
    texts = {"COMPARISON": "", "INDICATION": "Cough", "FINDINGS": findings, "IMPRESSION": "Clear."}
    sections = "".join(f'<AbstractText Label="{name}">{text}</AbstractText>' for name, text in texts.items())
    parents = "".join(
        f'<parentImage id="CXR{number}_{name}"><caption>PA and lateral</caption></parentImage>' for name in images
    )
    head = f'<uId id="{uid or f"CXR{number}"}"/><pmcId id="{number}"/>'
    body = f"<eCitation>{head}<Abstract>{sections}</Abstract>{parents}</eCitation>"
    return f'<?xml version="1.0" encoding="utf-8"?>{body}'.encode()


def archive(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / f"{name.lstrip('n')}.xml").write_bytes(data)
    return path


def reasons(source: Path) -> dict[str, str]:
    return {refusal.id: refusal.reason for refusal in read_open_i(source).refusals}


def test_archive_tar_and_folder_give_the_same_studies(tmp_path: Path) -> None:
    members = [("ecgen/7.xml", report(7)), ("ecgen/12.xml", report(12, images=()))]
    packed = archive(tmp_path / "reports.tgz", *members)
    (tmp_path / "plain.tar").write_bytes(gzip.decompress(packed.read_bytes()))
    files = folder(tmp_path / "files", n7=report(7), n12=report(12, images=()))
    for source in (packed, tmp_path / "plain.tar", files):
        collection = read_open_i(source)
        assert collection.layout == "open-i" and collection.refusals == ()
        seven, twelve = collection.studies
        assert (seven.id, seven.patient_id, twelve.id) == ("CXR7", "CXR7", "CXR12")
        assert seven.findings == "Heart < normal.  XXXX opacity,\n maybe edema. " and seven.impression == "Clear."
        assert seven.indication == "Cough" and seven.comparison is None
        assert [(image.name, image.view) for image in seven.images] == [
            ("CXR7_IM-0001-1001", None),
            ("CXR7_IM-0001-2001", None),
        ]
        assert twelve.images == () and str(source) in seven.where and "7.xml" in seven.where


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<eCitation><uId", "broken XML (unclosed token: line 1"),
        (b"", "broken XML (no element found"),
        (report(9)[:-20], "broken XML"),
        (report(9, findings="caf\u00e9").replace("\u00e9".encode(), b"\xe9"), "broken XML (not well-formed"),
        (report(9).replace(b"utf-8", b"x-none"), "unknown encoding: x-none"),
        (b"<html><body/></html>", "element <html>; an Open-i report is an <eCitation>"),
        (report(9).replace(b'<uId id="CXR9"/>', b""), "element <uId>: []"),
        (report(9).replace(b"<pmcId", b'<uId id="CXR10"/><pmcId'), "element <uId>: ['CXR9', 'CXR10']"),
        (report(9, uid="nine"), "element <uId>: ['nine']"),
        (report(9, uid="CXR10"), "element <uId>: 'CXR10', but the file is named for 9; two ids for one study"),
        (
            report(9).replace(b"CXR9_IM-0001-2001", b"CXR8_IM-0001-2001"),
            "<parentImage id='CXR8_IM-0001-2001'> is of study 8",
        ),
        (report(9).replace(b'id="CXR9_IM-0001-2001"', b""), "element <parentImage> without an id"),
        (report(9).replace(b"COMPARISON", b"FINDINGS"), "<AbstractText Label='FINDINGS'> stands twice"),
        (b"<eCitation>" + b" " * MAX_XML + b"</eCitation>", "a report has at most 1,000,000"),
        (b"<eCitation>&nothing;</eCitation>", "broken XML (undefined entity"),
    ],
)
def test_a_bad_report_costs_one_study_and_says_why(tmp_path: Path, data: bytes, expected: str) -> None:
    packed = archive(tmp_path / "reports.tgz", ("e/8.xml", report(8)), ("e/9.xml", data), ("e/10.xml", report(10)))
    for source in (packed, folder(tmp_path / "files", n8=report(8), n9=data, n10=report(10))):
        collection = read_open_i(source)
        assert [study.id for study in collection.studies] == ["CXR8", "CXR10"]
        assert [refusal.id for refusal in collection.refusals] == ["CXR9"]
        assert expected in collection.refusals[0].reason
        assert str(source) in collection.refusals[0].where and "9.xml" in collection.refusals[0].where


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE e [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE e [<!ENTITY secret SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE e SYSTEM "http://localhost:1/x.dtd">',
    ],
)
def test_a_report_with_a_document_type_is_not_read(tmp_path: Path, doctype: str) -> None:
    data = report(9).replace(b"<eCitation>", doctype.encode() + b"<eCitation>")
    source = archive(tmp_path / "reports.tgz", ("9.xml", data), ("8.xml", report(8)))
    assert "<!DOCTYPE e>" in reasons(source)["CXR9"]


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("/tmp/9.xml", "outside"),
        ("e/../../9.xml", "outside"),
        (link("e/9.xml", "/etc/hostname", tarfile.SYMTYPE), "link"),
        (link("e/9.xml", "8.xml", tarfile.LNKTYPE), "link"),
        (link("e/9.xml", "", tarfile.FIFOTYPE), "link"),
    ],
)
def test_a_member_that_reaches_outside_is_refused_and_nothing_is_unpacked(
    tmp_path: Path, member: str | tarfile.TarInfo, expected: str
) -> None:
    data = report(9) if isinstance(member, str) else b""
    source = archive(tmp_path / "reports.tgz", ("e/8.xml", report(8)), (member, data), ("e/10.xml", report(10)))
    collection = read_open_i(source)
    assert [study.id for study in collection.studies] == ["CXR8", "CXR10"]
    assert expected in collection.refusals[0].reason and collection.refusals[0].id == "CXR9"
    assert list(tmp_path.iterdir()) == [source]


def test_a_second_report_of_a_study_is_refused_and_names_the_first(tmp_path: Path) -> None:
    source = archive(tmp_path / "reports.tgz", ("a/9.xml", report(9)), ("b/9.xml", report(9, findings="Other.")))
    collection = read_open_i(source)
    assert [study.findings for study in collection.studies] == ["Heart < normal.  XXXX opacity,\n maybe edema. "]
    assert "'CXR9'" in collection.refusals[0].reason and "a/9.xml" in collection.refusals[0].reason
    assert "b/9.xml" in collection.refusals[0].where


def test_what_macos_leaves_in_archives_is_passed_over(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "reports.tgz", ("e/._9.xml", b"\0\5\26\7"), ("e/9.xml", report(9)), ("e/readme.txt", b"x")
    )
    assert reasons(source) == {} and len(read_open_i(source).studies) == 1


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def header_of_second_member(data: bytes) -> bytes:
    tar = bytearray(gzip.decompress(data))
    second = tar.index(b"e/9.xml")
    tar[second + 150] ^= 0x05  # in the header's checksum
    return gzip.compress(bytes(tar))


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda data: data[:-6], header_of_second_member, lambda data: gzip.compress(b"no tar" * 999)]
)
def test_a_damaged_archive_is_refused_as_a_whole(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    source = archive(tmp_path / "reports.tgz", ("e/8.xml", report(8)), ("e/9.xml", report(9)), ("e/10.xml", report(10)))
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(ManifestError, match=r"reports\.tgz: .*NLMCXR_reports\.tgz"):
        read_open_i(source)


def test_an_archive_that_unpacks_to_far_too_much_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iu_open_i, "MAX_ARCHIVE", 2_000_000)
    source = archive(
        tmp_path / "reports.tgz", ("e/8.xml", report(8)), ("e/fill", bytes(5_000_000)), ("e/9.xml", report(9))
    )
    with pytest.raises(ManifestError, match=r"reports\.tgz: .*2,000,000 bytes"):
        read_open_i(source)


def test_an_archive_or_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="XML"):
        read_open_i(archive(tmp_path / "images.tgz", ("a.png", b"x")))
    with pytest.raises(ManifestError, match="XML"):
        read_open_i(folder(tmp_path / "files"))


def test_the_real_collection_comes_through_whole_and_verbatim() -> None:
    source = shared_data() / "iu_xray" / "NLMCXR_reports.tgz"
    collection = read_open_i(source)
    assert collection.refusals == () and len(collection.studies) == 3955
    assert sum(study.findings is not None for study in collection.studies) == 3425
    assert sum(study.impression is not None for study in collection.studies) == 3921
    assert sum(len(study.images) for study in collection.studies) == 7470
    by_member = {study.where.removeprefix(f"{source}, "): study for study in collection.studies}
    names = {"FINDINGS": "findings", "IMPRESSION": "impression", "INDICATION": "indication", "COMPARISON": "comparison"}
    with tarfile.open(source) as tar:
        for member in tar:
            if not member.isfile():
                continue
            study = by_member.pop(member.name)
            # read once more in another way: as text
            text = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
            for label, name in names.items():
                (found,) = re.findall(rf'<AbstractText Label="{label}"(?:/>|>([^<]*)</AbstractText>)', text)
                plain = (
                    found.replace("&lt;", "<")
                    .replace("&gt;", ">")
                    .replace("&quot;", '"')
                    .replace("&apos;", "'")
                    .replace("&amp;", "&")
                )
                assert (getattr(study, name) or "") == plain, (member.name, label)
            assert [image.name for image in study.images] == re.findall(r'<parentImage id="([^"]*)"', text)
            assert f'<uId id="{study.id}"/>' in text
    assert by_member == {}
