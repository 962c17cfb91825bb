"""A disk that is full, or that fails: the file is named, nothing half-written stands under the real name, and what was
there before stays. Also: what is written has the umask's permissions, whoever writes it.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrg_r1 import files
from mrg_r1.cli import main
from mrg_r1.data.study import write_manifest
from mrg_r1.files import atomically, folder_filled, naming, save_tensors, write_text_atomically
from mrg_r1.labels.observations import OBSERVATIONS, write_labels_csv
from mrg_r1.labels.reports import write_reports_csv
from mrg_r1.phantom.contact_sheet import contact_sheet
from mrg_r1.tracking.metrics_file import MetricsFile
from tests.data.test_images import noise
from tests.world import World

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file can be brought to the disk; a full disk names none."""

    def fails(descriptor: int) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        yield


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text_atomically(path, "text"),
    "labels": lambda path: write_labels_csv(path, {"a": [0] * 14}),
    "reports": lambda path: write_reports_csv(path, {"a": "Clear."}),
    "manifest": lambda path: write_manifest(path, []),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_names_its_file_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, before: str | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with full_disk(monkeypatch), pytest.raises(OSError) as error:
        WRITERS[writer](path)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert [(name.name, name.read_text()) for name in tmp_path.iterdir()] == ([("file", "old")] if before else [])


def test_an_error_that_names_another_file_keeps_it_and_a_temporary_name_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, atomically(tmp_path / "file"):
        (tmp_path / "other").read_text()
    assert error.value.filename == str(tmp_path / "other")
    with pytest.raises(OSError) as error, atomically(tmp_path / "file") as temporary:
        raise OSError(errno.EIO, "fails", str(temporary / "part"))
    assert error.value.filename == str(tmp_path / "file")
    with pytest.raises(ValueError, match="^no disk$"), naming(tmp_path / "file"):
        raise ValueError("no disk")


