"A flow through the trainer and the shell: judged in bits, resumed to the bit, handed to whoever stands on it."
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_processes import launch, well
from torch import nn
from torch.testing import assert_close

from jat_nb.batches import Batch
from jat_nb.catalogue import _REGISTERED, Paper, register, setting
from jat_nb.checkpoints import best_row
from jat_nb.cli import jat_attack, jat_eval, jat_train
from jat_nb.data import load
from jat_nb.flow_layers import ActNorm
from jat_nb.glow import Glow, round_trip_error
from jat_nb.judging import classifies, judge, open_classifier, open_run, sources_for
from jat_nb.models import create
from jat_nb.objectives import JUDGES, OBJECTIVES, judge_flow, likelihood, roles
from jat_nb.processes import from_first, processes
from jat_nb.randomness import image_generators
from jat_nb.recipes import Recipe
from jat_nb.records import read_jsonl
from jat_nb.training import fit
from jat_nb.weights import check_rebuildable, load_weights, save_weights, start_from, tensor_hash, write_tensors

SMALL = {"levels": 2, "steps": 2, "width": 16}
FLOW = Recipe(objective="likelihood", data="digits", model="glow", model_options=SMALL, epochs=4, batch_size=32,
              optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="piecewise", knots=((0, 0.05), (1, 1)),
              augment=(), clip_norm=100.0, probe_images=16)


def small_digits(n=160):
    whole = load("digits")
    return replace(whole, images=whole.images[:n, :, ::4, ::4], labels=whole.labels[:n]).split(32)


def new_flow(seed=0, size=8, **options):
    torch.manual_seed(seed)
    return create("glow", in_chans=1, size=size, **{**SMALL, **options})


@pytest.fixture(scope="module")
def toy():
    "A paper with a flow, and with a classifier that stands on it."
    attacks = {"attack": [["jsa", {"steps": 1}]]}
    above = Recipe(objective="adversarial", attacks=attacks, needs={"flow": "toy/glow"}, data="digits", epochs=1,
                   batch_size=32, model="wrn_10_1_cifar", probe="pgd", probe_options={"steps": 1}, probe_images=16)
    kept = ("epochs", "schedule", "knots", "weight_decay", "amp", "channels_last", "batch_size")
    register(Paper("toy", "Toy", {"toy/glow": replace(FLOW, epochs=2, essential=kept), "toy/above": above}))
    yield "toy"
    _REGISTERED.pop("toy")


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy):
    "The folder of a finished flow, trained by the shell on 32 x 32 digits."
    folder = tmp_path_factory.mktemp("flow") / "glow"
    assert jat_train(recipe=["toy/glow"], out=str(folder), tier="smoke", images=64, device="cpu") == 0
    return folder


# Building and files

def test_create_builds_what_the_metadata_says():
    flow = create("glow", in_chans=3, size=16, num_classes=7, mean=(0.5,) * 3, std=(1.0,) * 3, levels=3, steps=1, width=8)
    assert isinstance(flow, Glow) and flow.training and flow.shape == (3, 16, 16)
    assert flow.metadata == {"name": "glow", "in_chans": 3, "size": 16, "options": {"levels": 3, "steps": 1, "width": 8}}
    assert create("glow", size=16, width=8, steps=1).metadata["options"] == {"levels": 4, "steps": 1, "width": 8}
    check_rebuildable(flow)


@pytest.mark.parametrize("call, message", [
    (dict(), "size=32"), (dict(size=32, depth=3), "levels, steps, width, got depth"),
    (dict(size=4), "choose fewer levels"),
])
def test_create_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        create("glow", **call)


