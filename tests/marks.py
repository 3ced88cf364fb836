"""Which of many cases run in the quick suite; the others run with ``-m slow``."""

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
