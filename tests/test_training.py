"Recipes, schedules, checkpoints, and the promise that a killed run ends where an undisturbed one would."
import itertools
import json
import math
import os
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import double_pass, pgd
from jat_nb.data import Batch, ImageSet, batches
from jat_nb.checkpoints import best_row, collapsed, load_state, save_state
from jat_nb.models import create, load_weights
from jat_nb.objectives import OBJECTIVES, jat, natural
from jat_nb.records import read_jsonl
from jat_nb.recipes import Recipe, bind, make_optimizer
from jat_nb.training import accuracy, fit, split_batch, train_step

TINY = dict(epochs=3, batch_size=16, milestones=(2,), probe="pgd", probe_options={"steps": 1}, probe_images=10)
NATURAL = Recipe(**TINY)
ONE_STEP = {"steps": 1, "step_pixel": 8 / 255, "step_flow": 0.3}
ATTACKED = {"attack": [["double_pass", ONE_STEP]]}
JOINT = Recipe(objective="jat", attacks=ATTACKED, **TINY)


def images(n=40, seed=0, side=8):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.randint(0, 100, (n, 1, side, side), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return ImageSet("toy", x.to(torch.uint8), labels, ("a", "b", "c"))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def killer(objective, at):
    calls = itertools.count(1)

    def killed(model, batch, **attacks):
        if next(calls) == at:
            raise KeyboardInterrupt
        return objective(model, batch, **attacks)
    return killed


# Steps

def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    model, data = net().train(), images()
    before = {k: v.clone() for k, v in model.named_parameters()}
    broken = lambda model, batch, **attacks: natural(model, batch) * math.inf
    with pytest.raises(FloatingPointError, match="inf"):
        train_step(model, next(iter(batches(data, 8))), make_optimizer(model, NATURAL), broken)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 1 of 3: lower lr"):
        fit(net(), data, NATURAL, objective=broken)


@pytest.mark.parametrize("options", [{}, {"amp": True}, {"channels_last": True}, {"optimizer": "adamw", "lr": 0.01},
                                     {"augment": (), "schedule": "onecycle"}])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_trains(objective, options):
    attacks = {} if objective == "natural" else ATTACKED
    recipe = Recipe(objective=objective, attacks=attacks, **{**TINY, **options, "epochs": 4})
    model, data = net(), images(64)
    history = fit(model, data, recipe, validation=images(20, seed=1))
    assert [r["epoch"] for r in history] == [1, 2, 3, 4] and all(math.isfinite(r["loss"]) for r in history)
    assert history[-1]["loss"] < history[0]["loss"] and not model.training
    assert all(0 <= r["val_robust"] <= 1 and 0 <= r["val_clean"] <= 1 for r in history)


def test_callables_override_names():
    seen = []

    def attack(model, x, y, *, target=None, generator=None):
        seen.append(len(x))
        return x
    madry = Recipe(objective="adversarial", attacks={"attack": [["pgd", {"steps": 7}]]}, **TINY)
    fit(net(), images(16), madry, attacks={"attack": attack})
    assert seen == [16] * 3
    fit(net(), images(16), NATURAL, validation=images(6), probe=attack, objective=lambda m, b: natural(m, b))
    assert seen[3:] == [6] * 3


def test_the_callers_randomness_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = net()
    torch.manual_seed(3)
    fit(model, images(), NATURAL)
    assert torch.equal(torch.rand(3), expected)


def test_accuracy():
    model, data = net().train(), images(30)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attack = partial(pgd, eps=0.2, steps=2)
    assert accuracy(model, data, attack) == accuracy(model, data, attack)
    assert accuracy(model, data, attack) <= accuracy(model, data)
    assert accuracy(model, data, batch_size=7) == accuracy(model, data) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_best_is_the_later_of_equals():
    rows = [dict(epoch=e, val_robust=a) for e, a in ((1, 0.1), (2, 0.4), (3, 0.4), (4, 0.3))]
    assert best_row(rows)["epoch"] == 3


# Runs on disk

@pytest.mark.parametrize("objective", ["natural", "jat"])
@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.1), ("adamw", 0.01)])
@pytest.mark.parametrize("at", [2, 4, 6, 9])
def test_a_killed_run_ends_bit_identical(tmp_path, objective, optimizer, lr, at):
    recipe = replace(NATURAL if objective == "natural" else JOINT, optimizer=optimizer, lr=lr)
    data, held = images(), images(20, seed=1)
    whole, resumed = net(), net(seed=7 if at > 3 else 0)
    expected = fit(whole, data, recipe, validation=held, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data, recipe, validation=held, out=tmp_path / "run",
            objective=killer(bind(recipe).objective, at))
    torch.manual_seed(99)  # what ran before in the process does not matter
    history = fit(resumed, data, recipe, validation=held, out=tmp_path / "run")
    assert equal(whole, resumed)
    bare = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert bare(history) == bare(expected) == bare(read_jsonl(tmp_path / "run" / "log.jsonl"))


