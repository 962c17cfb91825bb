"""What the ranks of the pool can be asked to do. Each function runs on every rank and returns something that JSON can carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mrg_r1.config import load_recipe
from mrg_r1.data.loader import PromptBuilder, PromptWords, rank_indices
from mrg_r1.engine.checkpoint import load_checkpoint, save_checkpoint
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.policy.load import Policy, load_image_processor, load_policy
from mrg_r1.rollout.decode import rollout
from mrg_r1.trainer import train as train_grpo
from mrg_r1.trainer import update
from mrg_r1.types import Experience, Rewards
from tests.conftest import make_study, with_lora

GROUP = 4
SIDES = [[(84, 84)], [(84, 56), (112, 112)], [(56, 112)], [(112, 84)]]


def reduce_unequal(ranks: Ranks) -> dict[str, float | None]:
    """Rank 0 counts 1 value, rank 1 counts 3."""
    sums, counts = ([1.0, 9.0], [1.0, 3.0])
    one, none = torch.tensor(counts[ranks.rank]), torch.tensor(0.0)
    metrics = {
        "mean": (torch.tensor(sums[ranks.rank]), one),
        "largest_max": (torch.tensor([5.0, -2.0][ranks.rank]), one),
        "nothing": (none, none),
        "only_rank_one": (torch.tensor([0.0, 8.0][ranks.rank]), torch.tensor([0.0, 2.0][ranks.rank])),
    }
    return ranks.reduce_metrics(metrics)


def fixed_policy(directory: str) -> Policy:
    """The tiny policy with a LoRA that is far from zero, the same wherever it is built."""
    return with_lora(load_policy(Path(directory), dtype=torch.float32))


def fixed_experience(policy: Policy, directory: str, images: str, studies: list[int]) -> Experience:
    """Group b of the global batch of four, for the studies asked for; reference and old log-probs are made up, but the same everywhere."""
    processor = load_image_processor(Path(directory), min_pixels=56 * 56, max_pixels=112 * 112)
    build = PromptBuilder(
        tokenizer=policy.tokenizer, image_processor=processor, positions=policy.positions, words=PromptWords("Write the findings.")
    )
    folder = Path(images)
    folder.mkdir(exist_ok=True)
    prompts = build([make_study(folder, "abcd"[b], SIDES[b]) for b in studies])
    vision = policy.encode_images(prompts)
    # ragged: study b stops after 4 + 3 b tokens
    completions = rollout(policy, prompts, vision, group_size=GROUP, max_new_tokens=13, seed=0, step=0)
    limit = torch.tensor([4 + 3 * b for b in studies])[:, None, None]
    completions.mask &= torch.arange(completions.mask.shape[2]) < limit
    shift = torch.stack([torch.randn(GROUP, 13, generator=torch.Generator().manual_seed(b)) for b in studies])[
        :, :, : completions.mask.shape[2]
    ]
    advantages = torch.stack([torch.randn(GROUP, generator=torch.Generator().manual_seed(10 + b)) for b in studies])
    empty = torch.zeros(len(studies), GROUP)
    judged = Rewards(empty, {}, {}, torch.zeros(len(studies), GROUP, 14, dtype=torch.long), [[None] * GROUP for _ in studies])
    reference = completions.logp + 0.3 * shift
    old = completions.logp + 0.2 * shift.flip(1)
    return Experience(prompts, vision, completions, judged, advantages, reference, old)


def update_on_ranks(ranks: Ranks, *, directory: str, images: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Two updates on this rank's two of the four studies; losses, gradient norms and the weights after them."""
    settings = load_recipe(Path(recipe), overrides)
    policy = fixed_policy(directory)
    experience = fixed_experience(policy, directory, images, [2 * ranks.rank, 2 * ranks.rank + 1])
    engine = Engine(
        policy,
        ranks=ranks,
        config=settings.engine.deepspeed,
        dtype=torch.float32,
        learning_rate=1e-3,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        max_grad_norm=1e9,
    )
    losses, norms = [], []
    for _ in range(2):
        states = policy.prompt_states(experience.prompts, experience.vision) if settings.rollout.reuse_prefill else None
        metrics = ranks.reduce_metrics(update(experience, recipe=settings, engine=engine, ranks=ranks, states=states))
        losses.append(metrics["loss"])
        norms.append(engine.grad_norm())
    weights = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    return {"losses": losses, "norms": norms, "weights": weights[::37].tolist()}


