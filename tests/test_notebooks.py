"""Every notebook runs from top to bottom at the smoke tier, as a test of its own."""
import multiprocessing
import os
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT
from nbdev.test import test_nb as run_cells

SLOW_IMPORTS = ["cvxpy", "matplotlib.pyplot", "pandas", "sklearn.datasets", "timm", "torch", "torchvision"]


@pytest.fixture(scope="module")
def fresh():
    "Processes that have made the slow imports, once for all of them, and nothing else."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context


def run(path: Path, log: Path) -> None:
    "Run a notebook in this process, which ends with it; what it prints goes to a file."
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2): os.dup2(stream, standard)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    good, _ = run_cells(path, basepath=ROOT)
    raise SystemExit(0 if good else 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, fresh, tmp_path):
    log = tmp_path / "log.txt"
    process = fresh.Process(target=run, args=(path, log))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()[-4000:]
