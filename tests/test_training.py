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

from jat_nb.attacks import chain, pgd
from jat_nb.batches import Batch, batches
from jat_nb.checkpoints import RESUME, best_row, collapsed, load_state, save_state, shortfall
from jat_nb.data import ImageSet
from jat_nb import training
from jat_nb.batches import _pieces
from jat_nb.glow import Glow
from jat_nb.models import create
from jat_nb.objectives import JUDGES, OBJECTIVES, adversarial, natural, networks, roles
from jat_nb.processes import Processes
from jat_nb.recipes import Recipe
from jat_nb.records import read_jsonl
from jat_nb.schedules import make_optimizer
from jat_nb.training import fit
from jat_nb.updates import _in_training, accuracy, train_step
from jat_nb.weights import load_weights

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


def dies(model, at):
    "The network, which gives up in a training batch as if by Ctrl-C."
    calls = itertools.count(1)

    def stop(module, inputs):
        if module.training and next(calls) == at:
            raise KeyboardInterrupt
    model.register_forward_pre_hook(stop)
    return model


def bare(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


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
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("robust_mixup_codes", "by_class", *JUDGES)])
def test_every_objective_trains(objective, options):
    if options and objective not in ("natural", "adversarial", "jat", "pareto", "robust_mixup"):
        pytest.skip("precision, layout and optimiser do not depend on the objective")
    alone = roles(OBJECTIVES[objective]) == () and objective != "pareto"  # which takes attacks under any names
    attacks = {} if alone else ATTACKED
    own = {"pareto": {"r": 0.5}, "rlat": {"layers": ["2"]}, "fast_pat": {"steps": 2}}.get(objective, {})
    stand_on = {"flow": partial(Glow, (1, 8, 8), levels=2, steps=1, width=8),
                "features": partial(create, "wrn_10_1_cifar", in_chans=1)}
    needs = {name: stand_on.get(name, net)() for name in networks(OBJECTIVES[objective])}
    recipe = Recipe(objective=objective, objective_options=own, attacks=attacks, needs=dict.fromkeys(needs, "a/b"),
                    **{**TINY, **options, "epochs": 4})
    model, data = net(), images(64)
    history = fit(model, data, recipe, validation=images(20, seed=1), needs=needs)
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
        fit(dies(net(), at), data, recipe, validation=held, out=tmp_path / "run")
    torch.manual_seed(99)  # what ran before in the process does not matter
    history = fit(resumed, data, recipe, validation=held, out=tmp_path / "run")
    assert equal(whole, resumed)
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
    with pytest.raises(ValueError, match="choose another folder"):
        fit(dies(net(), 1), images(), NATURAL, out=blocked / "run")


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

def test_parts_make_the_batch_and_none_has_a_single_image():
    whole = next(batches(images(37), 37))._replace(share=0.5)
    parts = _pieces(whole, 5)
    assert [len(p.y) for p, _ in parts] == [8, 8, 7, 7, 7]
    assert torch.equal(torch.cat([p.x for p, _ in parts]), whole.x)
    assert math.isclose(sum(w for _, w in parts), 1) and math.isclose(sum(p.share for p, _ in parts), 0.5)
    assert len({torch.rand(1, generator=p.generator).item() for p, _ in parts}) == 5
    assert min(len(p.y) for p, _ in _pieces(whole, 50, 2)) == 2  # batch norm on one vector would stop the run
    one = next(batches(images(1), 1))
    assert _pieces(one, 4) == [(one, 1.0)]


@pytest.mark.parametrize("n, count, parts", [(7, 2, 4), (11, 3, 2), (9, 4, 3), (16, 2, 50)])
def test_unequal_shares_are_cut_into_equally_many_parts(n, count, parts):
    "Batch norm that sees all cards would wait for ever for a part that only some processes have."
    shares = [next(batches(images(n), n, part=part, parts=count)) for part in range(count)]
    assert len({len(_pieces(share, parts, count)) for share in shares}) == 1


def test_a_probe_of_fewer_images_than_processes_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: Processes(0, 2))
    for recipe, held in ((NATURAL, 1), (replace(NATURAL, probe_images=1), 20)):
        with pytest.raises(ValueError, match="2 processes cannot share 1 images"):
            fit(net(), images(), recipe, validation=images(held, 1))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulation_changes_nothing_without_batch_norm(parts):
    ends = []
    for accumulate in (1, parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
        batch = next(iter(batches(images(20), 20, seed=5)))
        loss = train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), adversarial,
                          {"attack": partial(pgd, steps=2, random_start=False)}, accumulate=accumulate)
        ends.append((loss, nn.utils.parameters_to_vector(model.parameters()).detach()))
    assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)


