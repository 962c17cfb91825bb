"""Train a policy by GRPO: `deepspeed launch/train.py RECIPE.yaml [key=value ...]`."""

if __name__ == "__main__":  # image workers import this file too, and need none of it
    from mrg_r1.cli.launch import run_on_ranks
    from mrg_r1.training.grpo import train

    run_on_ranks(train, __doc__, labeler_beside=True)
