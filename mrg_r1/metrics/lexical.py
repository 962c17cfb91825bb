"""Lexical metrics (docs/method.md §4): texts enter, BLEU-1 to 4, ROUGE-L, CIDEr and, where Java runs, METEOR leave.

The scorers are pycocoevalcap's, called as the R2Gen family calls them: on words separated by white space, without the
PTB tokenizer of COCO's own evaluation. What a number is depends on how texts were cleaned before, so a cleaning has a
name and goes with every number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor
from pycocoevalcap.rouge.rouge import Rouge

Cleaning = Literal["raw", "r2gen-iu", "r2gen-mimic"]
CLEANINGS: tuple[Cleaning, ...] = get_args(Cleaning)
Scorer = Literal["bleu", "rouge_l", "cider", "meteor"]
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
# In words, for the output. R2Gen keeps 60 (IU) and 100 (MIMIC) ids of a reference, the first of which is the start
# mark.
CLEANING_IS: dict[Cleaning, str] = {
    "raw": "the text as it is, case and punctuation kept, white space collapsed; nothing is cut off",
    "r2gen-iu": "R2Gen's clean_report_iu_xray; references cut to 59 words, predictions to 60; rare words kept (R2Gen: "
    "<unk>)",
    "r2gen-mimic": "R2Gen's clean_report_mimic_cxr; references cut to 99 words, predictions to 100; rare words kept "
    "(R2Gen: <unk>)",
}
TITLES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
}
NAMES = tuple(TITLES)
SOURCES = {
    "bleu_1": "BLEU-1, corpus level, closest reference length, no smoothing (Papineni et al., 2002)",
    "bleu_2": "BLEU-2, as BLEU-1",
    "bleu_3": "BLEU-3, as BLEU-1",
    "bleu_4": "BLEU-4, as BLEU-1",
    "rouge_l": "ROUGE-L, beta 1.2, mean over reports (Lin, 2004)",
    "cider": "CIDEr-D of pycocoevalcap, idf of these references, times 10 (Vedantam et al., 2015)",
    "meteor": "METEOR 1.5, English, normalised (Denkowski and Lavie, 2014)",
}
_LIMITS: dict[Cleaning, int] = {"r2gen-iu": 60, "r2gen-mimic": 100}
_NOT_IN_SENTENCES = re.compile(r"""[.,?;*!%^&_+():<=>@\[\]{}"'/\\]""")  # the hyphen stays
_METEOR_TRIAL = 30  # seconds for `java -version`


@dataclass(frozen=True)
class Lexical:
    """The result of `lexical_scores`."""

    scores: dict[str, float]  # by name of `NAMES`
    left_out: dict[str, str]  # why a metric of `NAMES` is not there


