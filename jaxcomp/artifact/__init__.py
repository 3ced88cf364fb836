"""The compressed file."""

from jaxcomp.artifact.disk import FileError
from jaxcomp.artifact.files import file_size, load, load_metadata, save, stored_bytes
from jaxcomp.artifact.lazy import OpenTree, open_tree

__all__ = [
    "FileError",
    "OpenTree",
    "file_size",
    "load",
    "load_metadata",
    "open_tree",
    "save",
    "stored_bytes",
]