@pytest.mark.parametrize("fails", ["last.safetensors", "best.safetensors", "log.jsonl", "resume.safetensors"])
def test_killed_between_two_files(tmp_path, monkeypatch, fails):
    data, held, real, seen = images(), images(20, seed=1), os.replace, itertools.count(1)
    whole = net()
    fit(whole, data, NATURAL, validation=held, out=tmp_path / "whole")

    def replace_once(src, dst, *args, **kwargs):
        if str(dst).endswith(fails) and next(seen) == 3:
            raise KeyboardInterrupt
        return real(src, dst, *args, **kwargs)

    monkeypatch.setattr(os, "replace", replace_once)
    try:
        fit(net(), data, NATURAL, validation=held, out=tmp_path / "run")
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    resumed = net(seed=5)
    history = fit(resumed, data, NATURAL, validation=held, out=tmp_path / "run")
    assert equal(whole, resumed) and [r["epoch"] for r in read_jsonl(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]
    for name in ("last", "best"):
        a, b = ((tmp_path / d / f"{name}.safetensors").read_bytes() for d in ("whole", "run"))
        assert a[-400:] == b[-400:]  # the weights; headers differ in seconds
    assert len(history) == 3 and not list((tmp_path / "run").glob("*.part"))


def test_a_finished_run_is_only_read(tmp_path):
    first, again = net(), net(seed=4)
    history = fit(first, images(), NATURAL, validation=images(20, 1), out=tmp_path)
    stamp = (tmp_path / "last.safetensors").read_bytes(), (tmp_path / "best.safetensors").read_bytes()
    assert fit(again, images(), NATURAL, validation=images(20, 1), out=tmp_path) == history
    assert equal(first, again) and not again.training
    assert stamp == ((tmp_path / "last.safetensors").read_bytes(), (tmp_path / "best.safetensors").read_bytes())


def test_another_run_is_refused_and_nothing_is_overwritten(tmp_path):
    fit(net(), images(), NATURAL, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="lr was 0.1, is 0.2"): fit(net(), images(), replace(NATURAL, lr=0.2), out=tmp_path)
    with pytest.raises(ValueError, match="train was"): fit(net(), images(24), NATURAL, out=tmp_path)
    with pytest.raises(ValueError, match="validation was"): fit(net(), images(), NATURAL, validation=images(9), out=tmp_path)
    with pytest.raises(ValueError, match="does not hold a run of this model"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), images(), NATURAL, out=tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before}


def test_the_folder_is_checked_before_any_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("here lies a file")
    calls = []
    with pytest.raises(ValueError, match="choose another folder"):
        fit(net(), images(), NATURAL, out=blocked / "run", objective=lambda *a, **k: calls.append(a))
    assert not calls


def test_weights_on_disk_rebuild_the_model(tmp_path):
    torch.manual_seed(0)
    model = create("wrn_10_1_cifar", num_classes=3, in_chans=1)
    history = fit(model, images(24), replace(NATURAL, epochs=2, milestones=(1,)), validation=images(9), out=tmp_path)
    last, best = load_weights(tmp_path / "last.safetensors"), load_weights(tmp_path / "best.safetensors")
    assert equal(last, model) and last.metadata["record"] == history[-1]
    assert best.metadata["record"] == best_row(history)


def test_state_holds_the_momentum(tmp_path):
    for recipe in (NATURAL, replace(NATURAL, optimizer="adamw"), replace(NATURAL, momentum=0.0)):
        a, b = net().eval(), net(1).eval()
        opt_a, opt_b = make_optimizer(a, recipe), make_optimizer(b, recipe)
        batch = Batch(images(8).x, images(8).labels, torch.Generator())
        train_step(a, batch, opt_a, natural)
        save_state(tmp_path / "s.safetensors", a, opt_a, {"epoch": 3})
        assert load_state(tmp_path / "s.safetensors", b, opt_b) == {"epoch": 3}
        train_step(a, batch, opt_a, natural), train_step(b, batch, opt_b, natural)
        assert equal(a, b)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"model": 1}, tmp_path / "resume.safetensors")
    with pytest.raises(ValueError, match="does not hold a run"):
        load_state(tmp_path / "resume.safetensors", net(), make_optimizer(net(), NATURAL))


