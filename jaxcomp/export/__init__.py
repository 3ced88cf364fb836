"""Programs and files for other runtimes, and their files read."""

from jaxcomp.export.compressed_tensors.reading import from_compressed_tensors
from jaxcomp.export.compressed_tensors.writing import to_compressed_tensors
from jaxcomp.export.errors import ExportError
from jaxcomp.export.gguf.reading import from_gguf
from jaxcomp.export.gguf.writing import to_gguf
from jaxcomp.export.litert import to_litert
from jaxcomp.export.onnx.export import to_onnx
from jaxcomp.export.stablehlo import to_stablehlo

__all__ = [
    "ExportError",
    "from_compressed_tensors",
    "from_gguf",
    "to_compressed_tensors",
    "to_gguf",
    "to_litert",
    "to_onnx",
    "to_stablehlo",
]
