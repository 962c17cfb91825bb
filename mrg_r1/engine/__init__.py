"""The engine: DeepSpeed, checkpoints, faults."""
