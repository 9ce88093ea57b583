"Files that a kill cannot spoil, JSON that every reader reads, records that come back as they were."
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jat_nb
from jat_nb import records
from jat_nb.records import (TIERS, Record, append_jsonl, check_writable, environment, progress, read_jsonl,
                            write_atomic, write_json)


def strict(text: str):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")
    return json.loads(text, parse_constant=refuse)


trees = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats() | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
                     max_leaves=12)


def finite(value):
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_survives_but_for_nan(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("json") / "a.json"
    assert strict(write_json(path, tree).read_text(encoding="utf-8")) == finite(tree)


def test_other_types(tmp_path):
    @dataclass
    class Point:
        x: float
        y: tuple[int, ...]

    row = {"t": torch.tensor([[1, 2]]), "nan": torch.tensor(float("nan")), "np": np.float32(0.5), "p": Point(1.0, (2, 3)),
           "path": Path("a") / "b", 7: np.arange(2), "flag": np.bool_(True)}
    assert strict(write_json(tmp_path / "a.json", row).read_text()) == {
        "t": [[1, 2]], "nan": None, "np": 0.5, "p": {"x": 1.0, "y": [2, 3]}, "path": "a/b", "7": [0, 1], "flag": True}


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", Record, lambda: 0])
def test_what_json_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="cannot store"):
        write_json(tmp_path / "a.json", {"deep": [value]})
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"old": 1})

    def half(part: Path) -> None:
        part.write_text('{"ne')
        raise MemoryError

    with pytest.raises(MemoryError):
        write_atomic(path, half)
    assert strict(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_sigkill_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"old": list(range(100))})
    program = ("import sys, time\nfrom pathlib import Path\nfrom jat_nb.records import write_atomic\n"
               "def slowly(part):\n"
               "    with open(part, 'w') as f:\n"
               "        f.write('{\"half'); f.flush(); print('writing', flush=True); time.sleep(60)\n"
               "write_atomic(Path(sys.argv[1]), slowly)\n")
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "writing\n"
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert strict(path.read_text()) == {"old": list(range(100))}
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(left) == 1 and left[0].startswith(".a.json.") and left[0].endswith(".part")
    assert strict(write_json(path, {"new": 1}).read_text()) == {"new": 1}


def test_readers_meet_whole_files_only(tmp_path):
    path, seen = write_json(tmp_path / "a.json", {"n": 0}), []

    def slowly(part: Path) -> None:
        with open(part, "w") as f:
            for piece in ('{"n"', ": 1", "}"):
                f.write(piece)
                f.flush()
                seen.append(strict(path.read_text()))

    write_atomic(path, slowly)
    assert seen == [{"n": 0}] * 3 and strict(path.read_text()) == {"n": 1}


def test_the_folder_is_made_and_the_umask_kept(tmp_path):
    path = write_json(tmp_path / "x" / "y" / "a.json", 1)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (check_writable, lambda p: write_json(p / "a.json", 1), lambda p: append_jsonl(p / "a.jsonl", {})):
        with pytest.raises(ValueError, match=r"cannot write in .*file.sub .*choose another folder"):
            call(tmp_path / "file" / "sub")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="choose another folder"):
        check_writable(tmp_path)
    tmp_path.chmod(0o700)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=6), max_size=3), max_size=4),
       st.data())
def test_a_torn_log_loses_its_last_line_only(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    path.touch()
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    raw = path.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    whole = rows[:raw[:cut].count(b"\n")]
    assert read_jsonl(path) == whole
    append_jsonl(path, {"next": 1})
    assert read_jsonl(path) == [*whole, {"next": 1}]
    assert path.read_bytes().endswith(b"\n")


def test_line_separators_inside_text_do_not_split_a_row(tmp_path):
    row = {"text": "a\u2028b\u0085c\x0cd\r\ne"}
    append_jsonl(tmp_path / "a.jsonl", row)
    assert read_jsonl(tmp_path / "a.jsonl") == [row]


def test_missing_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log at"):
        read_jsonl(tmp_path / "a.jsonl")


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True).stdout