def test_a_file_gives_the_flow_back(tmp_path):
    flow, x = new_flow(), torch.rand(6, 1, 8, 8)
    flow.initialise(x)
    again = load_weights(save_weights(flow.eval(), tmp_path / "a.safetensors", metadata={"record": {"epoch": 1}}))
    assert isinstance(again, Glow) and not again.training and again.metadata["record"] == {"epoch": 1}
    assert again.latent_shapes == flow.latent_shapes
    assert_close(again.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
    assert_close(again.decode(again.encode(x)), x, rtol=0, atol=1e-4)
    on = start_from(tmp_path / "a.safetensors", 10)
    assert on.training and all(m.initialised for m in on.modules() if isinstance(m, ActNorm))


@pytest.mark.parametrize("change, message", [
    ({"size": None}, "size as numbers above 0"), ({"in_chans": 2}, "other tensors"),
    ({"options": {**SMALL, "width": 10**12}}, "cannot build glow"), ({"options": {**SMALL, "width": 8}}, "other tensors"), ({"options": {**SMALL, "steps": "two"}}, "whole numbers, got 'two'"),
    ({"options": {"loader": "x"}}, "cannot hold the option loader"), ({"name": ["glow"]}, "lacks"),
])
def test_headers_that_lie_are_refused(tmp_path, change, message):
    flow = new_flow(levels=3)
    file = write_tensors(tmp_path / "a.safetensors", flow.state_dict(), {**flow.metadata, **change})
    with pytest.raises(ValueError, match=message):
        load_weights(file)


# Objective and judge

def test_likelihood_is_the_mean_of_bits_with_the_noise_of_the_batch():
    flow, x = new_flow(), small_digits()[0].x[:8]
    flow.initialise(x)
    batch = lambda: Batch(x, torch.zeros(8, dtype=torch.int64), torch.Generator().manual_seed(3))
    assert_close(likelihood(flow, batch()), flow.bits_per_dim(x, torch.Generator().manual_seed(3)).mean(), rtol=0, atol=0)
    assert roles(likelihood) == () and OBJECTIVES["likelihood"] is likelihood and set(JUDGES) == {"likelihood", "vae_gan"}
    with pytest.raises(ValueError, match="trains a flow, got Sequential"):
        likelihood(nn.Sequential(), batch())
    with pytest.raises(ValueError, match="call initialise"):
        likelihood(new_flow(), batch())


def test_the_judge_does_not_depend_on_batches_and_leaves_the_flow_alone():
    flow, held = new_flow(), small_digits(700)[0]
    flow.initialise(held.x[:32])
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    found = judge_flow(flow, held, held.subset(9))
    assert found == judge_flow(flow, held, held.subset(9)) and flow.training and list(found) == ["val_bits_per_dim", "round_trip"]
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    with torch.no_grad():
        alone = [flow.eval().bits_per_dim(held.x[i:i + 1], image_generators(0, [i])).item() for i in (0, 300, 667)]
        together = flow.bits_per_dim(held.x, image_generators(0, range(len(held))))
    assert_close(together[[0, 300, 667]], torch.tensor(alone), rtol=1e-5, atol=1e-5)
    assert_close(found["val_bits_per_dim"], together.mean().item(), rtol=1e-5, atol=0)
    assert_close(found["round_trip"], round_trip_error(flow, held.x[:9]).max().item(), rtol=0.5, atol=1e-6)


def test_a_flow_that_fails_says_so():
    flow, held = new_flow(), small_digits()[1]
    flow.initialise(held.x)
    with torch.no_grad():
        next(flow.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        judge_flow(flow, held, held)


# Training

def test_bits_fall_and_the_row_has_no_accuracy():
    train, held = small_digits()
    history = fit(flow := new_flow(), train, FLOW, validation=held)
    bits = [row["val_bits_per_dim"] for row in history]
    assert bits == sorted(bits, reverse=True) and bits[-1] < bits[0] - 0.05 and bits[-1] < 8
    assert all(0 < row["round_trip"] < 1e-3 for row in history) and not flow.training
    assert not any(key in row for row in history for key in ("val_clean", "val_robust", "collapsed", "one_answer"))
    assert_close(judge_flow(flow, held, held.subset(16))["val_bits_per_dim"], bits[-1])


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}])
def test_a_run_in_slices_ends_with_the_same_bits(tmp_path, more):
    (train, held), recipe = small_digits(), replace(FLOW, epochs=2, **more)
    history = fit(whole := new_flow(), train, recipe, validation=held, out=tmp_path / "whole")
    rows, starts = [], []
    while len(rows) < 2:  # one batch for each call, every time from other weights
        rows = fit(sliced := new_flow(seed=len(starts)), train, recipe, validation=held, out=tmp_path / "cut", seconds=0)
        starts.append(sliced)
    assert len(starts) == 8
    without = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in (rows, history)]
    assert without[0] == without[1]
    loaded = [load_weights(tmp_path / part / "last.safetensors") for part in ("whole", "cut")]
    for k, v in whole.state_dict().items():
        assert all(torch.equal(other.state_dict()[k], v) for other in (sliced, *loaded)), k
    assert_close(loaded[1].log_prob(held.x), whole.log_prob(held.x), rtol=0, atol=0)
    facts = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert facts["model"] == new_flow().metadata and "judge" not in facts["recipe"] and facts["own"] == {}


