"""The training program: what trains, compresses and judges a network. It uses jaxcomp; jaxcomp never uses it.

The main path reads downward in five files:

1. ``__main__.py``, the command line of ``python -m train``;
2. ``experiments/main_job.py``: a baseline, then each row trained, saved, loaded again and judged;
3. ``experiments/methods.py``: what each row makes of the baseline;
4. ``loop/fit.py``: epochs of steps, checkpoints, metrics;
5. ``loop/step.py``: the step, pure and jitted.
"""
