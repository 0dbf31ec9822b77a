"""Sums of branches that are linear in one value; `sums` is where to begin."""
