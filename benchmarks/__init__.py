"""What a step costs, beside TRL and beside transformers' own generation. `python -m benchmarks.bench --help`
explains.
"""
