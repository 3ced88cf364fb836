"""Data sets in memory, the order of their examples, images on their way into a network, and shards of them."""

from train.data.images import Augmentation, augment, channel_statistics, normalize
from train.data.order import epoch_batches, hold_out
from train.data.sets import Dataset, Split, load
from train.data.shards import client_batches, dirichlet_shards, iid_shards

__all__ = [
    "Augmentation",
    "Dataset",
    "Split",
    "augment",
    "channel_statistics",
    "client_batches",
    "dirichlet_shards",
    "epoch_batches",
    "hold_out",
    "iid_shards",
    "load",
    "normalize",
]
