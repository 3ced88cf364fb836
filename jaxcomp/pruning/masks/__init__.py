"""Pruning masks of arrays: scores, thresholds, structures. No tree is known here."""
