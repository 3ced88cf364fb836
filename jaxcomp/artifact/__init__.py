"""The compressed file."""

from jaxcomp.artifact.files import FileError, file_size, load, load_metadata, save, stored_bytes

__all__ = [
    "FileError",
    "file_size",
    "load",
    "load_metadata",
    "save",
    "stored_bytes",
]
