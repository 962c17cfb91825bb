"""Fixtures made by code: a tiny policy, studies with rendered radiographs of unequal size, prompts."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.engine.ranks import OneRank
from mrg_r1.kernels import calls as kernels
from mrg_r1.kernels import library
from mrg_r1.policy.family import find_family
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.types import ImageInputs, Study, StudyImage
from tests.inline_rewards import score_inline
from tests.leftovers import end_with_parent, guard
from tests.world import World, build_world

# A busy machine is no fault of an example: no test here asserts a time. What names no number of its own takes 25
# examples, and hypothesis' 100 where CI is set.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("full", deadline=None)
settings.load_profile("full" if os.environ.get("CI") else "quick")

TEXTS = [
    "The heart is enlarged. No pleural effusion.",
    "There is a left pleural effusion. The lungs are clear.",
    "No pneumothorax is seen. A pacemaker is present.",
    "Write the findings of this chest X-ray. Frontal view: Lateral view: Indication: cough",
    "<think>heart enlarged</think><report>The heart is enlarged.</report>",
]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist
        end_with_parent()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.groups import Groups

    return Groups(config, log) if config.getvalue("dist") == "load" else None  # what `-n` alone asks for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("ranks", "launches"))


def pytest_collection_finish() -> None:
    """The libraries' half a million objects are there: the collector, which so many tests call up, would walk through
    them each time; and what tests leave can wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _alone() -> None:
    """One thread of torch, here and in what tests start, and no process left behind."""
    # transformers writes out each config that it reads, for a log line that nobody sees: a twentieth of a test run
    PreTrainedConfig.__repr__ = object.__repr__  # type: ignore[method-assign]
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guard()


def either_way(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs by the kernels in C, where there are any, and by torch's own."""
    cases = pytest.mark.parametrize("_kernels", ["kernels", "torch"], indirect=True)
    return cases(pytest.mark.usefixtures("_kernels")(test))


@pytest.fixture
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "ready", lambda *tensors: False)
    elif library.state().library is None:
        pytest.skip(library.state().text)


__all__ = ["OneRank"]  # from where tests take it

# and layers of its decoder: features are added after all but the last, or all but the last but one see a window
FAMILIES = {"qwen2_5_vl": 2, "qwen3_vl": 3, "gemma3": 3}
_FIRST = next(iter(FAMILIES))
# what ends a report; padding is 0, which is an end of Qwen's and none of Gemma's
EOS = {"qwen2_5_vl": [0, 2], "qwen3_vl": [0, 2], "gemma3": [1, 4]}
# A test with one of these marks runs once for each family, or for each whose positions have three axes and whose tower
# reads LoRA; without one for the first. Where a test is dear, the others are slow.
each_family = pytest.mark.parametrize("tiny_policy_directory", FAMILIES, indirect=True)
_SLOWLY = [pytest.param(family, marks=[] if family == _FIRST else pytest.mark.slow) for family in FAMILIES]
each_family_slowly = pytest.mark.parametrize("tiny_policy_directory", _SLOWLY, indirect=True)
each_world_slowly = pytest.mark.parametrize("world", _SLOWLY, indirect=True)  # whole runs


