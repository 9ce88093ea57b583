"From notebooks to the pages that Sphinx reads, and to README.md."
from __future__ import annotations

import base64
import copy
import json
import os
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import nbformat
from docutils.nodes import make_id
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pybtex.database import Entry as Paper

from book import NOTEBOOKS, PACKAGE, ROOT, SITE, Book, BuildError, Cell, Chapter, settings
from reference import Entry, Parameter

MAP = "<!-- chapters -->"
BIBLIOGRAPHY = "_site/references.bib"
FENCE = re.compile(r"^(```|~~~)")
INLINE = re.compile(r"(?P<text>!?\[(?:`[^`]*`|\\.|[^\]`\\])*\])\((?P<target>[^()\s]*)\)"
                    r"|(?P<ticks>`+)(?P<code>[^`\n]+)(?P=ticks)")
Edit = Callable[[str], str]


# ---------------------------------------------------------------------------------------------- prose


def rewrite(text: str, link: Edit, name: Edit = lambda code: "") -> str:
    "Markdown with link targets passed through `link`, and inline code linked to where `name` says, if anywhere."
    def inline(match: re.Match[str]) -> str:
        if match["text"]:
            return f"{match['text']}({link(match['target'])})"
        target = "" if match.string.startswith("#") else name(match["code"])
        return f"[{match[0]}]({target})" if target else match[0]

    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else INLINE.sub(inline, line))
    return "\n".join(lines)


def site_link(book: Book, chapter: Chapter, target: str) -> str:
    "A link of a notebook as the site needs it."
    path, _, fragment = unquote(target).partition("#")
    if re.match(r"\w+:", target):
        return target
    if path == BIBLIOGRAPHY:
        book.cite(chapter, fragment)
        return f"references.html#{fragment}"
    if path and not path.endswith(".ipynb"):
        return repository_link(chapter, path)
    page = path.replace(".ipynb", ".html")
    return f"{page}#{make_id(fragment)}" if fragment else page


def repository_link(chapter: Chapter, path: str) -> str:
    "A file that is not part of the site, at its public address."
    file, about = (NOTEBOOKS / path).resolve(), settings()
    if not file.exists():
        raise BuildError(f"{chapter.path.name}: links to '{path}', which does not exist")
    return f"{about['git_url']}/blob/{about['branch']}/{file.relative_to(ROOT).as_posix()}"


def readme_link(book: Book, target: str) -> str:
    "A link of index.ipynb as README.md needs it."
    path, _, fragment = target.partition("#")
    if re.match(r"\w+:", target) or not path:
        return target
    if path == BIBLIOGRAPHY:
        return book.cite(book.index, fragment).fields["url"]
    return Path(os.path.relpath(NOTEBOOKS / path, ROOT)).as_posix() + target.removeprefix(path)


def prose(book: Book, chapter: Chapter) -> Edit:
    return partial(rewrite, link=partial(site_link, book, chapter), name=partial(book.address, chapter=chapter))


# ---------------------------------------------------------------------------------------------- chapters and home


def stage(book: Book, folder: Path) -> None:
    "Write all pages of the site into `folder`."
    for chapter in book.chapters:
        write(folder / chapter.path.name, [eyebrow(chapter), *body(book, chapter)])
    write(folder / "index.ipynb", home(book))
    (folder / "api.md").write_text(api(book), encoding="utf-8")
    for chapter in exporting(book):
        (folder / chapter.reference.replace(".html", ".md")).write_text(api_module(book, chapter), encoding="utf-8")
    (folder / "search.js").write_text(search(book), encoding="utf-8")
    (folder / "references.md").write_text(references(book), encoding="utf-8")


def write(path: Path, cells: list[NotebookNode]) -> None:
    language = {"name": "python", "pygments_lexer": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"language_info": language}), path)


def eyebrow(chapter: Chapter) -> NotebookNode:
    "The line above a title: part, number, module."
    name = f"{PACKAGE}.{chapter.module}"
    module = f' · <a href="{chapter.reference}">{name}</a>' if chapter.entries else ""
    return new_markdown_cell(f'<p class="eyebrow">{chapter.part} · {chapter.number}{module}</p>')


WHERE = "{.from}\nThe code of this page reads files of this repository: run it in the folder `nbs` of a clone."


def body(book: Book, chapter: Chapter) -> list[NotebookNode]:
    edit = prose(book, chapter)
    staged: list[NotebookNode] = []
    for cell, following in chapter.cells:
        if cell.kind == "markdown":
            caption = "{.caption}\n" if cell.alternative else ""
            staged.append(new_markdown_cell(caption + edit(cell.source)))
            continue
        found = chapter.defined(cell) if cell.exported else []
        staged += [defines(chapter, found)] if found else []
        staged.append(code(cell, following))
    if chapter.reads_results:
        staged.insert(1, new_markdown_cell(WHERE))  # below the title
    return staged


