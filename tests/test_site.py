"The committed site and README.md are those of the notebooks, complete, self-contained and readable without a server."
from __future__ import annotations

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "nbs" / "_site"
DOCS = ROOT / "docs"
sys.path.insert(0, str(SITE))

import build  # noqa: E402
import links  # noqa: E402
import pages  # noqa: E402
from book import PACKAGE, Book  # noqa: E402
from reference import entries, private_classes  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A site built now, warnings being errors, with its README beside it."
    folder = tmp_path_factory.mktemp("site")
    build.build(folder / "docs", folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def book() -> Book:
    return Book.read()


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def public_names(module: Path) -> list[str]:
    "`__all__` of a module, without importing it; what it passes on from another module has its entry there."
    body = ast.parse(text(module)).body
    passed_on = {a.asname or a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names}
    listed = next((ast.literal_eval(node.value) for node in body
                   if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), [])
    return [name for name in listed if name not in passed_on]


def test_the_committed_site_is_not_stale() -> None:
    changed = build.stale()
    assert not changed, f"docs/ and README.md are older than {', '.join(changed)}: run `make docs`"


def test_a_fresh_build_gives_the_committed_pages(fresh: Path) -> None:
    assert text(fresh / "README.md") == text(ROOT / "README.md"), "README.md differs: run `make docs`"
    pages = {path.name for path in DOCS.glob("*.html")}
    assert pages == {path.name for path in (fresh / "docs").glob("*.html")}, "pages differ: run `make docs`"
    assert not build.stale(fresh / "docs", fresh / "README.md")


def test_a_change_makes_the_site_stale(fresh: Path, tmp_path: Path) -> None:
    edited = tmp_path / "README.md"
    edited.write_text(text(fresh / "README.md") + "\nedited by hand\n", encoding="utf-8")
    assert build.stale(fresh / "docs", edited) == ["README.md"]
    assert "nbs/index.ipynb" in build.stale(tmp_path, edited)


def test_every_link_and_anchor_resolves() -> None:
    assert links.broken(DOCS, links.read(DOCS)) == []


def test_nothing_is_loaded_from_a_network() -> None:
    assert links.remote(DOCS, links.read(DOCS)) == []


def test_the_link_check_sees_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here">1</a><a href="#gone">2</a><a href="b.html">3</a>'
                                     '<img src="https://example.org/x.png"><a href="https://example.org">4</a></p>')
    assert links.broken(tmp_path, links.read(tmp_path)) == ["a.html: #gone", "a.html: b.html"]
    assert links.remote(tmp_path, links.read(tmp_path)) == ["a.html: https://example.org/x.png"]


