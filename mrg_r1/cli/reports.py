"""`mrg-r1 report`: one study's images in, the report of a run's policy out, with what a labeler reads in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import described, positive, seed

if TYPE_CHECKING:
    from mrg_r1.config.recipe import Recipe
    from mrg_r1.data.loader import PromptBuilder
    from mrg_r1.labels.labeler import Labeler
    from mrg_r1.policy.policy import Policy
    from mrg_r1.types import Study

# option -> data.context's name
_CONTEXT = {"indication": "indication", "comparison": "comparison", "prior": "prior_report"}


def add_commands(commands: Any) -> None:
    """`report`."""
    report = described(
        commands.add_parser,
        "report",
        help="a report of one study's images, by a run's policy",
        description="Write the report of one study. The images of the study, in order (PNG, JPEG, DICOM), go into "
        "the prompt of the run's\n"
        "recipe, its policy writes the report, and its labeler reads the findings in it. Greedy unless "
        "--samples is given: the text is\n"
        "then the one that `launch/evaluate.py` writes of the same study. Nothing leaves this machine. "
        "Not for clinical use.\n"
        "(What a run learned, before and after: `mrg-r1 summary RUN`.)",
        examples="""
        mrg-r1 report frontal.png --run runs/mine
        mrg-r1 report frontal.dcm lateral.dcm --view frontal --view lateral --indication "cough" --run runs/mine
        mrg-r1 report frontal.png --run runs/mine --samples 4 --temperature 0.7 --seed 1
        mrg-r1 report frontal.png --run runs/mine --no-labeler --json report.json
        """,
    )
    report.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="images of ONE study, in the order of the prompt"
    )
    report.add_argument(
        "--run", dest="folder", type=Path, metavar="RUN", help="output_dir of a GRPO or SFT run (required)"
    )
    report.add_argument(
        "--view",
        action="append",
        choices=("frontal", "lateral"),
        help="an image's view; once for each image in their order, or not at all",
    )
    for option, field in _CONTEXT.items():
        report.add_argument(
            f"--{option}", metavar="TEXT", help=f"the study's {field}, where the run's data.context has it"
        )
    report.add_argument("--samples", type=positive, metavar="N", help="N sampled reports instead of the greedy one")
    report.add_argument(
        "--temperature", type=_temperature, metavar="T", help="of the samples (default: rollout.temperature of the run)"
    )
    report.add_argument("--seed", type=seed, metavar="S", help="of the samples (default: 0)")
    report.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    )
    report.add_argument(
        "--policy", type=Path, metavar="DIR", help="where the recipe's policy.path lies now, if it has moved"
    )
    report.add_argument(
        "--cold-start", type=Path, metavar="DIR", help="where the recipe's policy.adapter lies now, if it has moved"
    )
    labeler = report.add_mutually_exclusive_group()
    labeler.add_argument(
        "--labeler",
        type=Path,
        metavar="PATH",
        help="labeler that reads the findings (default: the run's reward.labeler)",
    )
    labeler.add_argument("--no-labeler", action="store_true", help="print the report without findings")
    report.add_argument(
        "--json", metavar="FILE", help="write everything as one JSON object; `-` prints it, and nothing else"
    )
    report.set_defaults(run=lambda arguments: _report(arguments, report))


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature; write a number above 0, such as 0.7")
    return value


def _report(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.folder is None:
        parser.error(
            "give the run whose policy writes as --run RUN; what a run learned, before and after, is `mrg-r1 "
            "summary RUN`"
        )
    if arguments.samples is None and (arguments.temperature is not None or arguments.seed is not None):
        parser.error(
            "--temperature and --seed are of sampled reports: give --samples N too; without it the report is greedy"
        )
    import warnings

    from mrg_r1.data.images import image_problem
    from mrg_r1.doctor.texts import check_prompts
    from mrg_r1.evaluation.generate import add_labels, reports_of_one
    from mrg_r1.policy.load import load_tokenizer

    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own calls of its own old names
    recipe = _recipe(arguments)
    study = _study(arguments, recipe)
    problems = [problem for path in arguments.images if (problem := image_problem(path, study.id)) is not None]
    if problems:
        raise ValueError("\n".join(problems))
    check_prompts(recipe, [study], load_tokenizer(recipe.policy.path))
    device = _device(arguments.device)
    # before the policy, which takes longer to load
    labeler = None if arguments.no_labeler else _labeler(arguments, recipe, device)
    policy = _policy(arguments, recipe, device)
    rows = reports_of_one(
        policy,
        study,
        build=_builder(recipe, policy),
        mode=recipe.prompt.mode,
        max_new_tokens=recipe.rollout.max_new_tokens,
        samples=arguments.samples,
        seed=arguments.seed or 0,
    )
    if labeler is not None:
        add_labels(rows, labeler.label)
    if arguments.json != "-":
        _print(rows, recipe, labeler)
    if arguments.json is not None:
        _write_json(arguments, recipe, study, rows, labeler, temperature=policy.temperature)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The run's recipe, its policy being the one that it has trained, where the files lie now."""
    from mrg_r1.config.recipe import check_checkpoint_directory, load_run, with_trained_policy

    file = arguments.folder / "config.yaml"
    recipe = load_run(arguments.folder)
    if arguments.cold_start is not None and recipe.policy.adapter is None:
        raise ValueError(f"--cold-start {arguments.cold_start}: {file} names no policy.adapter; leave it out")
    recipe = with_trained_policy(recipe, arguments.folder)
    paths = {"path": arguments.policy, "adapter": arguments.cold_start}
    policy = recipe.policy.model_copy(update={name: path for name, path in paths.items() if path is not None})
    if not policy.path.is_dir():
        raise ValueError(
            f"{policy.path}: no such folder (policy.path of {file}); go to the folder that the run was started in, "
            "or name the one where the checkpoint lies now with --policy"
        )
    check_checkpoint_directory(policy.path)
    if policy.adapter is not None and not (policy.adapter / "adapter_config.json").is_file():
        raise ValueError(
            f"{policy.adapter}: no adapter_config.json there (policy.adapter of {file}); name where it lies now with "
            "--cold-start"
        )
    return recipe.model_copy(update={"policy": policy})


