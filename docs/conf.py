"""Builds the pages as a site: ``python -m sphinx -W docs build/site``, of the extra ``docs``.

Sphinx, because the docstrings are written for it and because its engine is kept: MkDocs's last release is of 2024.
"""

import re
from importlib.metadata import version as installed
from typing import Any

project = "jaxcomp"
copyright = "the authors of jaxcomp"
release = version = installed("jaxcomp")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.mermaid",
]
html_theme = "furo"
html_title = f"jaxcomp {version}"
exclude_patterns = ["build"]

myst_enable_extensions = ["attrs_inline"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True}  # of a room: what its __all__ names
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Params", "PyTree", "State", "Stats", "Where", "Leaf", "Key", "Step")}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [(name, "params_style") for name in ("Fields", "Class attributes", "Raises on call")]
suppress_warnings = ["ref.python"]  # a type hint ``bytes`` is no field of that name


def setup(app: Any) -> None:
    """Docstrings read as they are meant: ``(*stack, rows)`` is no emphasis, ``Raises (on call):`` is a section."""

    def read(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
        lines[:] = [re.sub(r"(?<![\w`*\\])\*(?=\w[^*`]*[,)])", r"\\*", line) for line in lines]
        lines[:] = [re.sub(r"^Raises \(.*\):$", "Raises on call:", line) for line in lines]

    app.connect("autodoc-process-docstring", read, priority=100)  # before napoleon, which comes at 500
