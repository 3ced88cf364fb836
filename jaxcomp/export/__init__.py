"""Programs and files for other runtimes, and their files read."""

from jaxcomp.export.compressed_tensors.reading import from_compressed_tensors
from jaxcomp.export.compressed_tensors.writing import to_compressed_tensors
from jaxcomp.export.errors import ExportError

__all__ = [
    "ExportError",
    "from_compressed_tensors",
    "to_compressed_tensors",
]
