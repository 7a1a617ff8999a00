"""The documentation site: `make docs` builds it into build/docs, where every warning is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import pick_math_environment
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring

import wd_kernels

ROOT = Path(__file__).parent.parent


project, author, copyright = "wd_kernels", "the authors of wd_kernels", "the authors of wd_kernels"
version = release = wd_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_*"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.header"]  # what is included begins where it likes

html_theme = "furo"
html_title = f"wd_kernels {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what arguments are
napoleon_custom_sections = [("Source", "notes")]
napoleon_use_rtype = False
default_role = "code"

# Every reference in the pages is checked. Those in docstrings that lead to other libraries are not: reading them would
# need the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"torch\..*|nn\..*|Tensor|numpy\..*")]


def math(self: Any, node: nodes.Element, block: bool) -> None:
    """Writes an equation as MathML, which every browser draws: no script, no font, no request."""
    text = node.astext()
    if block and "align" in (environment := pick_math_environment(text)):
        text = rf"\begin{{{environment}}}{text}\end{{{environment}}}"
    drawn = convert(text, display="block" if block else "inline")
    self.body.append(f'<div class="math">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


#: A line of names alone that goes on in the next.
NAMES = r"^( +\w+(?:, \w+)*,)\n +(?=\w+[,:])"


def as_rest(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """What docstrings write for who reads them in an editor, in reST's words: `code`, arguments of several lines."""

    def literal(found: re.Match[str]) -> str:
        return f"``{found[1]}``" + (r"\ " if found[2] else "") if found[1] else found[0]

    text = re.sub(r":[\w:]+:`[^`]*`|``(?s:.*?)``|`([^`]+)`(?=(\w)?)", literal, "\n".join(lines))
    text, before = re.sub(NAMES, r"\1 ", text, flags=re.MULTILINE), text
    while text != before:
        text, before = re.sub(NAMES, r"\1 ", text, flags=re.MULTILINE), text
    lines[:] = text.split("\n")


def outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to Markdown that is no page of the site are links to files."""
    folder = Path(app.srcdir, page).parent

    def as_file(found: re.Match[str]) -> str:
        return found[0] if (folder / found[1]).resolve().is_relative_to(app.srcdir) else f"](path:{found[1]})"

    source[0] = re.sub(r"\]\(([^):#]+\.md)\)", as_file, source[0])


# The docstring of a property is prose: its first colon does not end a type.
GoogleDocstring._parse_attribute_docstring = lambda self: self._consume_to_end()


def setup(app: Sphinx) -> None:
    app.connect("source-read", outside)
    app.connect("autodoc-process-docstring", as_rest, priority=400)  # before napoleon
    inline, block = ((lambda self, node, b=b: math(self, node, b), None) for b in (False, True))
    app.add_html_math_renderer("mathml", inline, block)


html_math_renderer = "mathml"
