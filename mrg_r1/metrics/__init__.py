"""Metrics: arrays and texts in, numbers out."""
