"""Every notebook runs from top to bottom at the smoke tier, as a test of its own."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    command = [Path(sys.executable).parent / "nbdev_test", "--path", str(path), "--n_workers", "0"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
