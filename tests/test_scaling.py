"The commands and the cost model of the chapter on more cards."
import os
import re
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cells
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jat_nb.batches import batches
from jat_nb.data import load
from jat_nb.models import create
from jat_nb.recipes import Recipe, bind
from jat_nb.schedules import make_optimizer
from jat_nb.updates import train_step

PAGE = "\n".join(cell["source"] for cell in cells(ROOT / "nbs" / "92_scaling_out.ipynb") if cell["cell_type"] == "markdown")
SHOWN = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.strip().replace("\\\n", " ").splitlines()]
SMALL = {"jat_train": "--data digits --tier smoke --images 128 --set epochs=1 batch_size=128 --threads 1 --device cpu",
         "jat_eval": "--n 4 --steps 1 --threads 1 --device cpu"}


def smaller(words, port):
    "The same command for two processes on this machine, on digits."
    start = next(i for i, word in enumerate(words) if word in SMALL)
    nodes = "--nnodes" in words
    for option, value in (("--nproc-per-node", "1" if nodes else "2"), ("--num_processes", "2"), ("--nnodes", "2"),
                          ("--rdzv-endpoint", f"127.0.0.1:{port}")):
        if option in words:
            words = [*words[:words.index(option) + 1], value, *words[words.index(option) + 2:]]
    words = ["--cpu" if word == "--multi_gpu" else word for word in words]
    return [*words[:start], words[start], *words[start + 1:], *SMALL[words[start]].split()], 2 if nodes else 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the GPUs")
def test_every_command_runs_with_two_processes(tmp_path):
    assert [Path(words[0]).name for words in SHOWN] == ["torchrun", "torchrun", "accelerate", "torchrun"]
    bin = Path(sys.executable).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{bin}:{os.environ['PATH']}"}
    for words in SHOWN:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command, machines = smaller(words, port)
        running = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for _ in range(machines)]
        said = [child.communicate(timeout=240) for child in running]
        assert all(child.returncode == 0 for child in running), (command, said[0][1][-2000:])
        assert sum("runs/" in line for out, _ in said for line in out.splitlines()) == 1  # one process speaks for all
    runs = {path.parent.name for path in tmp_path.glob("runs/*/last.safetensors")}
    assert runs == {"four", "natural", "sixty-four"} and (tmp_path / "runs" / "four" / "eval-jat.json").exists()


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("layer, shape, by_hand", [
    (nn.Linear(7, 5), (3, 7), 2 * 3 * 7 * 5),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (1, 4, 9, 9), 2 * 3 * 3 * 4 * 6 * 5 * 5),
    (nn.Conv2d(4, 6, 1, groups=2), (2, 4, 5, 5), 2 * 2 * 2 * 6 * 5 * 5),
])
def test_the_counter_counts_as_by_hand(layer, shape, by_hand):
    assert flops(lambda: layer(torch.rand(shape))) == by_hand


@pytest.mark.parametrize("attack, options, passes", [
    (None, {}, 3), ("fgsm", {}, 5), ("ggsm", {"steps": 2}, 7), ("one_pass", {"steps": 3}, 9), ("double_pass", {"steps": 2}, 11)])
def test_passes_of_a_training_step(attack, options, passes):
    attacked = {"objective": "adversarial", "attacks": {"attack": [[attack, options]]}} if attack else {}
    recipe, model = Recipe(epochs=1, **attacked), create("wrn_10_1_cifar", in_chans=1).train()
    batch, bound = next(batches(load("digits"), 4)), bind(recipe)
    step = partial(train_step, model, batch, make_optimizer(model, recipe), bound.objective, bound.attacks)
    assert flops(step) / flops(lambda: model(batch.x)) == pytest.approx(passes, rel=0.04)
