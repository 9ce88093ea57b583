"A folder that belongs to one run and one process, and files that hold what was written."
import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn

from jat_nb.checkpoints import RESUME, add_stretch, claim, load_state, publish, restore, save_state, shortfall, state_tensors
from jat_nb.recipes import Recipe

HOLD = "import sys, time; from jat_nb.checkpoints import claim; claim(sys.argv[1], {'lr': 1}); print('mine', flush=True); time.sleep(60)"


def run(seed=0, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    own = optimizer(model.parameters(), lr=0.1, **options)
    model(torch.randn(8, 3)).square().sum().backward()
    own.step()
    return model, own


def test_a_folder_is_held_for_the_life_of_a_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="in use by another process"): claim(tmp_path, {"lr": 1})
    finally:
        holder.kill()
        holder.wait()
    assert claim(tmp_path, {"lr": 1}) == claim(tmp_path, {"lr": 1}) == tmp_path  # a kill leaves no lock behind


def test_of_two_that_start_at_once_one_is_refused(tmp_path):
    program = "import sys; from jat_nb.checkpoints import claim; input(); claim(sys.argv[1], {'lr': 1}); input()"
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both:
        p.stdin.write("\n"), p.stdin.flush()
    end = time.monotonic() + 90
    while all(p.poll() is None for p in both) and time.monotonic() < end:
        time.sleep(0.05)
    loser = next(p for p in both if p.poll() is not None)
    winner = next(p for p in both if p is not loser)
    assert "in use by another process" in loser.stderr.read() and winner.poll() is None
    winner.communicate("\n")
    assert winner.returncode == 0


def test_a_claim_counts_before_there_are_results(tmp_path):
    claim(tmp_path, {"recipe": {"lr": 0.1}, "train": "a"})
    with pytest.raises(ValueError, match="lr was 0.1, is 0.2"): claim(tmp_path, {"recipe": {"lr": 0.2}, "train": "a"})
    with pytest.raises(ValueError, match="own was None"): claim(tmp_path, {"recipe": {"lr": 0.1}, "train": "a", "own": {"probe": "p"}})


def test_stretches_append_and_keep_what_was_there(tmp_path):
    claim(tmp_path, {"lr": 1}, {"about": {"name": "x"}})
    for n in (1, 2): add_stretch(tmp_path, {"processes": n})
    claim(tmp_path, {"lr": 1}, {"about": {"name": "y"}})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "lr": 1, "about": {"name": "x"}, "stretches": [{"processes": 1}, {"processes": 2}]}


@pytest.mark.parametrize("name", [RESUME, "last.safetensors"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    from jat_nb.weights import read_tensors
    model, optimizer = run(momentum=0.9)
    save_state(tmp_path / RESUME, model, optimizer, {"epoch": 1})
    publish(tmp_path, model, [{"epoch": 1}])
    content = bytearray((tmp_path / name).read_bytes())
    content[-7] ^= 16
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"): read_tensors(tmp_path / name)
    if name == RESUME:
        with pytest.raises(ValueError, match="damaged"): load_state(tmp_path / name, *run())


@pytest.mark.parametrize("optimizer, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_numbers_travel_through_wrappers(optimizer, options):
    (a, opt_a), (b, opt_b) = run(0, optimizer, **options), run(1, optimizer, **options)
    average = torch.optim.swa_utils.AveragedModel(a)
    tensors = {k: v.clone() for k, v in state_tensors(torch.compile(a, backend="eager"), opt_a, average).items()}
    assert not any("_orig_mod" in k for k in tensors)
    other = torch.optim.swa_utils.AveragedModel(b)
    restore(tensors, torch.compile(b, backend="eager"), opt_b, other)
    assert all(torch.equal(v, tensors[k]) for k, v in state_tensors(b, opt_b, other).items())


@pytest.mark.parametrize("spoil", ["weight", "buffer", "moment"])
def test_numbers_that_are_not_finite_stay_off_the_disk(tmp_path, spoil):
    model, optimizer = run(momentum=0.9)
    save_state(tmp_path / RESUME, model, optimizer, {})
    before = (tmp_path / RESUME).read_bytes()
    moment = optimizer.state[model[0].weight]["momentum_buffer"]
    {"weight": model[2].bias.data, "buffer": model[1].running_mean, "moment": moment}[spoil].view(-1)[0] = torch.inf
    with pytest.raises(FloatingPointError): save_state(tmp_path / RESUME, model, optimizer, {})
    assert (tmp_path / RESUME).read_bytes() == before
    if spoil != "moment":
        with pytest.raises(FloatingPointError): publish(tmp_path, model, [{"epoch": 1}])
        assert not (tmp_path / "log.jsonl").exists()


def test_shortfall():
    rows = [{"iterations": 3}, {"iterations": 2}]
    assert [shortfall({"epochs": 2}, rows[:n]) for n in (0, 1, 2)] == ["0 of 2 epochs", "1 of 2 epochs", ""]
    counted = asdict(Recipe(iterations=5))
    assert [shortfall(counted, rows[:n]) for n in (0, 1, 2)] == ["0 of 5 iterations", "3 of 5 iterations", ""]
    assert shortfall({"epochs": 1}, rows) == "2 of 1 epochs" and shortfall({}, rows) == "2 of None epochs"
