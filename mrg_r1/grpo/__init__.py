"""GRPO as pure functions: tensors in, tensors and metrics out."""
