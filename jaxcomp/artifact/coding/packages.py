"""The packages that code and decode, found when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def package(name: str) -> Any:
    """The module of this name.

    Raises:
      ImportError: it is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(f'coded tensors need the package {name}: pip install "jaxcomp[coding]"') from e
