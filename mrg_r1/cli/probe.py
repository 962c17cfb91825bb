"""`mrg-r1 probe`: what RL can gain from a recipe's start, before any step is paid for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import described, positive

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_OUTLOOK = {
    "nothing": "RL has nothing to learn from here",
    "little": "RL has little to gain here",
    "something": "RL has something to gain here",
}


def add_commands(commands: Any) -> None:
    """`probe`."""
    probe = described(
        commands.add_parser,
        "probe",
        help="what RL can gain from a start, before hours are spent",
        description="Sample a group of reports of some validation studies from a recipe's policy as it is, score them "
        "by the recipe's\n"
        "reward, and say what RL can gain: it makes likelier what is sampled and earns more than its group, and finds "
        "nothing\n"
        "that is never sampled.\n"
        "\n"
        "  a sample         mean over all reports sampled; `best of G`: of each group the report that earns most\n"
        "  constant report  the training report that earns most if every study is given it: what needs no looking\n"
        "  another study    a group's rewards for a study that is not its own: what so many tries earn by luck\n"
        "  zero signal      groups whose reports all earn the same: paid for, and nothing is learned from them\n"
        "  ever in G        of studies in which a finding is true, those in which any report of the group says it\n"
        "  AUC              of the share of a group that says it: 0.5 where that has nothing to do with the truth\n"
        "  a step           its seconds and memory in this process, with one update whose gradient is thrown away\n"
        "\n"
        "One process, no launcher; nothing is learned, and nothing is left in output_dir. docs/debugging.md has the "
        "thresholds.",
        examples="""
        mrg-r1 probe launch/recipes/iu_7b.yaml
        mrg-r1 probe my_recipe.yaml rollout.temperature=1.2 --studies 128 --group-size 16
        mrg-r1 probe runs/sft/config.yaml policy.path=runs/sft/policy --json probe.json
        mrg-r1 probe my_recipe.yaml data.val_split=test --no-update
        """,
    )
    probe.add_argument("recipe", type=Path, metavar="RECIPE", help="a GRPO recipe; its policy.path is the start")
    probe.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values to change, as in reward.margin=0.3; before any option"
    )
    probe.add_argument(
        "--studies", type=positive, default=64, metavar="N", help="validation studies, the first N (default: 64)"
    )
    probe.add_argument(
        "--group-size", type=positive, metavar="G", help="reports a study (default: the recipe's grpo.group_size)"
    )
    probe.add_argument("--no-update", action="store_true", help="leave out the update that is taken for its time")
    probe.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    probe.set_defaults(run=_probe)


def _probe(arguments: argparse.Namespace) -> None:
    from mrg_r1.config.recipe import load_recipe

    group = [] if arguments.group_size is None else [f"grpo.group_size={arguments.group_size}"]
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *group])  # a bad one is said before torch is imported
    import json
    import warnings

    from transformers.utils import logging

    from mrg_r1.cli.arguments import use_cores
    from mrg_r1.console import wide_console
    from mrg_r1.files import write_text_atomically
    from mrg_r1.reward.compute import RewardError
    from mrg_r1.training.probe import probe

    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own calls of its own old names
    logging.disable_progress_bar()
    use_cores()
    try:
        result = probe(recipe, studies=arguments.studies, updates=not arguments.no_update)
    except RewardError as error:
        raise ValueError(f"no rewards: {error}") from error
    _print(wide_console(), result)
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{arguments.json}: written")


def _print(console: Console, result: dict[str, Any]) -> None:
    group = result["group_size"]
    start = result["policy"] + (f" with {result['adapter']}" if result["adapter"] else "")
    asked = f"temperature {result['temperature']:g}, seed {result['seed']}"

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{start}: {result['studies']} studies of {result['split']!r} x G {group}, {asked}")
    console.print(_scores(result))
    reports = result["reports"]
    say(
        f"zero-signal groups {result['zero_signal']:.0%}; std of rewards in a group "
        f"{result['reward']['std_in_group']:.3f}; groups with right and wrong reports "
        f"{result['all_findings_right']['mixed']:.0%}"
    )
    say(
        f"reports: {reports['tokens_greedy']:.0f} tokens greedy, {reports['tokens_sampled']:.0f} sampled; truncated "
        f"{reports['truncated']:.0%}, malformed {reports['malformed']:.0%}; different texts: "
        f"{reports['different_sampled']} of {result['studies'] * group} sampled ({reports['distinct_in_group']:.0%} of "
        f"a group), {reports['different_greedy']} of {result['studies']} greedy"
    )
    console.print()
    console.print(_findings(result))
    say(_step(result))
    console.print()
    console.print(f"{_OUTLOOK[result['outlook']]}:", style="bold", highlight=False)
    for line in result["verdict"]:
        say(f"- {line}")


def _plain_table(*columns: str) -> Table:
    """Numbers to the right of a name."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    return table


def _scores(result: dict[str, Any]) -> Table:
    reward, f1, right = result["reward"], result["disease_micro13"], result["all_findings_right"]
    table = _plain_table("", "greedy", "a sample", f"best of {result['group_size']}", "constant report")
    table.add_row("reward", *map(_number, (reward["greedy"], reward["sampled"], reward["best"], reward["constant"])))
    other = (reward["sampled_for_another_study"], reward["best_for_another_study"])
    table.add_row("reward, given to another study", "", *map(_number, other), "")
    for name, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1")):
        numbers = (f1[which][key] for which in ("greedy", "sampled", "best"))
        table.add_row(f"disease_micro13 {name}", *map(_number, numbers), "")
    table.add_row("all 13 findings right", *map(_number, (right["greedy"], right["sampled"], right["any"])), "")
    return table


def _findings(result: dict[str, Any]) -> Table:
    group = f"ever in {result['group_size']}"
    table = _plain_table("said", "true in", "greedy: true", "absent", "a sample: true", "absent", group, "AUC")
    keys = ("greedy_recall", "greedy_said_when_false", "said_when_true", "said_when_false", "recall_at_group", "auc")
    for name, one in result["observations"].items():
        if one["true"] or one["said_when_false"]:
            table.add_row(name, str(one["true"]), *(_number(one[key], 2) for key in keys))
    return table


def _step(result: dict[str, Any]) -> str:
    step = result["step"]
    seconds = step["seconds"]
    parts = ", ".join(f"{name} {spent:.2g}" for name, spent in seconds.items())
    where = step["device"] if step["device"] != "cpu" else f"{step['threads']} CPU thread(s)"
    without = "the optimizer's step" if step["with_update"] else "any update"
    return (
        f"a step of {step['studies']} studies x G {result['group_size']} in this process, {where}: "
        f"{sum(seconds.values()):.2g} s ({parts}) without {without}; memory at most {step['memory_gib']:.2f} GiB, the "
        "labeler's process beside it"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
