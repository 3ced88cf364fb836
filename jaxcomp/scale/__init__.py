"""What is known from shapes alone, and what is done a leaf at a time: trees that are larger than memory."""

from jaxcomp.scale.compressing import compress_file
from jaxcomp.scale.memory import DeviceMemory, device_memory
from jaxcomp.scale.shards import open_safetensors
from jaxcomp.scale.sources import Leaves, open_orbax

__all__ = [
    "DeviceMemory",
    "Leaves",
    "compress_file",
    "device_memory",
    "open_orbax",
    "open_safetensors",
]
