"""mrg-r1: GRPO for chest X-ray report generation with a clinical reward."""

__version__ = "0.1.0"