def test_the_site_is_small_and_holds_only_pages() -> None:
    files = [path for path in DOCS.rglob("*") if path.is_file()]
    assert sum(-(-path.stat().st_size // 4096) * 4 for path in files) <= 15_360  # KiB on disk in blocks: 15 MiB
    assert (DOCS / ".nojekyll").exists()
    assert not [path for path in files if {".doctrees", "_sources"} & set(path.parts) or path.suffix == ".ipynb"]


def test_every_public_name_has_an_entry_and_an_anchor(book: Book) -> None:
    chapters = {chapter.module: links.Page(DOCS / chapter.page).anchors for chapter in book.chapters if chapter.module}
    api = set().union(*(links.Page(page).anchors for page in DOCS.glob("api_*.html")))
    files = {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path for path in (ROOT / PACKAGE).rglob("*.py")}
    wanted = {f"{PACKAGE}.{module}.{name}": chapters[module]
              for module, path in sorted(files.items()) for name in public_names(path)}
    assert not [name for name in wanted if name not in api], "no entry on a page of the reference"
    assert not [name for name, anchors in wanted.items() if name not in anchors], "no anchor in its chapter"


def test_every_chapter_has_its_title_and_figures(book: Book) -> None:
    for chapter in book.chapters:
        page = text(DOCS / chapter.page)
        assert re.search(r"<h1>.+?<", page), f"{chapter.page} has no title"
        stored = sum("image/png" in output.get("data", {}) for cell, _ in chapter.cells for output in cell.outputs)
        assert len(re.findall(r'<img[^>]+src="_images/', page)) == stored, f"{chapter.page} lacks figures"


@pytest.mark.parametrize("number, word", [("08", "jpeg"), ("37", "average"), ("66", "natural"), ("67", "jat"), ("90", "fog"),
                                          ("92", "recipes")])
def test_a_word_with_another_meaning_on_its_page_is_no_link(number: str, word: str, book: Book) -> None:
    page = next(chapter for chapter in book.chapters if chapter.number == number)
    assert word in book.names and not book.address(word, page)
    assert book.address(f"{word}()", page) and book.address(f"{PACKAGE}.{book.names[word][0].module}.{word}", page)


def test_a_word_that_code_uses_is_a_link(book: Book) -> None:
    pages = {chapter.number: chapter for chapter in book.chapters}
    fit, ascend, pgd, fog = (book.names[name][0].address(name) for name in ("fit", "ascend", "pgd", "fog"))
    assert (book.address("fit", pages["91"]), book.address("ascend", pages["12"])) == (fit, ascend)
    assert (book.address("pgd", pages["00"]), book.address("fog", pages["22"])) == (pgd, fog)


def blocks(page: Path) -> list[str]:
    "The code of a page as a reader copies it, folded code included, without what the code printed."
    found = re.findall(r'<div class="cell_input.*?<pre>(.*?)</pre>', text(page), re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", block)).strip("\n") for block in found]


def test_a_page_holds_all_the_code_of_its_chapter(book: Book) -> None:
    for chapter in [book.index, *book.chapters]:
        assert blocks(DOCS / chapter.page) == [cell.source for cell, _ in chapter.cells if cell.kind == "code"]
        left_out = [cell.source for cell in chapter.notebook.cells if cell.cell_type == "code" and "export()" in cell.source]
        assert all(re.fullmatch(r"#\| hide\n#\| eval: false\nimport nbdev; nbdev.nbdev_export\(\)", source) for source in left_out), chapter.page


def says_where(book: Book) -> set[str]:
    "The pages that tell the reader to run them in the folder of the notebooks."
    return {c.path.stem for c in [book.index, *book.chapters] if pages.WHERE in [cell.source for cell in pages.body(book, c)]}


@pytest.mark.parametrize("page", ["02_randomness", "05_threats", "51_plots"])
def test_a_page_runs_as_copied(page: str, book: Book, tmp_path: Path) -> None:
    copied, place = tmp_path / "page.py", ROOT / "nbs" if page in says_where(book) else tmp_path
    copied.write_text("\n".join(blocks(DOCS / f"{page}.html")), encoding="utf-8")
    run = subprocess.run([sys.executable, str(copied)], cwd=place, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr[-2000:]


def test_pages_that_read_results_say_where_they_run(book: Book) -> None:
    told = says_where(book)
    assert {"index", "33_generators", "48_results", "80_exp_jat"} <= told and not {"02_randomness", "90_your_own_model"} & told
    for chapter in [book.index, *book.chapters]:
        code = "\n".join(cell.source for cell, _ in chapter.cells if cell.kind == "code")
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert any(Path(word).parts[:1] == ("results",) for word in texts) == (chapter.path.stem in told), chapter.page


def test_the_reference_leads_to_the_line_of_every_name(book: Book) -> None:
    for chapter in (chapter for chapter in book.chapters if chapter.entries):
        module = f"{PACKAGE}/{chapter.module.replace('.', '/')}.py"
        lines = re.findall(rf"{module}#L(\d+)", text(DOCS / chapter.reference))
        source = text(ROOT / module).split("\n")
        assert len(lines) == len(chapter.entries)
        for line, entry in zip(lines, chapter.entries, strict=True):
            assert re.match(rf"(def|class) {entry.name}\b|{entry.name}\b|@", source[int(line) - 1])


def test_the_readme_is_plain_markdown_with_its_figures() -> None:
    readme = text(ROOT / "README.md")
    assert not re.search(r"^:::|^```\{|^\{\.|#\||<!-- chapters -->", readme, re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    missing = [target for target in targets if not re.match(r"\w+:|#", target)
               and not (ROOT / target.partition("#")[0]).exists()]
    assert targets and not missing


SOURCE = '''
def attack(
    x: Tensor,  # Images
    *,
    # Budget in pixels,
    # from Table 2
    eps: float = 8 / 255,
) -> Tensor:  # Changed images
    "Change `x`."
    return x

class Box:
    "A box."
    def __init__(self, side: float = 1.0):  # Metres
        self.side = side
    @property
    def area(self) -> float:  # Square metres
        "Side squared."
        return self.side**2

LIMITS = (0, 1)  # Range of a pixel
_HIDDEN = 1
'''


def test_entries_are_read_from_source() -> None:
    attack, box, limits = entries(SOURCE)
    assert attack.signature == "attack(x, *, eps=8 / 255)"
    assert [p.meaning for p in attack.parameters] == ["Images", "Budget in pixels, from Table 2"]
    assert attack.returns and (attack.returns.type, attack.returns.meaning) == ("Tensor", "Changed images")
    area, = box.members
    assert (box.signature, area.signature, area.summary) == ("Box(side=1.0)", "area", "Side squared.")
    assert (limits.signature, limits.summary) == ("LIMITS = (0, 1)", "Range of a pixel")


BUILT_ON = '''class _Base:
    "Hidden."
    size: int  # Pixels

    def area(self) -> int:  # Square pixels
        "Size squared."
        return self.size**2


class _Where:
    device: str = "cpu"  # Where to compute
'''


def test_private_classes_are_shown_as_part_of_what_is_built_on_them(tmp_path: Path) -> None:
    source = "class Box(_Base):\n    unit: str = 'px'  # Name\n\ndef work(n: int, *, where: _Where):\n    'Work.'\n"
    (tmp_path / "groups.py").write_text(BUILT_ON, encoding="utf-8")
    (tmp_path / "work.py").write_text("from .groups import _Base, _Where\n", encoding="utf-8")
    box, work = entries(source, private_classes(tmp_path / "work.py"))
    assert (box.signature, [m.name for m in box.members]) == ("Box(size, unit='px')", ["area"])
    assert [p.meaning for p in work.parameters] == ["", "Where to compute"]
    assert work.signature == 'work(n, *, device="cpu")'
    assert entries(BUILT_ON) == ()


def in_a_browser(address: str, tmp_path: Path, *more: str) -> str:
    "The page as a browser without a network makes it."
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}",
               "--virtual-time-budget=10000", *more]
    dom = subprocess.run([CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=60)
    assert dom.returncode == 0
    return dom.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_opens_a_page_as_a_file_and_sets_its_mathematics(book: Book, tmp_path: Path) -> None:
    page = next(DOCS / c.page for c in book.chapters if 'class="math' in text(DOCS / c.page))
    dom = in_a_browser(page.as_uri(), tmp_path)
    assert "class=\"katex\"" in dom
    assert "katex-error" not in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("name, chapter", [("double_pass", "12_attacks"), ("evaluate", "42_evaluation")])
def test_the_search_finds_the_chapter_of_a_name_first(name: str, chapter: str, book: Book, tmp_path: Path) -> None:
    dom = in_a_browser(f"{(DOCS / 'search.html').as_uri()}?q={name}", tmp_path)
    found = re.findall(r'<li class="kind-\w+"><a href="([^"]+)"[^>]*>.*?</li>', dom)
    assert found[0] == f"{chapter}.html"
    assert next(c.promise for c in book.chapters if c.path.stem == chapter) in html.unescape(dom)


MEASURE = """<script>addEventListener("load", () => {
    const seen = [...document.querySelectorAll(".mobile-header :is(label, button)")].map(e => e.getBoundingClientRect());
    document.body.dataset.buttons = JSON.stringify(seen.map(r => [r.left, r.right, r.height]));
})</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_buttons_of_a_phone_are_wide_and_apart(tmp_path: Path) -> None:
    page = text(DOCS / "12_attacks.html").replace("<head>", f'<head><base href="{DOCS.as_uri()}/">', 1)
    (tmp_path / "page.html").write_text(page.replace("</body>", MEASURE), encoding="utf-8")
    dom = in_a_browser((tmp_path / "page.html").as_uri(), tmp_path / "profile", "--window-size=390,800")
    menu, theme, contents = json.loads(html.unescape(re.search(r'data-buttons="([^"]+)"', dom)[1]))
    assert all(right - left >= 32 and height >= 32 for left, right, height in (menu, theme, contents))
    assert theme[0] - menu[1] >= 8 and contents[0] - theme[1] >= 8
