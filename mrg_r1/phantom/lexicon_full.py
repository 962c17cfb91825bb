"""The words of preset `full`: those of `lexicon`, and more nouns, sizes for nearly all findings, lists, and words of
change.

No corpus was read to make them. What no label reads (`REMARKS`, `COMPARED`, `TECHNIQUE`) holds for every phantom it is
said of.
"""

from __future__ import annotations

from dataclasses import replace

from mrg_r1.phantom.lexicon import (
    CLAUSE_FRAMES,
    NEW,
    NORMAL,
    NOUN_FRAMES,
    PAIR_FRAMES,
    SPLITS,
    UNCHANGED,
    VOCABULARY,
    Clause,
    Lexicon,
    Noun,
    Vocabulary,
    names,
)
from mrg_r1.phantom.traits import (
    ATELECTASIS,
    CARDIOMEGALY,
    CONSOLIDATION,
    EDEMA,
    ENLARGED_CARDIOMEDIASTINUM,
    FRACTURE,
    LUNG_LESION,
    LUNG_OPACITY,
    PLEURAL_EFFUSION,
    PLEURAL_OTHER,
    PNEUMONIA,
    PNEUMOTHORAX,
)

_SEVERITY = ("mild", "moderate", "severe")


def _more(
    observation: int, nouns: tuple[Noun, ...] = (), clauses: tuple[Clause, ...] = (), sizes: tuple[str, ...] = ()
) -> Vocabulary:
    words = VOCABULARY[observation]
    return replace(words, nouns=words.nouns + nouns, clauses=words.clauses + clauses, sizes=sizes or words.sizes)


_VOCABULARY: dict[int, Vocabulary] = {
    **VOCABULARY,
    ENLARGED_CARDIOMEDIASTINUM: _more(
        ENLARGED_CARDIOMEDIASTINUM,
        names("widening of the mediastinum", countable=False, sides=False),
        (
            Clause("the mediastinal contour", "widened", "within normal limits"),
            Clause("the cardiomediastinal silhouette", "widened", "unremarkable"),
        ),
    ),
    CARDIOMEGALY: _more(
        CARDIOMEGALY,
        names("enlargement of the heart", countable=False, sides=False),
        (Clause("the heart size", "", "within normal limits"), Clause("the heart", "enlarged", "not enlarged")),
    ),
    LUNG_OPACITY: _more(LUNG_OPACITY, (Noun("airspace opacity", "airspace opacities"),), sizes=("faint", "", "dense")),
    LUNG_LESION: _more(LUNG_LESION, names("pulmonary nodule")),
    EDEMA: _more(EDEMA, names("interstitial edema", countable=False, sides=False)),
    CONSOLIDATION: _more(
        CONSOLIDATION, names("focal consolidation", countable=False), sizes=("small", "", "extensive")
    ),
    PNEUMONIA: _more(
        PNEUMONIA, names("patchy pneumonia", "bronchopneumonia", countable=False), sizes=("mild", "", "extensive")
    ),
    ATELECTASIS: _more(
        ATELECTASIS, names("bandlike atelectasis", "platelike atelectasis", countable=False), sizes=_SEVERITY
    ),
    PNEUMOTHORAX: _more(PNEUMOTHORAX, names("apical pneumothorax")),
    PLEURAL_EFFUSION: _more(PLEURAL_EFFUSION, names("pleural fluid", countable=False)),
    PLEURAL_OTHER: _more(PLEURAL_OTHER, names("pleural plaque"), sizes=_SEVERITY),
    FRACTURE: _more(FRACTURE, names("fracture of a rib", sides=False), sizes=("", "displaced")),
}

_NOUN_FRAMES: dict[str, dict[int, tuple[str, ...]]] = {
    "train": {
        1: (
            "Findings include {NP}{where}.",
            "{NP} {be} noted{where}.",
            "{NP} {be} identified{where}.",
            "There is evidence of {NP}{where}.",
        ),
        0: ("No definite {np}.", "No {np} is identified.", "Negative for {np}.", "The study shows no {np}."),
        -1: (
            "Findings may represent {NP}{where}.",
            "{NP}{where} {be} suspected.",
            "Questionable {np}{where}.",
            "It is possible that there {be} {NP}{where}.",
        ),
    },
    "heldout": {
        1: (
            "Noted {be} {NP}{where}.",
            "{NP} can be seen{where}.",
            "The study shows {NP}{where}.",
            "Evidence of {NP}{where}.",
        ),
        0: (
            "There is no definite {np}.",
            "No {np} noted.",
            "{np} is not identified.",
            "The findings are negative for {np}.",
        ),
        -1: (
            "Suspected {np}{where}.",
            "{NP}{where} {be} questionable.",
            "This may represent {NP}{where}.",
            "{np}{where} is not excluded.",
        ),
    },
}
_CLAUSE_FRAMES: dict[str, dict[int, tuple[str, ...]]] = {
    "train": {
        1: ("{Subject} looks {state}.",),
        0: ("{Subject} {be} found {state}.",),
        -1: ("{Subject} is questionably {state}.",),
    },
    "heldout": {
        1: ("{Subject} is noted to be {state}.",),
        0: ("The study shows that {Subject} {be} {state}.",),
        -1: ("It is possible that {Subject} is {state}.",),
    },
}