LONG = 20  # rows of a table that a page shows without being asked
WORDS = re.compile(r"<td>(?=[^<]{25})(?=(?:[^<]*?[a-z]){12}|[^<]*[;:])([^<]*)</td>")


def code(cell: Cell, following: Cell | None) -> NotebookNode:
    outputs = copy.deepcopy(list(cell.outputs))
    for data in (o["data"] for o in outputs if "text/html" in o.get("data", {})):
        data["text/html"] = folded(WORDS.sub(r'<td class="words">\1</td>', data["text/html"]))  # sentences stand left
    staged = new_code_cell(cell.source, outputs=outputs)
    staged.metadata["tags"] = ["exported"] * cell.exported + ["hide-input"] * bool(cell.fold)
    staged.metadata["mystnb"] = {"code_prompt_show": cell.fold, "code_prompt_hide": cell.fold} if cell.fold else {}
    if following and following.alternative:
        staged.metadata["mystnb"]["image"] = {"alt": following.alternative}
    return staged


def folded(table: str) -> str:
    "A table of an output; a long one is opened by the reader."
    rows = table.count("<tr") - 1
    return f'<details class="long"><summary>Table of {rows} rows</summary>{table}</details>' if rows > LONG else table


def defines(chapter: Chapter, found: list[Entry]) -> NotebookNode:
    "The line above exported code: the names it defines, where links to them land."
    module = f"{PACKAGE}.{chapter.module}"
    names = " ".join(f'<a id="{module}.{e.name}" href="{chapter.reference}#{module}.{e.name}">{e.name}</a>' for e in found)
    return new_markdown_cell(f'<p class="defines"><span>{module}</span> {names}</p>')


def home(book: Book) -> list[NotebookNode]:
    cells = body(book, book.index)
    if not (maps := [cell for cell in cells if cell.source == MAP]):
        raise BuildError(f"index.ipynb: no markdown cell '{MAP}' says where the chapters are listed")
    for cell in maps:
        cell.source = ":::{container} chapters\n" + chapter_map(book, lambda c: c.page) + "\n:::"
    trees = [toctree(name, [f"{c.number} {c.title} <{c.path.stem}>" for c in chapters])
             for name, chapters in book.parts.items()]
    return [*cells, new_markdown_cell("\n\n".join([*trees, toctree("Reference", ["api", "references"])]))]


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def chapter_map(book: Book, address: Callable[[Chapter], str]) -> str:
    "The chapters by parts, each with its promise, in plain markdown."
    return "\n\n".join(
        f"**{name}**\n\n" + "\n".join(f"- {c.number} [{c.title}]({address(c)})  \n  {c.promise}" for c in chapters)
        for name, chapters in book.parts.items())


# ---------------------------------------------------------------------------------------------- reference


def rows(entry: Entry) -> list[Parameter]:
    return [*entry.parameters, *([entry.returns] if entry.returns else [])]


def details(entry: Entry, edit: Edit) -> list[str]:
    "Tables of the parameters of a name and of its members."
    blocks = [table(entry, edit)] if rows(entry) else []
    for member in entry.members:
        blocks.append(f"{{.member}}\n`{member.signature}` {edit(member.summary)}")
        blocks += [table(member, edit)] if rows(member) else []
    return blocks


def table(entry: Entry, edit: Edit) -> str:
    "Name, type, default and meaning of each parameter; no column of defaults where there are none."
    def quoted(text: str) -> str:
        return f"`{text}`" if text else ""

    lines = [["parameter", "type", "default", "meaning"], ["---"] * 4]
    for p in rows(entry):
        name = "*returns*" if p is entry.returns else quoted(p.name)
        line = name, edit(quoted(p.type)), quoted(p.default), edit(p.meaning)
        lines.append([text.replace("|", r"\|") for text in line])
    if not any(p.default for p in rows(entry)):
        lines = [[name, kind, meaning] for name, kind, _, meaning in lines]
    return "{.parameters}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def exporting(book: Book) -> list[Chapter]:
    return [chapter for chapter in book.chapters if chapter.entries]


def api(book: Book) -> str:
    "All modules, each with the names it exports."
    blocks = ["# Every public name", "> What to import from where, and the chapter that explains it."]
    for chapter in exporting(book):
        module = f"{PACKAGE}.{chapter.module}"
        names = ", ".join(f"[`{e.name}`]({chapter.reference}#{module}.{e.name})" for e in chapter.entries)
        blocks += [f"## [{module}]({chapter.reference})",
                   f"{{.from}}\n{chapter.number} [{chapter.title}]({chapter.page})", names]
    return "\n\n".join(blocks)


