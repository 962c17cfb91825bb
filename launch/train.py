"""Train a policy by GRPO: `deepspeed launch/train.py RECIPE.yaml [key=value ...]`."""

from mrg_r1.launching import run_on_ranks
from mrg_r1.trainer import train

if __name__ == "__main__":
    run_on_ranks(train, __doc__)
