"""Files are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from mrg_r1.files import RepeatedField, atomically, parse_json, sha256_of, shown, write_text_atomically


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomically(path) as temporary:
        if folder:
            temporary.mkdir()
            (temporary / "half").write_text("half")
        else:
            temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()  # empty, so it is replaced
    with atomically(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "one").write_text("1")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["folder", "folder/one"]


def test_half_a_character_is_written_as_its_escape(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "file", "\ud800é")
    assert (tmp_path / "file").read_bytes() == "\\ud800é".encode()


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"x" * 100_000).hexdigest()


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    try:
        write_text_atomically(path, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode) and [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("[" * 100_000, 1),
        ('{"a":' * 100_000, 1),
        (f"[1, {10**400}]", 5),
        (f"[{-(10**308)}]", 2),
        (f"[{'9' * 5000}]", 2),  # more digits than int() reads
        ("[1,,2]", 4),
        (b'{"a": tru}', 7),
    ],
)
def test_all_that_is_wrong_with_json_is_one_error_with_its_place(text: str | bytes, column: int) -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        parse_json(text)
    assert error.value.colno == column


def test_a_number_that_a_float_holds_is_read() -> None:
    assert float(parse_json(str(10**307))) == 1e307 and parse_json(b"\xef\xbb\xbf-3") == -3


def test_a_field_that_stands_twice_is_refused_where_it_is_asked_for() -> None:
    text = '[{"a": 1}, {"b": {"a": 1, "c": 2, "a": 3}}]'
    assert parse_json(text)[1]["b"]["a"] == 3
    with pytest.raises(RepeatedField, match="`a`"):
        parse_json(text, unique=True)


def test_a_value_of_any_depth_can_be_shown() -> None:
    value: list[object] = []
    for _ in range(10_000):
        value = [value]
    assert len(shown(value)) < 80 and len(shown("x" * 100)) == 80 and shown({"a": "\u00e9"}) == '{"a": "\\u00e9"}'
