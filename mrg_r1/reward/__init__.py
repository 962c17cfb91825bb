"""Rewards: texts of completions and references enter, one number a completion leaves (`compute.RewardFunction`)."""
