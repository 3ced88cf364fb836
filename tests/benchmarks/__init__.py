"""Benchmarks: ratios to what one would use otherwise. ``python -m tests.benchmarks [NAME ...] [--json FILE]``."""
