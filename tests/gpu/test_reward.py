"""The labeler on a CUDA device: the same labels as on the CPU, in a process that sees that device alone."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from mrg_r1.labels.labeler import Labeler
from mrg_r1.reward.service.client import ServiceRewards
from mrg_r1.reward.service.supervisor import ServiceSettings, Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXTS = [
    f"No pleural effusion. The heart is enlarged{', and a pacemaker is seen' * (number % 3)}." + " Clear." * number
    for number in range(60)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_labels_on_the_device_are_the_cpus(world, dtype):
    here = Labeler.load(world.folder / "labeler").label(TEXTS)
    there = Labeler.load(world.folder / "labeler", device="cuda", dtype=dtype).label(TEXTS)
    assert (here == there).mean() >= (1.0 if dtype == torch.float32 else 0.98)


def test_the_service_takes_the_physical_device_whatever_the_ranks_see(world, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "63")  # inherited from a launcher, and wrong for the service
    settings = ServiceSettings(
        labeler=str(world.folder / "labeler"),
        tokenizer=None,
        device="cuda:0",
        dtype="float32",
        reward_function={"weights": {"mccs": 1.0}, "mode": "plain"},
        threads=1,
    )
    supervisor = Supervisor(settings, log=tmp_path / "log")
    supervisor.wait()
    service = ServiceRewards(supervisor.directory, keeper=os.getpid(), timeout=60)
    assert np.array_equal(service.label(TEXTS), Labeler.load(world.folder / "labeler").label(TEXTS))
    service.close()
    supervisor.close()
