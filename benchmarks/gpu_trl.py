"""The worker of the other side on a GPU: TRL's GRPOTrainer, generating by transformers or by vLLM in the same process.

It runs the cases one after another and says a line of JSON after each; `benchmarks.gpu` starts it. The model's shapes,
words, images, reward and hyperparameters are those of `benchmarks.gpu_ours`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import trl.generation.vllm_generation
from peft import LoraConfig
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig

from benchmarks import task as same
from benchmarks.gpu_cases import (
    LORA_ALPHA,
    LORA_RANK,
    REPETITIONS,
    Allowance,
    CaseChannel,
    GpuCase,
    Unit,
    find_cases,
    units_of,
    worker_arguments,
)
from benchmarks.gpu_model import random_model
from benchmarks.trl_worker import EQUAL_SETTINGS, TimedTrainer, make_dataset, make_processor, reward, suppressed

START_SECONDS = 15.0  # for the model and the trainer of a case


class StepTimer(TrainerCallback):
    """Times each step of a case with the device idle at both ends, and stops the trainer when enough are there or time
    is short.
    """

    def __init__(self, case: GpuCase, allowance: Allowance) -> None:
        self.case, self.allowance = case, allowance
        self.trainer: TimedTrainer
        self.units: list[Unit] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, trainer, asked = time.perf_counter() - self.began, self.trainer, self.case.new_tokens
        if (trainer.shortest, trainer.longest) != (asked, asked):
            raise RuntimeError(f"completions of {trainer.shortest} to {trainer.longest} tokens, {asked} were asked for")
        generation = trainer.generation_seconds
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self.units.append(
            {
                "seconds": seconds,
                "phases": {"generation": generation, "rest": seconds - generation},
                "peak_bytes": peak,
            },
        )
        control.should_training_stop = not self.allowance.another(self.case, self.units)
        return control


def make_config(
    folder: Path, case: GpuCase, banned: list[int], *, device: str, micro_batch: int, vllm: bool, memory: float
) -> GRPOConfig:
    """The settings of `benchmarks.trl_worker` in bfloat16, with gradient checkpointing: 7B does not fit a card without
    it.
    """
    if case.rows % micro_batch:
        raise ValueError(f"--micro-batch {micro_batch} does not divide the {case.rows} completions of case {case.name}")
    # vLLM has no ids to suppress, but a bias that comes to the same
    never = {"ignore_eos": True, "logit_bias": dict.fromkeys(banned, -100.0)} if vllm else {"suppress_tokens": banned}
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=case.rows // micro_batch,
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        generation_kwargs=never,
        max_steps=1 + REPETITIONS,
        use_cpu=device == "cpu",
        bf16=True,
        gradient_checkpointing=True,
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=memory,
        vllm_importance_sampling_correction=False,  # a forward pass more, which the others have not
        **EQUAL_SETTINGS,
    )


def measure_case(
    case: GpuCase, allowance: Allowance, options: argparse.Namespace, *, largest_side: int, attention: str
) -> dict[str, Any]:
    """Steps of one case, as many as wanted and time allows, by a trainer and a model of its own."""
    policy = options.folder / "policy"
    model: Qwen2_5_VLForConditionalGeneration = random_model(policy, torch.device(options.device), attention=attention)
    processor = make_processor(policy, largest_side)
    banned = suppressed(model, processor.tokenizer)
    timer = StepTimer(case, allowance)
    timer.trainer = TimedTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=reward,
        args=make_config(
            options.folder,
            case,
            banned,
            device=options.device,
            micro_batch=options.micro_batch,
            vllm=options.vllm,
            memory=options.vllm_memory,
        ),
        train_dataset=make_dataset(options.folder, case.side),
        peft_config=LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=same.LORA_TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[timer],
    )
    timer.trainer.train()
    timer.trainer.accelerator.free_memory()
    return units_of(timer.units)


def share_one_vllm(rows: int) -> None:
    """Let all cases use one vLLM, since it gives no memory back; its weights are dummies until TRL pushes the
    trainer's.
    """
    module = trl.generation.vllm_generation
    make = functools.partial(module.LLM, load_format="dummy")
    made: list[Any] = []

    def shared(**settings: Any) -> Any:
        if not made:
            made.append(make(**{**settings, "max_num_seqs": rows}))
        return made[0]

    module.LLM = shared


def main() -> None:
    parser = worker_arguments(__doc__)
    parser.add_argument("--micro-batch", type=int, required=True, help="completions of a forward and backward pass")
    parser.add_argument("--vllm", action="store_true", help="generate by vLLM in the same process")
    parser.add_argument("--vllm-memory", type=float, default=0.45, help="vllm_gpu_memory_utilization (0.45)")
    options = parser.parse_args()
    channel, allowance = CaseChannel(), Allowance(options.until)
    cases = find_cases(options.size, options.cases)
    # without flash-attn, transformers' vision tower calls its attention once a window
    attention = "flash_attention_2" if options.device == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    if options.vllm:
        share_one_vllm(max(case.rows for case in cases))
    packages = ("trl", "torch", "transformers", "peft", "accelerate", *(("vllm",) if options.vllm else ()))
    channel.ready(
        {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "micro_batch_completions": options.micro_batch,
            "gradient_checkpointing": True,
            "attention": attention,
            "generation": f"vLLM, {options.vllm_memory} of the card's memory" if options.vllm else "transformers",
            "versions": {name: metadata.version(name) for name in packages},
        }
    )
    largest = max(case.side for case in cases)
    for case in cases:
        refusal = allowance.refusal(case, start=START_SECONDS)
        if refusal is not None:
            channel.case(case, {"note": refusal})
            continue
        try:
            line = measure_case(case, allowance, options, largest_side=largest, attention=attention)
        except torch.OutOfMemoryError as error:
            line = {"error": f"out of memory: {str(error).splitlines()[0]}"}
        gc.collect()  # trainer, model and accelerator hold one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        channel.case(case, line)
    channel.done()


if __name__ == "__main__":
    main()
