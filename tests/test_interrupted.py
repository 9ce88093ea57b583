"Runs that are killed without warning, and runs that several processes share."
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import launch, well
from torch import nn
from torch.testing import assert_close

from jat_nb.data import ImageSet
from jat_nb.evaluation import evaluate
from jat_nb.models import create
from jat_nb.objectives import jat
from jat_nb.papers.jat import jat_suite
from jat_nb.processes import processes, until_interrupted
from jat_nb.recipes import Recipe
from jat_nb.records import read_jsonl
from jat_nb.training import fit
from jat_nb.updates import accuracy
from jat_nb.weights import read_tensors

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


# Two processes

SHARED = Recipe(**JOINT, **PROBED, epochs=3, batch_size=15, milestones=(2,))
FIXED = Recipe(objective="adversarial", attacks={"attack": [["pgd", {"steps": 2, "random_start": False}]]}, **PROBED,
               epochs=3, batch_size=17, milestones=(2,), augment=())  # pieces of 9 and 8
EVERYTHING = Recipe(**JOINT, **PROBED, epochs=2, batch_size=15, ema=0.9, clip_norm=1.0, accumulate=2, amp=True)
draws = []


def drawn(model, batch, attack):
    draws.append(torch.rand(1).item())  # what dropout would use next
    return jat(model, batch, attack)


def evaluated(model):
    data = images(37, 2)
    found = evaluate(model, data.x, data.labels, jat_suite(eps_pixel=0.1, eps_flow=0.5, steps=3))
    return found.correct, found.passes


def refuse_what_differs(rank):
    for message, options in [
        ("recipe.lr is 0.1 in process 0 and 0.2 in process 1", {"recipe": replace(SHARED, lr=0.1 * (1 + rank))}),
        ("train.pixels is ", {"train": images(seed=rank)}),
        ("model.mean is ", {"model": create("wrn_10_1_cifar", in_chans=1, num_classes=3, mean=[0.1 * rank])}),
        ("cannot share 1 images", {"recipe": replace(SHARED, batch_size=1)}),
    ]:
        given = {"model": net(), "train": images(), "recipe": SHARED} | options
        with pytest.raises(ValueError, match=message): fit(**given)


def several_runs(out):
    out, rank = Path(out), processes().rank
    refuse_what_differs(rank)
    fixed = net(norm=nn.GroupNorm, drop=0)
    history = fit(fixed, images(), FIXED, validation=images(20, 1))
    with pytest.raises(ValueError, match="lr was 0.1, is 0.3"):  # the refusal of the first reaches all
        fit(net(3), images(), SHARED, out=out / "whole")
        fit(net(3), images(), replace(SHARED, lr=0.3), out=out / "whole")
    unequal = net(seed=rank)
    own = set(vars(unequal))
    fit(unequal, images(), EVERYTHING, validation=images(20, 1), objective=drawn, out=out / "everything")
    assert set(vars(unequal)) == own and not unequal.training
    bits, passes = evaluated(fixed)
    torch.save({"fixed": fixed.state_dict(), "loss": [r["loss"] for r in history], "unequal": unequal.state_dict(),
                "val": history[-1]["val_clean"], "draws": draws, "bits": bits, "passes": passes}, out / f"ends-{rank}.pt")


def test_two_processes_train_one_network(tmp_path):
    well(launch(several_runs, tmp_path))
    first, second = (torch.load(tmp_path / f"ends-{rank}.pt") for rank in (0, 1))
    same = lambda what: all(torch.equal(a, b) for a, b in zip(first[what].values(), second[what].values()))
    assert same("fixed") and same("unequal") and not set(first["draws"]) & set(second["draws"])
    one = net(norm=nn.GroupNorm, drop=0)
    history = fit(one, images(), FIXED, validation=images(20, 1))
    assert_close(first["fixed"], dict(one.state_dict()), rtol=1e-3, atol=1e-4)
    assert_close(first["loss"], [r["loss"] for r in history], rtol=1e-4, atol=1e-5)
    one.load_state_dict(first["fixed"])
    assert accuracy(one, images(20, 1)) == first["val"]
    bits, passes = evaluated(one)
    assert torch.equal(first["bits"], bits) and torch.equal(first["passes"], passes)
    kept = net()
    kept.load_state_dict(load_file(tmp_path / "everything" / "last.safetensors"))
    assert_close(dict(kept.state_dict()), first["unequal"], rtol=0, atol=0)
    run = json.loads((tmp_path / "everything" / "run.json").read_text())
    assert [s["processes"] for s in run["stretches"]] == [2] and run["own"] == {"objective": "test_interrupted:drawn"}


def one_hears_ctrl_c(out):
    model, calls = net(seed=5), itertools.count(1)

    def stop(module, inputs):
        if processes().rank == 1 and module.training and next(calls) == 5: signal.raise_signal(signal.SIGINT)
    model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), until_interrupted(float("inf")) as seconds:
        fit(model, images(), SHARED, out=out, seconds=seconds)


def test_ctrl_c_in_one_process_saves_the_stretch_of_all(tmp_path):
    well(launch(one_hears_ctrl_c, tmp_path / "run"))
    assert read_tensors(tmp_path / "run" / "resume.safetensors")[1]["iteration"] > 0
    assert len(read_jsonl(tmp_path / "run" / "log.jsonl")) < SHARED.epochs
    well(launch(goes_on, tmp_path / "run"))
    well(launch(goes_on, tmp_path / "whole"))
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def goes_on(out):
    fit(net(seed=5), images(), SHARED, out=out)


def one_is_killed(out, at):
    model, calls = net(seed=5 + processes().rank), itertools.count(1)

    def stop(module, inputs):
        if processes().rank == 1 and module.training and next(calls) == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(stop)
    fit(model, images(), SHARED, out=out)


def test_one_of_two_processes_is_killed(tmp_path):
    (code, text), (killed, _) = launch(one_is_killed, tmp_path / "run", 6)
    assert killed == -9 and code == 1
    assert "ConnectionError: process 0 of 2 has lost another one and stops" in text.strip().splitlines()[-1]
    assert len(read_jsonl(tmp_path / "run" / "log.jsonl")) == 1
    well(launch(one_is_killed, tmp_path / "run", 0))
    well(launch(undisturbed, tmp_path / "whole"))
    ends = [load_file(tmp_path / d / "last.safetensors") for d in ("run", "whole")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    stretches = json.loads((tmp_path / "run" / "run.json").read_text())["stretches"]
    assert [s["from"] for s in stretches] == [{"epoch": 1, "iteration": 1}, {"epoch": 2, "iteration": 1}]


def undisturbed(out):
    fit(net(seed=5), images(), SHARED, out=out)


@pytest.mark.parametrize("weights, message", [(b"not a checkpoint", "does not hold a run"), (b"", "does not hold a run")])
def test_a_damaged_checkpoint_is_named(tmp_path, weights, message):
    train(tmp_path, seconds=0)
    (tmp_path / "resume.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=message): train(tmp_path)


def test_a_damaged_claim_is_named(tmp_path):
    train(tmp_path, seconds=0)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"): train(tmp_path)
