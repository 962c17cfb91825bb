"""Many rendered radiographs into a folder: in parallel, resumable, and never two settings in one folder.

Kept free of torch: every worker process imports this module anew.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrg_r1 import __version__
from mrg_r1.console import progress
from mrg_r1.files import atomically, write_text_atomically
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.views import render_view

SETTINGS_FILE = "prepare.json"
_CHUNK = 32  # images a worker takes at a time
_WORTH_A_WORKER = 256  # starting a process takes as long as some tens of images
_KEPT = 2**24  # bytes: larger than any array of a rendering
_COMPRESSION = 1  # noise does not compress; the highest zlib level takes ten times as long for 3 % less


@dataclass(frozen=True)
class Rendering:
    """One radiograph to render."""

    path: Path  # a PNG, 8-bit greyscale
    drawn: tuple[int | None, ...]  # 14 file values, CheXbert's order
    index: int  # with the seed, all that the anatomy and the noise depend on
    view: str | None = None  # "frontal" or "lateral" of preset `full`; None: `findings.render`'s frontal one
    patient: int = 0  # preset `full`: index of the patient's first study
    strengths: tuple[float, ...] | None = None  # of `findings.render`


def claim_folder(output: Path, settings: Mapping[str, Any], *, images: int, seed: int, side: int) -> None:
    """Make a folder ready for `images` renderings of side x side pixels and write its settings.

    Args:
        output, settings: as `claim_settings`.
        images: how many images at most will be written.
        seed: of the images.
        side: their pixels.

    Raises:
        ValueError: a seed or side that cannot be rendered, or as `claim_settings`.
        OSError: as `claim_settings`.
    """
    # refuses what it cannot draw before the folder is touched
    render([None] * len(OBSERVATIONS), seed=seed, index=0, side=side)
    # noise: about a byte a pixel, and the rest of the last block
    claim_settings(output, settings, room=images * (side * side + 4096))


def claim_settings(output: Path, settings: Mapping[str, Any], *, room: int = 0) -> None:
    """Make a folder and write its settings, so that no run with other settings is mixed into it.

    Args:
        output: the folder; made if absent.
        settings: JSON values that the content depends on; None where nothing depends on it yet, to be settled by a
            later run. The package's version is added.
        room: bytes that will be written at most.

    Raises:
        ValueError: a folder made with other settings, or a dataset without settings.
        OSError: it cannot be made or written, or its disk has no such room.
    """
    settings = {**settings, "mrg_r1": __version__}
    path = output / SETTINGS_FILE
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); remove the folder or choose another output") from error
        settled = {key: value for key, value in found.items() if value is not None}
        unsettled = found.keys() - settled.keys()
        # a setting that is not there is at its default, in the folder as in what is asked for
        keys = [key for key in {**settled, **settings} if key not in unsettled and found.get(key) != settings.get(key)]
        if keys:
            differing = "; ".join(f"`{key}` was {found.get(key)!r}, asked for {settings.get(key)!r}" for key in keys)
            raise ValueError(
                f"{output}: made with other settings ({differing}); choose another output or remove the folder"
            )
    elif any((output / name).exists() for name in ("manifest.jsonl", "images")):
        raise ValueError(
            f"{output}: holds a manifest or images but no {SETTINGS_FILE}; choose another output or remove the folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free
        if free < room:
            raise OSError(
                f"needs {room / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; free some or choose another "
                "output"
            )
        write_json(path, settings)
    except OSError as error:
        raise OSError(f"{output}: cannot be written: {error.strerror or error}") from error


def render_files(renderings: Sequence[Rendering], *, seed: int, side: int, workers: int) -> int:
    """Render those whose file does not exist yet. Each file appears whole or not at all.

    Args:
        renderings: any number; folders are made.
        seed: with each rendering's index, decides every pixel, so neither order nor `workers` matters.
        side: pixels of the square image.
        workers: processes; 1 renders in this one.

    Returns:
        How many were rendered now.
    """
    there = {path for folder in {rendering.path.parent for rendering in renderings} for path in _files(folder)}
    missing = [rendering for rendering in renderings if rendering.path not in there]
    job = partial(_render, seed=seed, side=side)
    workers = min(workers, len(missing) // _WORTH_A_WORKER)
    if workers <= 1:
        _keep_memory()
        for rendering in progress(missing, "rendering"):
            job(rendering)
        return len(missing)
    # spawn: a process that has run torch holds threads that do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        for _ in progress(pool.map(job, missing, chunksize=_CHUNK), "rendering", total=len(missing)):
            pass
    return len(missing)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _begin_worker() -> None:
    """A pool's worker waits for its next chunk on a pipe that it holds open itself, so it would outlive a parent that
    is killed.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_memory()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None  # run in a pool's worker alone
    parent.join()
    os._exit(1)  # a half-written file has its temporary name


def _keep_memory() -> None:
    """Let glibc keep the blocks that renderings allocate and free all the time, instead of asking the system for each
    anew.

    By mallopt(3) blocks from M_MMAP_THRESHOLD, at first 128 KiB, are mapped and unmapped one by one, and freeing a
    larger one raises the threshold to its size. Fresh pages were half of a rendering's time. Harmless with another C
    library.
    """
    np.empty(_KEPT, dtype=np.uint8)


def _files(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries]


def _render(rendering: Rendering, *, seed: int, side: int) -> None:
    if rendering.view is None:
        pixels = render(rendering.drawn, seed=seed, index=rendering.index, side=side, strengths=rendering.strengths)
    else:
        pixels = render_view(
            rendering.drawn, rendering.view, seed=seed, index=rendering.index, patient=rendering.patient, side=side
        )
    with atomically(rendering.path, synced=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=_COMPRESSION)
