from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrg_r1.phantom import contact_sheet as sheets
from mrg_r1.phantom.contact_sheet import contact_sheet, full_contact_sheet
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.views import render_view


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "SIDE", 64)


def test_the_sheet_has_a_normal_row_and_one_for_every_observation(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (14 * (64 + 16), 4 * 64)
    assert (sheet[:64, :64] == render([None] * 14, seed=0, index=0, side=64)).all()
    contact_sheet(tmp_path / "again.png")
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_the_sheet_of_full_shows_each_finding_twice_in_two_views(tmp_path: Path) -> None:
    full_contact_sheet(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (14 * (64 + 16), 4 * 64)
    for column, (view, patient) in enumerate((v, p) for p in (0, 1) for v in ("frontal", "lateral")):
        expected = render_view([None] * 14, view, seed=0, index=patient, patient=patient, side=64)
        assert (sheet[:64, column * 64 : (column + 1) * 64] == expected).all()
    captions = [sheet[row * 80 + 64 : row * 80 + 80, :64] for row in range(14)]
    assert all((caption < 128).any() for caption in captions)
