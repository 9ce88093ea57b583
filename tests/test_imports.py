"""The import graph: chapters and modules point to lower numbers only, and attacks stay light."""
import ast
import re
import subprocess
import sys
from pkgutil import resolve_name

import pytest
from conftest import NOTEBOOKS, ROOT, cells

from jat_nb.attacks import ATTACKS
from jat_nb.catalogue import papers
from jat_nb.objectives import OBJECTIVES

RANK = {}
for path in NOTEBOOKS:
    for cell in cells(path):
        if cell["source"].startswith("#| default_exp "):
            RANK[cell["source"].split()[2]] = path.name.split("_")[0]


def imported(source: str, package: str = "jat_nb") -> set[str]:
    "Modules of jat_nb that some code in a package imports; magics and shell lines are not Python."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    found = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom):
            above = {0: "", 1: package + ".", 2: "jat_nb."}[node.level]
            names = [above + (node.module or "")]
            names += [f"{n}.{a.name}" for n in names if n.rstrip(".") == "jat_nb" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        modules = [n.removeprefix("jat_nb.") for n in names if n.startswith("jat_nb.") and n != "jat_nb."]
        found |= {".".join(m.split(".")[:2]) if m.startswith("papers.") else m.split(".")[0] for m in modules}
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_uses_only_earlier_chapters(path):
    here = path.name.split("_")[0]
    own = {m for c in cells(path) if c["source"].startswith("#| default_exp ") for m in c["source"].split()[2:3]}
    used = set().union(*(imported(c["source"]) for c in cells(path) if c["cell_type"] == "code"))
    late = {m: RANK[m] for m in used - own if m in RANK and not RANK[m] < here and path.stem != "index"}
    assert not late, f"{path.name} imports later chapters: {late}"


@pytest.mark.parametrize("module", sorted(RANK))
def test_a_module_imports_only_earlier_modules(module):
    package = ".".join(["jat_nb", *module.split(".")[:-1]])
    used = imported((ROOT / "jat_nb" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"), package)
    late = {m for m in used - {module} if not RANK[m] < RANK[module]}
    assert not late, f"jat_nb.{module} imports later modules: {late}"


def test_every_module_has_its_chapter():
    files = [p.relative_to(ROOT / "jat_nb") for p in (ROOT / "jat_nb").rglob("*.py") if not p.stem.startswith("_")]
    modules = {".".join(p.with_suffix("").parts) for p in files}
    assert modules == set(RANK)


def test_names_written_as_text_lead_somewhere():
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "jat_nb").rglob("*.py") if p.stem != "_modidx"]
    names = {name for source in sources for name in re.findall(r'"(jat_nb\.[a-z_.]+:[A-Za-z_]+)"', source)}
    for paper in papers().values():
        names |= {check.kind for claim in paper.claims for check in claim.checks} | {suite.kind for suite in paper.suites.values()}
        names |= {*paper.scores.values(), paper.remark}
    names = {name for name in names if ":" in name}
    assert len(names) > 40
    for name in sorted(names): resolve_name(name)
    for registry in (ATTACKS, OBJECTIVES): assert all(callable(registry[name]) for name in registry)


def test_attacks_are_light():
    code = "import sys, jat_nb.attacks; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    heavy = {"cvxpy", "matplotlib", "pandas", "sklearn", "jat_nb.training", "jat_nb.evaluation", "jat_nb.data"}
    assert "jat_nb.attacks" in loaded and not heavy & loaded


def test_only_pareto_may_import_cvxpy():
    importing = re.compile(r"^\s*(import|from) cvxpy", re.M)
    users = {p.stem for p in (ROOT / "jat_nb").rglob("*.py") if importing.search(p.read_text(encoding="utf-8"))}
    assert users <= {"pareto"}
