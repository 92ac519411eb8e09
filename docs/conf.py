"""How Sphinx builds these pages: `make docs`.

Sphinx, since it has maintainers: those of Material for MkDocs end its support in November 2026, for a
successor that is young yet. Sphinx reads docstrings by itself, and its pages work from the disk, search too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import dmx

project = "DMX"
author = copyright = "The DMX developers"
version = release = dmx.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
# In docstrings `x` is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"DMX {release}"
html_static_path = ["theme"]
html_css_files = ["dmx.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5d7a", "color-brand-content": "#0b5d7a"},
    "dark_css_variables": {"color-brand-primary": "#6cc5e6", "color-brand-content": "#6cc5e6"},
}