def each_family_once(names: str, cases: Sequence[Any], *, ids: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """The first family with every case, the others with the first; with the rest they are slow."""
    width = names.count(",") + 1
    rows = [
        pytest.param(
            family,
            *(case if width > 1 else [case]),
            id=f"{family}-{name}",
            marks=[] if family == _FIRST or not number else pytest.mark.slow,
        )
        for family in FAMILIES
        for number, (name, case) in enumerate(zip(ids or map(str, cases), cases, strict=True))
    ]
    return pytest.mark.parametrize(f"tiny_policy_directory,{names}", rows, indirect=["tiny_policy_directory"])


QWEN = [family for family in FAMILIES if family.startswith("qwen")]
each_qwen = pytest.mark.parametrize("tiny_policy_directory", QWEN, indirect=True)


@pytest.fixture(scope="session")
def tiny_policies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's random policy of few layers whose generation config is near-greedy, as published checkpoints' are."""

    @cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp("tiny-policy") / family
        find_family(family).create_tiny(
            directory, TEXTS * 20, vocabulary=400, image_side=112, hidden=64, layers=FAMILIES[family], seed=0
        )
        if family != _FIRST:
            _make_everything_matter(directory / "model.safetensors")
        return directory

    return make


def _make_everything_matter(file: Path) -> None:
    """Norms and biases far from 1 and 0, and a tower whose features are not lost among the others."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, weight in weights.items():
        if weight.ndim == 1:
            noise = torch.randn(weight.shape, generator=generator) * 0.3
            weights[name] = noise if name.endswith(".bias") else weight + noise
        elif ".visual." in name or "vision_tower." in name:
            weights[name] = weight * 4
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def tiny_policy_directory(request: pytest.FixtureRequest, tiny_policies: Callable[[str], Path]) -> Path:
    return tiny_policies(getattr(request, "param", _FIRST))


@pytest.fixture
def policy(tiny_policy_directory: Path) -> Policy:
    """The tiny policy without LoRA, fp32, frozen."""
    return load_policy(tiny_policy_directory, dtype=torch.float32)


def with_lora(policy: Policy, *, targets: str = "language") -> Policy:
    """A LoRA that is far from zero, the same wherever it is built and in whatever precision."""
    add_lora(policy, rank=4, alpha=8, seed=0, targets=targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return policy


def inputs_of_modules(image: int, images: ImageInputs, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' own forward takes of one study without padding: `ids` [1, L], its prompt's first; `image` is
    the id of an image's tokens.
    """
    kinds = "mm_token_type_ids" if "image_grid_thw" in images.tensors else "token_type_ids"
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), kinds: (ids == image).int()}
    return {**given, **images.tensors}


@pytest.fixture
def lora_policy(policy: Policy) -> Policy:
    """With LoRA whose B is not zero: with PEFT's own start, policy and reference would be equal and tests vacuous."""
    return with_lora(policy)


def make_study(folder: Path, name: str, sides: list[tuple[int, int]], report: str = "The heart is enlarged.") -> Study:
    """A study with one noise image for each (height, width)."""
    rng = np.random.default_rng([len(name), *name.encode()])
    images = []
    for number, (height, width) in enumerate(sides):
        path = folder / f"{name}-{number}.png"
        Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8)).save(path)
        images.append(StudyImage(path, "frontal" if number == 0 else "lateral"))
    return Study(id=name, patient_id=f"p-{name}", images=tuple(images), report=report, split="train")


@pytest.fixture
def studies(tmp_path: Path) -> list[Study]:
    """Four studies: prompts of unequal length, one with two images of unequal size."""
    return [
        make_study(tmp_path, "a", [(84, 84)]),
        make_study(tmp_path, "b", [(84, 56), (112, 112)]),
        make_study(tmp_path, "c", [(56, 112)]),
        make_study(tmp_path, "d", [(112, 84)]),
    ]


@pytest.fixture
def build(tiny_policy_directory: Path) -> Callable[[Policy], PromptBuilder]:
    """The prompt builder of a policy."""

    def make(policy: Policy, **words: object) -> PromptBuilder:
        processor = load_image_processor(tiny_policy_directory, min_pixels=56 * 56, max_pixels=112 * 112)
        return PromptBuilder(
            tokenizer=policy.tokenizer,
            image_processor=processor,
            layout=policy.layout,
            words=PromptWords(**{"instruction": "Write the findings of this chest X-ray.", **words}),  # type: ignore[arg-type]
        )

    return make


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, _world: World) -> World:
    family = getattr(request, "param", _FIRST)
    return _world if family == _FIRST else _world.of_family(family, layers=FAMILIES[family])


@pytest.fixture
def inline_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are opened here start no reward service."""
    score_inline(monkeypatch)