def _study(arguments: argparse.Namespace, recipe: Recipe) -> Study:
    """The images as a study, named after the first; its context is checked against what the recipe puts into a
    prompt.
    """
    from mrg_r1.types import Study, StudyImage

    views = arguments.view or [None] * len(arguments.images)
    if len(views) != len(arguments.images):
        raise ValueError(
            f"--view: {len(views)} given, but {len(arguments.images)} image(s); give one for each image in their "
            "order, or none"
        )
    file, fields = arguments.folder / "config.yaml", recipe.data.context
    context = {field: getattr(arguments, option) for option, field in _CONTEXT.items()}
    for option, field in _CONTEXT.items():
        text = context[field]
        if text is not None and field not in fields:
            raise ValueError(
                f"--{option}: the run was trained without it (data.context of {file} is {list(fields)}), and has no "
                "room for it; leave it out"
            )
        if text is not None and not text.strip():
            raise ValueError(f"--{option} {text!r}: empty; write the text or leave the option out")
        if text is None and field in fields:
            _note(f"no --{option}: the run's prompts have it where a study does (data.context)")
    if arguments.view is None and recipe.prompt.show_view:
        _note("no --view: the run's prompts name each image's view where it is known (prompt.show_view)")
    if arguments.view is not None and not recipe.prompt.show_view:
        _note("--view changes nothing: the run's prompts do not name views (prompt.show_view is false)")
    images = tuple(StudyImage(path.absolute(), view) for path, view in zip(arguments.images, views, strict=True))
    return Study(id=arguments.images[0].stem, patient_id="", images=images, report=None, split="", **context)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: cannot be used ({reason}); give cpu, cuda or cuda:N of a GPU that is there"
        ) from error
    return name


