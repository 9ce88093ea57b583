"Runs that are killed without warning, and runs that several processes share."
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.data import ImageSet
from jat_nb.evaluation import evaluate, jat_suite
from jat_nb.records import read_jsonl
from jat_nb.recipes import Recipe
from jat_nb.training import fit

JOINT = dict(objective="jat", attacks={"attack": [["double_pass", {
    "steps": 1, "eps_pixel": 8 / 255, "step_pixel": 8 / 255, "eps_flow": 0.3, "step_flow": 0.3}]]})
PROBED = dict(probe="pgd", probe_options={"steps": 1}, probe_images=10)
RECIPE = Recipe(**JOINT, **PROBED, epochs=30, batch_size=16, milestones=(12, 20), ema=0.9, clip_norm=5.0)


def images(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.randint(0, 100, (n, 1, 8, 8), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return ImageSet("toy", x.to(torch.uint8), labels, ("a", "b", "c"))


def net(seed=0, norm=nn.BatchNorm2d, drop=0.2):
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(4) if norm is nn.BatchNorm2d else nn.GroupNorm(2, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer, nn.ReLU(), nn.Dropout(drop),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def train(out, seed=0, seconds=float("inf"), started=None):
    torch.set_num_threads(1)
    model = net(seed)
    if started is not None:
        started.set()
    return model, fit(model, images(), RECIPE, validation=images(20, 1), out=out, seconds=seconds)


def test_twenty_kills_at_random_moments(tmp_path):
    start = time.perf_counter()
    whole, expected = train(tmp_path / "whole")
    length = time.perf_counter() - start
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jat_nb.training", "jat_nb.evaluation", "pytest"])
    moments, killed, attempt, reach = random.Random(0), 0, 0, length / 16
    resume = tmp_path / "run" / "resume.safetensors"
    position = lambda: resume.stat().st_mtime_ns if resume.exists() else None
    log = tmp_path / "run" / "log.jsonl"
    finished = lambda: log.exists() and len(read_jsonl(log)) == RECIPE.epochs
    while (killed < 20 or not resume.exists()) and not finished():
        attempt, before = attempt + 1, position()
        # a slice of time in every third attempt, so that kills also meet checkpoints in the middle of an epoch
        options = {"seconds": length / 30} if attempt % 3 == 0 else {}
        started = context.Event()
        child = context.Process(target=train, args=(tmp_path / "run",), kwargs={"started": started, **options})
        child.start()
        started.wait(60)
        time.sleep(moments.uniform(0, reach / 2 if options else reach))
        child.kill()
        child.join()
        killed += child.exitcode == -9 and not finished()
        reach *= 1.3 if position() == before else 0.6  # a busy machine needs longer to get anywhere
        assert attempt < 100
    assert killed >= 20
    model, history = train(tmp_path / "run", seed=99)  # other initial weights: those on disk count
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))
    bare = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert bare(history) == bare(expected) == bare(read_jsonl(tmp_path / "run" / "log.jsonl"))


PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_interrupted import RECIPE, SHARED, evaluated, images, net
from jat_nb.records import processes
from jat_nb.training import fit

torch.set_num_threads(1)
model = net(norm=getattr(torch.nn, {norm!r}), drop=0)
history = fit(model, images(), SHARED, validation=images(20, 1), out={out!r})
bits, passes = evaluated(model)
assert processes().count == 2
if processes().rank == 0:
    torch.save({{"weights": model.state_dict(), "loss": [r["loss"] for r in history], "bits": bits, "passes": passes}}, {out!r} + "/ends.pt")
"""
SHARED = Recipe(**JOINT, **PROBED, epochs=3, batch_size=15, milestones=(2,))


def evaluated(model):
    data = images(37, 2)
    found = evaluate(model, data.x, data.labels, jat_suite(eps_pixel=0.1, eps_flow=0.5, steps=3))
    return found.correct, found.passes


@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm"])
def test_two_processes_are_one(tmp_path, norm):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent), out=str(tmp_path / "two"), norm=norm))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)],
                          capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two" / "ends.pt")
    one = net(norm=getattr(nn, norm), drop=0)
    history = fit(one, images(), SHARED, validation=images(20, 1))
    assert_close(two["weights"], dict(one.state_dict()), rtol=1e-3, atol=1e-4)
    assert_close(two["loss"], [r["loss"] for r in history], rtol=1e-4, atol=1e-5)
    one.load_state_dict(two["weights"])
    bits, passes = evaluated(one)
    assert torch.equal(two["bits"], bits) and torch.equal(two["passes"], passes)
    assert len(read_jsonl(tmp_path / "two" / "log.jsonl")) == 3


@pytest.mark.parametrize("weights, message", [(b"not a checkpoint", "does not hold a run"), (b"", "does not hold a run")])
def test_a_damaged_checkpoint_is_named(tmp_path, weights, message):
    train(tmp_path, seconds=0)
    (tmp_path / "resume.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=message): train(tmp_path)


def test_a_damaged_claim_is_named(tmp_path):
    train(tmp_path, seconds=0)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"): train(tmp_path)
