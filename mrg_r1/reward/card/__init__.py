"""The reward card: what a policy can earn without looking at a radiograph."""
