"""What GRPO is compared with (docs/method.md §3): rejection fine-tuning on each group's best report, and rewards that
say nothing. The third control, further SFT, is `sft.train` for the time of a run (`config.control`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mrg_r1.config.recipe import Recipe
from mrg_r1.grpo.advantages import zero_signal
from mrg_r1.rollout.sampling import keyed_uniforms
from mrg_r1.tracking.control import CONTROLS
from mrg_r1.types import Completions, Prompts, Rewards, Sampled

_ATTEMPT = -1  # of `keyed_uniforms`: no rollout has it, so that these numbers are none that a token was drawn with


def control_words(recipe: Recipe) -> str:
    """What the log of a control run says of it."""
    if recipe.control == "rft":
        how = "learns the likelihood of each group's best report; groups of equal rewards are left out"
    elif recipe.control == "random":
        how = "learns from each group's rewards dealt to its reports at random; those that are logged are the real ones"
    else:
        limit = recipe.sft.max_cpu_seconds or recipe.sft.max_seconds
        kind = "processor seconds" if recipe.sft.max_cpu_seconds else "seconds"
        of = "" if recipe.control_of is None else f", those of {recipe.control_of}"
        how = (
            f"{recipe.sft.trainable}, {recipe.sft.batch_size} studies a step, learning rate "
            f"{recipe.optimizer.learning_rate:g}, for {limit:,.0f} {kind}{of}"
        )
    return f"{CONTROLS[str(recipe.control)]}: {how}"


def best_of_groups(sampled: Sampled, rewards: Rewards) -> tuple[Sampled, Tensor]:
    """Each group's best report by its total, the first of several that are equally good: members are exchangeable, so
    the first of them is as good a draw as any.

    Returns:
        The groups as groups of one, log-probs of theirs with them, and [B, 1] bool: False where all rewards of the
        group were equal. Its best report is then one like any, and its likelihood would teach noise: such a group is
        to be left out, as a policy gradient leaves it out.

    Source: RAFT (arXiv 2304.06767), section 3, best of K; what is left out is ours.
    """
    best = rewards.total.argmax(dim=1)  # [B], the first of the largest
    studies = torch.arange(len(best))
    done = sampled.completions

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[studies.to(tensor.device), best.to(tensor.device)].unsqueeze(1)

    length = max(1, int(chosen(done.mask).sum(dim=-1).max()))
    alone = Completions(
        token_ids=chosen(done.token_ids)[:, :, :length].contiguous(),
        mask=chosen(done.mask)[:, :, :length].contiguous(),
        logp=chosen(done.logp)[:, :, :length].contiguous(),
        ended=chosen(done.ended),
        texts=[[texts[member]] for texts, member in zip(done.texts, best.tolist(), strict=True)],
    )
    reference, old = (
        None if tensor is None else chosen(tensor)[:, :, :length].contiguous()
        for tensor in (sampled.reference_logp, sampled.old_logp)
    )
    kept = ~zero_signal(rewards.total)
    groups = Sampled(sampled.prompts, alone, reference_logp=reference, old_logp=old)
    return groups, kept.unsqueeze(1).to(done.mask.device)


def dealt_at_random(rewards: Rewards, prompts: Prompts, *, seed: int, step: int) -> Rewards:
    """Each group's rewards, total and terms together, dealt to its members at random: sizes, spreads and groups without
    signal are those of the real rewards, and which report earned what is forgotten. Keyed as sampling is, so the
    same for any number of ranks.
    """
    groups, members = rewards.total.shape
    uniforms = keyed_uniforms(
        seed=seed,
        step=step,
        study_ids=prompts.study_ids,
        group_size=members,
        length=1,
        attempt=_ATTEMPT,
        occurrences=prompts.occurrences,
    )
    order = uniforms.view(groups, members).argsort(dim=1).to(rewards.total.device)  # [B, G]
    return replace(
        rewards,
        total=rewards.total.gather(1, order),
        terms={name: values.gather(1, order) for name, values in rewards.terms.items()},
    )
