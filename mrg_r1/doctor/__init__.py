"""What a machine and a recipe lack for a run: looked at in seconds, before a policy is loaded (`mrg-r1 doctor`,
`launch/train.py`).
"""
