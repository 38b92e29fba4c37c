"""How Sphinx builds this site: see "Documentation" in CONTRIBUTING."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions")]

import bcn_flax  # noqa: E402

project = "batch-channel-norm"
project_copyright = "The batch-channel-norm developers"
version = release = bcn_flax.__version__
html_title = "batch-channel-norm"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # formulas need no network
    "sphinx_design",
    "code_lines",
    "docstrings",
]
exclude_patterns = ["_build"]

# Pages: every code cell runs, and one that fails or warns fails the build. While writing, results
# are kept between builds; elsewhere nothing is.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
nb_execution_mode = "force" if os.environ.get("CI") else "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "error"
nb_merge_streams = True

# Reference: from the docstrings, which are in Google style. Single backticks are code and, if they
# hold the name of an object of this site or of another project, a link.
default_role = "name"
add_module_names = False
autosummary_generate = False
autoclass_content = "both"
autodoc_default_options = {"no-value": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 120
python_use_unqualified_type_names = True

# Other projects: the names that this site links to, and where they are.
intersphinx_mapping = {
    name: (url, str(HERE / "inventories" / f"{name}.inv"))
    for name, url in {
        "flax": "https://flax.readthedocs.io/en/latest/",
        "jax": "https://docs.jax.dev/en/latest/",
        "numpy": "https://numpy.org/doc/stable/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

# A name that leads nowhere is a warning, and warnings are errors.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"jaxtyping\..*"),  # the index of the reference says how to read them
    ("py:class", r"jax\.numpy\.float32"),  # a dtype, which JAX documents with NumPy's
    ("py:class", r"bcn_flax\..*\.(Error|ModuleT|Part|PerGroup|Worst)"),  # of the implementation
    ("py:class", r"bcn_flax\.interop\.ModuleT"),
]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
mathjax3_config = {"chtml": {"displayAlign": "left", "displayIndent": "0"}}
