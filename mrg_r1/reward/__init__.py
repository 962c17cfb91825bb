"""The reward stage: texts in, rewards out."""
