"""Converters: what lies on a researcher's disk becomes a manifest."""
