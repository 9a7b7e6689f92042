"""Sphinx's settings: `make docs` writes the pages below docs/ as HTML into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flashcute"
author = "the flashcute authors"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "command_line",
    "long_names",
    "mathml",
    "repository_files",
    "plain_docstrings",
    "translations",
]
exclude_patterns = ["_ext"]
nitpicky = False
smartquotes_action = "q"  # quotes alone: "--" and "..." stand for themselves

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
# "repository": what the extension repository_files makes of links to files outside of docs/.
myst_url_schemes = {"http": None, "https": None, "repository": {"url": "{{path}}"}}
suppress_warnings = ["myst.header"]  # pages of one table begin their sections at any level

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures show them
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "flashcute"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