def politely(model, x, y, target=None, generator=None):
    live = x.clone().requires_grad_()
    grad = torch.autograd.grad(nn.functional.cross_entropy(model(live), y), live)[0]
    return (x + 0.1 * grad.sign()).clamp(0, 1)


def rudely(model, x, y, target=None, generator=None):
    live = x.clone().requires_grad_()
    model.zero_grad(set_to_none=False)  # would spoil what earlier parts left
    nn.functional.cross_entropy(model(live), y).backward()  # would add to the update
    return (x + 0.1 * live.grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_that_an_attack_leaves_are_no_part_of_the_update(parts):
    ends = []
    for attack in (politely, rudely):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
        batch = next(iter(batches(images(20), 20, seed=5)))
        train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), adversarial, {"attack": attack}, accumulate=parts)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*ends)


def test_an_attack_in_half_precision_is_taken_as_it_is_under_autocast_alone():
    x, half = images(4).x, lambda model, x, y: x.bfloat16()
    attack = _in_training("attack", half, net())
    with torch.autocast("cpu", torch.bfloat16): assert attack(net(), x, None).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got .*bfloat16"): attack(net(), x, None)


def test_clipping_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    batch = Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.Generator())
    train_step(layer, batch, torch.optim.SGD(layer.parameters(), lr=1.0), lambda m, b: 50 * m.weight.sum(), clip_norm=0.25)
    assert math.isclose(layer.weight.item(), 0.75, rel_tol=1e-5)


