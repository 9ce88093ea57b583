"Several processes on one machine: what they agree on, what they exchange, and how they part."
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from jat_nb import processes as module
from jat_nb.models import bare, create
from jat_nb.processes import agree, distribute, from_first, on_first, own_device, processes, report_lost, total


def launch(work, *arguments, count=2, timeout=150):
    "Run `work(*arguments)` of a test file in several processes; exit codes and what they printed, in order of rank."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = (f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import {work.__module__} as t; "
               f"t.torch.set_num_threads(1); t.{work.__name__}(*{tuple(map(str, arguments))!r})")
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, "-c", program], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(count)]
    try:
        said = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, text) for child, text in zip(children, said)]


def well(results):
    for code, text in results:
        assert code == 0, text[-3000:]


# Alone

def test_one_process_pays_nothing():
    program = ("import sys, torch; from jat_nb.processes import agree, copy_buffers, distribute, from_first, on_first, total; m = torch.nn.Linear(1, 1)\n"
               "with distribute(m) as w: assert w is m and vars(m).keys() == vars(torch.nn.Linear(1, 1)).keys()\n"
               "assert total(torch.ones(2)).tolist() == [1, 1] and from_first(3) == on_first(lambda: 3) == 3\n"
               "agree({}), copy_buffers(m); assert 'accelerate' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_the_card_is_chosen_before_anything_moves(monkeypatch):
    class State:
        device = torch.device("cuda:3")
    monkeypatch.setattr(module, "processes", lambda: module.Processes(3, 8))
    monkeypatch.setattr(module, "_state", State)
    assert own_device("cuda") == own_device("cuda:0") == torch.device("cuda:3")
    with pytest.raises(ValueError, match="leave it out or name .cuda"): own_device("cpu")


@pytest.mark.parametrize("name, options", [("resnet18_cifar", {}), ("efficientnet_b0", {})])
def test_batch_norm_of_all_cards_and_back(name, options):
    model = create(name, **options)
    parts = {k: id(v) for k, v in model.named_modules()}
    tensors = {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    with module._statistics_of_all(model):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
        assert tensors == {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
        acts = [type(m.act) for m in norms if hasattr(m, "act")]
        model.eval()
    assert parts == {k: id(v) for k, v in model.named_modules()} and not any(m.training for m in model.modules())
    assert acts == [type(m.act) for m in model.modules() if isinstance(m, _BatchNorm) and hasattr(m, "act")]


def test_engines_that_are_not_data_parallel_are_refused(monkeypatch):
    class State:
        class distributed_type: value = "DEEPSPEED"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "_state", State)
    with pytest.raises(ValueError, match="DEEPSPEED: use torchrun"): processes()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="size mismatch"):
        with report_lost(): raise RuntimeError("size mismatch")


# Two processes

def exchange():
    rank, count = processes()
    assert (count, total(torch.tensor([[1.0, rank]])).tolist()) == (2, [[2.0, 1.0]])
    assert total(torch.tensor([True, False]).int()).tolist() == [2, 0]
    assert from_first({"w": torch.full((2,), float(rank))})["w"].tolist() == [0, 0]
    seen = []
    assert on_first(lambda: seen.append(1) or rank + 5) == 5 and len(seen) == 1 - rank
    with pytest.raises(ValueError, match="full"): on_first(lambda: raised("the disk is full"))
    agree({"a": [1, 2]})
    with pytest.raises(ValueError, match='train is "digits" in process 0 and "mnist" in process 1'):
        agree({"train": ["digits", "mnist"][rank], "a": 1})
    with pytest.raises(ValueError, match="b is missing in process 0"): agree({"b": 1} if rank else {})
    gradients()
    if rank == 1:
        os._exit(0)
    with pytest.raises(ConnectionError, match="process 0 of 2 has lost another one"):
        with report_lost(): total(torch.ones(1))


def raised(message):
    raise ValueError(message)


def small(norm, seed=0):
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()


def two_losses(model, x, y):
    "Clean and changed images in one graph, with something in between that looks at the bare model."
    clean = nn.functional.cross_entropy(model(x), y)
    probe = x.clone().requires_grad_()
    step, = torch.autograd.grad(bare(model)(probe).square().sum(), probe)
    return clean + nn.functional.cross_entropy(model(x + 0.1 * step.sign()), y)


def gradients():
    "Two forwards before one backward; unequal pieces weigh by their images; the model comes back as it was."
    rank, count = processes()
    x, y = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 3
    mine = [slice(0, 5), slice(5, 7)][rank]
    for norm in ("group", "batch"):
        model = small(norm)
        before = set(vars(model))
        with distribute(model) as shared:
            assert bare(shared) is model and shared is not model
            (two_losses(shared, x[mine], y[mine]) * len(y[mine]) / 7 * count).backward()
            module.copy_buffers(model)
        assert set(vars(model)) == before
        tensors = [p.grad for p in model.parameters()] + list(model.buffers())
        for t in tensors:
            assert torch.equal(t, from_first(t))
        if norm == "group":
            alone = small(norm)
            two_losses(alone, x, y).backward()
            assert_close([p.grad for p in model.parameters()], [p.grad for p in alone.parameters()], rtol=1e-4, atol=1e-6)
        model(x).sum().backward()  # no hook is left behind: this would wait for the other process


def test_two_processes_exchange_agree_and_part():
    well(launch(exchange))


def test_nothing_distributed_is_made_by_hand():
    for path in (Path(__file__).parent.parent / "jat_nb").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "all_reduce" not in text and "F.batch_norm =" not in text, path.name


# What the first process does alone

def judge_after_every_epoch(place):
    from jat_nb.data import load
    from jat_nb.evaluation import evaluate, pgd_at
    from jat_nb.recipes import Recipe
    from jat_nb.training import fit

    torch.manual_seed(0)
    seen, held_out = [], load("digits", "test").subset(12)
    def judge(row, network):
        found = evaluate(network, held_out.x, held_out.labels, {"PGD": pgd_at(8 / 255, steps=1)})
        seen.append((len(found.correct[0]), processes().count))
    recipe = Recipe(epochs=1, batch_size=16, amp=False, probe_images=4, probe_options={"steps": 1})
    model = create("wrn_10_1_cifar", num_classes=10, in_chans=1)
    fit(model, load("digits", "train").subset(32), recipe, validation=held_out, on_epoch=judge)
    assert seen == ([(12, 1)] if processes().rank == 0 else []) and processes().count == 2
    Path(place, str(processes().rank)).touch()


def test_an_epoch_can_be_judged_by_the_first_process_alone(tmp_path):
    well(launch(judge_after_every_epoch, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
