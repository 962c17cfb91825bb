"""A policy whose head and embedding are two."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText


@pytest.fixture(scope="module")
def untied(tiny_policy_directory, tmp_path_factory):
    """The tiny policy with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder
