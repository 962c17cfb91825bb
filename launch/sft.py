"""Fine-tune a policy on reports (SFT), the cold start and baseline: `deepspeed launch/sft.py RECIPE.yaml [key=value
...]`.
"""

if __name__ == "__main__":  # image workers import this file too, and need none of it
    from mrg_r1.cli.launch import run_on_ranks
    from mrg_r1.training.sft import train

    run_on_ranks(train, __doc__)
