"""Damaged folders of runs: a report says what it left out, or one line says why there is none; never a traceback."""
import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT

from jat_nb.claims import judge_claims
from jat_nb.cli import jat_report
from jat_nb.results import read_runs

REAL = sorted(p.parent for p in (ROOT / "nbs/results/jat_cpu").glob("*/run.json"))[:2]
WRONG = [None, True, -1, 1e400, "", "<script>alert(1)</script>", "ü/..\\ %s {0}\n", [], {}, [None], {"a": {}}, [[1], "x"], 10**400]


def places(value, path=()):
    "Every place in a JSON value."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in items: yield from places(part, (*path, key))


def hurt_value(value, draws):
    "A field missing, of another type or under another name."
    path = draws.choice([p for p in places(value) if p])
    holder = value
    for key in path[:-1]: holder = holder[key]
    kind = draws.choice(["missing", "wrong", "wrong", "renamed"])
    if kind == "wrong" or not isinstance(holder, dict): holder[path[-1]] = draws.choice(WRONG)
    elif kind == "missing": del holder[path[-1]]
    else: holder[f"{path[-1]}<b>"] = holder.pop(path[-1])
    return value


def hurt_file(file, draws):
    text = file.read_text(encoding="utf-8")
    kind = draws.choice(["value"] * 6 + ["truncated", "empty", "words", "bytes", "list", "folder"])
    if kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "value" and file.suffix == ".json":
        file.write_text(json.dumps(hurt_value(json.loads(text), draws)), encoding="utf-8")
    elif kind == "value":
        lines = text.splitlines()
        i = draws.randrange(len(lines))
        lines[i] = json.dumps(hurt_value(json.loads(lines[i]), draws))
        file.write_text("\n".join(lines), encoding="utf-8")
    else:
        file.write_bytes({"truncated": text[:draws.randrange(len(text))].encode(), "empty": b"", "words": b"not json",
                          "bytes": bytes(draws.randrange(256) for _ in range(99)), "list": b"[1, {}]"}[kind])
    return kind


def damaged(root, seed):
    "Two real runs, the first with a damaged file and perhaps an unusual name, and how it was damaged."
    draws = random.Random(seed)
    kinds = {}
    for i, source in enumerate(REAL):
        name = draws.choice([source.name, "<img src=x onerror=alert(1)>", "ü %s {0}", "a b.json"]) if i == 0 else source.name
        shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
        if i == 0:
            file = draws.choice(sorted(f for f in (root / name).iterdir() if f.suffix in (".json", ".jsonl")))
            kinds[name] = hurt_file(file, draws)
    return kinds


@pytest.mark.parametrize("seed", range(24))
def test_damage_is_told_and_the_rest_is_read(seed, tmp_path):
    [(name, kind)] = damaged(tmp_path, seed).items()
    found = {Path(run.folder).name: run for run in read_runs(tmp_path)}
    if seed % 12 == 0: judge_claims([*found.values()])  # takes the longest
    assert not found[REAL[1].name].problems
    if kind != "value": assert found[name].problems  # a changed value may still be a possible one


class Active(HTMLParser):
    def __init__(self): super().__init__(); self.seen = []
    def handle_starttag(self, tag, attrs):
        if tag == "script" or any(name.startswith("on") for name, _ in attrs): self.seen.append((tag, attrs))


@pytest.mark.parametrize("seed", (100, 101, 102))
def test_pages_of_damaged_runs_are_whole_and_escaped(seed, tmp_path, capsys):
    damaged(tmp_path / "runs", seed)
    status = jat_report(runs=str(tmp_path / "runs"), out=str(tmp_path / "page.html"))
    said = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in said.err + said.out
    if status == 2:
        assert len(said.err.strip().splitlines()) <= 3
        return
    page = Active()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not page.seen
