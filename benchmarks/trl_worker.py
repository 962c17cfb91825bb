"""The worker of the other side: TRL's GRPOTrainer on the same checkpoint, words, images, reward and hyperparameters.

`.venv-trl/bin/python -m benchmarks.trl_worker FOLDER TASK` serves one training step a line; see `benchmarks.workers`.
It imports nothing of mrg_r1. TRL owns the loop, so a callback holds it at the beginning of each step until the parent
wants one.
"""

from __future__ import annotations

import argparse
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from benchmarks import task as same
from benchmarks.task import Task
from benchmarks.workers import Channel

MICRO_BATCH = 8  # completions a forward and backward pass: as fast as 16, faster than 32, least memory (README.md)
STEPS = 1_000_000  # more than any bench takes; it ends when the parent closes the pipe


# What GRPOConfig is told on a CPU and on a GPU alike: the step of `benchmarks.task`, and everything that only costs
# time off.
EQUAL_SETTINGS: dict[str, Any] = {
    "beta": same.BETA,
    "epsilon": same.CLIP,
    "num_iterations": 1,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "learning_rate": same.LEARNING_RATE,
    "adam_beta1": same.BETAS[0],
    "adam_beta2": same.BETAS[1],
    "max_grad_norm": same.MAX_GRAD_NORM,
    "lr_scheduler_type": "constant",
    "seed": same.SEED,
    "remove_unused_columns": False,
    "dataloader_num_workers": 0,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
    "log_completions": False,
    "disable_tqdm": True,
}


class ImageProcessorOnly(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, which needs torchvision, for which there is no CPU wheel.

    ProcessorMixin reads the parts that a processor has from the signature of this constructor.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that knows how long its last generation took, and how long its completions were."""

    generation_seconds = 0.0
    shortest = longest = 0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = super()._generate(*args, **kwargs)
        self.generation_seconds = time.perf_counter() - began
        lengths = [len(ids) for ids in output[1]]
        self.shortest, self.longest = min(lengths), max(lengths)
        return output


class StepServer(TrainerCallback):
    """Lets one step run for each line of the parent."""

    def __init__(self, channel: Channel, task: Task) -> None:
        self.channel, self.task = channel, task
        self.trainer: TimedTrainer
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.channel.wait():
            raise SystemExit(0)
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trainer, asked = self.trainer, self.task.new_tokens
        if (trainer.shortest, trainer.longest) != (asked, asked):
            raise RuntimeError(f"completions of {trainer.shortest} to {trainer.longest} tokens, {asked} were asked for")
        generation = trainer.generation_seconds
        self.channel.answer({"generation": generation, "rest": time.perf_counter() - self.began - generation})


def make_processor(policy: Path, side: int) -> ImageProcessorOnly:
    """Tokenizer and image processor of the checkpoint, with the same limits on the area as on the other side."""
    tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    images = Qwen2VLImageProcessorPil.from_pretrained(
        policy, min_pixels=same.SMALLEST_AREA, max_pixels=side**2, local_files_only=True
    )
    return ImageProcessorOnly(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def make_dataset(folder: Path, side: int) -> Dataset:
    """One user turn an image, worded as the other side words it: the chat template puts nothing between image
    and text.
    """
    rows = [
        {
            "prompt": [{"role": "user", "content": f"\n{same.INSTRUCTION}"}],
            "image": str(path),
            "reference": same.REFERENCE,
        }
        for path in same.images_of(folder, side)
    ]
    return Dataset.from_list(rows).cast_column("image", Image())


def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
    """Word overlap, in the shape that TRL asks rewards for."""
    texts = [completion[0]["content"] for completion in completions]
    return [same.word_overlap(text, wanted) for text, wanted in zip(texts, reference, strict=True)]


def suppressed(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Any) -> list[int]:
    """Ids never sampled: what stands for pixels, and every EOS, so that completions are as long as was asked for."""
    vision = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    ends = model.generation_config.eos_token_id
    return sorted({*tokenizer.convert_tokens_to_ids(list(vision)), *([ends] if isinstance(ends, int) else ends)})


def make_trainer(folder: Path, task: Task, channel: Channel) -> TimedTrainer:
    """GRPOTrainer with the settings of `benchmarks.task`; everything that only costs time is off."""
    policy = folder / "policy"
    processor = make_processor(policy, task.side)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float32, local_files_only=True)
    rows, micro = task.studies * task.group, task.micro_batch or MICRO_BATCH
    if rows % micro:
        raise ValueError(f"micro_batch {micro} does not divide the {rows} completions of a step")
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=task.group,
        max_completion_length=task.new_tokens,
        generation_kwargs={"suppress_tokens": suppressed(model, processor.tokenizer)},
        max_steps=STEPS,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        dataloader_pin_memory=False,
        **EQUAL_SETTINGS,
    )
    server = StepServer(channel, task)
    server.trainer = TimedTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=reward,
        args=config,
        train_dataset=make_dataset(folder, task.side),
        peft_config=LoraConfig(
            r=same.LORA_RANK, lora_alpha=same.LORA_ALPHA, target_modules=same.LORA_TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[server],
    )
    return server.trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where benchmarks.model wrote the policy and the images")
    parser.add_argument("task", type=Task.from_json, help="JSON of a Task whose unit is step")
    arguments = parser.parse_args()
    channel, task = Channel(), arguments.task
    if task.unit != "step":
        raise ValueError(f"unit {task.unit!r}: TRL is measured by whole steps only")
    torch.set_num_threads(1)
    trainer = make_trainer(arguments.folder, task, channel)
    parameters = list(trainer.model.parameters())
    channel.ready(
        {
            "micro_batch": task.micro_batch or MICRO_BATCH,
            "micro_batch_of": "completions",
            "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "threads": torch.get_num_threads(),
            "versions": {
                name: metadata.version(name)
                for name in ("trl", "torch", "transformers", "peft", "accelerate", "datasets")
            },
        }
    )
    trainer.train()


if __name__ == "__main__":
    main()