def api_module(book: Book, chapter: Chapter) -> str:
    "What one module exports, with types; no entry of its own in the sidebar."
    module, edit = f"{PACKAGE}.{chapter.module}", prose(book, chapter)
    blocks = ["---\norphan: true\n---", f"# {module}", f"> {chapter.promise}",
              f"{{.from}}\n{chapter.number} [{chapter.title}]({chapter.page}) · [all modules](api.html)"]
    for entry in chapter.entries:
        blocks += [f'<span class="anchor" id="{module}.{entry.name}"></span>', f"## {entry.name}",
                   f"```python\n{wrapped(entry.signature)}\n```", f"{edit(entry.summary)} {origins(chapter, entry)}"]
        blocks += details(entry, edit)
    return "\n\n".join(blocks)


def origins(chapter: Chapter, entry: Entry) -> str:
    "Links to the definition in its chapter and to its line in the module."
    about, module = settings(), chapter.module.replace(".", "/")
    source = f"{about['git_url']}/blob/{about['branch']}/{PACKAGE}/{module}.py#L{chapter.line(entry.name)}"
    places = {"chapter": chapter.address(entry.name), "source": source}
    return " ".join(f'<a class="where" href="{address}">{place}</a>' for place, address in places.items())


def search(book: Book) -> str:
    "The script that ranks and describes what the search finds, with what it has to know of the book."
    promises = {c.path.stem: c.promise for c in book.chapters}
    homes = {entry.name: c.path.stem for c in book.chapters for entry in c.entries}
    names = {f"{c.reference.removesuffix('.html')}#{make_id(e.name)}": e.summary for c in book.chapters for e in c.entries}
    tables = {"PROMISES": promises, "HOMES": homes, "NAMES": names}
    lines = [f"const {name} = {json.dumps(table, ensure_ascii=False)};" for name, table in tables.items()]
    return "\n".join([*lines, (SITE / "search.js").read_text(encoding="utf-8")])


def wrapped(signature: str) -> str:
    return textwrap.fill(signature, 96, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


# ---------------------------------------------------------------------------------------------- bibliography


def references(book: Book) -> str:
    opening = "# References\n\n> The papers this book builds on, and the chapters that cite them."
    return "\n\n".join([opening, *(reference(book, key) for key in sorted(book.papers, key=partial(by_author, book)))])


def by_author(book: Book, key: str) -> tuple[list[str], str]:
    paper = book.papers[key]
    return [" ".join(person.last_names) for person in paper.persons["author"]], paper.fields["year"]


def reference(book: Book, key: str) -> str:
    fields = book.papers[key].fields
    chapters = ", ".join(f"[{c.title}]({c.page})" for c in book.cited.get(key, []))
    cited = f" Cited in {chapters}." if chapters else ""
    return (f'<span class="anchor" id="{key}"></span>\n\n{{.reference}}\n{authors(book.papers[key])} '
            f"({fields['year']}). [{fields['title']}]({fields['url']}). {venue(book.papers[key])}.{cited}")


def authors(paper: Paper) -> str:
    return ", ".join(" ".join(p.first_names + p.middle_names + p.prelast_names + p.last_names)
                     for p in paper.persons["author"])


def venue(paper: Paper) -> str:
    name = next(paper.fields[kind] for kind in ("journal", "booktitle", "institution", "howpublished")
                if kind in paper.fields)
    place = [f"*{name}* {paper.fields.get('volume', '')}".rstrip(), paper.fields.get("pages", "").replace("--", "–")]
    return ", ".join(filter(None, place))


# ---------------------------------------------------------------------------------------------- README


def readme(book: Book, images: Path) -> str:
    "index.ipynb as plain markdown; its figures are written to `images`."
    images.mkdir()
    blocks: list[str] = []
    for cell, following in book.index.cells:
        if cell.source == MAP:
            blocks.append(chapter_map(book, lambda c: f"{NOTEBOOKS.name}/{c.path.name}"))
        elif cell.kind == "markdown":
            blocks.append(rewrite(cell.source, partial(readme_link, book)))
        else:
            blocks += [] if cell.fold else [f"```python\n{cell.source}\n```"]
            alternative = following.alternative if following else ""
            blocks += [shown(output, alternative, images) for output in cell.outputs]
    return "\n\n".join(filter(None, blocks)) + "\n"


def shown(output: NotebookNode, alternative: str, images: Path) -> str:
    "An output in plain markdown: a picture, markdown or text."
    data = output.get("data", {})
    if "image/png" in data:
        path = images / f"index-{len(list(images.iterdir())) + 1}.png"
        path.write_bytes(base64.b64decode(data["image/png"]))
        return f"![{alternative}](docs/{images.name}/{path.name})"
    text = (output.get("text") or data.get("text/plain", "")).rstrip()
    return data.get("text/markdown") or (f"```text\n{text}\n```" if text else "")
