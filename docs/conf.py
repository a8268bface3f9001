"""The documentation's site: `make docs` builds it into out/docs."""

import sys
from pathlib import Path

import jupytext

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import fastdtd  # noqa: E402  # after the path

# The tutorial is a script that anyone can run; here it becomes a notebook, which is run when the site is built.
jupytext.write(jupytext.read(ROOT / "examples" / "tutorial.py"), HERE / "tutorial.ipynb")

project = "fastdtd"
author = copyright = "The fastdtd developers"
version = release = fastdtd.__version__
language = "en"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "numpydoc", "myst_nb"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"  # `fastdtd.load` is a link, and `scale`, a parameter's name, is code
nitpicky = True
nitpick_ignore_regex = [("py:obj", r"(?!fastdtd\.).*")]
toc_object_entries = False

autodoc_typehints = "none"  # numpydoc's sections say more
autodoc_member_order = "bysource"
autosummary_generate = False
autosummary_ignore_module_all = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

html_theme = "furo"
html_title = f"fastdtd {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