# What the full-size trainer adds

def test_shares_add_up_to_the_batch():
    data = images(37)
    whole = next(iter(batches(data, 37)))
    parts = split_batch(whole, 5)
    assert [len(p.y) for p, _ in parts] == [8, 8, 7, 7, 7]
    assert torch.equal(torch.cat([p.x for p, _ in parts]), whole.x) and math.isclose(sum(w for _, w in parts), 1)
    assert len(split_batch(whole, 50)) == 37  # never an empty part
    targets = [jat_target(p) for p, _ in parts]
    assert torch.equal(torch.cat(targets), jat_target(split_batch(whole, 1)[0][0]))


def jat_target(batch):
    from jat_nb.losses import random_target
    return random_target(batch.y, 3, batch.generator)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulation_changes_nothing_without_batch_norm(parts):
    ends = []
    for accumulate in (1, parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
        batch = next(iter(batches(images(20), 20, seed=5)))
        loss = train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), jat,
                          {"attack": partial(double_pass, steps=1)}, accumulate=accumulate)
        ends.append((loss, nn.utils.parameters_to_vector(model.parameters()).detach()))
    assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)


def test_clipping_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    batch = Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.Generator())
    train_step(layer, batch, torch.optim.SGD(layer.parameters(), lr=1.0), lambda m, b: 50 * m.weight.sum(), clip_norm=0.25)
    assert math.isclose(layer.weight.item(), 0.75, rel_tol=1e-5)


def test_averages_by_hand_and_through_a_kill(tmp_path):
    recipe, seen = replace(NATURAL, ema=0.8), []
    watch = lambda m, b: (seen.append([p.detach().clone() for p in m.parameters()]), natural(m, b))[1]
    whole = net()
    fit(whole, images(), recipe, validation=images(20, 1), out=tmp_path / "whole", objective=watch)
    last = net()
    fit(last, images(), NATURAL)  # the same steps without averaging: the weights after the last one
    weights = [*seen[1:], list(last.parameters())]
    for i, p in enumerate(whole.parameters()):
        average = weights[0][i].clone()
        for w in weights[1:]:
            average.lerp_(w[i], 0.2)
        assert_close(p, average, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), images(), recipe, validation=images(20, 1), out=tmp_path / "run", objective=killer(natural, 5))
    resumed = net(3)
    fit(resumed, images(), recipe, validation=images(20, 1), out=tmp_path / "run")
    assert equal(whole, resumed) and equal(load_weights_of(tmp_path / "run"), resumed)


def load_weights_of(folder):
    from safetensors.torch import load_file
    model = net()
    model.load_state_dict(load_file(folder / "last.safetensors"))
    return model


@pytest.mark.parametrize("budget", [0.0, 0.02])
def test_slices_of_time_make_the_same_run(tmp_path, budget):
    data, held, whole = images(), images(20, 1), net()
    expected = fit(whole, data, NATURAL, validation=held)
    calls = 0
    while calls < 50:
        calls += 1
        sliced = net()
        history = fit(sliced, data, NATURAL, validation=held, out=tmp_path, seconds=budget)
        if len(history) == 3:
            break
        assert not (tmp_path / "last.safetensors").exists() or history
    bare = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert equal(whole, sliced) and bare(history) == bare(expected)
    assert calls > 3 if budget == 0 else calls >= 1


def test_collapse_is_reported():
    assert [collapsed([{"epoch": i, "val_robust": v} for i, v in enumerate((0.0, 0.6, 0.5, 0.29)[:n])]) for n in (1, 2, 3, 4)] \
        == [False, False, False, True]
    history = fit(net(), images(), NATURAL, validation=images(20, 1))
    assert [r["collapsed"] for r in history] == [collapsed(history[:n]) for n in (1, 2, 3)]


def test_other_images_of_the_same_size_are_another_run(tmp_path):
    fit(net(), images(), NATURAL, out=tmp_path)
    with pytest.raises(ValueError, match="crc32"): fit(net(), images(seed=3), NATURAL, out=tmp_path)
