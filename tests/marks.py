"""Which of many cases run in the quick suite; the others run with ``-m slow``, and those for a GPU with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *names: Any) -> list[Any]:
    """The cases as parameters, all but the named ones marked slow."""
    cases = list(cases)
    unknown = [name for name in names if name not in cases]
    assert not unknown, f"no case is called {unknown[0]!r}"
    return [pytest.param(case, marks=() if case in names else pytest.mark.slow) for case in cases]


DRY = "JAXCOMP_GPU_DRY"
"""Set to 1, ``pytest -m gpu`` runs the bodies on whatever device there is, to show that they are not broken."""


def why_no_gpu(backend: str, dry: str | None) -> str | None:
    """Why tests that need an accelerator are skipped, if they are."""
    if backend != "cpu" or dry == "1":
        return None
    return f"needs a GPU or TPU, and JAX's default device is a CPU; {DRY}=1 runs it here, which shows nothing of a GPU"
