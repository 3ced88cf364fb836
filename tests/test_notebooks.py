"""Every notebook runs as it stands, warns of nothing, and draws; Jupyter and Colab read the files made of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
QUICK = ("01_prune",)


def cases() -> list:
    """A notebook each; ``-m notebooks`` runs all, the quick suite the quickest."""
    marks = {p.stem: [pytest.mark.notebooks] + [pytest.mark.slow] * (p.stem not in QUICK) for p in NOTEBOOKS}
    assert marks.keys() >= set(QUICK)
    return [pytest.param(p, marks=marks[p.stem], id=p.stem) for p in NOTEBOOKS]


def make(*arguments: str) -> subprocess.CompletedProcess:
    """The documented command."""
    command = [sys.executable, str(ROOT / "notebooks" / "make.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # this clone, also from the kernel's folder
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("path", cases())
def test_notebook_runs(path, tmp_path) -> None:
    done = make(path.stem, "--execute", "--repository=owner/name", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    cells = jupytext.read(tmp_path / f"{path.stem}.ipynb").cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []
    assert any("image/png" in o.get("data", {}) for o in outputs), "no picture was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_written_as_the_others(path) -> None:
    text = path.read_text()
    header = NOTEBOOKS[0].read_text().split("\n# %%")[0]
    assert text.startswith(header), f"{path.name}: wants the header of {NOTEBOOKS[0].name}"
    first, *rest = jupytext.reads(text, fmt="py:percent").cells
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {int(path.stem[:2])}. ")
    code = "\n".join(cell.source for cell in rest if cell.cell_type == "code")
    assert len(re.findall(r"^SCALE = 1  # ", code, flags=re.M)) == 1, "one constant scales it, with a word on how"
    assert len(re.findall(r"\bSCALE\b", code)) > 1, "SCALE scales nothing"
    assert re.search(r"^ *assert ", code, flags=re.M), "its result is asserted"


def test_made_notebooks_begin_with_a_badge_and_an_installation(tmp_path) -> None:
    done = make("--repository=owner/name", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert sorted(p.stem for p in tmp_path.iterdir()) == [p.stem for p in NOTEBOOKS]
    for path in tmp_path.iterdir():
        title, badge, install, *_ = jupytext.read(path).cells
        assert title.source.startswith("# ")
        assert f"colab.research.google.com/github/owner/name/blob/notebooks/{path.name})" in badge.source
        assert "%pip install" in install.source
        assert "git+https://github.com/owner/name" in install.source


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prune", "--repository=owner"), "--repository must be OWNER/NAME, got 'owner'."),
        (("prunes", "--repository=owner/name"), "there is no notebook 'prunes', only 01_prune"),
    ],
)
def test_a_wrong_word_makes_nothing(arguments, says, tmp_path) -> None:
    done = make(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
