"""Phantoms: chest radiographs rendered from labels, and what is said of them."""
