"""The policy: a checkpoint of a model family with LoRA, its passes and log-probs."""
