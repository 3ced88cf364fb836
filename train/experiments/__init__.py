"""The experiments: the main job with its rows, sparse training, and a simulated federation."""

from train.experiments.federated_configs import COMPRESSORS
from train.experiments.main_job import BASELINE, Row, run
from train.experiments.methods import MAIN_JOB, METHODS, Method, Recipe, Start

__all__ = ["BASELINE", "COMPRESSORS", "MAIN_JOB", "METHODS", "Method", "Recipe", "Row", "Start", "run"]
