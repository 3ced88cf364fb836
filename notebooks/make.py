"""Makes .ipynb files of the notebooks beside it: ``python notebooks/make.py [--execute] [NAME ...]``.

Each begins with what their sources leave out, because it is the same in all: a badge that opens the notebook in Colab,
and a cell that installs jaxcomp there from its repository. docs/notebooks.md says how they get where the badge looks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
BRANCH = "notebooks"  # of the repository: where the badge looks for the .ipynb files
INSTALL = """\
# Where jaxcomp is not installed yet, as in Colab (any runtime: CPU, GPU or TPU), it comes from its repository.
import importlib.util

if importlib.util.find_spec("jaxcomp") is None:
    %pip install -q "jaxcomp @ git+https://github.com/{repository}" scikit-learn matplotlib onnx onnxruntime"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/{branch}/{name}.ipynb)"
)


def sources(names: list[str]) -> list[Path]:
    """The notebooks of these names, such as ``prune`` or ``01_prune``; of no names, all."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    known = {key: path for path in found for key in (path.stem, path.stem[3:])}
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no notebook {name!r}, only {', '.join(p.stem for p in found)}.")
    return [known[name] for name in names] or found


def repository_of(folder: Path) -> str:
    """OWNER/NAME on GitHub of the clone's ``origin``."""
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    url = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = re.search(r"github\.com[:/]([^/]+/[^/]+?)(\.git)?/?$", url)
    if not found:
        raise SystemExit(
            f"the remote 'origin' is {url or 'not set'}, no address on GitHub; say --repository OWNER/NAME."
        )
    return found[1]


def book_of(path: Path, repository: str) -> nbformat.NotebookNode:
    """A notebook as its source says, behind the badge and the cell that installs."""
    book = jupytext.read(path)
    badge = nbformat.v4.new_markdown_cell(
        BADGE.format(repository=repository, branch=BRANCH, name=path.stem), id="badge"
    )
    install = nbformat.v4.new_code_cell(INSTALL.format(repository=repository), id="install")
    book.cells = [book.cells[0], badge, install, *book.cells[1:]]
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"  # the same file whenever it is made
    book.metadata.pop("jupytext", None)
    return book


def execute(book: nbformat.NotebookNode) -> None:
    """Runs a notebook in a folder of its own; its outputs are put into it, the files it writes are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(book, timeout=None, kernel_name="python3", resources=resources).execute()


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Make .ipynb files of the notebooks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which, such as prune; by default all")
    parser.add_argument("--out", type=Path, default=Path("build/notebooks"), help="the folder they are written to")
    parser.add_argument("--repository", help="OWNER/NAME on GitHub; by default what the clone's origin says")
    parser.add_argument("--execute", action="store_true", help="run each, so that the files hold their pictures")
    options = parser.parse_args()
    repository = options.repository or repository_of(HERE)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SystemExit(f"--repository must be OWNER/NAME, got {repository!r}.")
    chosen = sources(options.names)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        book = book_of(path, repository)
        if options.execute:
            execute(book)
        target = options.out / f"{path.stem}.ipynb"
        nbformat.write(book, target)
        print(target, flush=True)


if __name__ == "__main__":
    main()
