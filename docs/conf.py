"""Sphinx: `make docs` builds these pages into docs/_build."""

import re

from mgd_timm._version import __version__

project = "mgd_timm"
version = release = __version__
copyright = "mgd_timm contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mgd_timm {__version__}"
myst_heading_anchors = 2
suppress_warnings = ["myst.header"]  # docs/changelog.md includes a page with its own title
default_role = "code"  # docstrings have Markdown's single backticks
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def show_formulas_as_they_are(app, what, name, thing, options, lines):
    """Escape what is no markup in docstrings: the stars, bars and underscores of formulas."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def setup(app):
    """Run before napoleon, whose priority is 500, reads the docstrings."""
    app.connect("autodoc-process-docstring", show_formulas_as_they_are, priority=400)
