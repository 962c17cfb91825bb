"""IU X-Ray read and converted in one call, as `mrg-r1 prepare iu-xray` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mrg_r1.data.prepare.conversion import Counts
from mrg_r1.data.prepare.iu_xray.convert import Report, convert_iu_xray, read_iu_xray


def prepare_iu_xray(
    source: Path,
    images: Path | None,
    output: Path,
    *,
    projections: Path | None = None,
    report: Report = "findings",
    split: str | None = None,
    render_missing: Sequence[Path] = (),
    side: int = 224,
    films: int = 1,
    seed: int = 0,
) -> Counts:
    """`read_iu_xray`, then `convert_iu_xray`."""
    collection = read_iu_xray(source, projections)
    return convert_iu_xray(
        collection,
        images,
        output,
        report=report,
        split=split,
        render_missing=render_missing,
        side=side,
        films=films,
        seed=seed,
    )
