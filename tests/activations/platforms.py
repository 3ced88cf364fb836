"""What another platform would be given, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from jax import lax

PLATFORMS = ("cpu", "cuda", "tpu")


def run_as_on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is traced takes the form that it would be lowered in for this platform."""

    def chosen(*args: Any, default: Any, **by: Any) -> Any:
        return by.get(platform, default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", chosen)
