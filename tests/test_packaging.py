"""The package as it is installed, and tests that a busy machine does not break."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "thread_time", "time_ns"}


def test_fault_10_a_folder_of_the_same_name_does_not_shadow_an_editable_install(tmp_path):
    try:
        distribution("jaxcomp")
    except PackageNotFoundError:
        pytest.skip("jaxcomp is not installed here, only on the path")
    (tmp_path / "jaxcomp" / "jaxcomp").mkdir(parents=True)  # the clone, seen from its parent's folder
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import jaxcomp; jaxcomp.prune; print(jaxcomp.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "__init__.py"


def time_limits(source: str) -> list[str]:
    """The calls by which a test would depend on how busy the machine is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
            found.append(f"{node.lineno}: {node.attr}")
        if isinstance(node, ast.Call):
            limits = [k for k in node.keywords if k.arg == "timeout"]
            found += [f"{node.lineno}: timeout" for k in limits if getattr(k.value, "value", 0) is not None]
    return found


def test_fault_10_no_test_has_a_limit_in_seconds():
    # Benchmarks measure time, and faults come at times that are drawn.
    files = [p for p in TESTS.rglob("*.py") if "benchmarks" not in p.parts and p != TESTS / "train" / "faults.py"]
    assert len(files) > 50
    assert {p.name: found for p in files if (found := time_limits(p.read_text()))} == {}


def test_fault_10_limits_would_be_seen():
    assert time_limits("import time\nt = time.perf_counter()\n") == ["2: perf_counter"]
    assert time_limits("p.communicate(timeout=3)\np.wait(timeout=None)\n") == ["1: timeout"]
