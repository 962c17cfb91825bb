"""`mrg-r1 prepare`: a dataset, or a tiny policy to try things on.

Each module here is one kind and has `add_command`; a converter of another collection is one more module, found by being
here. What a kind needs is imported inside its functions: `--help` must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def add_commands(commands: Any) -> None:
    """`prepare {chexpert, iu-xray, manifest, mimic-cxr, nih, padchest, phantom, tiny-policy}`."""
    prepare = commands.add_parser("prepare", help="write a dataset, or a tiny policy to try things on")
    kinds = prepare.add_subparsers(title="what to prepare", required=True, metavar="KIND")
    for name in sorted(module.name for module in iter_modules(__path__)):
        import_module(f"{__name__}.{name}").add_command(kinds)
