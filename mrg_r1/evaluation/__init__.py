"""Greedy reports of a split, with scores where there are references and without where there are none."""
