"""What several subcommands share: help that teaches by an example, arguments that recur, values that are checked while
parsing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrg_r1.labels.labeler import Labeler


def described(make: Any, *names: str, examples: str, **keywords: Any) -> argparse.ArgumentParser:
    """A parser whose help closes with examples: `make` is ArgumentParser, or `add_parser` of the commands it joins."""
    lines = [line.strip() for line in examples.strip().splitlines()]
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)
    parser: argparse.ArgumentParser = make(
        *names, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords
    )
    return parser


def add_output(parser: argparse.ArgumentParser, text: str, metavar: str = "DIR", *, required: bool = True) -> None:
    """`-o`, the file or folder that a command writes."""
    parser.add_argument("-o", "--output", type=Path, required=required, metavar=metavar, help=text)


def add_labeler_arguments(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """`--labeler`, `--tokenizer`, `--device` and `--dtype`, for `load_labeler`."""
    what = "a labeler's folder, or a CheXbert file (.pth, .safetensors)"
    parser.add_argument("--labeler", type=Path, required=required, metavar="PATH", help=what)
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer of a checkpoint file (default: bert-base-uncased)"
    )
    parser.add_argument("--device", default="cpu", help="where the labeler runs: cpu or cuda:N (default: cpu)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="float32", choices=dtypes, help="precision of its weights (default: float32)"
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """`--views`, `--max-images` and `--check-images`, for the `prepare` of large collections of several views."""
    parser.add_argument(
        "--views",
        choices=("frontal", "all"),
        default="frontal",
        help="frontal: no study without a frontal view (default); all: a frontal, a lateral, then the others",
    )
    parser.add_argument(
        "--max-images", type=positive, default=2, metavar="N", help="images a study, at most (default: 2)"
    )
    add_check_images(parser)


def add_check_images(parser: argparse.ArgumentParser) -> None:
    """`--check-images`, for the `prepare` of collections that it takes hours to decode."""
    parser.add_argument(
        "--check-images",
        choices=("none", "size", "open"),
        nargs="?",
        const="open",
        default="size",
        help="of the images taken: nothing, that they are there and not empty (default), or that each can be decoded, "
        "which takes hours",
    )


def load_labeler(arguments: argparse.Namespace) -> Labeler:
    """The labeler that the arguments of `add_labeler_arguments` name."""
    import torch

    from mrg_r1.labels.labeler import Labeler

    dtype = getattr(torch, arguments.dtype)
    return Labeler.load(arguments.labeler, tokenizer=arguments.tokenizer, device=arguments.device, dtype=dtype)


def use_cores() -> None:
    """Let torch run as many threads as this process may use cores, or as OMP_NUM_THREADS says."""
    import torch

    from mrg_r1.cores import read_cores, share_cores

    threads = share_cores(read_cores(), ranks=1, labeler=False)
    for note in threads.notes:
        print(f"cores: {note}", file=sys.stderr)
    torch.set_num_threads(threads.rank)


def positive(text: str) -> int:
    """A whole number above 0, or a usage error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number, 0 or more, or a usage error."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def between_0_and_1(text: str) -> float:
    """A number above 0 and below 1, or a usage error."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1, such as 0.4")
    return value


def margin(text: str) -> float:
    """A reward margin, 0 <= m < 1, or a usage error."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a margin; write a number from 0 to below 1, such as 0.5")
    return value