def test_averages_by_hand_and_through_a_kill(tmp_path):
    recipe, seen = replace(NATURAL, ema=0.8), []

    def watch(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return natural(model, batch)
    fit(net(), images(), recipe, validation=images(20, 1), objective=watch)
    whole = net()
    fit(whole, images(), recipe, validation=images(20, 1), out=tmp_path / "whole")
    last = net()
    fit(last, images(), NATURAL)  # the same steps without averaging: the weights after the last one
    weights = [*seen[1:], list(last.parameters())]
    for i, p in enumerate(whole.parameters()):
        average = weights[0][i].clone()
        for n, w in enumerate(weights[1:], 1):
            average.lerp_(w[i], 1 - min(0.8, (1 + n) / (10 + n)))
        assert_close(p, average, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyboardInterrupt):
        fit(dies(net(), 5), images(), recipe, validation=images(20, 1), out=tmp_path / "run")
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
    assert equal(whole, sliced) and bare(history) == bare(expected)
    assert calls > 3 if budget == 0 else calls >= 1


def test_collapse_is_reported():
    assert [collapsed([{"epoch": i, "val_robust": v} for i, v in enumerate((0.0, 0.6, 0.5, 0.29)[:n])]) for n in (1, 2, 3, 4)] \
        == [False, False, False, True]
    history = fit(net(), images(), JOINT, validation=images(20, 1))
    assert [r["collapsed"] for r in history] == [collapsed(history[:n]) for n in (1, 2, 3)]


def test_other_images_of_the_same_size_are_another_run(tmp_path):
    fit(net(), images(), NATURAL, out=tmp_path)
    with pytest.raises(ValueError, match="pixels"): fit(net(), images(seed=3), NATURAL, out=tmp_path)


# Nothing silently wrong

def test_other_labels_or_class_names_are_another_run(tmp_path):
    data = images()
    fit(net(), data, NATURAL, validation=images(9), out=tmp_path)
    relabelled = replace(images(9), labels=images(9).labels.roll(1))
    with pytest.raises(ValueError, match="validation was"): fit(net(), data, NATURAL, validation=relabelled, out=tmp_path)
    renamed = replace(data, classes=("b", "a", "c"))
    with pytest.raises(ValueError, match="train was"): fit(net(), renamed, NATURAL, validation=images(9), out=tmp_path)


def soft(model, batch):
    return 0.5 * natural(model, batch)


def test_own_functions_need_a_name_and_are_recorded(tmp_path):
    fit(net(), images(), NATURAL, objective=soft, out=tmp_path / "own")
    assert json.loads((tmp_path / "own" / "run.json").read_text())["own"] == {"objective": f"{__name__}:soft"}
    with pytest.raises(ValueError, match="holds another run"): fit(net(), images(), NATURAL, out=tmp_path / "own")
    madry = Recipe(objective="adversarial", attacks={"attack": [["pgd", {"steps": 1}]]}, **TINY)
    for given in ({"objective": lambda m, b, attack: natural(m, b)}, {"probe": partial(pgd, steps=1)},
                  {"attacks": {"attack": partial(pgd, steps=1)}}):
        with pytest.raises(ValueError, match="has none: give it one with def"):
            fit(net(), images(), madry, out=tmp_path / "new", **given)
        fit(net(), images(), madry, **given)
    assert not (tmp_path / "new").exists()


def test_functions_made_by_others_are_told_apart(tmp_path):
    madry = Recipe(objective="adversarial", attacks={"attack": [["pgd", {"steps": 1}]]}, **TINY)
    near, far = (chain([partial(pgd, eps=eps, steps=1)] * 2) for eps in (0.01, 0.3))
    with pytest.raises(ValueError, match="does not say with what it was made: set its __qualname__"):
        fit(net(), images(), madry, out=tmp_path / "run", attacks={"attack": near})
    assert not (tmp_path / "run").exists()
    near.__qualname__, far.__qualname__ = "near", "far"
    fit(net(), images(), madry, out=tmp_path / "run", attacks={"attack": near})
    with pytest.raises(ValueError, match="holds another run"):
        fit(net(), images(), madry, out=tmp_path / "run", attacks={"attack": far})


def poisoned(model, batch):
    "A finite loss whose gradient is not: the root of zero."
    return natural(model, batch) + (0 * model(batch.x)).abs().sum().sqrt()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model = net().train()
    before = [p.clone() for p in model.parameters()]
    batch = next(batches(images(), 8))
    assert poisoned(model, batch).isfinite()
    with pytest.raises(FloatingPointError, match="length nan"):
        train_step(model, batch, make_optimizer(model, NATURAL), poisoned)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 1 of 3"):
        fit(model, images(), NATURAL, objective=poisoned, out=tmp_path)
    assert not (tmp_path / "last.safetensors").exists()


class Blind(nn.Module):
    "Answers with NaN what it does not know."

    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return torch.full((len(x), 3), torch.nan) + self.w


def test_a_network_that_answers_clean_images_with_nan_has_no_accuracy():
    "Under attack such an answer is an error like any other."
    with pytest.raises(FloatingPointError, match="answers 30 of 30 clean images with NaN"): accuracy(Blind(), images(30))
    assert accuracy(Blind(), images(30), lambda model, x, y, **_: x) == 0


def no_better(model, validation, few): return {"val_robust": 0.5}


def test_a_longer_patience_than_the_one_that_stopped_a_run_is_not_passed_over(tmp_path):
    data, held, recipe = images(), images(12), replace(NATURAL, epochs=5)
    again = lambda patience: fit(net(), data, recipe, validation=held, judge=no_better, patience=patience, out=tmp_path)
    assert again(2)[-1]["stopped"] == "patience 2"
    for patience in (None, 1, 2): assert len(again(patience)) == 3
    with pytest.raises(ValueError, match="was stopped by patience 2, with patience=4 it would have gone on"): again(4)
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 3


def test_the_verdict_of_accuracy_is_in_single_precision():
    seen, model = [], net()
    model.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16): accuracy(model, images(20), partial(pgd, steps=1), amp=True)
    assert seen == [torch.bfloat16, torch.float32]


def test_weights_that_are_not_finite_are_not_published(tmp_path):
    model, held = net(), images(20, 1)
    fit(model, images(), NATURAL, validation=held, out=tmp_path, seconds=0)
    before = (tmp_path / RESUME).read_bytes()

    def spoil(module, inputs, output):
        module.running_var.data.fill_(torch.inf)
    broken = net()
    broken[1].register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="left as it was"):
        fit(broken, images(), NATURAL, validation=held, out=tmp_path)
    assert (tmp_path / RESUME).read_bytes() == before and not (tmp_path / "last.safetensors").exists()


def test_every_stretch_of_work_is_on_record(tmp_path):
    stretches = lambda: json.loads((tmp_path / "run.json").read_text())["stretches"]
    done = []
    while shortfall(asdict(NATURAL), done):
        done = fit(net(), images(), NATURAL, out=tmp_path, seconds=0)
    seen = stretches()
    assert [(s["from"]["epoch"], s["from"]["iteration"]) for s in seen] == [(e, i) for e in (1, 2, 3) for i in (1, 2, 3)]
    assert all(s["processes"] == 1 and s["versions"]["torch"] for s in seen)
    fit(net(), images(), NATURAL, out=tmp_path)
    assert stretches() == seen  # a finished run that is called again adds nothing


