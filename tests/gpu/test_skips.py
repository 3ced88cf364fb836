"""Without a GPU the tests of one are skipped and say so, each by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.marks import DRY, why_no_gpu

FILES = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py") if path.stem != Path(__file__).stem)


def test_why_they_are_skipped() -> None:
    assert why_no_gpu("gpu", None) is None
    assert why_no_gpu("tpu", None) is None
    assert why_no_gpu("cpu", "1") is None
    assert f"needs a GPU or TPU, and JAX's default device is a CPU; {DRY}=1 runs it here" in str(
        why_no_gpu("cpu", None)
    )


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_this_folder_is_marked(name) -> None:
    marks = importlib.import_module(f"tests.gpu.{name}").pytestmark
    assert "gpu" in [mark.name for mark in (marks if isinstance(marks, list) else [marks])]
