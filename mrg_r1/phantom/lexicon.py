"""The words and the sentence frames of the phantoms' reports: data for `wording`.

A sentence is a frame (its syntax) filled with an observation's own words. Frames come in two splits that share no
sentence: a labeler trained on `train` frames meets the same nouns and negations in new syntax in `heldout` frames, so a
test on them measures reading, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mrg_r1.phantom.traits import (
    ATELECTASIS,
    CARDIOMEGALY,
    CONSOLIDATION,
    EDEMA,
    ENLARGED_CARDIOMEDIASTINUM,
    FRACTURE,
    LINE,
    LUNG_LESION,
    LUNG_OPACITY,
    PACEMAKER,
    PLEURAL_EFFUSION,
    PLEURAL_OTHER,
    PNEUMONIA,
    PNEUMOTHORAX,
    SUPPORT_DEVICES,
)

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Noun:
    """One name of an observation. `plural` is empty where there is none ("edema")."""

    singular: str
    plural: str = ""
    countable: bool = True
    sides: bool = True  # may be said to be left or right
    smallest: float = 0.0  # grade from which this name fits ("mass")
    kind: int | None = None  # Support Devices: the kind that it names


@dataclass(frozen=True)
class Clause:
    """Another way to say it: a subject with a predicate. An empty predicate means that the clause cannot say that."""

    subject: str  # may hold {side}
    present: str  # predicate of a positive or uncertain sentence, one word
    absent: str  # predicate of a negative sentence
    plural_subject: str = ""  # the subject of the negative, where it differs


@dataclass(frozen=True)
class Vocabulary:
    """The words of one observation."""

    nouns: tuple[Noun, ...]
    absent_nouns: tuple[Noun, ...]
    sizes: tuple[str, ...] = ()  # from small to large, said of the grade
    lung_zone: bool = False  # "left upper lung" rather than "left"
    clauses: tuple[Clause, ...] = ()


def names(*singular: str, countable: bool = True, sides: bool = True) -> tuple[Noun, ...]:
    """Nouns whose plural, if countable, takes an s."""
    return tuple(Noun(name, name + "s" if countable else "", countable, sides) for name in singular)


@dataclass(frozen=True)
class Lexicon:
    """All words and frames of a preset. Dictionaries of frames go by split, then, where values differ, by value."""

    vocabulary: dict[int, Vocabulary]
    noun_frames: dict[str, dict[int, tuple[str, ...]]]
    clause_frames: dict[str, dict[int, tuple[str, ...]]]
    pair_frames: dict[str, tuple[str, ...]]
    normal: dict[str, tuple[str, ...]]
    triple_frames: dict[str, tuple[str, ...]] = field(default_factory=dict)  # {a}, {b}, {c}; may be empty
    change_frames: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)  # by split and NEW or UNCHANGED
    lung_places: tuple[str, ...] = ("{side} {zone} lung",)


NEW, UNCHANGED = "new", "unchanged"  # against the patient's earlier study


_MASS = names("edema", "pulmonary edema", countable=False, sides=False)
_DEVICES = (
    Noun("pacemaker", "pacemakers", kind=PACEMAKER),
    Noun("pacemaker and lead", kind=PACEMAKER),
    Noun("central line", "central lines", kind=LINE),
    Noun("venous catheter", "venous catheters", kind=LINE),
)

VOCABULARY: dict[int, Vocabulary] = {
    ENLARGED_CARDIOMEDIASTINUM: Vocabulary(
        nouns=names("mediastinal widening", countable=False, sides=False),
        absent_nouns=names("mediastinal widening", countable=False, sides=False),
        sizes=("mild", "moderate", "severe"),
        clauses=(
            Clause("the mediastinum", "widened", "normal in width"),
            Clause("the mediastinum", "wide", "not widened"),
        ),
    ),
    CARDIOMEGALY: Vocabulary(
        nouns=names("cardiomegaly", "cardiac enlargement", countable=False, sides=False),
        absent_nouns=names("cardiomegaly", "cardiac enlargement", countable=False, sides=False),
        sizes=("mild", "moderate", "severe"),
        clauses=(
            Clause("the heart", "enlarged", "normal in size"),
            Clause("the cardiac silhouette", "enlarged", "not enlarged"),
            Clause("the heart size", "", "normal"),
        ),
    ),
    LUNG_OPACITY: Vocabulary(
        nouns=(*names("hazy opacity"), Noun("opacity", "opacities")),
        absent_nouns=(Noun("opacity", "opacities"), Noun("lung opacity", "lung opacities")),
        lung_zone=True,
        clauses=(Clause("the {side} lung", "hazy", "clear", "the lungs"),),
    ),
    LUNG_LESION: Vocabulary(
        nouns=(*names("nodule", "lung nodule"), Noun("mass", "masses", smallest=0.6)),
        absent_nouns=(*names("nodule", "lung nodule"), Noun("mass", "masses")),
        sizes=("small", "", "large"),
        lung_zone=True,
    ),
    EDEMA: Vocabulary(nouns=_MASS, absent_nouns=_MASS, sizes=("mild", "moderate", "severe")),
    CONSOLIDATION: Vocabulary(
        nouns=names("consolidation", "airspace consolidation", countable=False),
        absent_nouns=names("consolidation", "airspace consolidation", countable=False),
        lung_zone=True,
        clauses=(Clause("the {side} lung", "consolidated", ""),),
    ),
    PNEUMONIA: Vocabulary(
        nouns=names("pneumonia", "infectious infiltrate", countable=False),
        absent_nouns=names("pneumonia", "infectious infiltrate", countable=False),
        lung_zone=True,
    ),
    ATELECTASIS: Vocabulary(
        nouns=names("atelectasis", "linear atelectasis", countable=False),
        absent_nouns=names("atelectasis", "collapse", countable=False),
        sizes=("mild", "", ""),
        lung_zone=True,
    ),
    PNEUMOTHORAX: Vocabulary(
        nouns=names("pneumothorax"),
        absent_nouns=names("pneumothorax"),
        sizes=("small", "moderate", "large"),
    ),
    PLEURAL_EFFUSION: Vocabulary(
        nouns=names("pleural effusion", "effusion"),
        absent_nouns=names("pleural effusion", "effusion"),
        sizes=("small", "moderate", "large"),
        clauses=(Clause("the {side} costophrenic angle", "blunted", "sharp", "the costophrenic angles"),),
    ),
    PLEURAL_OTHER: Vocabulary(
        nouns=names("pleural thickening", "pleural scarring", countable=False),
        absent_nouns=names("pleural thickening", "pleural scarring", countable=False),
    ),
    FRACTURE: Vocabulary(
        nouns=names("rib fracture", "fracture"),
        absent_nouns=names("rib fracture", "fracture"),
        clauses=(Clause("a {side} rib", "broken", "intact", "the ribs"),),
    ),
    SUPPORT_DEVICES: Vocabulary(
        nouns=_DEVICES,
        absent_nouns=(*names("support device", "device"), Noun("pacemaker", "pacemakers")),
    ),
}

# Frames. {np}: the bare noun phrase; {NP}: with its article; {where}: " on the left", " in the right upper lung" or
# nothing; {be}: is or are. A frame with "also" does not open a report.
NOUN_FRAMES: dict[str, dict[int, tuple[str, ...]]] = {
    "train": {
        1: (
            "There {be} {NP}{where}.",
            "{NP} {be} present{where}.",
            "{NP} {be} seen{where}.",
            "{np}{where}.",
            "There {be} also {NP}{where}.",
        ),
        0: (
            "No {np}.",
            "There is no {np}.",
            "No {np} is seen.",
            "No {np} is present.",
            "{np} is not seen.",
            "No evidence of {np}.",
            "{np} is absent.",
        ),
        -1: (
            "Possible {np}{where}.",
            "There may be {NP}{where}.",
            "{np}{where} cannot be excluded.",
            "{NP}{where} {be} possible.",
        ),
    },
    "heldout": {
        1: (
            "There {be} {NP} seen{where}.",
            "Also seen {be} {NP}{where}.",
            "{np} present{where}.",
            "Also present {be} {NP}{where}.",
        ),
        0: (
            "There is no {np} seen.",
            "{np} is not present.",
            "There is no evidence of {np}.",
            "{np} not seen.",
            "{np} absent.",
        ),
        -1: (
            "There {be} possible {np}{where}.",
            "{NP} may be present{where}.",
            "{np}{where} possible.",
            "{NP} may be seen{where}.",
        ),
    },
}
# {Subject}, {subject}: a clause's subject with and without its article; {state}: its predicate; {quality}: a predicate
# of one word, standing before the noun, and {a_quality} the same with its article.
CLAUSE_FRAMES: dict[str, dict[int, tuple[str, ...]]] = {
    "train": {
        1: ("{Subject} is {state}.", "{Subject} appears {state}."),
        0: ("{Subject} {be} {state}.",),
        -1: ("{Subject} may be {state}.", "{Subject} is possibly {state}."),
    },
    "heldout": {
        1: ("There is {a_quality} {subject}.", "{subject} {state}."),
        0: ("{subject} {state}.", "{quality} {subject}."),
        -1: ("There may be {a_quality} {subject}.", "{subject} possibly {state}."),
    },
}
PAIR_FRAMES: dict[str, tuple[str, ...]] = {
    "train": (
        "No {a} or {b}.",
        "There is no {a} or {b}.",
        "No {a} or {b} is seen.",
        "No evidence of {a} or {b}.",
        "{a} and {b} are not seen.",
    ),
    "heldout": (
        "There is no {a} and no {b}.",
        "No {a} and no {b}.",
        "{a} and {b} are absent.",
        "{a} and {b} are not present.",
    ),
}
NORMAL: dict[str, tuple[str, ...]] = {
    "train": ("No acute cardiopulmonary abnormality.", "No acute abnormality is seen.", "Normal chest."),
    "heldout": ("There is no acute cardiopulmonary abnormality.", "No acute abnormality.", "The chest is normal."),
}

FIVE = Lexicon(VOCABULARY, NOUN_FRAMES, CLAUSE_FRAMES, PAIR_FRAMES, NORMAL)

THINK: dict[int, tuple[str, str, str]] = {
    # name, positive, negative; uncertain is "possible" for all
    ENLARGED_CARDIOMEDIASTINUM: ("mediastinum", "wide", "normal"),
    CARDIOMEGALY: ("heart", "enlarged", "normal"),
    LUNG_OPACITY: ("opacity", "yes", "none"),
    LUNG_LESION: ("nodule", "yes", "none"),
    EDEMA: ("edema", "yes", "none"),
    CONSOLIDATION: ("consolidation", "yes", "none"),
    PNEUMONIA: ("pneumonia", "yes", "none"),
    ATELECTASIS: ("atelectasis", "yes", "none"),
    PNEUMOTHORAX: ("pneumothorax", "yes", "none"),
    PLEURAL_EFFUSION: ("effusion", "yes", "none"),
    PLEURAL_OTHER: ("pleura", "thickened", "normal"),
    FRACTURE: ("fracture", "yes", "none"),
    SUPPORT_DEVICES: ("device", "yes", "none"),
}

ORDER = (  # how a report goes through a chest: heart, lungs, pleura, bones, devices
    CARDIOMEGALY,
    ENLARGED_CARDIOMEDIASTINUM,
    EDEMA,
    LUNG_OPACITY,
    CONSOLIDATION,
    PNEUMONIA,
    ATELECTASIS,
    LUNG_LESION,
    PLEURAL_EFFUSION,
    PNEUMOTHORAX,
    PLEURAL_OTHER,
    FRACTURE,
    SUPPORT_DEVICES,
)
IN_LUNG = (LUNG_LESION, EDEMA, CONSOLIDATION, PNEUMONIA, ATELECTASIS, PNEUMOTHORAX, PLEURAL_EFFUSION)