def test_a_model_that_nobody_could_rebuild_is_refused_before_training(tmp_path):
    model = create("wrn_10_1_cifar", num_classes=3, in_chans=1)
    model.model.fc = nn.Linear(64, 3, bias=False)
    with pytest.raises(ValueError, match="other tensors"): fit(model, images(), NATURAL, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit(model, images(), replace(NATURAL, epochs=1, milestones=()))  # without a folder nothing has to be rebuilt


def test_a_compiled_model_trains_and_its_files_are_those_of_the_network_inside(tmp_path):
    plain, inside = net(), net()
    recipe = replace(JOINT, ema=0.5)
    expected = fit(plain, images(), recipe, validation=images(20, 1), out=tmp_path / "plain")
    wrapped = torch.compile(inside, backend="eager")
    assert bare(fit(wrapped, images(), recipe, validation=images(20, 1), out=tmp_path / "compiled")) == bare(expected)
    assert equal(plain, inside) and equal(load_weights_of(tmp_path / "compiled"), plain)
    again = net(5)
    fit(again, images(), recipe, validation=images(20, 1), out=tmp_path / "compiled")
    assert equal(again, plain)


def test_the_averages_of_a_short_run_are_as_good_as_its_weights():
    from jat_nb.data import load
    data = load("digits")
    train, held = replace(data, images=data.images[:, :, ::2, ::2]).split(360)
    recipe = Recipe(epochs=6, batch_size=32, lr=0.03, schedule="onecycle", augment=(), ema=0.999, probe="fgsm", probe_options={},
                    probe_images=1)
    ends = []
    for r in (recipe, replace(recipe, ema=0.0)):
        torch.manual_seed(1)
        model = create("small_cnn_mnist", in_chans=1)
        ends.append(fit(model, train, r, validation=held)[-1]["val_clean"])
    assert ends[1] > 0.7 and ends[0] >= ends[1] - 0.03  # of 360 images, whose standard error is 0.02


def test_a_run_may_be_counted_in_iterations(tmp_path):
    recipe = replace(NATURAL, epochs=None, iterations=5, milestones=(4,))
    whole, resumed = net(), net(2)
    history = fit(whole, images(), recipe, out=tmp_path / "whole")
    assert [r["iterations"] for r in history] == [3, 2] and not shortfall(asdict(recipe), history)
    assert_close([r["lr"] for r in history], [0.1, 0.01])
    with pytest.raises(KeyboardInterrupt): fit(dies(net(), 5), images(), recipe, out=tmp_path / "run")
    assert shortfall(asdict(recipe), read_jsonl(tmp_path / "run" / "log.jsonl"))
    assert bare(fit(resumed, images(), recipe, out=tmp_path / "run")) == bare(history) and equal(whole, resumed)


@pytest.mark.parametrize("a, b", [((0, 1), (1, 0)), ((1, 0, 1), (0, 1, 1))])
def test_no_two_batches_share_their_randomness(a, b):
    from jat_nb.randomness import seed_from
    assert seed_from(*a) != seed_from(*b) and seed_from(*a, 0, "model") != seed_from(*a, 1, "model")


@pytest.mark.parametrize("labelled, free, parts", [(4, 20, 4), (25, 103, 16), (12, 28, 5)])
def test_no_unlabelled_image_is_lost_between_the_parts(labelled, free, parts):
    x, u = torch.rand(labelled, 1, 4, 4), torch.rand(free, 1, 4, 4)
    batch = Batch(x, torch.zeros(labelled, dtype=torch.long), torch.Generator().manual_seed(0), u=u)
    pieces = [piece for piece, _ in _pieces(batch, parts)]
    assert torch.equal(torch.cat([p.u for p in pieces]), u) and torch.equal(torch.cat([p.x for p in pieces]), x)
    together = sum(share * piece.balance for piece, share in _pieces(batch, parts))
    assert abs(together - 1) < 1e-6


@pytest.mark.parametrize("plan, expected", [(NATURAL, [False, False, False]), (JOINT, [False, True, True])])
def test_only_a_training_that_attacks_can_overfit_catastrophically(plan, expected):
    "A network that learns clean images alone has no robustness to lose."
    left = iter([0.5, 0.2, 0.1])
    history = fit(net(), images(), plan, validation=images(20, 1), judge=lambda *_: {"val_clean": 0.9, "val_robust": next(left)})
    assert [row["collapsed"] for row in history] == expected
