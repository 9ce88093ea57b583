"Public names of a module, read from the source of its exported cells: signature, summary, documented parameters."
from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Parameter:
    "One row of a parameter table; what the source leaves open is an empty string."

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    "One public name."

    name: str
    signature: str
    summary: str
    parameters: tuple[Parameter, ...] = ()
    returns: Parameter | None = None
    members: tuple[Entry, ...] = ()


@cache
def entries(source: str, context: str = "") -> tuple[Entry, ...]:
    """Public functions, classes and constants at the top level of `source`, in their order; `context` holds the private
    classes that they are built on."""
    reader = _Reader(f"{context}\n{source}")
    return tuple(entry for node in reader.body for entry in reader.read(node))


def private_classes(module: Path) -> str:
    "The private classes that a module defines, or imports from its neighbours, as source."
    source, found = module.read_text(encoding="utf-8"), []
    lines = source.splitlines()
    for node in ast.parse(source).body:
        match node:
            case ast.ClassDef(name=name) if name.startswith("_"):
                found.append("\n".join(lines[node.lineno - 1:node.end_lineno]))  # with the comment of the last line
            case ast.ImportFrom(module=str(name), level=up) if up and any(re.match("_[A-Z][a-z]", a.name) for a in node.names):
                found.append(private_classes(module.parents[up - 1].joinpath(*name.split(".")).with_suffix(".py")))
    return "\n\n".join(found)


def starts(source: str) -> dict[str, int]:
    "The line on which each name at the top level of `source` begins."
    found: dict[str, int] = {}
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name, decorator_list=marks) | ast.ClassDef(name=name, decorator_list=marks):
                found[name] = min([node.lineno, *(mark.lineno for mark in marks)])
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node.lineno
    return found


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    "Comment of each line, and the lines that hold nothing else."
    found: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").rstrip()
            if token.line.lstrip().startswith("#"):
                alone.add(token.start[0])
    return found, alone


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.comments, self.alone = _comments(source)
        self.body = ast.parse(source).body
        self.hidden = {node.name: node for node in self.body if isinstance(node, ast.ClassDef) and node.name[0] == "_"}

    def read(self, node: ast.stmt) -> Iterator[Entry]:
        match node:
            case ast.FunctionDef(name=name) if not name.startswith("_"):
                yield self.function(node)
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield self.class_(node)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) if name[0] != "_":
                yield self.constant(name, node)

    def text(self, node: ast.AST | None) -> str:
        return " ".join((ast.get_source_segment(self.source, node) or "").split()) if node else ""

    def comment(self, line: int) -> str:
        "The comment on a line, else the comment lines right above it."
        if line in self.comments:
            return self.comments[line]
        first = line
        while first - 1 in self.alone:
            first -= 1
        return " ".join(self.comments[n] for n in range(first, line))

    def function(self, node: ast.FunctionDef, method: bool = False) -> Entry:
        decorators = {self.text(d) for d in node.decorator_list}
        bound = method and "staticmethod" not in decorators
        parameters = [p for p in self.arguments(node)[bound:] if p.meaning or not method]
        call = "" if decorators & {"property", "cached_property"} else f"({self.call(node, bound)})"
        return Entry(node.name, node.name + call, _summary(node), tuple(parameters), self.returned(node))

    def returned(self, node: ast.FunctionDef) -> Parameter | None:
        "The documented result: its comment stands between the return type and the body."
        lines = range(node.returns.lineno, node.body[0].lineno) if node.returns else []
        meaning = next((self.comments[n] for n in lines if n in self.comments), "")
        return Parameter("returns", self.text(node.returns), "", meaning) if meaning else None

    def arguments(self, node: ast.FunctionDef) -> list[Parameter]:
        a = node.args
        positional = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
        rows = [(arg.arg, arg, default) for arg, default in zip(positional, defaults, strict=True)]
        rows += [(f"*{a.vararg.arg}", a.vararg, None)] if a.vararg else []
        rows += [(arg.arg, arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
        rows += [(f"**{a.kwarg.arg}", a.kwarg, None)] if a.kwarg else []
        return [p for name, arg, value in rows for p in self.parameter(name, arg, value)]

    def parameter(self, name: str, arg: ast.arg, value: ast.expr | None) -> list[Parameter]:
        "One argument; a private group of options stands for its fields."
        kind = self.text(arg.annotation)
        if kind in self.hidden and value is None:
            return self.fields(self.hidden[kind])
        return [Parameter(name, kind, self.text(value), self.comment((value or arg).end_lineno))]

    def call(self, node: ast.FunctionDef, bound: bool) -> str:
        "The arguments as a caller sees them: names and defaults, without types."
        parts = [_default(p) for p in self.arguments(node)]
        if node.args.kwonlyargs and not node.args.vararg:
            parts.insert(len(node.args.posonlyargs) + len(node.args.args), "*")
        return ", ".join(parts[bound:])

    def class_(self, node: ast.ClassDef) -> Entry:
        "A class as its constructor, written or generated from its fields, and its public methods."
        methods = [m for part in self.parts(node) for m in part.body if isinstance(m, ast.FunctionDef)]
        init = next((m for m in reversed(methods) if m.name == "__init__"), None)
        fields = [field for part in self.parts(node) for field in self.fields(part)]
        parameters = self.arguments(init)[1:] if init else fields
        call = self.call(init, True) if init else ", ".join(_default(p) for p in fields)
        members = tuple(self.function(m, method=True) for m in methods if not m.name.startswith("_"))
        return Entry(node.name, f"{node.name}({call})" if call else node.name, _summary(node), tuple(parameters),
                     members=members)

    def parts(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        "A class after the private classes of its module that it is built on: a reader meets them as one."
        bases = [self.hidden[name] for base in node.bases if (name := self.text(base)) in self.hidden]
        return [part for base in bases for part in self.parts(base)] + [node]

    def fields(self, node: ast.ClassDef) -> list[Parameter]:
        "The public fields that a class declares."
        return [self.field(f.target.id, f) for f in node.body
                if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name) and f.target.id[0] != "_"]

    def field(self, name: str, node: ast.AnnAssign) -> Parameter:
        return Parameter(name, self.text(node.annotation), self.text(node.value), self.comment(node.end_lineno))

    def constant(self, name: str, node: ast.Assign | ast.AnnAssign) -> Entry:
        value = self.text(node.value)
        shown = value if len(value) <= 90 else "..."
        return Entry(name, f"{name} = {shown}", self.comment(node.end_lineno) or self.comment(node.lineno))


def _default(parameter: Parameter) -> str:
    return f"{parameter.name}={parameter.default}" if parameter.default else parameter.name


def _summary(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
