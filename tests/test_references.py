"""What code says of docs/ is there: `docs/method.md §3` is a section, `docs/traps.md #5` a row, any page a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("mrg_r1", "tests", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
REFERENCE = re.compile(r"\bdocs/([\w-]+\.md)((?:(?:,| and|) [§#]\d+)*)")
TRAP = re.compile(r"\b[Tt]raps? (\d+)((?:(?:,| and) \d+)*)")


def references(text: str) -> list[tuple[str, str]]:
    """Pages with what is named of them, `§3`, `#5` or nothing; a line may end anywhere between the two."""
    text = re.sub(r"\s*\n\s*(?:# )?", " ", text)
    found = []
    for page, places in REFERENCE.findall(text):
        found += [(page, place) for place in re.findall(r"[§#]\d+", places) or [""]]
    for first, more in TRAP.findall(text):
        found += [("traps.md", f"#{number}") for number in [first, *re.findall(r"\d+", more)]]
    return found


def places(page: Path) -> set[str]:
    """The numbered headings and the numbered rows of a page."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (\d+)\b", text, re.MULTILINE)
    return {""} | {f"§{number}" for number in headings} | {f"#{n}" for n in re.findall(r"^\| (\d+) \|", text, re.M)}


def test_references_are_found_wherever_a_line_ends() -> None:
    text = '"""Traps 5 and 17; docs/method.md\n    §3 and §4."""\n# docs/traps.md\n    # #22, trap 6'
    assert set(references(text)) == {
        ("method.md", "§3"),
        ("method.md", "§4"),
        *(("traps.md", place) for place in ("#5", "#17", "#22", "#6")),
    }


def test_every_reference_resolves() -> None:
    named = [(path, reference) for path in FILES for reference in references(path.read_text(encoding="utf-8"))]
    known = {page.name: places(page) for page in (ROOT / "docs").glob("*.md")}
    assert len(named) > 80
    lost = [
        f"{path.relative_to(ROOT)}: docs/{page} {place}"
        for path, (page, place) in named
        if path != Path(__file__) and place not in known.get(page, set())
    ]
    assert lost == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"\btests/[\w/]+\.py\b", page.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
