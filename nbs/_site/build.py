"""Build the site and README.md from the stored outputs of nbs/*.ipynb. Nothing is executed.

    python nbs/_site/build.py [--out docs] [--readme README.md]

What a notebook may contain, beside what nbdev defines:

- `[Zhang and Wang 2019](_site/references.bib#zhang2019joint)` cites an entry of the bibliography. As a raw notebook it
  opens the file; on the site it leads to the entry, in README.md to the paper. An unknown key fails the build.
- `[title](03_threats.ipynb#A-heading)` leads to a chapter, as in Jupyter. Links to other files of the repository work.
- Inline code that names a public name, such as `double_pass` or `attacks.double_pass`, becomes a link to it.
- A markdown cell that starts with `**Figure n.**` is the caption of the figure above it.
- In index.ipynb, a markdown cell `<!-- chapters -->` stands for the list of chapters.
- `#| hide` drops a cell, `#| echo: false` drops its code and keeps its output.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import unquote

import nbformat
from docutils.nodes import make_id
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pybtex.database import Entry as Paper
from pybtex.database import parse_file

import links
from reference import Entry, Parameter, entries

SITE = Path(__file__).resolve().parent
NOTEBOOKS = SITE.parent
ROOT = NOTEBOOKS.parent
PACKAGE = "jat_nb"
PARTS = ((0, "Foundations"), (10, "Attacks"), (20, "Training"), (30, "Evaluation"),
         (40, "Tools and experiments"), (60, "Tutorials"))
MAP = "<!-- chapters -->"
CAPTION = re.compile(r"\*\*Figure \d+\.\*\*")


class BuildError(Exception):
    "The notebooks cannot become a site; the message says where and why."


# ---------------------------------------------------------------------------------------------- notebooks


@dataclass(frozen=True)
class Cell:
    "One cell that readers see: its source without directives, and the directives."

    kind: str  # 'markdown' or 'code'
    source: str
    directives: frozenset[str]
    outputs: tuple[NotebookNode, ...] = ()

    @property
    def exported(self) -> bool:
        return self.kind == "code" and bool(self.directives & {"export", "exports", "exporti"})

    @property
    def figure(self) -> bool:
        return any("image/png" in output.get("data", {}) for output in self.outputs)


@dataclass(frozen=True)
class Chapter:
    "A notebook and what the rest of the book wants to know of it."

    path: Path

    @cached_property
    def cells(self) -> list[Cell]:
        return list(visible_cells(nbformat.read(self.path, as_version=4)))

    @cached_property
    def module(self) -> str:
        found = re.search(r"#\| *default_exp +(\w+)", "\n".join(
            cell.source for cell in nbformat.read(self.path, as_version=4).cells if cell.cell_type == "code"))
        return found.group(1) if found else ""

    @property
    def number(self) -> int:
        return int(self.path.stem[:2])

    @property
    def part(self) -> str:
        return [name for first, name in PARTS if first <= self.number][-1]

    @property
    def page(self) -> str:
        return f"{self.path.stem}.html"

    @property
    def title(self) -> str:
        return self._opening(r"# +(.+)", "a title, a line '# ...'")

    @property
    def promise(self) -> str:
        return self._opening(r"> *(.+)", "a promise, a line '> ...'")

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for cell in self.cells if cell.exported for entry in entries(cell.source)]

    def _opening(self, pattern: str, what: str) -> str:
        found = re.search(f"^{pattern}$", self.cells[0].source, re.MULTILINE)
        if not found:
            raise BuildError(f"{self.path.name}: the first cell has no {what}")
        return found.group(1)


def visible_cells(notebook: NotebookNode) -> Iterator[Cell]:
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        is_directive = [cell.cell_type == "code" and line.startswith("#|") for line in lines]
        directives = frozenset(line[2:].strip() for line, yes in zip(lines, is_directive, strict=True) if yes)
        source = "\n".join(line for line, yes in zip(lines, is_directive, strict=True) if not yes).strip("\n")
        if source and "hide" not in directives:
            yield Cell(cell.cell_type, source, directives, tuple(cell.get("outputs", ())))


# ---------------------------------------------------------------------------------------------- the book


@dataclass(frozen=True)
class Book:
    "All chapters, and the two tables that prose is resolved with: public names and papers."

    chapters: list[Chapter]
    index: Chapter
    papers: dict[str, Paper]
    cited: dict[str, list[Chapter]] = field(default_factory=dict)  # filled while pages are staged

    @classmethod
    def read(cls, folder: Path = NOTEBOOKS) -> Book:
        papers = parse_file(str(SITE / "references.bib"), "bibtex").entries
        chapters = [Chapter(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
        return cls(chapters, Chapter(folder / "index.ipynb"), dict(papers))

    @cached_property
    def names(self) -> dict[str, list[Chapter]]:
        "Chapters that define a public name or a member, written `name` or `Class.member`."
        table: dict[str, list[Chapter]] = {}
        for chapter in self.chapters:
            for entry in chapter.entries:
                for name in [entry.name, *(f"{entry.name}.{member.name}" for member in entry.members)]:
                    table.setdefault(name, []).append(chapter)
        return table

    @property
    def parts(self) -> dict[str, list[Chapter]]:
        return {name: found for _, name in PARTS if (found := [c for c in self.chapters if c.part == name])}

    def address(self, code: str, home: str = "") -> str:
        "Where inline code leads if it means exactly one public name, seen from the module `home`; else ''."
        name = code.removesuffix("()")
        if name.startswith(f"{PACKAGE}.") and name.count(".") == 1:
            known = any(c.module == name.split(".")[1] for c in self.chapters)
            return f"api.html#{name}" if known else ""
        qualified = re.fullmatch(rf"(?:{PACKAGE}\.)?(\w+)\.(\w.*)", name)
        if qualified and (found := [c for c in self.names.get(qualified[2], []) if c.module == qualified[1]]):
            return anchor(found[0], qualified[2])
        found = self.names.get(name, [])
        own = [c for c in found if c.module == home]
        return anchor((own or found)[0], name) if len(own or found) == 1 else ""


def anchor(chapter: Chapter, name: str) -> str:
    "Address of a public name in its chapter; a member is shown with its class."
    return f"{chapter.page}#{PACKAGE}.{chapter.module}.{name.split('.')[0]}"


# ---------------------------------------------------------------------------------------------- prose

Link = Callable[[str], str]
FENCES = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~) *$)", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?P<head>!?\[(?:`[^`]*`|\\.|[^\]`\\])*\])\((?P<target>[^()\s]*(?:\([^()]*\)[^()\s]*)*)\)|(?P<ticks>`+)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)")


def outside_fences(edit: Link, text: str) -> str:
    return "".join(part if i % 2 else edit(part) for i, part in enumerate(FENCES.split(text)))


def rewrite(text: str, link: Link, code: Link = lambda _: "") -> str:
    "Markdown with every link target passed through `link`, and inline code linked to where `code` says."
    def inline(match: re.Match[str], names: bool) -> str:
        if match["head"]:
            return f"{match['head']}({link(match['target'])})"
        target = code(match["code"]) if names else ""
        return f"[{match[0]}]({target})" if target else match[0]

    def line(text: str) -> str:
        return INLINE.sub(partial(inline, names=not text.startswith("#")), text)

    return outside_fences(lambda part: "\n".join(line(row) for row in part.split("\n")), text)


def site_link(book: Book, chapter: Chapter, target: str) -> str:
    "A link of a notebook as the site needs it."
    path, _, fragment = unquote(target).partition("#")
    if re.match(r"\w+:", target) or target.startswith("api.html"):
        return target
    if path == "_site/references.bib":
        paper(book, chapter, fragment)
        cited = book.cited.setdefault(fragment, [])
        if chapter not in cited:
            cited.append(chapter)
        return f"references.html#{fragment}"
    if path and not path.endswith(".ipynb"):
        return repository_link(chapter, path)
    page = path.replace(".ipynb", ".html")
    return f"{page}#{make_id(fragment)}" if fragment else page


def readme_link(book: Book, target: str) -> str:
    "A link of index.ipynb as README.md needs it."
    path, _, fragment = target.partition("#")
    if re.match(r"\w+:", target) or not path:
        return target
    if path == "_site/references.bib":
        return paper(book, book.index, fragment).fields["url"]
    inside = os.path.relpath(NOTEBOOKS / path, ROOT)
    return f"{inside}#{fragment}" if fragment else inside


def paper(book: Book, chapter: Chapter, key: str) -> Paper:
    if key not in book.papers:
        raise BuildError(f"{chapter.path.name}: cites '{key}', which is not in {SITE / 'references.bib'}")
    return book.papers[key]


def repository_link(chapter: Chapter, path: str) -> str:
    "A file of the repository that is not part of the site, at its public address."
    target = (chapter.path.parent / path).resolve()
    if not target.exists():
        raise BuildError(f"{chapter.path.name}: links to '{path}', which does not exist")
    return f"{settings()['git_url']}/blob/{settings()['branch']}/{target.relative_to(ROOT).as_posix()}"


def settings() -> dict[str, str]:
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


# ---------------------------------------------------------------------------------------------- pages


def stage(book: Book, folder: Path) -> None:
    "Write the pages of the site as Sphinx reads them."
    for chapter in book.chapters:
        write_notebook(chapter_page(book, chapter), folder / chapter.path.name)
    write_notebook(index_page(book), folder / book.index.path.name)
    (folder / "api.md").write_text(api_page(book), encoding="utf-8")
    (folder / "references.md").write_text(references_page(book), encoding="utf-8")


def write_notebook(cells: list[NotebookNode], path: Path) -> None:
    language = {"name": "python", "pygments_lexer": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"language_info": language}), path)


def chapter_page(book: Book, chapter: Chapter) -> list[NotebookNode]:
    module = f' · <a href="api.html#{PACKAGE}.{chapter.module}">{PACKAGE}.{chapter.module}</a>' if chapter.module else ""
    eyebrow = f'<p class="eyebrow">{chapter.part} · {chapter.number:02d}{module}</p>'
    return [new_markdown_cell(eyebrow), *body(book, chapter)]


def index_page(book: Book) -> list[NotebookNode]:
    trees = [toctree(name, [c.path.stem for c in chapters]) for name, chapters in book.parts.items()]
    trees.append(toctree("Reference", ["api", "references"]))
    cells = body(book, book.index)
    for cell in cells:
        if cell.source == MAP:
            cell.source = chapter_map(book, lambda c: c.page)
    return [*cells, new_markdown_cell("\n\n".join(trees))]


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def chapter_map(book: Book, address: Callable[[Chapter], str]) -> str:
    "The chapters by parts, each with its promise, in plain markdown."
    return "\n\n".join(
        f"### {name}\n\n" + "\n".join(f"- [{c.title}]({address(c)}): {c.promise}" for c in chapters)
        for name, chapters in book.parts.items())


def body(book: Book, chapter: Chapter) -> list[NotebookNode]:
    prose = partial(rewrite, link=partial(site_link, book, chapter), code=partial(book.address, home=chapter.module))
    staged: list[NotebookNode] = []
    for cell, following in zip(chapter.cells, [*chapter.cells[1:], None], strict=True):
        if cell.kind == "markdown":
            staged.append(new_markdown_cell(captioned(prose(cell.source))))
            continue
        found = entries(cell.source) if cell.exported else []
        staged += [new_markdown_cell(anchors(chapter, found))] if found else []
        staged.append(code_cell(cell, following))
        staged += [new_markdown_cell(prose(details(entry))) for entry in found if rows(entry) or entry.members]
    return staged


def captioned(text: str) -> str:
    return f"{{.caption}}\n{text}" if CAPTION.match(text) else text


def code_cell(cell: Cell, following: Cell | None) -> NotebookNode:
    staged = nbformat.v4.new_code_cell(cell.source, outputs=list(cell.outputs))
    tags = ["exported"] * cell.exported + ["remove-input"] * ("echo: false" in cell.directives)
    staged.metadata = NotebookNode(tags=tags)
    if cell.figure and following and CAPTION.match(following.source):
        staged.metadata["mystnb"] = {"image": {"alt": alternative(following.source)}}
    return staged


def alternative(caption: str) -> str:
    "First sentence of a caption as plain text."
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$\\]", lambda m: m[1] or "", caption.split("\n\n")[0])
    number, sentence = re.match(r"(Figure \d+\.)\s*(.*?(?:[.!?](?=\s|$)|$))", plain.replace("\n", " ")).groups()
    return f"{number} {sentence}"


def anchors(chapter: Chapter, found: list[Entry]) -> str:
    "The line above exported code: what it defines, and where those who link to it land."
    marks = ", ".join(f'<a class="name" id="{PACKAGE}.{chapter.module}.{e.name}" '
                      f'href="api.html#{PACKAGE}.{chapter.module}.{e.name}">{e.name}</a>' for e in found)
    return f'<p class="defines"><span>{PACKAGE}.{chapter.module}</span> {marks}</p>'


# ---------------------------------------------------------------------------------------------- reference


def details(entry: Entry) -> str:
    "Collapsed tables of the parameters of a name and of its members."
    label = "Parameters" if rows(entry) else "Members"
    blocks = [table(entry)] if rows(entry) else []
    for member in entry.members:
        blocks.append(f"{{.member}}\n`{member.signature}` {member.summary}")
        blocks += [table(member)] if rows(member) else []
    summary = f"<summary>{label} of <code>{html.escape(entry.name)}</code></summary>"
    return "\n\n".join([f'<details class="parameters">\n{summary}', *blocks, "</details>"])


def rows(entry: Entry) -> list[Parameter]:
    return [*entry.parameters, *([entry.returns] if entry.returns else [])]


def table(entry: Entry) -> str:
    def code(text: str) -> str:
        return f"`{text}`" if text else ""

    head = ["| name | type | default | meaning |", "|---|---|---|---|"]
    lines = [[code(p.name) if p is not entry.returns else "*returns*", code(p.type), code(p.default), p.meaning]
             for p in rows(entry)]
    return "\n".join(head + ["| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines])


def api_page(book: Book) -> str:
    modules = [api_module(book, chapter) for chapter in book.chapters if chapter.entries]
    return "\n\n".join(["# Every public name", "> Signatures, parameters and the chapter that explains them.", *modules])


def api_module(book: Book, chapter: Chapter) -> str:
    name = f"{PACKAGE}.{chapter.module}"
    prose = partial(rewrite, link=partial(site_link, book, chapter), code=partial(book.address, home=chapter.module))
    blocks = [f'<span class="anchor" id="{name}"></span>', f"## {name}",
              f"{{.from}}\n[{chapter.title}]({chapter.page}): {chapter.promise}"]
    for entry in chapter.entries:
        blocks += [f'<span class="anchor" id="{name}.{entry.name}"></span>', f"### {entry.name}",
                   f"```python\n{wrapped(entry.signature)}\n```",
                   f"{prose(entry.summary)} {{.where}}[Explained in the chapter]({anchor(chapter, entry.name)})"]
        blocks += [prose(details(entry))] if rows(entry) or entry.members else []
    return "\n\n".join(blocks)


def wrapped(signature: str) -> str:
    return textwrap.fill(signature, 84, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def references_page(book: Book) -> str:
    ordered = sorted(book.papers.items(), key=lambda item: (str(item[1].persons["author"][0].last_names), item[1].fields["year"]))
    return "\n\n".join(["# References", "> The papers this book builds on, and the chapters that cite them.",
                        *(reference(key, entry, book.cited.get(key, [])) for key, entry in ordered)])


def reference(key: str, entry: Paper, cited: list[Chapter]) -> str:
    authors = [" ".join(p.first_names + p.middle_names + p.prelast_names + p.last_names) for p in entry.persons["author"]]
    fields = entry.fields
    venue = next(fields[name] for name in ("journal", "booktitle", "institution", "howpublished") if name in fields)
    place = f"*{venue}*" + (f" {fields['volume']}" if "volume" in fields else "")
    place += f", {fields['pages'].replace('--', '–')}" if "pages" in fields else ""
    where = " Cited in " + ", ".join(f"[{c.title}]({c.page})" for c in cited) + "." if cited else ""
    return (f'<span class="anchor" id="{key}"></span>\n\n{{.reference}}\n'
            f"{', '.join(authors)} ({fields['year']}). [{fields['title']}]({fields['url']}). {place}.{where}")


# ---------------------------------------------------------------------------------------------- README


def readme(book: Book, images: Path) -> str:
    "index.ipynb as plain markdown; its figures are written to `images`."
    images.mkdir(parents=True, exist_ok=True)
    blocks: list[str] = []
    for cell, following in zip(book.index.cells, [*book.index.cells[1:], None], strict=True):
        if cell.source == MAP:
            blocks.append(chapter_map(book, lambda c: f"{NOTEBOOKS.name}/{c.path.name}"))
        elif cell.kind == "markdown":
            blocks.append(rewrite(cell.source, partial(readme_link, book)))
        else:
            blocks += [] if "echo: false" in cell.directives else [f"```python\n{cell.source}\n```"]
            caption = following.source if following and CAPTION.match(following.source) else "**Figure 1.** Output"
            blocks += [block for output in cell.outputs if (block := readme_output(output, caption, images))]
    return "\n\n".join(blocks) + "\n"


def readme_output(output: NotebookNode, caption: str, images: Path) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        path = images / f"index-{len(list(images.iterdir())) + 1}.png"
        path.write_bytes(base64.b64decode(data["image/png"]))
        return f"![{alternative(caption)}](docs/{images.name}/{path.name})"
    if "text/markdown" in data:
        return data["text/markdown"]
    text = (output.get("text") or data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


# ---------------------------------------------------------------------------------------------- building


def build(out: Path, readme_path: Path) -> None:
    "Build everything beside `out`, check it, and only then replace `out` and `readme_path`."
    book = Book.read()
    if MAP not in (cell.source for cell in book.index.cells):
        raise BuildError(f"index.ipynb: no markdown cell '{MAP}' says where the chapters are listed")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        source, site = Path(temporary, "source"), Path(temporary, "site")
        source.mkdir()
        stage(book, source)
        sphinx(source, site, Path(temporary, "doctrees"))
        text = readme(book, site / "images")
        (site / "build.json").write_text(json.dumps(inputs() | {"README.md": digest(text.encode())}, indent=1) + "\n")
        check(site)
        replace(site, out, Path(temporary, "old"))
    draft = readme_path.with_name(f".{readme_path.name}.new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, readme_path)


def sphinx(source: Path, site: Path, doctrees: Path) -> None:
    about = settings()
    named = {"project": about["title"], "html_title": about["title"], "author": about["author"],
             "copyright": about["copyright"], "version": about["version"], "release": about["version"]}
    options = [part for name, value in named.items() for part in ("-D", f"{name}={value}")]
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-c", SITE, "-d", doctrees]
    if subprocess.run([*command, *options, source, site]).returncode:
        raise BuildError("Sphinx reported the warnings above")
    (site / ".buildinfo").unlink(missing_ok=True)
    (site / ".nojekyll").touch()


def check(site: Path) -> None:
    if faults := links.broken(site) + links.remote(site):
        raise BuildError("links that lead nowhere, or to a network:\n  " + "\n  ".join(faults))


def replace(new: Path, old: Path, aside: Path) -> None:
    if old.exists():
        shutil.move(old, aside)
    os.replace(new, old)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def inputs() -> dict[str, str]:
    "Everything the site is made of, with its SHA-256."
    files = [*NOTEBOOKS.glob("*.ipynb"), *(p for p in SITE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)]
    return {"version": settings()["version"]} | {
        path.relative_to(ROOT).as_posix(): digest(path.read_bytes()) for path in sorted(files)}


def stale(out: Path = ROOT / "docs", readme_path: Path = ROOT / "README.md") -> list[str]:
    "Inputs that changed, came or went since `out` was built, and README.md if it was edited by hand."
    record = out / "build.json"
    then = json.loads(record.read_text()) if record.exists() else {}
    now = inputs() | {"README.md": digest(readme_path.read_bytes()) if readme_path.exists() else ""}
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the site (default: docs)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write (default: README.md)")
    options = parser.parse_args()
    try:
        build(options.out.resolve(), options.readme.resolve())
    except BuildError as error:
        sys.exit(f"{error}\nNothing was replaced.")
    print(f"built {options.out} and {options.readme}")


if __name__ == "__main__":
    main()
