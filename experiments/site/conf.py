"""Sphinx's settings for the results site; build.py lays out the pages and calls Sphinx."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "The Gato workbook"
author = "the Gato workbook's authors"
html_title = project

extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show what a run has written
nb_render_image_options = {"alt": "a figure of this notebook"}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = [
    "mystnb.unknown_mime_type",  # widgets live in JupyterLab
    "myst.header",  # a README may jump a level
    "misc.highlighting_failure",  # notebooks' magics
]

html_theme = "sphinx_book_theme"
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search box of the side bar is enough
    "use_download_button": False,
}
html_copy_source = False  # pages are made by a program; their source is the repository
html_show_sphinx = False

# Formulas as MathML, which browsers draw by themselves: MathJax would come from the net.
html_math_renderer = "mathml"


def setup(app):
    """Sphinx calls this."""

    def formula(writer, node):
        writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
