"""Rewrites of parameters that keep the function: scales moved between layers, residual streams rotated, biases mended."""
