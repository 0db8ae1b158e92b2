"""The site, which `make site` builds. Sources lie where they lie anyway; nothing is copied, run or fetched."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
# jsonschema would check addresses with it, of which there are none here; making its grammars takes 3 s.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository", "").rstrip("/")
if "/OWNER/" in REPOSITORY:  # not set yet: no launch buttons, and links to files that are no page stay words
    REPOSITORY = ""

project, version = "KV-cache labs", PROJECT["version"]
copyright = "the authors. Code: Apache-2.0; text: CC-BY-4.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "extensions.docstrings",
    "extensions.glossary",
    "extensions.mathml",
    "extensions.modules",
    "extensions.pages",
    "extensions.sources",
]

# The source folder is the whole repository, so that links between docs and notebooks are what they are on disk.
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*", "CHANGELOG.md", "CONTRIBUTING.md"]
SITE = {"docs", "notebooks", "CHANGELOG.md", "CONTRIBUTING.md"}
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in SITE] + ["**/.*", "docs/extensions"]

nb_execution_mode = "off"
nb_custom_formats = {".ipynb": ["extensions.notebooks.read", {}]}
nb_ipywidgets_js: dict = {}  # widgets need a kernel; their scripts would come from another server
nb_merge_streams = True
myst_enable_extensions = ["attrs_block", "attrs_inline", "dollarmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "ignore-module-all": True}  # each name in its own module, once
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
viewcode_follow_imported_members = False  # else a cached function brings along functools, or not: that hangs on -j
suppress_warnings = ["ref.python"]  # two modules have a `Plan`, and a hint says no more than the name
python_maximum_signature_line_length = 88
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_extra_path = ["front"]  # the site's first page leads to docs/index.html
html_favicon = "static/favicon.svg"
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
# Pages of source code have no tree of all pages beside them: making it for each took a third of the build.
html_sidebars = {"_modules/**": ["navbar-logo.html", "search-button-field.html"]}
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None  # two builds of one commit are the same
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "use_repository_button": bool(REPOSITORY),
    "use_download_button": False,
    "launch_buttons": {
        "notebook_interface": "jupyterlab",
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
    }
    if REPOSITORY
    else {},
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "max_navbar_depth": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
