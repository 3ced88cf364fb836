"""The code of README and of the pages under docs runs as it stands; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest

from tests.marks import quick

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]
BLOCKS = {
    f"{path.stem}-{number}": code
    for path in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S), 1)
}
QUICK = ("README-1", "README-2", "pruning-1", "pruning-2", "pruning-4", "quantization-2")


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
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[block], f"block {block}", "exec"), {"__name__": "document"})


def test_readme_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 200


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
