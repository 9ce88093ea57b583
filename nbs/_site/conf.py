"Sphinx settings of the site; build.py stages the pages and passes title, author, copyright and version."
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "index"

# Notebooks: stored outputs only. A stored warning or error message fails the build.
nb_execution_mode = "off"
nb_output_stderr = "error"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_dmath_double_inline = True
myst_all_links_external = True  # build.py resolves the links, links.py checks them

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["katex/katex.min.css", "book.css"]  # KaTeX 0.16.22, fonts that the book uses
html_js_files = [("katex/katex.min.js", {"defer": "defer"}), ("katex/auto-render.min.js", {"defer": "defer"}),
                 ("math.js", {"defer": "defer"})]
html_math_renderer = "tex"
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # needs a server; the pages are also read as files
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
}


def _whole_equations(app: Sphinx, document: nodes.document) -> None:
    "Pass display mathematics on as written: Sphinx would split it at line breaks, where a tag is not allowed."
    for equation in document.findall(nodes.math_block):
        if not equation["nowrap"]:
            equation["nowrap"] = True
            equation.children = [nodes.Text(rf"\[{equation.astext()}\]")]


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    tex = writer.encode(node.astext())
    writer.body.append(rf'<span class="math">\({tex}\)</span>')
    raise nodes.SkipNode


def _display(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{writer.encode(node.astext())}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", _whole_equations)
    app.add_html_math_renderer("tex", (_inline, None), (_display, None))
