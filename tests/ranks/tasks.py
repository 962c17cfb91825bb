"""What the ranks of the pool can be asked to do. Each function runs on every rank and returns something that JSON can
carry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import mrg_r1.training.grpo as trainer
from mrg_r1.config.recipe import load_recipe
from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.data.order import StudyOrder
from mrg_r1.engine.checkpoint import load_checkpoint, save_checkpoint
from mrg_r1.engine.partition import RankPartition, is_absent
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.state import gather_state, optimizer_steps, scatter_state
from mrg_r1.engine.zero import Engine
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.policy.policy import Policy
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.training.grpo import train as train_grpo
from mrg_r1.training.sft import train as train_sft
from mrg_r1.training.update import update
from mrg_r1.types import Experience, Prompts, Rewards, VisionFeatures
from tests.conftest import make_study, with_lora
from tests.inline_rewards import score_inline

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


def fixed_policy(
    directory: str, *, config: Path | None = None, dtype: torch.dtype = torch.float32, targets: str = "language"
) -> Policy:
    """The tiny policy with a LoRA that is far from zero, the same wherever it is built; cut over the ranks where
    `config` is of stage 3.
    """
    partition = None if config is None else RankPartition.of_config(config, device=torch.device("cpu"), dtype=dtype)
    return with_lora(load_policy(Path(directory), dtype=dtype, partition=partition), targets=targets)


def prompts_of(policy: Policy, directory: str, images: str, studies: list[int]) -> tuple[Prompts, VisionFeatures]:
    """Some of the four studies."""
    processor = load_image_processor(Path(directory), min_pixels=56 * 56, max_pixels=112 * 112)
    build = PromptBuilder(
        tokenizer=policy.tokenizer,
        image_processor=processor,
        layout=policy.layout,
        words=PromptWords("Write the findings."),
    )
    folder = Path(images)
    folder.mkdir(exist_ok=True)
    prompts = build([make_study(folder, "abcd"[b], SIDES[b]) for b in studies])
    with torch.no_grad():
        return prompts, policy.encode_images(prompts)


def fixed_experience(policy: Policy, directory: str, images: str, studies: list[int]) -> Experience:
    """Group b of the global batch of four, for the studies asked for; reference and old log-probs are made up, but the
    same everywhere.
    """
    prompts, vision = prompts_of(policy, directory, images, studies)
    # ragged: study b stops after 4 + 3 b tokens
    completions = rollout(policy, prompts, vision, Sampling(group_size=GROUP, max_new_tokens=13, seed=0, step=0))
    limit = torch.tensor([4 + 3 * b for b in studies])[:, None, None]
    completions.mask &= torch.arange(completions.mask.shape[2]) < limit
    shift = torch.stack([torch.randn(GROUP, 13, generator=torch.Generator().manual_seed(b)) for b in studies])[
        :, :, : completions.mask.shape[2]
    ]
    advantages = torch.stack([torch.randn(GROUP, generator=torch.Generator().manual_seed(10 + b)) for b in studies])
    empty = torch.zeros(len(studies), GROUP)
    rewards = Rewards(
        empty, {}, {}, torch.zeros(len(studies), GROUP, 14, dtype=torch.long), [[None] * GROUP for _ in studies]
    )
    reference = completions.logp + 0.3 * shift
    old = completions.logp + 0.2 * shift.flip(1)
    return Experience(prompts, vision, completions, rewards, advantages, reference, old)


def update_on_ranks(ranks: Ranks, *, directory: str, images: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Two updates on this rank's two of the four studies; losses, gradient norms and the weights after them."""
    settings = load_recipe(Path(recipe), overrides)
    policy = fixed_policy(directory, config=settings.engine.deepspeed, targets=settings.policy.lora.targets)
    if settings.policy.gradient_checkpointing:
        policy.checkpoint_gradients()
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
        states = policy.prompt_cache(experience.prompts, experience.vision) if settings.rollout.reuse_prefill else None
        metrics = ranks.reduce_metrics(update(experience, recipe=settings, engine=engine, ranks=ranks, states=states))
        losses.append(metrics["loss"])
        norms.append(engine.grad_norm())
    weights = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    return {"losses": losses, "norms": norms, "weights": weights[::37].tolist()}


