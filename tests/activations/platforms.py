"""What another platform would be given, run on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax import lax

PLATFORMS = ("cpu", "cuda", "tpu")
traced_as: list[str] = []
"""The platforms that something may have been traced for; whoever clears it forgets those traces."""


def run_as_on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is traced takes the form that it would be lowered in for this platform."""

    def chosen(*args: Any, default: Any, **by: Any) -> Any:
        return by.get(platform, default)(*args)

    jax.clear_caches()  # what is alike is traced once
    traced_as.append(platform)
    monkeypatch.setattr(lax, "platform_dependent", chosen)