def test_commit_clean_dirty_and_outside(tmp_path, monkeypatch):
    assert environment("cpu", tmp_path)["commit"] is None
    git(tmp_path, "init", "-q")
    assert environment("cpu", tmp_path)["commit"] is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert environment("cpu", tmp_path)["commit"] == head
    (tmp_path / "a").write_text("2")
    assert environment("cpu", tmp_path)["commit"] == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment("cpu", tmp_path)["commit"] is None, "no git on this machine"


def commit_all(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all", "--allow-empty")
    return git(folder, "rev-parse", "HEAD").strip()


def test_the_commit_is_that_of_the_package_wherever_a_run_is_started(tmp_path, monkeypatch):
    here, head = environment("cpu")["commit"], commit_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert environment("cpu")["commit"] == here != head
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment("cpu")["commit"] == here, "as inside a hook of another project"


@pytest.mark.parametrize("place, tracked, own", [("venv/lib/jat_nb", False, False), ("third_party/jat_nb", True, False),
                                                 ("jat_nb", False, False), ("jat_nb", True, True)])
def test_an_installed_package_has_no_commit(tmp_path, monkeypatch, place, tracked, own):
    package = tmp_path / place
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "own.py").write_text("")
    if not tracked:
        (tmp_path / ".gitignore").write_text(place)
    head = commit_all(tmp_path)
    monkeypatch.setattr(jat_nb, "__file__", str(package / "__init__.py"))
    assert environment("cpu")["commit"] == (head if own else None)


def test_environment_says_enough_and_not_too_much():
    here = environment("cpu")
    text = json.dumps(here)
    assert {"python", "torch", "jat_nb"} <= set(here["versions"]) and here["threads"] == torch.get_num_threads()
    assert os.uname().nodename not in text and str(Path.home()) not in text and os.getcwd() not in text
    strict(text)


def test_device_of_a_gpu_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    assert environment("cuda")["device"] == "Some GPU" != environment("cpu")["device"]


def test_record_round_trip(tmp_path):
    record = Record("e", {"lr": 0.1, "milestones": [1, 2]}, tier="cpu", data="digits", variant="upscaled", seed=3,
                    seconds=1.5, forwards=10, backwards=5, metrics={"clean": {"correct": 1, "n": 2}},
                    log=[{"epoch": 1, "loss": float("nan")}], device="cpu")
    again = Record.load(record.save(tmp_path / "a.json"))
    assert again.log == [{"epoch": 1, "loss": None}]
    record.log = again.log
    assert again == record and again.device == environment("cpu")["device"]


def test_a_loaded_record_speaks_of_its_own_machine(tmp_path, monkeypatch):
    path = Record("e").save(tmp_path / "a.json")
    row = json.loads(path.read_text())
    row |= {"versions": {"torch": "0.1"}, "device": "abacus", "commit": None, "threads": 99}
    write_json(path, row)
    again = Record.load(path)
    assert (again.versions, again.device, again.commit, again.threads) == ({"torch": "0.1"}, "abacus", None, 99)


def test_records_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no record at"):
        Record.load(tmp_path / "a.json")
    for content in ({"experiment": "e"}, [1]):
        with pytest.raises(ValueError, match="no record"):
            Record.load(write_json(tmp_path / "a.json", content))
    (tmp_path / "torn.json").write_text('{"experiment"')
    with pytest.raises(ValueError, match="no record"):
        Record.load(tmp_path / "torn.json")
    with pytest.raises(ValueError, match=f"{', '.join(TIERS)}, got 'big'"):
        Record("e", tier="big")


def test_progress_is_silent_here_and_speaks_in_a_terminal(capsys, monkeypatch):
    assert list(progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(3), description="epoch", unit="img"):
        time.sleep(0.12)
    shown = capsys.readouterr().err
    assert "epoch" in shown and "3/3" in shown and re.search(r"img/s|s/img", shown)
    assert records.progress(range(3), show=False).disable
    monkeypatch.setenv("CI", "true")
    assert records.progress(range(3)).disable


def test_progress_shows_in_a_notebook(monkeypatch):
    kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stderr", kernel())
    assert not records.progress(range(3)).disable
    assert records.progress(range(3), show=False).disable
