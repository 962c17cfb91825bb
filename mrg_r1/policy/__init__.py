"""The policy: a Qwen2.5-VL checkpoint with LoRA, its vision tower, positions and log-probs."""
