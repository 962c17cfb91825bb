"""The published checkpoint, read once and written in a format that loads without pickle: for `mrg-r1 labeler
convert`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mrg_r1.files import atomically
from mrg_r1.labels import loading
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.labeler import Labeler


def convert(source: Path, output: Path, *, tokenizer: str | None = None) -> str:
    """Write a CheXbert checkpoint as a directory of ours, or as one safetensors file.

    The output is there whole or not at all.

    Args:
        source: the published checkpoint file, or a `.safetensors` copy of it.
        output: a directory to make, with a tokenizer in it; or a file whose name ends in `.safetensors`, without one.
        tokenizer: as for `Labeler.load`: a directory or a hub name, bert-base-uncased's unless told. A file needs none.

    Returns:
        The labeler's fingerprint: what `Labeler.load` of source and of output give.

    Raises:
        FileExistsError: `output` is there already (an empty directory is taken).
        FileNotFoundError: no file at `source`, or a tokenizer that cannot be had (offline).
        ValueError: as `Labeler.load`, or a tokenizer for an output that holds none.
    """
    source, output = Path(source), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already and is not overwritten; name another output or remove it")
    if not source.is_file():
        reason = "is a directory; only a checkpoint file is converted" if source.is_dir() else "no such file"
        raise FileNotFoundError(f"{source}: {reason}")
    as_file = output.suffix == ".safetensors"
    if as_file and tokenizer is not None:
        raise ValueError(
            f"{output}: a safetensors file holds no tokenizer; leave it out, or name a directory as output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomically(output) as fresh:
        if as_file:
            config, state = loading.read_checkpoint(source)
            with torch.device("meta"):
                loading.require_fit(CheXbert(config).state_dict(), state, source)
            loading.write_weights(fresh, state)
            fingerprint = loading.fingerprint(state)
        else:
            labeler = Labeler.load(source, tokenizer=tokenizer)
            labeler.save(fresh)
            fingerprint = labeler.fingerprint
    return fingerprint