def test_the_first_batch_starts_a_flow_and_no_later_one(monkeypatch, tmp_path):
    calls = []
    own = Glow.initialise
    monkeypatch.setattr(Glow, "initialise", lambda self, *given: (calls.append(len(given[0])), own(self, *given))[1])
    (train, _), recipe = small_digits(), replace(FLOW, epochs=1)
    for _ in range(3):
        fit(new_flow(), train, recipe, out=tmp_path / "run", seconds=0)
    assert calls == [32]
    fit(new_flow(), train, replace(FLOW, epochs=1, accumulate=4))
    assert calls == [32, 32]  # the whole batch, whatever parts it is worked through in


def test_the_best_epoch_needs_the_fewest_bits(tmp_path):
    (train, held), recipe = small_digits(), replace(FLOW, epochs=3, schedule="piecewise", knots=((0, 1), (2, 1), (2, 60), (3, 60)))
    history = fit(new_flow(), train, recipe, validation=held, out=tmp_path / "run")
    best = min(history, key=lambda row: row["val_bits_per_dim"])
    kept = load_weights(tmp_path / "run" / "best.safetensors")
    assert best_row(history) is best and kept.metadata["record"] == best


def test_another_judge_may_stand_in(tmp_path):
    (train, held), recipe = small_digits(), replace(FLOW, epochs=1)
    seen = []

    def widest(model, validation, few):
        seen.append((len(validation), len(few)))
        return {"widest": 3.5}
    row = fit(new_flow(), train, recipe, validation=held, judge=widest)[-1]
    assert row["widest"] == 3.5 and seen == [(32, 16)] and "val_bits_per_dim" not in row


@pytest.mark.parametrize("options, message", [
    (dict(model="wrn_10_1_cifar"), "'likelihood' trains no classifier, the recipe has model='wrn_10_1_cifar': .*glow"),
    (dict(objective="natural"), "'natural' trains a classifier, the recipe has model='glow'"),
    (dict(attacks={"attack": [["pgd", {}]]}), "needs attacks for the roles"),
    (dict(objective_options={"beta": 1.0}), "takes no options"),
])
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        replace(FLOW, **options)


# The shell