def test_errors_of_libraries_in_rust_are_errors_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, naming(tmp_path / "file"):
        raise Exception("I/O error: No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError) as error:
        save_tensors(tmp_path / "none" / "w.safetensors", {"w": torch.zeros(2)})
    assert str(tmp_path / "none" / "w.safetensors") in str(error.value)


def test_a_folder_that_fails_keeps_its_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one").write_text("old")
    with full_disk(monkeypatch), pytest.raises(OSError) as error, folder_filled(folder) as fresh:
        (fresh / "one").write_text("new")
    assert error.value.filename == str(folder)
    assert [(path.name, path.read_text()) for path in folder.rglob("*")] == [("one", "old")]
    with folder_filled(folder) as fresh:
        (fresh / "two").write_text("new")
    assert sorted(path.name for path in folder.rglob("*")) == ["one", "two"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_label_onto_a_full_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reports_csv(tmp_path / "reports.csv", {"a": "The lungs are clear."})
    with full_disk(monkeypatch):
        said = refused(
            capsys, "label", tmp_path / "reports.csv", "--labeler", world.folder / "labeler", "-o", tmp_path / "l.csv"
        )
    assert str(tmp_path / "l.csv") in said and os.strerror(errno.ENOSPC) in said
    assert [path.name for path in tmp_path.iterdir()] == ["reports.csv"]


def test_what_is_printed_onto_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code = main(["recipes", "-o", str(tmp_path / "folder")])
    assert code == 2 and capsys.readouterr().err == f"mrg-r1: standard output: {os.strerror(errno.ENOSPC)}\n"


def test_what_a_run_logs_onto_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsFile(SimpleNamespace(directory=tmp_path, start_step=0))  # type: ignore[arg-type]
    with full_disk(monkeypatch), pytest.raises(OSError) as error:
        log.sync()
    log.close()
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("fails_at", ["fsync", "write"])
def test_a_conversion_onto_a_full_disk_names_its_file_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails_at: str
) -> None:
    noise(8, 8).save(tmp_path / "1.png")
    (tmp_path / "mine.csv").write_text("id,images,report,split\na,1.png,Clear.,train\n")
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        if fails_at == "fsync":
            from mrg_r1.data.prepare import conversion

            def fails(descriptor: int) -> None:
                raise FULL

            patch.setattr(conversion.os, "fsync", fails)
            patch.setattr(files, "sync", lambda path: None)
        else:
            from mrg_r1.data.prepare import conversion

            class Failing:
                def writer(self, file: Any) -> Any:
                    raise FULL

            patch.setattr(conversion, "csv", Failing())
        said = refused(capsys, "prepare", "manifest", tmp_path / "mine.csv", "-o", output)
    assert str(output) in said and os.strerror(errno.ENOSPC) in said and ".tmp" not in said
    assert not list(output.glob("*.tmp")) and not list(output.glob("*.csv")) and not list(output.glob("*.jsonl"))
    assert main(["prepare", "manifest", str(tmp_path / "mine.csv"), "-o", str(output)]) == 0
    assert (output / "manifest.jsonl").is_file()


# Whoever writes more than so many bytes into a file fails as on a full disk, once in writing and once more in closing.
LIMITED = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from mrg_r1.cli import main
from mrg_r1.tracking.metrics_file import MetricsFile

resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
for name in sys.argv[1:]:
    kind, source = name.split("=")
    code = main(["prepare", kind, source, "-o", f"{source}.out", *(["--check-images", "none"] * (kind != "manifest"))])
    print(code, flush=True)
log = MetricsFile(SimpleNamespace(directory=Path(), start_step=0))
for act in (lambda: log.log(0, {"x" * 2000: 1.0}, ()), log.close):
    try:
        act()
    except OSError as error:
        print(error.filename, flush=True)
"""


def test_what_a_disk_takes_half_of_is_named_by_whoever_writes(tmp_path: Path) -> None:
    """A disk that takes a part of what is written, as a full one does: what is left is written again at closing."""
    noise(8, 8).save(tmp_path / "1.png")
    rows = [f"s{number},1.png,The lungs are clear.,train" for number in range(60)]
    (tmp_path / "mine.csv").write_text("\n".join(["id,images,report,split", *rows]) + "\n")
    chexpert = tmp_path / "chexpert"
    chexpert.mkdir()
    paths = [f"train/patient{number:05}/study1/view1_frontal.jpg" for number in range(60)]
    cells = "Path,Frontal/Lateral," + ",".join(OBSERVATIONS)
    (chexpert / "train.csv").write_text("\n".join([cells, *(f"{path},Frontal,1.0{',' * 13}" for path in paths)]) + "\n")
    padchest = tmp_path / "padchest.csv"
    cells = "ImageID,ImageDir,StudyID,PatientID,Projection,Report,Labels"
    padchest.write_text("\n".join([cells, *(f"{n}.png,0,s{n},p{n},PA,Normal.,['normal']" for n in range(60))]) + "\n")
    sources = ["manifest=mine.csv", "chexpert=chexpert", "padchest=padchest.csv"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *sources],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = os.strerror(errno.EFBIG)
    named = [f"mrg-r1: {name.partition('=')[2]}.out/conversion.part: {said}" for name in sources]
    assert done.stderr.splitlines() == named and done.returncode == 0
    assert done.stdout.split() == ["2"] * 3 + ["metrics.jsonl"] * 2


def test_a_picture_that_cannot_be_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def fails(image: Image.Image, target: Any, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError) as error:
        contact_sheet(tmp_path / "sheet.png", seed=0)
    assert error.value.filename == str(tmp_path / "sheet.png") and not list(tmp_path.iterdir())


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_tensors_and_folders_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)}, {"format": "pt"})
    with folder_filled(tmp_path / "folder") as fresh:
        (fresh / "part").touch(mode=0o600)
    assert modes(tmp_path) == {0o666 & ~umask}


def test_policies_adapters_and_labelers_have_the_permissions_of_the_umask(
    world: World, tmp_path: Path, umask: int
) -> None:
    from mrg_r1.labels.labeler import Labeler
    from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy

    create_tiny_policy(tmp_path / "policy", ["The lungs are clear."] * 9, image_side=28, seed=0)
    Labeler.load(world.folder / "labeler").save(tmp_path / "labeler")
    assert list((tmp_path / "policy").glob("*.safetensors")) and list((tmp_path / "labeler").glob("*.safetensors"))
    assert modes(tmp_path) == {0o666 & ~umask}


def test_no_module_writes_tensors_around_the_umask() -> None:
    """safetensors makes files that only their owner may read: one writer of it is enough."""
    root = Path(files.__file__).parent
    calls = [path for path in root.rglob("*.py") if "import load_file, save_file" in path.read_text()]
    calls += [path for path in root.rglob("*.py") if "import save_file" in path.read_text()]
    assert calls == [root / "files.py"]
