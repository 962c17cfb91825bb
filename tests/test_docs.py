"""README, docs/ and recipes' heads: links lead somewhere, commands parse, keys and targets exist, marked blocks run,
tables match the code.

A fence under `<!-- test -->` is executed in a fresh folder, with the others of its page in their order; one under `<!--
file: NAME -->` is written there as NAME. `<!-- test: slow -->` makes the whole page a slow test.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from mrg_r1 import cli
from mrg_r1.config.recipe import Recipe, describe_fields, load_recipe
from mrg_r1.metrics.clinical import DEFINITIONS, LENIENT
from mrg_r1.tables.plan import TableSpec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted(
    path for path in (ROOT / "launch/recipes").glob("*.yaml") if "\n#   " in path.read_text(encoding="utf-8")
)
# What other branches bring: to be emptied as they are merged.
PAGES_TO_COME: set[str] = set()
COMMANDS_TO_COME: set[str] = set()

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>test(?:: slow)?|file: \S+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def fences(page: Path) -> list[re.Match[str]]:
    return list(FENCE.finditer(page.read_text(encoding="utf-8")))


def prose(page: Path) -> str:
    """The page without its fences."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline(page: Path) -> list[str]:
    return INLINE.findall(prose(page))


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's fences or a recipe's head; a prompt before it and a comment behind it left
    out.
    """
    texts = [fence["body"] for fence in fences(page) if fence["kind"] in ("", "bash", "sh")]
    if page.suffix == ".yaml":
        texts = ["\n".join(re.findall(r"^#   (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE))]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(\S*\$|\$) ", "", line.strip())
            if not re.match(r"(mrg-r1|deepspeed|torchrun|make|python|cd|srun) ", line):
                continue
            command: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word in (";", "&&", "|", "||"):
                    yield command
                    command = []
                else:
                    command.append(word)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [choices] = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)] or [{}]
    return dict(choices)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, of sections and of fields."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


KEYS = set(keys(Recipe))
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two lines; backticks kept."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [
        target.partition("#")[0] for target in LINK.findall(prose(page)) if not re.match(r"https?://|mailto:|#", target)
    ]
    broken = [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"\bdocs/[\w-]+\.md\b", page.read_text(encoding="utf-8"))
    broken += [name for name in named if not (ROOT / name).exists()]
    assert [target for target in broken if Path(target).name not in PAGES_TO_COME] == []


def test_lines_of_prose_are_at_most_120_characters() -> None:
    """Outside of tables, fences and link references."""
    long = []
    for page in [*PAGES, ROOT / "benchmarks/README.md"]:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            fence = line.lstrip().startswith("```")
            fenced ^= fence
            is_prose = not (fence or fenced or line.lstrip().startswith("|") or re.match(r"\[[^\]]+\]: ", line))
            if is_prose and len(line) > 120:
                long.append(f"{page.relative_to(ROOT)}:{number}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_exist(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "comparison.md"):  # modules of earlier versions, and of others
        return
    named = re.findall(r"(?<![\w/.-])(?:[a-z_0-9]+/)+[a-z_0-9]+\.py\b", page.read_text(encoding="utf-8"))
    assert [name for name in named if not any((root / name).is_file() for root in (ROOT, ROOT / "mrg_r1"))] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if page.name != "README.md" and f"({page.name})" not in contents] == []


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in shell_commands(page):
        if not words or words[0] != "mrg-r1" or words[1] in COMMANDS_TO_COME:
            continue
        try:
            cli._parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_only_named_exist_with_their_options(page: Path) -> None:
    for text in inline(page):
        words = text.split()
        if words[0] != "mrg-r1" or len(words) == 1 or words[1] in COMMANDS_TO_COME or re.search(r"[{…]", text):
            continue
        parser = cli._parser()
        assert words[1] in subcommands(parser) or words[1] in parser._option_string_actions, text
        for word in words[1:]:
            parser = subcommands(parser).get(word, parser)
        options = [word for word in words if re.match(r"-{1,2}[a-z]", word)]
        assert [option for option in options if option not in parser._option_string_actions] == [], text


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_launches_have_overrides_that_a_recipe_takes(page: Path) -> None:
    for words in [*shell_commands(page), *(text.split() for text in inline(page))]:
        scripts = [number for number, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)]
        for number in scripts[:1]:
            assert (ROOT / words[number]).is_file(), words
            overrides = [word for word in words[number + 2 :] if "=" in word and not word.startswith("-")]
            load_recipe(ROOT / "launch/recipes/demo.yaml", overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipe_keys_exist(page: Path) -> None:
    for text in inline(page):
        for key in re.findall(r"(?<![\w/.])([a-z_]+\.[a-z_]+(?:\.[a-z_]+)*)(?=$|[=: ,}\]])", text):
            if key.partition(".")[0] in SECTIONS and not re.search(r"\.(py|md|yaml|json|safetensors)$", key):
                assert key in KEYS or key.startswith("reward.weights."), f"{key} in `{text}`"
    for fence in fences(page):
        content = yaml.safe_load(fence["body"]) if fence["kind"] == "yaml" else None
        if content is not None and "rows" in content:
            TableSpec.model_validate(content)
            continue
        for section, fields in (content or {}).items():
            assert section in KEYS, section
            for name in fields if isinstance(fields, dict) else ():
                assert f"{section}.{name}" in KEYS, f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for rule in re.findall(r"^([a-z0-9 -]+):", makefile, re.MULTILINE) for target in rule.split()}
    for words in [*shell_commands(page), *(text.split() for text in inline(page))]:
        if words and words[0] == "make":
            named = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
            assert set(named) <= targets, words


def executed_pages() -> Iterator[Any]:
    for page in PAGES:
        marks = {fence["mark"] for fence in fences(page)} - {None}
        if marks:
            yield pytest.param(page, id=page.name, marks=[pytest.mark.slow] if "test: slow" in marks else [])


@pytest.mark.parametrize("page", executed_pages())
def test_marked_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    imported = set(sys.modules)
    names: dict[str, object] = {}
    for fence in fences(page):
        if fence["mark"] is None:
            continue
        if fence["mark"].startswith("file: "):
            Path(fence["mark"].removeprefix("file: ")).write_text(fence["body"], encoding="utf-8")
        elif fence["kind"] == "python":
            exec(compile(fence["body"], f"{page.name}", "exec"), names)
        else:
            for line in fence["body"].splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "mrg-r1" and cli.main(arguments) == 0, line
    for name in set(sys.modules) - imported:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def test_page_of_definitions_says_what_the_code_computes() -> None:
    rows = {row[0].strip("`"): row[1:4] for row in table("ce-definitions.md", "# What")}
    code = {
        name: [
            str(len(definition.labels)),
            "class 1 or 3" if definition.positive == LENIENT else "class 1",
            definition.average,
        ]
        for name, definition in DEFINITIONS.items()
    }
    assert rows == code
    assert [row[0].strip("`") for row in table("ce-definitions.md", "no policy was involved")] == list(DEFINITIONS)


def test_tests_that_pages_name_exist() -> None:
    """A fault's test is named as file::test, so that one that is renamed or dropped is missed here."""
    named = [(page, *match) for page in PAGES for match in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", prose(page))]
    gone = [
        f"{page.name}: {file}::{name}"
        for page, file, name in named
        if not (ROOT / file).is_file() or (name and f"\ndef {name}(" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert gone == []
    for row in table("traps.md", "## Faults that others have met"):
        assert re.fullmatch(r"`tests/[\w/]+\.py::\w+`(, `tests/[\w/]+\.py::\w+`)*", row[-1]), row


def test_page_of_reproducibility_lists_the_paper_s_values_and_no_other() -> None:
    paper = set(re.findall(r"^  (\S+)  \(default .*; paper(?: \(.*\))?\)$", describe_fields(), re.MULTILINE))
    assert "reward.weights" in paper and "grpo.beta" not in paper
    assert {row[0].strip("`") for row in table("reproducibility.md", "## The paper's")} == paper


def test_page_of_recipes_lists_every_file() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    files = [*(ROOT / "launch/recipes").rglob("*.yaml"), *(ROOT / "ds_configs").glob("*.json")]
    assert len(files) > 8 and [file.name for file in files if f"`{file.name}`" not in text] == []
