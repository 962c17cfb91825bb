"""Which metrics belong together: the groups of docs/metrics.md, and in each the plots that the page of a run and a
wandb dashboard draw. A metric that nobody has named here has a plot, and a group by its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GROUPS = {  # a group, headed as in docs/metrics.md -> the prefixes of its metrics, in the order of being shown
    "Rewards": ("reward", "agreement"),
    "Validation": ("validation",),
    "Policy": ("loss", "policy", "sampling", "sft"),
    "Groups": ("groups",),
    # other prefixes are shown here, each a group of its own
    "Time and memory": ("time",),
}
# the metrics whose highest value is a run's: wandb's summary of them, and what a dashboard compares runs by
HIGHER_IS_BETTER = (
    "reward/total",
    "validation/mean_reward",
    "validation/disease_micro13",
    "validation/disease_macro13",
)
_LAST = "Time and memory"
_TOGETHER = (  # metrics of one plot: title, pattern of the whole name; the first that matches. Others have a plot each.
    ("mean reward, beside one constant report", r"reward/(total|constant)"),
    ("spread of the rewards", r"reward/(std|.*_std)"),
    ("reward terms, before weights", r"reward/.*"),
    ("F1 on the validation studies, by definition", r"validation/(disease|held_out_disease|r2gen|chexbert|example).*"),
    ("gap to the drawn truth, to the held-out labeler", r"validation/.*_gap"),
    ("reports on the validation studies, shares", r"validation/(format_rate|distinct_share|no_finding_rate)"),
    ("agreement of samples with their references", r"agreement/.*"),
    ("probability ratio, new to old", r"policy/ratio.*"),
    ("share of tokens clipped", r"policy/clip_.*"),
    ("sampled against scored log-probability", r"sampling/logp_gap.*"),
    ("groups without signal", r"groups/(zero_signal|all_zero_.*)"),
    ("distinct reports, share", r"groups/distinct.*"),
    ("repetition and contradiction", r"groups/(repeated_sentence|repetition|contradiction)"),
    (
        "repetition and contradiction on the validation studies",
        r"validation/(repeated_sentence|repetition|contradiction)",
    ),
    ("truncated and malformed, share", r"groups/(truncated|malformed)"),
    ("shares and counts", r"time/.*(_share|_busy|_max)"),
    ("seconds a step", r"time/(?!start|evaluation|checkpoint|validation|tokens_|update_).*"),
    ("seconds now and then", r"time/(start|evaluation|checkpoint|validation)"),
)
_TITLES = {
    "loss": "loss",
    "policy/kl": "KL to the reference",
    "policy/entropy": "entropy, nats a token",
    "policy/grad_norm": "gradient norm",
    "policy/learning_rate": "learning rate",
    "validation/mean_reward": "mean reward on the validation studies",
    "groups/length": "length, tokens",
    "time/tokens_per_second": "tokens a second",
    "time/update_tflops": "TFLOP/s of the update, a rank",
    "time/update_mfu": "share of the card's peak in the update",
    "groups/no_finding": "reports that say No Finding, share",
}
_FIRST = (  # plots that open their group
    "mean reward, beside one constant report",
    "reward terms, before weights",
    "F1 on the validation studies, by definition",
    *_TITLES.values(),
)


@dataclass(frozen=True)
class Plot:
    """Metrics that are drawn into one another."""

    title: str
    names: list[str]


def group_of(name: str) -> str:
    """The group of a metric, as docs/metrics.md heads it; a prefix that it does not have is a group of its own."""
    prefix, slash, _ = name.partition("/")
    found = next((group for group, prefixes in GROUPS.items() if prefix in prefixes), None)
    return found or (prefix.capitalize() if slash else "Other")


def plots(names: Iterable[str], *, runs: int = 1) -> dict[str, list[Plot]]:
    """The plots of these metrics by group, in the order of being shown.

    Args:
        runs: that are drawn into each; of several, a plot of more than four metrics becomes one a metric.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=lambda name: ("constant" in name, name)):
        found.setdefault(group_of(name), {}).setdefault(_title(name), []).append(name)
    return {
        group: [
            plot
            for title, together in sorted(found[group].items(), key=lambda plot: _place(plot[0]))
            for plot in _apart(title, together, runs=runs)
        ]
        for group in in_order(found)
    }


def in_order(groups: Iterable[str]) -> list[str]:
    """Groups as they are shown: those of docs/metrics.md, others by name, and time last."""
    present = set(groups)
    known = [group for group in GROUPS if group in present and group != _LAST]
    return [*known, *sorted(present - GROUPS.keys()), *([_LAST] if _LAST in present else [])]


def _title(name: str) -> str:
    for title, pattern in _TOGETHER:
        if re.fullmatch(pattern, name):
            return title
    return _TITLES.get(name, name)


def _place(title: str) -> int:
    return _FIRST.index(title) if title in _FIRST else len(_FIRST)


def _apart(title: str, names: Sequence[str], *, runs: int) -> list[Plot]:
    """One plot, or with several runs one a metric where its lines could not be told apart."""
    if runs > 1 and len(names) > 4:
        return [Plot(f"{title}: {name.split('/', 1)[-1]}", [name]) for name in names]
    return [Plot(title, list(names))]
