"""README's code and the notebooks run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.marks import quick

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("i", quick(range(len(BLOCKS)), 0, 1, 2, 3, 5, 7))
def test_readme_code_runs(i, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[i], f"README block {i}", "exec"), {"__name__": "readme"})


def test_ci_runs_the_commands_that_readme_gives() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    install_and_run, install_and_test = commands[0].strip(), commands[1].strip()
    for command in (install_and_run, install_and_test):
        for part in command.split("&&"):
            words = shlex.split(part)
            assert words
            assert " ".join(w for w in words if not w.startswith(".[")) in ci.replace("-q ", "").replace('"', "")


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda p: p.stem)
def test_notebook_runs(notebook, tmp_path) -> None:
    code = """
import sys, jupytext, nbclient
book = jupytext.read(sys.argv[1])
nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()
pictures = sum("image/png" in o.get("data", {}) for c in book.cells for o in c.get("outputs", []))
assert pictures > 0, "no picture was drawn"
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(notebook)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_marker_is_explained() -> None:
    for marker in ("slow", "gpu"):
        assert f"-m {marker}" in README
