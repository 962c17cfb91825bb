"""Rewards: texts of completions and references enter, one number a completion leaves (`compute.RewardFunction`).

- `terms`: the terms, each a pure function and an entry of `BUILT_IN`. `compute`: one batch, from texts to `Rewards`.
- `reading`: the labeler behind a memory. `references`: what it read of the radiologists' reports, kept on the disk.
- `service/`: the reward function in a process of its own. `held_out`: a second labeler that is never rewarded.
- `diagnostics`: what a step logs of its rewards. `card/`: what a policy can earn without looking at a radiograph.
"""
