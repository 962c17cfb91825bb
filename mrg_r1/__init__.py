"""mrg-r1: GRPO for chest X-ray report generation with a clinical reward."""

__version__ = "0.2.0.dev0"
