"""Whether a recipe undoes what its reward was chosen for (docs/rewards.md), and whether who is asked for it answers."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from mrg_r1.config.recipe import Recipe
from mrg_r1.cores import read_cores, visible_device
from mrg_r1.doctor.finding import Finding, examined
from mrg_r1.metrics.radeval import RadEval
from mrg_r1.reward.judge import TRIAL, Judge, is_url
from mrg_r1.reward.outside import is_own, metrics_of

_OF_LABELS = ("mccs", "ccs", "ce_f1")  # terms whose break-evens are other ones than additive's

_IMPORTED = "imported\n"
_IMPORT = f"""import sys
from mrg_r1.reward.terms import load_callable
load_callable(sys.argv[1])
print({_IMPORTED!r}, end="")
"""


def reward_findings(recipe: Recipe) -> list[Finding]:
    """One line that says what is rewarded, or a warning for each thing that takes the term additive its threshold."""
    weights = {name: weight for name, weight in recipe.reward.weights.items() if weight != 0}
    findings = []
    if "additive" in weights:
        threshold = recipe.reward.threshold if not isinstance(recipe.reward.threshold, dict) else "by observation"
        if recipe.grpo.advantage_scale == "group":
            findings.append(
                Finding(
                    "reward",
                    "warning",
                    f"additive (reward.threshold {threshold}) with grpo.advantage_scale group: the group's std erases "
                    "how much a finding gains or costs, and with it the threshold; where the reports of a group differ "
                    "in one finding alone, saying it pays from the probability 0.5 on, whatever the threshold",
                    "grpo.advantage_scale=batch (or none) keeps it; `mrg-r1 reward-card` shows both",
                )
            )
        others = [name for name in _OF_LABELS if name in weights]
        if others:
            findings.append(
                Finding(
                    "reward",
                    "warning",
                    f"additive (reward.threshold {threshold}) beside {', '.join(others)}: their sum pays for a finding "
                    "from another probability on than either",
                    "reward one of them; a weight of 0 logs the other",
                )
            )
    words = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    return findings or [Finding("reward", "ok", f"{words}; grpo.advantage_scale {recipe.grpo.advantage_scale}")]


def radeval_finding(recipe: Recipe) -> list[Finding]:
    """Whether RadEval's process can be started and its metrics loaded, where a recipe asks it anything: it is started
    here, answers a trial, and is ended.
    """
    evaluated = recipe.evaluation.radeval if recipe.phases == "all" else []
    metrics = tuple(dict.fromkeys([*metrics_of(list(recipe.reward.weights)), *evaluated]))
    if not metrics:
        return []

    def look() -> str:
        child = RadEval(recipe.radeval.settings(metrics, threads=read_cores().usable))
        child.close()
        about = child.about
        return f"{recipe.radeval.python}: {about['package']} {about['version']}, {', '.join(metrics)} loaded"

    return [examined("radeval", look)]


def judge_findings(recipe: Recipe) -> list[Finding]:
    """Whether each judge of the reward answers: it is asked about two invented reports."""
    reward = recipe.reward

    def look(url: str) -> str:
        scores = Judge(url, reward.http.settings, reward.send_text_to).scores(TRIAL)
        return f"{url}: answers; of two invented reports, the first right, {scores[0]:g} and {scores[1]:g}"

    return [examined("judge", partial(look, url)) for url in reward.weights if is_url(url)]


def own_term_findings(recipe: Recipe) -> list[Finding]:
    """Whether each term of the user's own can be imported: by a process that stands where the reward service will, so
    that what a module prints, keeps or ends is its own.
    """
    reward = recipe.reward

    def look(name: str) -> str:
        command = [sys.executable, "-c", _IMPORT, name]  # with -c, as with the service's -m, this folder is on the path
        environment = os.environ | visible_device(reward.device)
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=reward.timeout, env=environment)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{name}: not imported in {reward.timeout:g} s (reward.timeout)") from error
        if not child.stdout.endswith(_IMPORTED):
            last = ([line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"])[
                -1
            ]
            raise ValueError(f"{name}: its module cannot be imported: {last.removeprefix('ValueError: ')}")
        return f"{name}: imported"

    return [examined("reward term", partial(look, name)) for name in reward.weights if is_own(name)]
