"""Shared set-up: one thread per worker, no progress bars, and the notebooks as test data."""
import json
from pathlib import Path

import pytest
import torch

from jat_nb.attacks import ATTACKS
from jat_nb.objectives import networks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("_"))

torch.set_num_threads(1)

ALONE = sorted(name for name in ATTACKS if not networks(ATTACKS[name]))  # the others stand on trained networks
ASCENTS = sorted(name for name in ALONE if "random_start" in ATTACKS[name].__kwdefaults__)  # the others search
CHANGING = {"jpeg", "fog", "snow"}  # threats without the identity: they change an image at zero budget too


def cells(path: Path) -> list[dict]:
    "Cells of a notebook, with `source` joined to one string."
    return [{**c, "source": "".join(c["source"])} for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
