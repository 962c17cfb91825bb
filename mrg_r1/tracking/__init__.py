"""Tracking: the run as JSONL, terminal lines and pages."""
