"""Evaluate a recipe's policy, with the adapter of its run: `deepspeed launch/evaluate.py RECIPE.yaml [key=value
...]`.
"""

if __name__ == "__main__":  # image workers import this file too, and need none of it
    from mrg_r1.finished import evaluate_run
    from mrg_r1.launching import run_on_ranks

    run_on_ranks(evaluate_run, __doc__)
