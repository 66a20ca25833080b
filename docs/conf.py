"""How Sphinx builds the documentation site: `make docs`."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))
import gsm_sgd  # noqa: E402

project = "gsm-sgd"
author = "The gsm-sgd developers"
version = release = gsm_sgd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
templates_path: list[str] = []
exclude_patterns = ["_build"]
suppress_warnings = ["config.cache"]
nitpicky = False  # torch's own classes are on another site, which a build without a network cannot ask

myst_heading_anchors = 3  # the anchors of headings are those that GitHub makes
myst_enable_extensions = ["colon_fence"]

smartquotes_action = "D"  # dashes; docstrings quote code, which wants plain quotes
highlight_language = "none"

pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = "gsm-sgd"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7cc0f5", "color-brand-content": "#7cc0f5"},
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # several arguments that share a description stay together
napoleon_custom_sections = [("Warns", "returns_style"), ("Attributes", "params_style")]
default_role = "code"  # `name` in a docstring is code, as everywhere but in reStructuredText


def as_rst(lines: list[str]) -> list[str]:
    """Return a docstring, which is written to be read as it stands, in reStructuredText.

    What is indented below an empty line is preformatted. Bars, stars and underscores stand for themselves, but in
    examples.
    """
    text, preformatted = [], False
    for number, line in enumerate(lines):
        if line and not line.startswith("    "):
            preformatted = False
        elif line and not preformatted and number > 1 and not lines[number - 1] and lines[number - 2][:1].strip():
            preformatted = True
            text += ["::", ""]
        if not (preformatted or line.lstrip().startswith((">>>", "..."))):
            line = re.sub(r"(`[^`]*`)|([|*])|(?<=\w)(_)(?!\w)", lambda m: m[1] or f"\\{m[2] or m[3]}", line)
        text.append(line)
    return text


def convert_docstring(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Convert a docstring in place."""
    lines[:] = as_rst(lines)


def keep_together(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Let no line end between a mean and its deviation, nor within a range or a sum of epochs."""
    source[0] = re.sub(r"(?<=\d) ([±+]|to) (?=\d)", "\u00a0\\1\u00a0", source[0])


def setup(app: Sphinx) -> None:
    """Hook both in; docstrings are converted before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", convert_docstring, priority=1)
    app.connect("source-read", keep_together)
