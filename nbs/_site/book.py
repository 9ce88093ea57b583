"The book as its notebooks hold it: cells that readers see, chapters with title and promise, public names, papers."
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from pybtex.database import Entry as Paper
from pybtex.database import parse_file

from reference import Entry, entries, private_classes, starts

SITE = Path(__file__).resolve().parent
NOTEBOOKS = SITE.parent
ROOT = NOTEBOOKS.parent
PACKAGE = "jat_nb"
PARTS = ((0, "Foundations"), (12, "Attacks"), (25, "Training"), (42, "Evaluation"), (54, "Papers"), (65, "Tools"),
         (80, "Experiments"), (90, "Tutorials"))
CAPTION = re.compile(r"\*\*(Figure \d+\.)\*\*\s*")


class BuildError(Exception):
    "The notebooks cannot become a site; the message says where and why."


def settings() -> dict[str, str]:
    "What settings.ini says of the project."
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@dataclass(frozen=True)
class Cell:
    "A cell of a page: its source without directives, and the directives."

    kind: str  # 'markdown' or 'code'
    source: str
    directives: frozenset[str]
    outputs: tuple[NotebookNode, ...]

    @property
    def exported(self) -> bool:
        return self.kind == "code" and bool(self.directives & {"export", "exports", "exporti"})

    @property
    def fold(self) -> str:
        "What stands on the fold that covers the code, or '' where the code is open."
        if "hide" in self.directives:
            return "Imports of this page"
        return "Code of this output" if "echo: false" in self.directives else ""

    @property
    def alternative(self) -> str:
        "Text in place of the figure that this cell is the caption of: its first sentence, without markup."
        if not (number := CAPTION.match(self.source)):
            return ""
        text = self.source[number.end():].split("\n\n")[0].replace("\n", " ")
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$\\]", lambda match: match[1] or "", text)
        sentence = re.split(r"(?<=[.!?])\s", plain)[0]
        return f"{number[1]} {sentence}"


def visible(notebook: NotebookNode) -> Iterator[Cell]:
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        marks = [line for line in lines if cell.cell_type == "code" and line.startswith("#|")]
        source = "\n".join(line for line in lines if line not in marks).strip("\n")
        directives = frozenset(mark[2:].strip() for mark in marks)
        if source and "nbdev_export()" not in source:
            yield Cell(cell.cell_type, source, directives, tuple(cell.get("outputs", ())))


@dataclass(frozen=True)
class Chapter:
    "A notebook and what the rest of the book wants to know of it."

    path: Path

    @cached_property
    def notebook(self) -> NotebookNode:
        return nbformat.read(self.path, as_version=4)

    @cached_property
    def cells(self) -> list[tuple[Cell, Cell | None]]:
        "Each visible cell with the one after it."
        cells = list(visible(self.notebook))
        return list(zip(cells, [*cells[1:], None], strict=True))

    @cached_property
    def module(self) -> str:
        code = "\n".join(cell.source for cell in self.notebook.cells if cell.cell_type == "code")
        found = re.search(r"^#\| *default_exp +([\w.]+)", code, re.MULTILINE)
        return found[1] if found else ""

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for cell, _ in self.cells if cell.exported for entry in self.defined(cell)]

    def defined(self, cell: Cell) -> tuple[Entry, ...]:
        "What an exported cell defines."
        return entries(cell.source, self.context)

    @cached_property
    def context(self) -> str:
        "The private classes that the public names of this chapter are built on."
        return private_classes(self.file)

    @property
    def file(self) -> Path:
        "The module that is exported from this notebook."
        return ROOT / PACKAGE / f"{self.module.replace('.', '/')}.py"

    @property
    def number(self) -> str:
        return self.path.stem[:2]

    @property
    def part(self) -> str:
        return [name for first, name in PARTS if first <= int(self.number)][-1]

    @property
    def page(self) -> str:
        return f"{self.path.stem}.html"

    @property
    def title(self) -> str:
        return self._opening("#")

    @property
    def promise(self) -> str:
        return self._opening(">")

    @property
    def reference(self) -> str:
        "The page that lists what the module exports."
        return f"api_{self.module.replace('.', '_')}.html"

    def address(self, name: str) -> str:
        "Where a public name is defined in the page; a member is shown with its class."
        return f"{self.page}#{PACKAGE}.{self.module}.{name.split('.')[0]}"

    @cached_property
    def words(self) -> set[str]:
        """Words to which the code of the page gives a meaning: its variables, functions and parameters, and words of its
        strings without spaces, such as values of fields and names of suites, that are no names in it."""
        defined: set[str] = set()
        used: set[str] = set()
        values: set[str] = set()
        for node in ast.walk(ast.parse("\n".join(c.source for c in self.notebook.cells if c.cell_type == "code"))):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    defined.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    defined.add(name)
                case ast.Name(id=name):
                    used.add(name)
                case ast.ImportFrom(names=names):
                    used |= {alias.name for alias in names}
                case ast.Constant(value=str(text)) if not re.search(r"\s", text):
                    values |= set(re.split(r"\W+", text))
        return defined | values - used

    @cached_property
    def reads_results(self) -> bool:
        "Whether the code of the page reads files of `nbs/results`."
        return any(re.search(r"""["']results["'/]""", cell.source) for cell, _ in self.cells if cell.kind == "code")

    def line(self, name: str) -> int:
        "Line of the module on which a public name begins, decorators included."
        return starts(self.file.read_text(encoding="utf-8"))[name]

    def _opening(self, mark: str) -> str:
        first = self.cells[0][0].source if self.cells else ""
        if not (found := re.search(rf"^{mark} +(.+)$", first, re.MULTILINE)):
            raise BuildError(f"{self.path.name}: the first cell has no line that starts with '{mark} '")
        return found[1]


