"""Modules, notebooks and their export agree; notebooks are clean."""
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import NOTEBOOKS, ROOT


def tool(name: str, *args: str, cwd: Path) -> None:
    run = subprocess.run([Path(sys.executable).parent / name, *args], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def copy(tmp_path: Path) -> Path:
    for name in ("settings.ini", "nbs", "jat_nb", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_package_is_what_the_notebooks_export(tmp_path):
    there = copy(tmp_path)
    tool("nbdev_export", cwd=there)
    ours, fresh = ({str(p.relative_to(root)) for p in (root / "jat_nb").rglob("*.py")} for root in (ROOT, there))
    stale = [name for name in sorted(ours) if not filecmp.cmp(ROOT / name, there / name, False)]
    extra = fresh - ours
    assert not stale and not extra, f"run `make export`: {stale} {sorted(extra)}"


def test_notebooks_are_clean(tmp_path):
    there = copy(tmp_path)
    tool("nbdev_clean", cwd=there)
    dirty = [p.name for p in NOTEBOOKS if not filecmp.cmp(p, there / "nbs" / p.name, False)]
    assert not dirty, f"run `make export`: {dirty}"