def _joined(
    base: dict[str, dict[int, tuple[str, ...]]], more: dict[str, dict[int, tuple[str, ...]]]
) -> dict[str, dict[int, tuple[str, ...]]]:
    return {split: {value: base[split][value] + more[split][value] for value in (1, 0, -1)} for split in SPLITS}


FULL = Lexicon(
    vocabulary=_VOCABULARY,
    noun_frames=_joined(NOUN_FRAMES, _NOUN_FRAMES),
    clause_frames=_joined(CLAUSE_FRAMES, _CLAUSE_FRAMES),
    pair_frames=PAIR_FRAMES,
    normal={
        "train": (*NORMAL["train"], "No acute cardiopulmonary abnormality is identified.", "Unremarkable chest."),
        "heldout": (*NORMAL["heldout"], "No acute abnormality of the chest.", "The chest is unremarkable."),
    },
    triple_frames={
        "train": (
            "No {a}, {b}, or {c}.",
            "There is no {a}, {b}, or {c}.",
            "No {a}, {b}, or {c} is identified.",
            "Negative for {a}, {b}, and {c}.",
        ),
        "heldout": (
            "There is no {a}, no {b}, and no {c}.",
            "No evidence of {a}, {b}, or {c}.",
            "{a}, {b}, and {c} are absent.",
        ),
    },
    change_frames={
        "train": {
            UNCHANGED: ("Unchanged {np}{where}.", "{NP} {be} again seen{where}.", "There {be} stable {np}{where}."),
            NEW: ("New {np}{where}.", "There {be} now {NP}{where}.", "{NP} {be} new{where}."),
        },
        "heldout": {
            UNCHANGED: ("Again seen {be} {NP}{where}.", "{np}{where}, unchanged.", "Stable {np}{where}."),
            NEW: ("There {be} new {np}{where}.", "Now seen {be} {NP}{where}.", "{np}{where}, new."),
        },
    },
    lung_places=("{side} {zone} lung", "{side} {zone} lung zone", "{zone} {side} lung"),
)

REMARKS: dict[str, tuple[str, ...]] = {  # true of every phantom, and read by no label
    "train": (
        "The trachea is midline.",
        "The aortic knob is unremarkable.",
        "Lung volumes are adequate.",
        "The soft tissues are unremarkable.",
    ),
    "heldout": (
        "Midline trachea.",
        "Unremarkable aortic knob.",
        "Adequate lung volumes.",
        "Unremarkable soft tissues.",
    ),
}
TECHNIQUE: dict[str, dict[int, tuple[str, ...]]] = {  # by the number of views
    "train": {1: ("A single frontal view is submitted.",), 2: ("Frontal and lateral views are submitted.",)},
    "heldout": {1: ("One frontal view.",), 2: ("Two views, frontal and lateral.",)},
}
COMPARED: dict[str, dict[bool, tuple[str, ...]]] = {  # by whether there is an earlier study
    "train": {
        True: ("Comparison is made with the earlier study.", "The earlier study is available for comparison."),
        False: ("No comparison is available.", "There is no earlier study to compare with."),
    },
    "heldout": {True: ("Compared with the earlier study.",), False: ("Comparison: not available.",)},
}

# Reasons for an examination, and the findings that make each of them likelier; none settles any label.
NEUTRAL_INDICATIONS = (
    "Chest pain.",
    "Preoperative evaluation.",
    "Routine examination.",
    "Weakness.",
    "Dizziness.",
    "Abdominal pain.",
)
INDICATIONS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("Shortness of breath.", "Dyspnea on exertion."): (CARDIOMEGALY, EDEMA, PLEURAL_EFFUSION, PNEUMOTHORAX),
    ("Cough and fever.", "Productive cough.", "Fever, evaluate for infection."): (
        PNEUMONIA,
        CONSOLIDATION,
        LUNG_OPACITY,
    ),
    ("Pain after a fall.", "Blunt trauma to the chest."): (FRACTURE, PNEUMOTHORAX, PLEURAL_EFFUSION),
    ("History of smoking.", "Weight loss."): (LUNG_LESION, PLEURAL_OTHER, ENLARGED_CARDIOMEDIASTINUM),
    ("Shallow breathing after surgery.", "Reduced breath sounds."): (ATELECTASIS, PLEURAL_EFFUSION),
}