def start_engine(
    ranks: Ranks, *, directory: str, images: str, recipe: str, overrides: list[str], dtype: str = "float32"
) -> tuple[Engine, Experience, Any]:
    """An engine around the fixed policy, and this rank's two of the four studies."""
    settings, precision = load_recipe(Path(recipe), overrides), getattr(torch, dtype)
    policy = fixed_policy(
        directory, config=settings.engine.deepspeed, dtype=precision, targets=settings.policy.lora.targets
    )
    # no pass needs it; it is there because its three elements do not divide over two ranks
    policy.odd = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=precision))
    experience = fixed_experience(policy, directory, images, [2 * ranks.rank, 2 * ranks.rank + 1])
    engine = Engine(
        policy,
        ranks=ranks,
        config=settings.engine.deepspeed,
        dtype=precision,
        learning_rate=1e-3,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
    )
    return engine, experience, settings


def losses_of(ranks: Ranks, engine: Engine, experience: Experience, settings: Any, count: int) -> list[float]:
    return [
        ranks.reduce_metrics(update(experience, recipe=settings, engine=engine, ranks=ranks))["loss"]
        for _ in range(count)
    ]


def save_and_load(ranks: Ranks, *, checkpoints: str, **setting: Any) -> dict[str, Any]:
    """Three updates in a row; and one, a checkpoint, a new engine, two more. `setting` is `start_engine`'s."""

    def start() -> tuple[Engine, Experience, Any]:
        return start_engine(ranks, **setting)

    engine, experience, settings = start()
    straight = losses_of(ranks, engine, experience, settings, 3)
    final = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    engine, experience, settings = start()
    first = losses_of(ranks, engine, experience, settings, 1)
    folder = Path(checkpoints)
    save_checkpoint(engine, folder, step=1, extra={"note": "one"}, keep=2)
    engine, experience, settings = start()
    with torch.no_grad():  # what is loaded must come from the file, not from an equal start
        for parameter in engine.trainable.values():
            parameter.mul_(3)
    record = load_checkpoint(engine, folder)
    rest = losses_of(ranks, engine, experience, settings, 2)
    resumed = torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])
    assert record is not None
    return {
        "straight": straight,
        "resumed": first + rest,
        "equal": torch.equal(final, resumed),
        "note": record["note"],
        "step": record["step"],
        "trained": final.numel(),
    }


def through_stages(ranks: Ranks, *, checkpoints: str, overrides: list[str], **setting: Any) -> dict[str, Any]:
    """Three updates at stage 2; and one at stage 2, one at 3, one at 2 with checkpoints between, whose contents must
    arrive whole.
    """

    def start(stage: int) -> tuple[Engine, Experience, Any]:
        return start_engine(ranks, overrides=[*overrides, f"engine.deepspeed=ds_configs/zero{stage}.json"], **setting)

    straight = losses_of(ranks, *start(2), 3)
    losses: list[float] = []
    state: dict[str, torch.Tensor] = {}
    arrived = []
    for number, stage in enumerate((2, 3, 2)):
        engine, experience, settings = start(stage)
        if number:
            load_checkpoint(engine, Path(checkpoints))
            found = gather_state(engine)
            arrived.append(
                found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
            )
        losses += losses_of(ranks, engine, experience, settings, 1)
        save_checkpoint(engine, Path(checkpoints), step=number, extra={}, keep=1)
        state = gather_state(engine)
    return {"straight": straight, "changing": losses, "arrived": arrived}


