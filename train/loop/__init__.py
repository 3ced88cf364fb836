"""The loop of training: epochs of steps with checkpoints, metrics and progress, and how a network is judged."""

from train.loop.evaluate import accuracy
from train.loop.fit import Job, fit
from train.loop.step import TrainState, init_variables, make_optimizer, make_predict, make_train_step

__all__ = [
    "Job",
    "TrainState",
    "accuracy",
    "fit",
    "init_variables",
    "make_optimizer",
    "make_predict",
    "make_train_step",
]
