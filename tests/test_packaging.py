"""What a person who installs a wheel has: every file that the code reads, the recipes, and a folder to start training
from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import mrg_r1
from mrg_r1 import cli
from mrg_r1.config.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta\nprint(build_meta.build_wheel('dist'), build_meta.build_sdist('dist'))"


def files(folder: Path) -> set[str]:
    """Everything in a folder that is not a cache, relative to the project."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a wheel and a source distribution, built from a copy of the project."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mrg_r1", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [wheel] = built.glob("*.whl")
    return wheel


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is no clone, as the working directory."""
    folder = tmp_path / "away"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_wheel_has_every_file_of_the_package_and_what_stands_beside_it_in_a_clone(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    beside = {f"mrg_r1/shipped/{name}" for folder in ("launch", "ds_configs") for name in files(ROOT / folder)}
    assert "mrg_r1/shipped/launch/train.py" in beside and "mrg_r1/shipped/launch/recipes/demo.yaml" in beside
    assert held == files(ROOT / "mrg_r1") | beside


def test_source_distribution_has_what_a_wheel_is_built_from(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = files(ROOT / "mrg_r1") | files(ROOT / "launch") | files(ROOT / "ds_configs")
    assert held >= needed | {"setup.py", "constraints.txt", "CITATION.cff"}


def test_one_version(wheel: Path) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert wheel.name.split("-")[1] == cited["version"] == mrg_r1.__version__


def test_wandb_comes_with_the_package(wheel: Path) -> None:
    [metadata] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert [line for line in lines if line.startswith("Requires-Dist: wandb") and "extra" not in line]
    assert "Provides-Extra: wandb" not in lines


def test_unpacked_wheel_makes_a_folder_to_train_from(wheel: Path, away: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    env = os.environ | {"PYTHONPATH": str(installed)}
    run = [sys.executable, "-m", "mrg_r1.cli"]
    said = subprocess.run([*run, "--version"], cwd=away, env=env, check=True, capture_output=True, text=True).stdout
    assert said == f"mrg-r1 {mrg_r1.__version__}\n"
    subprocess.run([*run, "recipes", "-o", "."], cwd=away, env=env, check=True, capture_output=True)
    assert files(away / "launch") == files(ROOT / "launch") and files(away / "ds_configs") == files(ROOT / "ds_configs")
    assert (away / "launch/train.py").read_bytes() == (ROOT / "launch/train.py").read_bytes()


def test_recipes_come_out_of_a_clone_too_and_name_files_that_are_there(
    away: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", "-o", "."]) == 0
    assert "deepspeed launch/train.py" in capsys.readouterr().out
    assert Recipe.model_fields["engine"].get_default(call_default_factory=True).deepspeed.is_file()
    assert set(Path("launch/recipes").rglob("*.yaml")) == {
        path.relative_to(ROOT) for path in (ROOT / "launch/recipes").rglob("*.yaml")
    }
    for recipe in Path("launch/recipes").glob("*.yaml"):
        assert load_recipe(recipe).engine.deepspeed.is_file(), recipe


def test_changed_recipe_is_not_overwritten(away: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "-o", "."]) == cli.main(["recipes", "-o", "."]) == 0
    mine = Path("launch/recipes/demo.yaml")
    mine.write_text("steps: 1\n")
    Path("launch/train.py").unlink()
    capsys.readouterr()
    assert cli.main(["recipes", "-o", "."]) == 2
    assert "launch/recipes/demo.yaml: is there already and differs" in capsys.readouterr().err
    assert mine.read_text() == "steps: 1\n" and not Path("launch/train.py").exists()


@pytest.mark.slow
def test_installed_wheel_renders_phantoms_and_explains_its_recipes(wheel: Path, away: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # ours come first
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [venv / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, cwd=away, env=env, check=True)
    prepare = [
        venv / "bin/mrg-r1",
        "prepare",
        "phantom",
        "-o",
        "data",
        "--splits",
        "train=4,val=2,test=2",
        "--side",
        "56",
    ]
    subprocess.run(prepare, cwd=away, env=env, check=True)
    assert (away / "data/manifest.jsonl").is_file()
    subprocess.run([venv / "bin/mrg-r1", "recipes", "-o", "."], cwd=away, env=env, check=True)
    said = subprocess.run(
        [venv / "bin/python", "launch/train.py", "--help"],
        cwd=away,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "engine.deepspeed  (default ds_configs/zero2.json; ours)" in said.stdout
    where = [venv / "bin/python", "-c", "import mrg_r1; print(mrg_r1.__file__)"]
    assert str(venv) in subprocess.run(where, cwd=away, env=env, check=True, capture_output=True, text=True).stdout