def _labeler(arguments: argparse.Namespace, recipe: Recipe, device: str) -> Labeler:
    import torch

    from mrg_r1.labels.labeler import Labeler

    path = arguments.labeler or recipe.reward.labeler
    if not path.exists():
        named = "--labeler" if arguments.labeler else f"reward.labeler of {arguments.folder / 'config.yaml'}"
        remedy = "name where a labeler lies with --labeler PATH, or print the report without findings with --no-labeler"
        raise ValueError(f"{path}: no such file or folder ({named}); {remedy}")
    # a folder of ours carries its own
    tokenizer = None if path.is_dir() and arguments.labeler else recipe.reward.tokenizer
    return Labeler.load(path, tokenizer=tokenizer, device=device, dtype=getattr(torch, recipe.reward.dtype))


def _policy(arguments: argparse.Namespace, recipe: Recipe, device: str) -> Policy:
    import torch
    from transformers.utils import logging

    from mrg_r1.policy import flash_attention
    from mrg_r1.policy.load import load_policy
    from mrg_r1.policy.lora import load_adapter, merge_adapter

    logging.disable_progress_bar()
    on_gpu = torch.device(device).type == "cuda"  # a report can be asked for where the run's kernels are not
    dtype = getattr(torch, recipe.policy.dtype)
    flash_attention.choose(recipe.policy.attention if on_gpu else "torch", device=torch.device(device), dtype=dtype)
    temperature = arguments.temperature or recipe.rollout.temperature
    policy = load_policy(recipe.policy.path, dtype=dtype, temperature=temperature).to(device)
    if recipe.policy.adapter is not None:
        merge_adapter(policy, recipe.policy.adapter)
    if (arguments.folder / "adapter" / "adapter_config.json").is_file():
        load_adapter(policy, arguments.folder / "adapter")
    elif recipe.policy.path != arguments.folder / "policy":
        _note(f"{arguments.folder} has no adapter yet: this is the policy as it was before the run")
    return policy.eval()


def _builder(recipe: Recipe, policy: Policy) -> PromptBuilder:
    from mrg_r1.data.loader import PromptBuilder, PromptWords
    from mrg_r1.policy.load import load_image_processor

    words = PromptWords(
        instruction=recipe.prompt.words,
        show_view=recipe.prompt.show_view,
        context=tuple(recipe.data.context),
        max_tokens=recipe.prompt.max_tokens,
    )
    processor = load_image_processor(
        recipe.policy.path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels
    )
    return PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=words)


def _print(rows: list[dict[str, Any]], recipe: Recipe, labeler: Labeler | None) -> None:
    from rich.console import Console

    from mrg_r1.evaluation.generate import NOT_FOR_CLINICAL_USE, shown_report

    console = Console(highlight=False)
    for number, row in enumerate(rows, start=1):
        title = "report" if len(rows) == 1 else f"report {number} of {len(rows)}"
        name = None if labeler is None else labeler.name
        console.print(shown_report(row, title=title, mode=recipe.prompt.mode, labeler=name), soft_wrap=False)
        console.print()
    console.print(NOT_FOR_CLINICAL_USE, style="bold")


def _write_json(
    arguments: argparse.Namespace,
    recipe: Recipe,
    study: Study,
    rows: list[dict[str, Any]],
    labeler: Labeler | None,
    *,
    temperature: float,
) -> None:
    from mrg_r1.evaluation.generate import NOT_FOR_CLINICAL_USE
    from mrg_r1.files import write_text_atomically
    from mrg_r1.labels.observations import OBSERVATIONS

    sampling = None if arguments.samples is None else {"temperature": temperature, "seed": arguments.seed or 0}
    content = {
        "notice": NOT_FOR_CLINICAL_USE,
        "id": study.id,
        "images": [{"path": str(image.path), "view": image.view} for image in study.images],
        "context": {field: getattr(study, field) for field in recipe.data.context},
        "run": str(arguments.folder),
        "policy": str(recipe.policy.path),
        "labeler": None if labeler is None else {"name": labeler.name, "fingerprint": labeler.fingerprint},
        "observations": list(OBSERVATIONS),
        "sampling": sampling,
        "reports": rows,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        write_text_atomically(Path(arguments.json), text)
        print(f"{arguments.json}: written")