@dataclass(frozen=True)
class Book:
    "All chapters, and the two tables that prose is resolved with: public names and papers."

    index: Chapter
    chapters: list[Chapter]
    papers: dict[str, Paper]
    cited: dict[str, list[Chapter]] = field(default_factory=dict)  # filled while the chapters are staged

    @classmethod
    def read(cls) -> Book:
        chapters = [Chapter(path) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
        return cls(Chapter(NOTEBOOKS / "index.ipynb"), chapters, dict(parse_file(str(SITE / "references.bib")).entries))

    @property
    def parts(self) -> dict[str, list[Chapter]]:
        return {name: found for _, name in PARTS if (found := [c for c in self.chapters if c.part == name])}

    @cached_property
    def names(self) -> dict[str, list[Chapter]]:
        "The chapters that define a public name `name` or a member `Class.member`."
        table: dict[str, list[Chapter]] = {}
        for chapter in self.chapters:
            for entry in chapter.entries:
                for name in [entry.name, *(f"{entry.name}.{member.name}" for member in entry.members)]:
                    if chapter in table.setdefault(name, []):
                        raise BuildError(f"{chapter.path.name}: defines {name} twice")
                    table[name].append(chapter)
        return table

    def address(self, code: str, chapter: Chapter) -> str:
        "Where inline code leads if, read in a chapter, it means exactly one public name; else ''."
        full = code.removesuffix("()")
        short = full.removeprefix(f"{PACKAGE}.")
        if full != short and (named := [c for c in self.chapters if short == c.module]):
            return named[0].reference
        owner = next((c for c in self.chapters if c.module and short.startswith(f"{c.module}.")), None)
        rest = short.removeprefix(f"{owner.module}.") if owner else ""
        qualified = [c for c in self.names.get(rest, []) if c is owner]
        found = self.names.get(short, [])
        own = [c for c in found if c is chapter]
        if not own and code in chapter.words:
            return ""
        for name, chapters in ((rest, qualified), (short, own), (short, found)):
            if len(chapters) == 1:
                return chapters[0].address(name)
        return ""

    def cite(self, chapter: Chapter, key: str) -> Paper:
        if key not in self.papers:
            raise BuildError(f"{chapter.path.name}: cites '{key}', which is not in nbs/_site/references.bib")
        if chapter not in self.cited.setdefault(key, []):
            self.cited[key].append(chapter)
        return self.papers[key]
