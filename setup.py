"""Packaging. Ranges here; the exact versions that the Makefile installs and the tests run with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mrg-r1",
    version="0.1.0",
    description="GRPO for chest X-ray report generation with a clinical reward: raw PyTorch on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mrg_r1", "mrg_r1.*"]),
    package_data={"mrg_r1.tracking.page": ["templates/*", "vendor/*"]},
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
    ],
    extras_require={
        "wandb": ["wandb>=0.19"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff", "mypy", "import-linter>=2", "scikit-learn>=1.5", "selenium>=4.20", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["mrg-r1=mrg_r1.cli:main"]},
)