def save_and_load(ranks: Ranks, *, directory: str, images: str, recipe: str, checkpoints: str, overrides: list[str]) -> dict[str, Any]:
    """Three updates in a row; and one, a checkpoint, a new engine, two more."""

    def start() -> tuple[Engine, Experience, Any]:
        settings = load_recipe(Path(recipe), overrides)
        policy = fixed_policy(directory)
        experience = fixed_experience(policy, directory, images, [2 * ranks.rank, 2 * ranks.rank + 1])
        engine = Engine(
            policy,
            ranks=ranks,
            config=settings.engine.deepspeed,
            dtype=torch.float32,
            learning_rate=1e-3,
            weight_decay=0.01,
            betas=(0.9, 0.95),
            max_grad_norm=1.0,
        )
        return engine, experience, settings

    def losses_of(engine: Engine, experience: Experience, settings: Any, count: int) -> list[float]:
        return [ranks.reduce_metrics(update(experience, recipe=settings, engine=engine, ranks=ranks))["loss"] for _ in range(count)]

    engine, experience, settings = start()
    straight = losses_of(engine, experience, settings, 3)
    final = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    engine, experience, settings = start()
    first = losses_of(engine, experience, settings, 1)
    folder = Path(checkpoints)
    save_checkpoint(engine, folder, step=1, extra={"note": "one"}, keep=2)
    engine, experience, settings = start()
    with torch.no_grad():  # what is loaded must come from the file, not from an equal start
        for parameter in engine.trainable.values():
            parameter.mul_(3)
    record = load_checkpoint(engine, folder)
    rest = losses_of(engine, experience, settings, 2)
    resumed = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    assert record is not None
    return {
        "straight": straight,
        "resumed": first + rest,
        "equal": torch.equal(final, resumed),
        "note": record["note"],
        "step": record["step"],
    }


def train(ranks: Ranks, *, recipe: str, overrides: list[str]) -> None:
    """A GRPO recipe, as launch/train.py runs it."""
    train_grpo(load_recipe(Path(recipe), overrides), ranks)


def indices(ranks: Ranks, *, step: int) -> list[int]:
    return rank_indices(10, seed=3, step=step, batch_size=4, rank=ranks.rank, world_size=ranks.world_size)


def update_with_nan(ranks: Ranks, *, directory: str, images: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """An update in which one advantage on rank 1 is NaN, and a sound one after it."""
    settings = load_recipe(Path(recipe), overrides)
    policy = fixed_policy(directory)
    experience = fixed_experience(policy, directory, images, [2 * ranks.rank, 2 * ranks.rank + 1])
    engine = Engine(
        policy,
        ranks=ranks,
        config=settings.engine.deepspeed,
        dtype=torch.float32,
        learning_rate=1e-3,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
    )

    def weights() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])

    before, sound = weights(), experience.advantages.clone()
    if ranks.rank == 1:
        experience.advantages[0, 0] = float("nan")
    skipped = update(experience, recipe=settings, engine=engine, ranks=ranks)["policy/skipped_updates"][0].item()
    kept = torch.equal(weights(), before)
    experience.advantages = sound
    after = update(experience, recipe=settings, engine=engine, ranks=ranks)["policy/skipped_updates"][0].item()
    return {"skipped": skipped, "kept": kept, "after": after, "moved": not torch.equal(weights(), before), "norm": engine.grad_norm()}
