"""The anatomy of a chapter, in figures (what makes the book readable, measured)."""
import ast
import io
import json
import re
import statistics
import tokenize

import pytest
from conftest import NOTEBOOKS, ROOT, cells

CHAPTERS = [p for p in NOTEBOOKS if p.stem not in ("index", "00_notation")]
MODULES = [p for p in CHAPTERS if any(c["source"].startswith("#| default_exp") for c in cells(p))]
CHECKS = re.compile(r"\bassert\b|assert_close\(|test_eq\(|test_close\(|expect_fail\(|gradcheck\(")
each = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def code(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def exported(cell):
    return cell["cell_type"] == "code" and cell["source"].startswith("#| export")


def lesson(cell):
    return cell["cell_type"] == "code" and not cell["source"].startswith("#|")


def loc(source):
    "Lines of code: neither empty nor a comment alone."
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())


def statements(source):
    "Lines as Python counts them: a statement that is broken into several is one."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.NEWLINE for token in tokens)


def signature_lines(source):
    "Lines of documentation: signatures with one docmented parameter each, and docstrings."
    defs = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    signatures = sum(max(0, d.body[0].lineno - d.lineno - 1) for d in defs)
    return signatures + docstring_lines(source)


def docstring_lines(source):
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return sum(loc(ast.get_docstring(d)) for d in documented if ast.get_docstring(d))


def only_imports(source):
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


def public_defs(source):
    return [n for n in ast.parse(source).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@each
def test_size_and_promise(path):
    all_cells = cells(path)
    assert len(all_cells) <= 100
    assert path.stat().st_size <= (1_000_000 if path.stem.startswith("8") else 600_000)
    first = all_cells[0]["source"].splitlines()
    assert first[0].startswith("# ") and any(line.startswith("> ") for line in first)


@each
def test_cells_are_short(path):
    lessons = [c["source"] for c in code(path) if lesson(c)]
    assert max(map(loc, lessons)) <= 25 and statistics.median(map(statements, lessons)) <= 6
    made = [c["source"] for c in code(path) if exported(c) and not only_imports(c["source"])]
    assert max([len(source.splitlines()) for source in made], default=0) <= 40
    assert statistics.median([loc(source) - signature_lines(source) for source in made] or [0]) <= 15


@each
def test_lines_are_short(path):
    shown = [block for c in cells(path) if c["cell_type"] == "markdown" for block in re.findall(r"```.*?```", c["source"], re.S)]
    long = [line for text in [c["source"] for c in code(path)] + shown for line in text.splitlines() if len(line) > 100]
    assert not long, long


@each
def test_prose_per_code(path):
    prose = sum(len(c["source"].split()) for c in cells(path) if c["cell_type"] == "markdown")
    broken = sum(loc(c["source"]) - (signature_lines(c["source"]) if exported(c) else 0) for c in code(path))
    whole = sum(statements(c["source"]) for c in code(path))
    assert 3 <= prose / min(broken, whole) and prose / max(broken, whole) <= 15


@each
def test_hidden_cells_only_set_up(path):
    for cell in code(path):
        if cell["source"].startswith("#| hide"):
            body = cell["source"].split("\n", 1)[1]
            assert only_imports(body) or "nbdev_export()" in body, body


@each
def test_imports_stand_alone(path):
    for cell in code(path):
        if "nbdev_export()" not in cell["source"]:
            body = ast.parse(cell["source"]).body
            kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
            assert len(kinds) <= 1, cell["source"]


@each_module
def test_public_names_are_shown_beside_prose(path):
    all_cells = cells(path)
    for i, cell in enumerate(all_cells):
        if not exported(cell):
            continue
        around = [c["cell_type"] for c in all_cells[max(0, i - 1):i + 2]]
        shown = " ".join(c["source"] for c in [c for c in all_cells[i + 1:] if lesson(c)][:2])
        for node in public_defs(cell["source"]):
            assert "markdown" in around, f"no prose beside {node.name}"
            assert re.search(rf"\b{node.name}\b", shown), f"{node.name} is not shown within two cells"


@each_module
def test_two_checks_per_public_name(path):
    names = [n for c in code(path) if exported(c) for n in public_defs(c["source"])]
    checks = sum(len(CHECKS.findall(c["source"])) for c in code(path) if lesson(c))
    assert checks >= 2 * len(names), (checks, len(names))


@each_module
def test_docments_and_types(path):
    for cell in code(path):
        if not exported(cell):
            continue
        lines = cell["source"].splitlines()
        for node in (n for n in public_defs(cell["source"]) if isinstance(n, ast.FunctionDef)):
            assert ast.get_docstring(node), node.name
            assert node.returns is not None, node.name
            for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                assert arg.annotation is not None, (node.name, arg.arg)
                beside = "#" in lines[arg.end_lineno - 1] or lines[arg.lineno - 2].strip().startswith("#")
                assert beside, f"{node.name}: {arg.arg} has no docment"


@each
def test_figures(path):
    images = [o for c in code(path) for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert 2 <= len(images) <= 6, len(images)


@each
def test_stored_outputs_are_quiet(path):
    text = json.dumps([c["outputs"] for c in code(path)])
    for trace in ("it/s]", "Warning", "0x7f", str(ROOT), "/tmp/", "/root/", "Traceback"):
        assert trace not in re.sub(r'"image/png": "[^"]*"', "", text), trace
    assert any(c["outputs"] for c in code(path)), "run the notebook and store its outputs"


@each_module
def test_chapter_closes(path):
    text = "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
    assert "## Summary" in text and "## Exercises" in text
    assert re.search(r"^\|.*we do.*\|", text, re.M), "the table of deviations is missing"
    module = cells(path)[1]["source"].split()[2]
    source = (ROOT / "jat_nb" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
