"""Sphinx: `make docs` builds these pages into docs/_build."""

import dataclasses
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
smartquotes = False  # -- is the start of a flag
default_role = "code"  # docstrings have Markdown's single backticks
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def escape(text):
    """Escape what is no markup in a docstring: the stars, bars and underscores of formulas."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def escape_docstring(app, what, name, thing, options, lines):
    """Escape the lines of a docstring in place."""
    lines[:] = map(escape, lines)


def list_options(app, what, name, thing, options, lines):
    """List a dataclass of options: each field with its default and the help that the command line shows."""
    if is_options(thing):
        for field in dataclasses.fields(thing):
            if "help" in field.metadata:
                lines += ["", f"``{field.name} = {field.default!r}``", f"    {escape(field.metadata['help'])}"]


def leave_out_signature(app, what, name, thing, options, signature, returns):
    """Leave out the signature where `list_options` says the same."""
    return ("", "") if is_options(thing) else None


def is_options(thing):
    """Whether this is a dataclass of options with help."""
    return dataclasses.is_dataclass(thing) and any("help" in field.metadata for field in dataclasses.fields(thing))


def setup(app):
    """Escape docstrings before napoleon, whose priority is 500, reads them; list options after it."""
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    app.connect("autodoc-process-docstring", list_options, priority=600)
    app.connect("autodoc-process-signature", leave_out_signature)
