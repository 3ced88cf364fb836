"""Networks: classifiers in linen, and what compression makes of them. NNX's twin of ResNet-18 is in its own file."""

from train.networks.compressed import LearnedGrids, Network, OnGrids, Shrunken, calibrated, learned_grids
from train.networks.linen import MLP, ConvNet, ResNet18, ViT, build, narrowed
from train.networks.widths import Shapes, Widths, resnet18_widths

__all__ = [
    "MLP",
    "ConvNet",
    "LearnedGrids",
    "Network",
    "OnGrids",
    "ResNet18",
    "Shapes",
    "Shrunken",
    "ViT",
    "Widths",
    "build",
    "calibrated",
    "learned_grids",
    "narrowed",
    "resnet18_widths",
]
