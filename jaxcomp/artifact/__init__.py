"""The compressed file."""

from jaxcomp.artifact.files import FileError, load, save

__all__ = [
    "FileError",
    "load",
    "save",
]
