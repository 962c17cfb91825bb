"""What a run has learned, for use without this project."""
