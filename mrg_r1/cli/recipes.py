"""`mrg-r1 recipes`: launch scripts, recipes and DeepSpeed configurations for somebody who has the package and
no clone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_output, described
from mrg_r1.files import atomically


def add_commands(commands: Any) -> None:
    """`recipes`."""
    recipes = described(
        commands.add_parser,
        "recipes",
        help="write the launch scripts, recipes and DeepSpeed configurations into a folder",
        description="Training starts in a folder that has launch/ and ds_configs/, as a clone of the project has. "
        "This makes such a\n"
        "folder from an installed package. A file that is there already and was changed is never "
        "overwritten.",
        examples="""
        mrg-r1 recipes -o work
        cd work && deepspeed launch/train.py launch/recipes/demo.yaml output_dir=runs/mine
        """,
    )
    add_output(recipes, "folder to write launch/, launch/recipes/ and ds_configs/ into")
    recipes.set_defaults(run=_recipes)


def _recipes(arguments: argparse.Namespace) -> None:
    root = _shipped()
    sources = [
        path
        for pattern in ("launch/*.py", "launch/recipes/**/*.yaml", "ds_configs/*.json")
        for path in sorted(root.glob(pattern))
    ]
    files = {path.relative_to(root): path.read_bytes() for path in sources}
    for name, content in files.items():
        there = arguments.output / name
        if there.exists() and there.read_bytes() != content:
            raise ValueError(
                f"{there}: is there already and differs from the one that comes along; move it away, or give another "
                "folder"
            )
    for name, content in files.items():
        (arguments.output / name).parent.mkdir(parents=True, exist_ok=True)
        with atomically(arguments.output / name, synced=False) as temporary:
            temporary.write_bytes(content)
    print(
        f"{arguments.output}: {len(files)} files; start there, for example: deepspeed launch/train.py "
        "launch/recipes/demo.yaml"
    )


def _shipped() -> Path:
    """The folder that has launch/ and ds_configs/: inside an installed package, beside the package in a clone."""
    package = Path(__file__).resolve().parents[1]
    return package / "shipped" if (package / "shipped").is_dir() else package.parent