def test_the_shell_trains_a_flow(run, capsys):
    rows = read_jsonl(run / "log.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["val_bits_per_dim"] < rows[0]["val_bits_per_dim"] < 8.5
    facts, flow = open_run(run)
    assert isinstance(flow, Glow) and flow.shape == (1, 32, 32) and facts["about"]["shape"] == [1, 32, 32]
    assert not classifies(run) and sources_for(run.parent, "jat", [run]) == []
    assert jat_train(recipe=["toy/glow"], out=str(run), tier="smoke", images=64, device="cpu") == 0
    said = capsys.readouterr().out
    assert f"all of 2 epochs, validation {rows[1]['val_bits_per_dim']:.3f} bits/dim, there and back within" in said
    assert "clean" not in said


def test_a_classifier_stands_on_its_folder(run, tmp_path, capsys):
    out = tmp_path / "above"
    assert jat_train(recipe=["toy/above"], out=str(out), tier="smoke", images=64, needs=[f"flow={run}"], device="cpu",
                     set_=["epochs=1"]) == 0
    facts = json.loads((out / "run.json").read_text())
    flow = open_run(run)[1]
    assert facts["needs"] == {"flow": tensor_hash(flow.state_dict())} and "val_robust" in read_jsonl(out / "log.jsonl")[0]


def test_a_missing_flow_is_named_with_its_command_and_another_is_another_run(run, tmp_path):
    "C18 for flows: the command of the message is the one that trained `run`, and a changed weight of the flow changes the run."
    common = dict(recipe=["toy/above"], tier="smoke", images=64, device="cpu", set_=["epochs=1"])
    with pytest.raises(ValueError, match="jat_train --recipe toy/glow .*pass --needs flow=FOLDER"):
        jat_train(out=str(tmp_path / "above"), **common)
    assert not (tmp_path / "above").exists()
    assert jat_train(out=str(tmp_path / "above"), needs=[f"flow={run}"], **common) == 0
    with pytest.raises(ValueError, match="--needs flow=.*is a run of 'toy/above', the recipe stands on 'toy/glow'"):
        jat_train(out=str(tmp_path / "third"), needs=[f"flow={tmp_path / 'above'}"], **common)
    other = tmp_path / "glow"
    shutil.copytree(run, other)
    flow = open_run(other)[1]
    with torch.no_grad(): next(flow.parameters()).add_(1e-3)
    save_weights(flow, other / "last.safetensors", metadata=flow.metadata)
    with pytest.raises(ValueError, match="holds another run .needs was .*flow"):
        jat_train(out=str(tmp_path / "above"), needs=[f"flow={other}"], **common)


def test_a_flow_is_not_judged_as_a_classifier(run, tmp_path):
    for work in (partial(judge, suite="jat", n=4), open_classifier, partial(jat_attack, images="x", out=str(tmp_path))):
        with pytest.raises(ValueError, match="names no classes: judge a classifier that stands on it"):
            work(run=str(run))


def test_jat_eval_passes_flows_over(run, capsys):
    with pytest.raises(ValueError, match="no finished run of a classifier.*train one to the end"):
        jat_eval(runs=[str(run)], device="cpu")
    assert "passed over, its network names no classes" in capsys.readouterr().out


def test_weights_for_another_size_are_refused(toy, tmp_path):
    flow = new_flow()
    flow.initialise(torch.rand(4, 1, 8, 8))
    file = save_weights(flow, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="takes images of 8 x 8, digits has others"):
        setting("toy/glow", init=file)


# Two processes

def own_noise(model, batch):
    "Bits per value with noise that depends on the image alone, whatever process it lies in."
    numbers = [int(v) for v in (255 * batch.x).round().flatten(1).double() @ torch.arange(64.0, dtype=torch.float64)]
    return model(batch.x, image_generators(0, numbers)).mean()


def descents():
    plain = replace(FLOW, epochs=2, batch_size=16, optimizer="sgd", momentum=0.0, schedule="constant", lr=1e-2)
    return {"own": (plain, own_noise), "likelihood": (plain, None)}


def both(folder):
    "What two processes make of a flow, beside what one made of it."
    train, held = small_digits(96)
    for name, (recipe, objective) in descents().items():
        alone = load_file(Path(folder) / f"{name}.safetensors")
        history = fit(flow := new_flow(seed=processes().rank), train, recipe, objective=objective, validation=held)
        for key, value in flow.state_dict().items():
            assert torch.equal(value, from_first(value)), key  # the same bits in both
        tolerance = {"own": 1e-5, "likelihood": 1e-3}[name]  # the noise of `likelihood` is drawn by each process
        assert_close(dict(flow.state_dict()), alone, rtol=tolerance, atol=tolerance)
        bits = [row["val_bits_per_dim"] for row in history]
        assert bits[1] < bits[0] and from_first(bits) == bits


def test_two_processes_train_a_flow_as_one_does(tmp_path):
    "ActNorm starts from the whole first batch in every process, before the batch is shared out."
    train, held = small_digits(96)
    for name, (recipe, objective) in descents().items():
        fit(flow := new_flow(), train, recipe, objective=objective, validation=held)
        save_file({k: v.contiguous() for k, v in flow.state_dict().items()}, tmp_path / f"{name}.safetensors")
    well(launch(both, tmp_path))