def lexical_scores(
    predicted: Sequence[str],
    reference: Sequence[str],
    *,
    scorers: Sequence[Scorer] = SCORERS,
    shown: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Lexical:
    """BLEU, ROUGE-L, CIDEr and METEOR of cleaned texts.

    Args:
        predicted, reference: N cleaned texts each (`clean`), in the same order. An empty one scores 0 in ROUGE-L, also
            against an empty one, which pycocoevalcap would give 1.
        scorers: those that are run; METEOR takes longer than all others together.
        shown: wraps the scorers' names, such as in a progress bar.

    Returns:
        BLEU, ROUGE-L and METEOR in [0, 1], CIDEr in [0, 10].

    Raises:
        ValueError: unequal numbers of texts, or none.

    Source: pycocoevalcap, the Python 3 port of the COCO caption evaluation (Chen et al., arXiv 1504.00325).
    """
    if len(predicted) != len(reference):
        raise ValueError(
            f"{len(predicted)} predicted and {len(reference)} reference texts; they are compared one by one"
        )
    if not predicted:
        raise ValueError("no text to score")
    said = {study: [text] for study, text in enumerate(predicted)}
    true = {study: [text] for study, text in enumerate(reference)}
    scores: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in shown(scorers):
        if name == "bleu":
            bleu, _ = Bleu(4).compute_score(true, said, verbose=0)  # otherwise it prints
            scores |= {f"bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
        elif name == "rouge_l":
            rouge = Rouge()
            values = [rouge.calc_score([a], [b]) if a and b else 0.0 for a, b in zip(predicted, reference, strict=True)]
            scores["rouge_l"] = float(np.mean(values))
        elif name == "cider" and len(set(reference)) == 1:
            left_out["cider"] = "CIDEr left out: its weights are 0 where all references are one text; give more studies"
        elif name == "cider":
            scores["cider"] = float(Cider().compute_score(true, said)[0])
        elif (reason := why_no_meteor()) is not None:
            left_out["meteor"] = f"METEOR left out: {reason}"
        else:
            try:
                scores["meteor"] = _meteor(predicted, reference)
            except (ValueError, IndexError, OSError, subprocess.SubprocessError) as error:
                # the others are not lost with it
                left_out["meteor"] = f"METEOR left out: java ended while it scored ({error}); it needs 2 GB of memory"
    return Lexical({name: scores[name] for name in NAMES if name in scores}, left_out)


def described_scores(
    predicted: Mapping[str, str],
    reference: Mapping[str, str],
    cleaning: Cleaning,
    *,
    shown: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """`lexical_scores` of texts as they were written, with everything that makes the numbers comparable: what a score
    card holds.

    Args:
        predicted, reference: study id -> text, the same studies in the same order.
        cleaning: of both sides, before anything is scored.
        shown: as for `lexical_scores`.

    Returns:
        JSON values: the cleaning's name and words, scores with what they are, what was left out and why, the scorer's
        version, the number of empty reports (which count), and a hash of the cleaned references.
    """
    said = [clean(text, cleaning, reference=False) for text in predicted.values()]
    true = [clean(text, cleaning, reference=True) for text in reference.values()]
    result = lexical_scores(said, true, shown=shown)
    texts = "".join(f"{study} {text}\n" for study, text in zip(reference, true, strict=True))
    return {
        "cleaning": cleaning,
        "cleaning_is": CLEANING_IS[cleaning],
        "scores": result.scores,
        "scores_are": {name: SOURCES[name] for name in result.scores},
        "left_out": result.left_out,
        "package": package(),
        "empty_predictions": sum(not text for text in said),
        "references_sha256": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def clean(text: str, cleaning: Cleaning, *, reference: bool) -> str:
    """A text as the scorers read it: words and marks separated by single spaces.

    Args:
        reference: one of the two that R2Gen cuts at different lengths (see `CLEANING_IS`).

    Source: R2Gen (arXiv 2010.16056), modules/tokenizers.py and datasets.py of its published code.
    """
    if cleaning == "raw":
        return " ".join(text.split())
    words = (_r2gen_iu(text) if cleaning == "r2gen-iu" else _r2gen_mimic(text)).split()
    return " ".join(words[: _LIMITS[cleaning] - 1 if reference else _LIMITS[cleaning]])


def why_no_meteor() -> str | None:
    """Why METEOR cannot be scored on this machine; None where it can."""
    java = shutil.which("java")
    if java is None:
        return "no java on PATH"
    try:
        tried = subprocess.run([java, "-version"], capture_output=True, timeout=_METEOR_TRIAL, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{java} does not run ({error})"
    return None if tried.returncode == 0 else f"{java} does not run (exit status {tried.returncode})"


def package() -> str:
    """Name and version of what scores."""
    return f"pycocoevalcap {importlib.metadata.version('pycocoevalcap')}"


def _meteor(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """One run of pycocoevalcap's jar over two files. Its own wrapper talks to a process and waits for ever where that
    ends or stalls.
    """
    jar = Path(inspect.getfile(Meteor)).with_name(METEOR_JAR)
    with tempfile.TemporaryDirectory() as folder:  # readable by this user alone
        files = [Path(folder, name) for name in ("predicted", "reference")]
        for file, texts in zip(files, (predicted, reference), strict=True):
            file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", errors="replace")
        command = [
            "java",
            "-Dfile.encoding=UTF-8",
            "-Xmx2G",
            "-jar",
            str(jar),
            *map(str, files),
            "-l",
            "en",
            "-norm",
            "-q",
        ]
        seconds = _METEOR_TRIAL * 2 + len(predicted)
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    return float(ended.stdout.split()[-1])


def _r2gen_iu(text: str) -> str:
    return _sentences(_fewer(text, ".", times=3))


def _r2gen_mimic(text: str) -> str:
    text = _fewer(text.replace("\n", " "), "_", times=7)
    return _sentences(_fewer(_fewer(text, " ", times=6), ".", times=8))


def _fewer(text: str, mark: str, times: int) -> str:
    """Runs of a mark made shorter: each time every pair becomes one."""
    for _ in range(times):
        text = text.replace(mark * 2, mark)
    return text


def _sentences(text: str) -> str:
    """Numbers of enumerations taken out, lower case, sentences stripped of punctuation and closed by a full stop of its
    own.
    """
    text = text.replace("1. ", "")
    for before in (". ", " "):
        for number in "2345":
            text = text.replace(f"{before}{number}. ", ". ")
    sentences = [_NOT_IN_SENTENCES.sub("", sentence) for sentence in text.strip().lower().split(". ")]
    return " . ".join(sentences) + " ."
