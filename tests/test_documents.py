"""The code of README and of the pages under docs runs as it stands; links lead somewhere."""

from __future__ import annotations

import os
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
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]


def blocks(path: Path) -> dict[str, list[str]]:
    """The code of a page by block, behind what it goes on from: without an ``import`` it takes the names before it."""
    found: dict[str, list[str]] = {}
    run: list[str] = []
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S), 1):
        run = [code] if re.search(r"^import ", code, flags=re.M) else [*run, code]
        found[f"{path.stem}-{number}"] = run
    return found


BLOCKS = {name: codes for path in DOCUMENTS for name, codes in blocks(path).items()}
QUICK = ("README-1", "recipes-2", "first-steps-2", "pruning-1", "pruning-2", "pruning-4", "quantization-2")


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.S | re.M)


def links(path: Path) -> list[str]:
    """Where a document's links lead, but for the web."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """What follows ``#`` in links to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", quick(BLOCKS, *QUICK))
def test_code_of_documents_runs(block, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "document"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in BLOCKS[block]:  # this file's annotations are strings, a reader's are not: nothing is inherited
            exec(compile(code, f"block {block}", "exec", dont_inherit=True), names)


def test_readme_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 150


def test_every_yes_of_readme_leads_to_a_test() -> None:
    section = README.partition("## Beside other tools")[2].partition("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head[1] == "jaxcomp"
    assert len(rows) >= 10
    for what, ours, *_ in rows:
        where = re.fullmatch(r"\[.+\]\((tests/\S+)\)", ours)
        assert where or ours == "no", f"{what}: {ours}"
        assert not where or "\ndef test_" in (ROOT / where[1]).read_text(), what


def test_readmes_picture_shows_what_was_measured() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import picture
    finally:
        sys.path.pop(0)
    drawn = re.sub(r"<[^>]*>", "\n", (ROOT / "docs" / "size.svg").read_text())
    for name, accuracy, size in picture.rows():
        assert f"{name}\n" in drawn, "python docs/picture.py"
        assert re.search(rf"{size / 1000:,.0f} kB.*{accuracy} right", drawn), "python docs/picture.py"
    for line in re.findall(r"^.*%.*x.*$", README.partition("```\nmethod")[2].partition("```")[0], flags=re.M):
        assert line in (ROOT / "docs" / "measured.md").read_text(), f"README has a row that was not measured: {line}"


@pytest.mark.parametrize("name", ["linen", "NNX"])
def test_a_net_from_float_to_integers_takes_fewer_than_30_lines(name) -> None:
    """What a new user would write: the blocks run as they stand, and use nothing of this repository but jaxcomp."""
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## From a float net")[2].partition("\n## ")[0]
    block = re.findall(r"```python\n(.*?)```", page, flags=re.S)[("linen", "NNX").index(name)]
    assert f"from flax import {name.lower()}" in block
    assert len([line for line in block.splitlines() if line.strip()]) < 30
    assert not re.search(r"^(from|import) (train|tests)", block, flags=re.M)
    for step in ("prune(", "quantize(jc.Int(8))", "Act(8)", "shrink(", "save(", "load(", "integer=True, strict=True"):
        assert step in block


@pytest.mark.parametrize("title", ["The loop in linen", "The loop in NNX", "The loop in Equinox", "The loop in Haiku"])
def test_a_loop_takes_fewer_than_30_lines(title) -> None:
    section = (ROOT / "docs" / "recipes.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len([line for line in block.splitlines() if line.strip()]) < 30


@pytest.mark.slow
def test_the_pages_build_as_a_site(tmp_path) -> None:
    pytest.importorskip("sphinx")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'id="jaxcomp.pruning.prune"' in (tmp_path / "reference" / "pruning.html").read_text()


def test_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert PAGES
    assert not [page.name for page in PAGES if page not in linked]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link} is not there"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link} is no heading of {target.name}"


def test_ci_runs_the_commands_that_readme_gives() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    install_and_run, install_and_test = commands[0].strip(), commands[1].strip()
    for command in (install_and_run, install_and_test):
        for part in command.split("&&"):
            words = shlex.split(part)
            assert words
            assert " ".join(w for w in words if not w.startswith(".[")) in ci.replace("-q ", "").replace('"', "")


def test_every_marker_is_explained() -> None:
    for marker in ("slow", "gpu"):
        assert f"-m {marker}" in README
    assert "-m notebooks" in (ROOT / "docs" / "notebooks.md").read_text()
