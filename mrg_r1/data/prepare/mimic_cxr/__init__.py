"""MIMIC-CXR, from one's own download."""
