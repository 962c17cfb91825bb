"""Packaging. Ranges here; the exact versions that the Makefile installs and the tests run with are in
constraints.txt.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# `mrg-r1 recipes` copies them out of an installed package
SHIPPED = ("launch/*.py", "launch/recipes/**/*.yaml", "ds_configs/*.json")


class BuildWithRecipes(build_py):
    """Puts what stands beside the package in a clone into mrg_r1/shipped/ of a wheel; a clone itself, installed with
    -e, needs no copy.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else [str(target) for _, target in self._shipped()]
        return [*super().get_outputs(include_bytecode), *shipped]

    def _shipped(self) -> list[tuple[Path, Path]]:
        folder = Path(self.build_lib) / "mrg_r1" / "shipped"
        return [
            (source, folder / source.relative_to(ROOT)) for pattern in SHIPPED for source in sorted(ROOT.glob(pattern))
        ]


setup(
    name="mrg-r1",
    version="0.2.0.dev0",  # and in mrg_r1/__init__.py
    description="GRPO for chest X-ray report generation with a clinical reward: raw PyTorch on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="mrg-r1 contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "grpo",
        "reinforcement learning",
        "vision-language",
        "radiology",
        "chest x-ray",
        "report generation",
        "deepspeed",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["mrg_r1", "mrg_r1.*"]),
    package_data={
        "mrg_r1": ["py.typed", "**/templates/*", "**/vendor/*", "**/source/*", "**/*.json", "**/*.yaml", "**/*.txt"]
    },
    cmdclass={"build_py": BuildWithRecipes},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8",
        "transformers>=5.17,<6",
        "peft>=0.19",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "numpy>=1.26",
        "packaging>=24",
        "pillow>=11",
        "psutil>=5.9",
        "pydantic>=2.9",
        "pydicom>=3",
        "PyYAML>=6",
        "rich>=13",
        "sacrebleu>=2.4",
        "scipy>=1.11",
        "tabulate>=0.9",
        "pycocoevalcap>=1.2",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "wandb>=0.31",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "dashboard": ["wandb-workspaces>=0.4.13"],
        # of source: compiles for the CUDA of the torch that is installed, so with --no-build-isolation
        "flash-attn": ["flash-attn>=2.7,<3"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "import-linter>=2.16",
            "scikit-learn>=1.5",
            "selenium>=4.20",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["mrg-r1=mrg_r1.cli:main"]},
)
