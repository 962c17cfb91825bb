"""Model families, one folder each; `policy/family.py` finds a checkpoint's."""
