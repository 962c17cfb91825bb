"""Rollout: sampling a group of reports a study, by hand."""
