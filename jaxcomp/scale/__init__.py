"""What is known from shapes alone, and what is done a leaf at a time: trees that are larger than memory."""

from jaxcomp.scale.compressing import compress_file
from jaxcomp.scale.sources import Leaves, open_orbax, open_safetensors

__all__ = [
    "Leaves",
    "compress_file",
    "open_orbax",
    "open_safetensors",
]