def weights_in_memory(ranks: Ranks, **setting: Any) -> dict[str, Any]:
    """What a rank holds of the frozen weights: at rest, and at most at any time of an update, in elements."""
    engine, experience, settings = start_engine(ranks, **setting)
    policy = engine._engine.module
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    whole: list[tuple[StorageWeakRef, int]] = []  # memory that weights brought together have been in
    most = 0

    def held(at_most: int) -> int:
        """Elements, after up to 0.2 s in which gloo's own thread may let go of what it brought together: where the
        cores are busy it does so some milliseconds after the ranks have met.
        """
        patience = time.monotonic() + 0.2
        while True:
            found = sum(size for reference, size in whole if not reference.expired())
            if found <= at_most or time.monotonic() > patience:
                return found
            time.sleep(0.01)

    def note(storages: list[torch.UntypedStorage]) -> None:
        nonlocal most
        for storage in storages:
            reference = StorageWeakRef(storage)
            if all(reference.cdata != known.cdata for known, _ in whole):
                whole.append((reference, storage.nbytes() // 4))
        most = max(most, held(at_most=most))

    def gathered(parameters: Sequence[nn.Parameter], *, written: bool = False) -> Any:
        @contextmanager
        def block() -> Iterator[None]:
            with RankPartition.gathered(policy.partition, parameters, written=written):
                try:
                    yield
                finally:  # a recomputation ends early, by an exception
                    note([parameter.untyped_storage() for parameter in parameters if not parameter.requires_grad])

        return block()

    policy.partition.gathered = gathered
    losses_of(ranks, engine, experience, settings, 1)
    layer = max(
        sum(p.ds_numel for p in layer.parameters() if not p.requires_grad) for layer in policy.language_model.layers
    )
    return {
        "total": sum(parameter.ds_numel for parameter in frozen),
        "parts": sum(parameter.ds_tensor.numel() for parameter in frozen),
        "absent": sum(parameter.ds_numel for parameter in frozen if is_absent(parameter)),
        "left": held(at_most=0),
        "most": most,
        "layer": layer,
        "merger": sum(p.ds_numel for p in policy.base.model.visual.merger.parameters() if not p.requires_grad),
        "embeddings": policy.language_model.embed_tokens.weight.ds_numel,
        "layers": len(policy.language_model.layers),
    }


def one_rank_ends_at_once(ranks: Ranks, **setting: Any) -> dict[str, Any]:
    """Every completion of rank 0 is one token long: it needs fewer passes than rank 1, and no pass over completions."""
    engine, experience, settings = start_engine(ranks, **setting)
    if ranks.rank == 0:
        experience.completions.mask[:, :, 1:] = False
    parts = experience.prompts, experience.vision, experience.completions
    scored = group_logprobs(engine._engine.module, *parts, token_budget=settings.engine.micro_batch_tokens)
    return {
        "scored": scored.sum().item(),
        "losses": losses_of(ranks, engine, experience, settings, 2),
        "norm": engine.grad_norm(),
    }


def unequal_rollouts(ranks: Ranks, *, directory: str, images: str, repeats: int = 1) -> dict[str, Any]:
    """Rank 0 ends at token 3, rank 1 goes on to token 40; then rank 0 samples once and rank 1 three times. Against a
    whole policy.
    """
    cut, whole = fixed_policy(directory, config=Path("ds_configs/zero3.json")), fixed_policy(directory)
    prompts, vision = prompts_of(cut, directory, images, [ranks.rank])
    whole_vision = whole.encode_images(prompts)
    pairs = zip(vision.per_study, whole_vision.per_study, strict=True)
    answer: dict[str, Any] = {"vision": max((found - wanted).abs().max().item() for found, wanted in pairs)}
    sampling: dict[str, Any] = {"group_size": 1, "seed": 0, "step": 0}
    first = rollout(whole, prompts, whole_vision, Sampling(max_new_tokens=3, **sampling))
    for policy in (cut, whole):
        policy.eos_ids = [int(first.token_ids[0, 0, 2])] if ranks.rank == 0 else [policy.pad_id]
    found = rollout(cut, prompts, vision, Sampling(max_new_tokens=40, **sampling))
    wanted = rollout(whole, prompts, whole_vision, Sampling(max_new_tokens=40, **sampling))
    answer["length"] = found.token_ids.shape[2]
    answer["equal"] = torch.equal(found.token_ids, wanted.token_ids)
    answer["gap"] = (found.logp - wanted.logp).abs().max().item()
    with cut.whole_decoder(images=True):
        for attempt in range(1 if ranks.rank == 0 else 3):
            cut.encode_images(prompts)
            found = rollout(cut, prompts, vision, Sampling(max_new_tokens=8, attempt=attempt, **sampling))
            wanted = rollout(whole, prompts, whole_vision, Sampling(max_new_tokens=8, attempt=attempt, **sampling))
            answer["equal"] &= torch.equal(found.token_ids, wanted.token_ids)
    ranks.barrier()
    return answer


def train(ranks: Ranks, *, recipe: str, overrides: list[str], service: bool = False) -> None:
    """A GRPO recipe, as launch/train.py runs it with a reward service; without one, rewards are computed here."""
    with pytest.MonkeyPatch.context() as patch:
        if not service:
            score_inline(patch)
        train_grpo(load_recipe(Path(recipe), overrides), ranks)


def sft(ranks: Ranks, *, recipe: str, overrides: list[str]) -> None:
    """An SFT recipe, as launch/sft.py runs it, without a reward service."""
    with pytest.MonkeyPatch.context() as patch:
        score_inline(patch)
        train_sft(load_recipe(Path(recipe), overrides), ranks)


def indices(ranks: Ranks, *, step: int) -> list[int]:
    return StudyOrder(10, seed=3).share(4 * step, batch_size=4, rank=ranks.rank, world_size=ranks.world_size)


def update_with_nan(ranks: Ranks, **setting: Any) -> dict[str, Any]:
    """The first update has a NaN on rank 1, its state is gathered for a checkpoint, a sound update follows; and that
    one alone.
    """

    def weights(engine: Engine) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in engine.trainable.values()])

    engine, experience, settings = start_engine(ranks, **setting)
    before, sound = weights(engine), experience.advantages.clone()
    if ranks.rank == 1:
        experience.advantages[0, 0] = float("nan")
    skipped = update(experience, recipe=settings, engine=engine, ranks=ranks)["policy/skipped_updates"][0].item()
    kept = torch.equal(weights(engine), before)
    state = gather_state(engine)
    blank = optimizer_steps(engine) == 0 and not any(
        tensor.any() for name, tensor in state.items() if name.startswith("exp_avg")
    )
    experience.advantages = sound
    after = update(experience, recipe=settings, engine=engine, ranks=ranks)["policy/skipped_updates"][0].item()
    straight, experience, settings = start_engine(ranks, **setting)
    update(experience, recipe=settings, engine=straight, ranks=ranks)
    return {
        "skipped": skipped,
        "kept": kept,
        "blank": blank,
        "after": after,
        "moved": not torch.equal(weights(engine), before),
        "same": torch.equal(weights(engine), weights(straight)),
    }


def train_with_fault(ranks: Ranks, *, recipe: str, overrides: list[str], fault: str, step: int) -> None:
    """A GRPO recipe in which, at `step`, a LoRA weight is infinite after sampling, or one reference log-prob of rank 1
    is NaN.
    """
    inner, calls = trainer.update, 0

    def faulty(experience: Experience, *, engine: Engine, **rest: Any) -> Any:
        nonlocal calls
        if calls == step and fault == "weight":
            state, name = gather_state(engine), next(name for name in engine.trainable if "lora_B" in name)
            for part in ("live", "master"):
                state[f"{part}/{name}"][0, 0] = float("inf")
            scatter_state(engine, state, optimizer_steps(engine))
        if calls == step and fault == "reference" and ranks.rank == 1:
            assert experience.reference_logp is not None
            experience.reference_logp[0, 0, 0] = float("nan")
        calls += 1
        return inner(experience, engine=engine, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "update", faulty)
        score_inline(patch)
        train_grpo(load_recipe(Path(recipe), overrides), ranks)
