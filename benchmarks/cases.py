"""What the bench measures: cases, the contenders of each, and the ratios that are read from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.task import Task

SHORT, LONG = 112, 672  # image sides in pixels: prompts of about 40 and about 600 tokens
WIDE, HALF = 1092, 336  # about 1,500 and about 170 tokens
SIDES = [SHORT, HALF, LONG, WIDE]

Quantity = Literal["seconds", "cpu_seconds", "memory"]


@dataclass(frozen=True)
class Contender:
    """One process of a case: its name in tables, whose worker it is, what it does, and its allocator where not the
    bench's.
    """

    name: str
    side: Literal["ours", "trl", "labeler", "laboratory"]
    task: Task
    allocator: tuple[tuple[str, str], ...] | None = None  # environment variables


@dataclass(frozen=True)
class Case:
    """Contenders that take turns.

    Attributes:
        repetitions: measured units of each contender, after one that is not.
        estimate: seconds on two quiet cores, start included; for the time left and nothing else.
    """

    name: str
    title: str
    contenders: tuple[Contender, ...]
    repetitions: int
    estimate: float


@dataclass(frozen=True)
class Ratio:
    """`over` divided by `under`, contenders of one case: minima of seconds, or the largest memory."""

    name: str
    case: str
    over: str
    under: str
    quantity: Quantity = "seconds"


def ours(name: str, task: Task) -> Contender:
    return Contender(name, "ours", task)


def step_case(name: str, title: str, task: Task, *, repetitions: int, estimate: float) -> Case:
    return Case(name, title, (ours("ours", task), Contender("TRL", "trl", task)), repetitions, estimate)


def labeler_case(name: str, title: str, task: Task, units: dict[str, str], *, estimate: float) -> Case:
    """Two ways of labelling the same texts; `units` is contender -> unit."""
    contenders = tuple(Contender(contender, "labeler", replace(task, unit=unit)) for contender, unit in units.items())
    return Case(name, title, contenders, repetitions=2, estimate=estimate)


def pair(name: str, title: str, task: Task, units: dict[str, str], *, repetitions: int, estimate: float) -> Case:
    """Two units of work on the same policy; `units` is contender -> unit."""
    contenders = tuple(ours(contender, replace(task, unit=unit)) for contender, unit in units.items())
    return Case(name, title, contenders, repetitions, estimate)


def laboratory(name: str, task: Task) -> Contender:
    return Contender(name, "laboratory", task)


PEAK = laboratory("peak", Task(unit="gemm"))
STUDIES = (16, 64, 256)  # a step
RANKS = 2  # as the demo has
REPORT = 56  # tokens at most, as in the demo
SFT_BATCH = 16
_DEMO = Task(unit="lab_grpo", new_tokens=REPORT, ranks=RANKS)
_SFT = Task(unit="lab_sft", studies=SFT_BATCH)

_ROLLOUT = {"ours": "rollout", "generate": "hf_generate"}
_SCORING = {"ours": "scoring", "one row each": "scoring_naive"}

CASES = (
    step_case("step_short", f"A whole step at {SHORT} px: ours and TRL", Task(side=SHORT), repetitions=6, estimate=50),
    step_case("step_long", f"A whole step at {LONG} px: ours and TRL", Task(side=LONG), repetitions=3, estimate=160),
    pair(
        "rollout_short",
        f"Rollout at {SHORT} px: ours and transformers' generate",
        Task(side=SHORT),
        _ROLLOUT,
        repetitions=6,
        estimate=30,
    ),
    pair(
        "rollout_long",
        f"Rollout at {LONG} px: ours and transformers' generate",
        Task(side=LONG),
        _ROLLOUT,
        repetitions=4,
        estimate=70,
    ),
    pair(
        "scoring_long",
        f"Policy scores with gradient at {LONG} px: ours and one row [prompt | completion] for each completion",
        Task(side=LONG),
        _SCORING,
        repetitions=4,
        estimate=80,
    ),
    Case(
        "growth_group",
        f"Our step at {LONG} px as the group grows",
        tuple(ours(f"G {group}", Task(side=LONG, group=group)) for group in (2, 4, 8, 16, 32)),
        repetitions=4,
        estimate=120,
    ),
    Case(
        "growth_prompt",
        "Our step as the prompt grows",
        tuple(ours(f"{side} px", Task(side=side)) for side in SIDES),
        repetitions=3,
        estimate=80,
    ),
    Case(
        "growth_tokens",
        f"Our step at {SHORT} px as completions grow",
        tuple(ours(f"{tokens} tokens", Task(side=SHORT, new_tokens=tokens)) for tokens in (16, 64, 256)),
        repetitions=3,
        estimate=50,
    ),
    Case(
        "growth_studies",
        f"Our step at {SHORT} px as studies are added",
        tuple(
            ours(f"{studies} {'study' if studies == 1 else 'studies'}", Task(side=SHORT, studies=studies))
            for studies in (1, 4, 8)
        ),
        repetitions=4,
        estimate=40,
    ),
    Case(
        "rollouts",
        "GRPO steps of the demo's policy, everything included, G 8, two ranks: 16, 64 and 256 studies a step",
        (*(laboratory(str(studies), replace(_DEMO, studies=studies)) for studies in STUDIES), PEAK),
        repetitions=3,
        estimate=120,
    ),
    Case(
        "sft_all",
        "SFT of every parameter of that policy, 64 studies in four steps: ours and the checkpoint's own modules",
        (laboratory("ours", _SFT), laboratory("modules", replace(_SFT, unit="lab_sft_modules")), PEAK),
        repetitions=6,
        estimate=50,
    ),
    labeler_case(
        "labeler_single",
        "Labelling 128 reports by CheXbert at BERT-base's size: ours and one report at a time",
        Task(reports=128),
        {"ours": "label", "one at a time": "label_singly"},
        estimate=70,
    ),
    labeler_case(
        "labeler_padded",
        "Labelling 12 reports, drawn like the 128: ours and batches padded to 512 tokens",
        Task(reports=12),
        {"ours": "label", "padded to 512": "label_padded"},
        estimate=55,
    ),
    labeler_case(
        "labeler_repeated",
        "Labelling 16 reports, drawn like the 128, of which each occurs 8 times: ours, and ours without noticing",
        Task(reports=16, copies=8),
        {"ours": "label", "each anew": "label_every"},
        estimate=40,
    ),
)

RATIOS = (
    Ratio("step_short", "step_short", over="TRL", under="ours"),
    Ratio("step_long", "step_long", over="TRL", under="ours"),
    Ratio("rollout_short", "rollout_short", over="generate", under="ours"),
    Ratio("rollout_long", "rollout_long", over="generate", under="ours"),
    Ratio("scoring_long", "scoring_long", over="one row each", under="ours"),
    Ratio("memory_long", "step_long", over="TRL", under="ours", quantity="memory"),
    Ratio("growth_8_16", "growth_group", over="G 16", under="G 8"),
    Ratio("sft_all", "sft_all", over="modules", under="ours"),
    Ratio("reward_single", "labeler_single", over="one at a time", under="ours"),
    Ratio("reward_padded", "labeler_padded", over="padded to 512", under="ours"),
    Ratio("reward_repeated", "labeler_repeated", over="each anew", under="ours"),
)
