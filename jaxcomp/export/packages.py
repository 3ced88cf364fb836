"""The packages behind exports, found when they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from jaxcomp.export.errors import ExportError


def package(name: str, what: str) -> ModuleType:
    """The module of this name.

    Raises:
      ExportError: it is not installed. The message begins with ``what``, which needs it, and names the extra.
    """
    try:
        return import_module(name)
    except ImportError as e:
        raise ExportError(
            f'{what} needs the package {name}, which is not installed; install it with: pip install "jaxcomp[export]".'
        ) from e
