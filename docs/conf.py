"""Configuration of the documentation site, for Sphinx: `make docs` builds it into `docs/_build/html`."""

import os
import sys
from hashlib import sha256
from pathlib import Path

import rwalk

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the notebooks, whose networks are small


def library() -> str:
    """Return a digest of the library's source: notebooks are run again when it changes."""
    source = Path(rwalk.__file__).parent
    return sha256(b"".join(path.read_bytes() for path in sorted(source.rglob("*.py")))).hexdigest()[:16]


project = "rwalk"
author = "the authors of rwalk"
copyright = "the authors of rwalk, MIT licence"
version = release = rwalk.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "absent_hosts",
    "api",
    "cli_help",
    "examples",
    "repository_links",
]
exclude_patterns = ["_build", "_ext", "images/**"]
default_role = "code"
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4

nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks" / library())
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
smartquotes_action = "D"  # dashes alone; quotation marks in docstrings are code
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "rwalk"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_search_summary = False  # it would be fetched, which browsers refuse to pages from disk
html_show_sphinx = False
html_theme_options = {
    "light_logo": "logo.svg",
    "dark_logo": "logo-dark.svg",
    "light_css_variables": {"color-brand-primary": "#0b5e7a", "color-brand-content": "#0b5e7a"},
    "dark_css_variables": {"color-brand-primary": "#7cc7e0", "color-brand-content": "#7cc7e0"},
}
copybutton_exclude = ".linenos, .gp, .go"
