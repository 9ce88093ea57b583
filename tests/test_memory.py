"Objectives over several attacks, and those that remember: Ave, Max, Pareto, and the trainer that serves them."
import itertools
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_processes import launch, well
from torch import nn
from torch.testing import assert_close

from jat_nb import pareto
from jat_nb.attacks import Named, ggsm, pgd
from jat_nb.batches import batches
from jat_nb.checkpoints import RESUME, function_names, load_state, save_state
from jat_nb.data import ImageSet
from jat_nb.objectives import OBJECTIVES, WithMemory, adversarial, attacked_losses, average, maximum, natural, roles
from jat_nb.pareto import Pareto, Weights, solve_weights
from jat_nb.processes import processes
from jat_nb.recipes import Recipe, bind
from jat_nb.records import read_jsonl
from jat_nb.schedules import make_optimizer
from jat_nb.training import fit
from jat_nb.updates import Memory, train_step
from jat_nb.weights import read_tensors, write_tensors

PGD, FLOW = ["pgd", {"eps": 0.1, "step": 0.1, "steps": 1}], ["ggsm", {"eps": 0.5, "step": 0.5, "steps": 1}]
BOTH = {"pgd": [PGD], "flow": [FLOW]}
SHORT = dict(epochs=3, batch_size=16, milestones=(2,), probe="pgd", probe_options={"steps": 1}, probe_images=10)
PARETO = Recipe(objective="pareto", objective_options={"r": 0.5, "warm_up": 2, "window": 4}, attacks=BOTH, **SHORT)


def images(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.randint(0, 100, (n, 1, 8, 8), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return ImageSet("toy", x.to(torch.uint8), labels, ("a", "b", "c"))


def net(seed=0, norm="batch", drop=0.3):
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer, nn.ReLU(), nn.Dropout(drop),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def shift(model, x, y, by=0.0, *, target=None, generator=None):
    "An attack that draws nothing."
    return (x + by).clamp(0, 1)


FIXED = {"pgd": partial(shift, by=0.2), "flow": partial(shift, by=-0.2)}


def equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def remembered(folder):
    return {k: v for k, v in load_file(folder / RESUME).items() if k.startswith("objective.")}


def bare(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


# Average and maximum

def test_average_and_maximum_by_hand():
    model, batch = net().eval(), next(batches(images(), 12))
    rows = torch.stack([F.cross_entropy(model(shift(model, batch.x, batch.y, by)), batch.y, reduction="none")
                        for by in (0, 0.2, -0.2)])
    assert_close(attacked_losses(model, batch, FIXED), rows[1:])
    assert_close(average(model, batch, **FIXED), rows[1:].mean())
    assert_close(average(model, batch, include_natural=True, **FIXED), rows.mean())
    assert_close(maximum(model, batch, **FIXED), torch.maximum(rows[1], rows[2]).mean())
    assert_close(maximum(model, batch, per="batch", **FIXED), torch.maximum(rows[1].mean(), rows[2].mean()))


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=8), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_maximum_is_no_less_than_the_average(shifts, seed):
    model, batch = net(seed).eval(), next(batches(images(12, seed), 12))
    attacks = {f"a{i}": partial(shift, by=by) for i, by in enumerate(shifts)}
    ave, top, of_means = (f(model, batch, **attacks).item() for f in (average, maximum, partial(maximum, per="batch")))
    assert top >= of_means - 1e-6 and of_means >= ave - 1e-6
    same = dict.fromkeys(attacks, attacks["a0"])
    assert_close(maximum(model, batch, **same), average(model, batch, **same))
    assert_close(average(model, batch, **same), adversarial(model, batch, attacks["a0"]))


def test_all_images_are_made_before_the_first_loss_and_in_order():
    model, batch, log = net().train(), next(batches(images(), 12)), []
    model.register_forward_pre_hook(lambda m, i: log.append("train" if m.training else "eval"))

    def named(name, attack):
        def attacked(*args, **options):
            log.append(name)
            return attack(*args, **options)
        return attacked
    attacks = {"pgd": named("pgd", partial(pgd, steps=1)), "flow": named("flow", partial(ggsm, steps=2)),
               "rt": named("rt", shift)}
    state = Pareto(r=0.5).start(3)
    Pareto(r=0.5)(model, batch, state, **attacks)
    assert log == ["pgd", "eval", "flow", "eval", "eval", "rt", *["train"] * 4] and model.training


def test_refusals():
    model, batch = net(), next(batches(images(), 12))
    for objective in (average, maximum, partial(average, include_natural=True)):
        with pytest.raises(ValueError, match="at least one role"): objective(model, batch)
    with pytest.raises(ValueError, match="choose 'example' or 'batch'"): maximum(model, batch, per="image", **FIXED)


def test_any_roles():
    assert roles(average) is roles(maximum) is roles(partial(maximum, per="batch")) is roles(Pareto(r=1.0)) is None
    named = Named({"here": natural, "there": "jat_nb.pareto:Pareto", "nowhere": "jat_nb.nothing:f"})
    assert list(named) == ["here", "there", "nowhere"] and len(named) == 3 and "nowhere" in named and "x" not in named
    assert named["here"] is natural and named["there"] is Pareto is OBJECTIVES["pareto"]
    with pytest.raises(ImportError): named["nowhere"]


def test_what_remembers_is_told_from_what_does_not():
    assert isinstance(Pareto(r=1.0), WithMemory) and isinstance(Follow(), WithMemory)
    assert not any(isinstance(f, WithMemory) for f in (natural, average, partial(average), net()))


# Pareto: the window and the weights

def after(objective, rows):
    state, facts = objective.start(rows.shape[1] - 1), []
    for row in rows:
        state, said = objective.update(state, torch.from_numpy(row))
        facts.append(said)
    return state, facts


@given(st.integers(2, 8), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_window_holds_the_last_losses_and_its_moments_are_numpys(k, n, seed):
    rows = np.random.default_rng(seed).uniform(0.1, 3, (n, k))
    state, facts = after(Pareto(r=0.4, window=9, warm_up=5), rows)
    last = rows[-9:]
    held = state["window"].numpy()
    assert sorted(map(tuple, held[:len(last)])) == sorted(map(tuple, last)) and int(state["seen"]) == n
    assert np.allclose(facts[-1]["mean"], last.mean(0), atol=1e-6)
    expected = np.full(k, 1 / k)
    if n >= 5:
        second = np.cov(last.T, ddof=0) + np.outer(last.mean(0), last.mean(0))
        expected = solve_weights(last.mean(0), second, 0.4).alpha
    assert np.abs(state["alpha"].numpy() - expected).max() < 1e-6
    assert [f["solver"] for f in facts[:4]] == ["warm-up"] * min(n, 4)


@given(st.integers(2, 8), st.sampled_from(["clip", "hold", "slack", "relative"]), st.sampled_from(["window", "batch"]),
       st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_weights_never_leave_the_simplex(k, mode, estimator, r, seed):
    rng = np.random.default_rng(seed)
    objective = Pareto(r=r if mode == "relative" else 5 * r, mode=mode, warm_up=1, window=8, estimator=estimator)
    state = objective.start(k - 1)
    for scale in (1.0, 1e-3, 0.0, 30.0):
        samples = scale * rng.uniform(0, 1, (k, 6)) ** 3
        samples[rng.integers(k)] = 0
        pairs = samples @ samples.T / 6 if estimator == "batch" else samples[:0]
        before = {name: value.clone() for name, value in state.items()}
        new, facts = objective.update(state, torch.from_numpy(np.r_[samples.mean(1), pairs.ravel()]))
        assert all(torch.equal(before[name], state[name]) for name in state)  # nothing is changed in place
        state, alpha = new, new["alpha"].numpy()
        assert alpha.min() >= 0 and abs(alpha.sum() - 1) < 1e-9 and math.isfinite(facts["r"])
        json.dumps(facts, allow_nan=False)


def test_moments_of_a_batch_by_hand():
    model, batch = net().eval(), next(batches(images(), 12))
    losses = attacked_losses(model, batch, FIXED, include_natural=True).detach().double()
    objective = Pareto(r=0.6, warm_up=1, estimator="batch")
    state = objective.start(2)
    _, terms = objective(model, batch, state, **FIXED)
    assert_close(terms, torch.cat([losses.mean(1), (losses @ losses.T / 12).flatten()]))
    state, _ = objective.update(state, terms)
    second = np.cov(losses, ddof=0) + np.outer(losses.mean(1), losses.mean(1))
    assert_close(state["alpha"].numpy(), solve_weights(losses.mean(1).numpy(), second, 0.6).alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"r": -0.1}, "at least 0 nats"), ({"r": math.nan}, "at least 0 nats"), ({"r": math.inf}, "at least 0 nats"),
    ({"r": 1.5, "mode": "relative"}, r"in \[-1, 1\]"), ({"r": 1.0, "mode": "soft"}, "unknown mode 'soft'"),
    ({"r": 1.0, "estimator": "all"}, "unknown estimator 'all'"), ({"r": 1.0, "warm_up": 0}, "warm_up <= window"),
    ({"r": 1.0, "window": 5}, "warm_up <= window, since weights .* got 8 and 5")])
def test_wrong_settings_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message): Pareto(**options)
    with pytest.raises(ValueError, match="warm_up|objective 'pareto'|of objective 'pareto'|JSON"):
        replace(PARETO, objective_options=options)


@pytest.mark.parametrize("changes, message", [
    ({"attacks": {}}, "needs attacks for one role or more"), ({"attacks": {"state": [PGD]}}, "other than model, batch, state"),
    ({"objective": "maximum", "objective_options": {}, "attacks": {"per": [PGD]}}, "other than model, batch, per"),
    ({"objective": "average", "objective_options": {"include_natural": 1}}, "include_natural of objective 'average' to be bool"),
    ({"objective": "maximum", "objective_options": {"per": "image"}}, "per of objective 'maximum'"),
    ({"objective_options": {}}, "needs r; got none"), ({"objective_options": {"r": "1"}}, "r of objective 'pareto' to be float"),
    ({"objective_options": {"r": 1.0, "window": 2, "warm_up": 1}}, "3 losses and a window of 2"),
    ({"objective_options": {"r": 1.0, "alpha": 2}}, "takes r, mode, window, warm_up, estimator")])
def test_recipes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message): replace(PARETO, **changes)


def test_fewer_than_two_losses():
    with pytest.raises(ValueError, match="a natural loss, one for each attack"): Pareto(r=1.0).start(0)


@pytest.mark.parametrize("answer", [ValueError("planted"), np.linalg.LinAlgError("planted"),
                                    Weights(np.array([1.5, -0.5, 0.0]), 0.5, False, "CLARABEL"),
                                    Weights(np.array([np.nan, 0.5, 0.5]), 0.5, False, "CLARABEL")])
def test_a_solver_that_fails_leaves_the_weights_and_is_counted(monkeypatch, answer):
    real, calls = pareto.solve_weights, itertools.count(1)

    def some(*args, **options):
        if next(calls) % 2: return real(*args, **options)
        if isinstance(answer, Exception): raise answer
        return answer
    monkeypatch.setattr(pareto, "solve_weights", some)
    row = fit(net(), images(), PARETO)[0]["objective"]  # three steps, solved in the second and third
    assert row["counts"]["solver"] == {"warm-up": 1, "CLARABEL": 1, "failed": 1} and row["mean"]["held"] == 1 / 3
    assert row["trace"][2]["alpha"] == row["trace"][1]["alpha"] != row["trace"][0]["alpha"] == [round(1 / 3, 6)] * 3


# One step

def test_the_weights_are_those_of_the_step_before_and_have_no_gradient():
    objective, state = Pareto(r=0.5), {**Pareto(r=0.5).start(2), "alpha": torch.tensor([0.2, 0.5, 0.3]).double()}
    model, batch = net(drop=0).eval(), next(batches(images(), 12))
    loss, terms = objective(model, batch, state, **FIXED)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = attacked_losses(model, batch, FIXED, include_natural=True).mean(1)
    by_hand = 0.2 * losses[0] + 0.5 * losses[1] + 0.3 * losses[2]
    by_hand.backward()
    assert_close(loss, by_hand)
    assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
    assert_close(terms, losses.detach().double()) and not terms.requires_grad
    assert not any(v.requires_grad or v.dtype != torch.float64 for v in state.values())
    new, _ = objective.update(state, terms)
    assert not any(v.requires_grad for v in new.values())


@pytest.mark.parametrize("estimator", ["window", "batch"])
def test_parts_make_one_update(estimator):
    ends = []
    for parts in (1, 3):
        model, objective = net(norm="group", drop=0).train(), Counting(r=0.6, warm_up=1, estimator=estimator)
        memory = Memory({**objective.start(2), "alpha": torch.tensor([0.2, 0.5, 0.3]).double()})
        loss = train_step(model, next(batches(images(20), 20)), torch.optim.SGD(model.parameters(), lr=0.1), objective,
                          FIXED, accumulate=parts, memory=memory)
        assert updates == [1] and int(memory.state["seen"]) == 1
        updates.clear()
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        ends.append((loss, weights, memory.state["window"], memory.state["alpha"]))
    for one, three in zip(*ends): assert_close(one, three, rtol=1e-4, atol=1e-5)


updates = []


@dataclass(frozen=True, kw_only=True)
class Counting(Pareto):
    def update(self, state, terms):
        updates.append(1)
        return super().update(state, terms)


def test_a_step_without_memory_starts_afresh():
    bound, even, losses = bind(PARETO), partial(average, include_natural=True), []
    for objective in (bound.objective, even):
        model, batch = net(drop=0), next(batches(images(), 16, seed=3))
        losses.append(train_step(model, batch, make_optimizer(model, PARETO), objective, bound.attacks))
    assert isinstance(losses[0], float) and math.isclose(*losses, rel_tol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_window_never_sees_what_is_not_finite(bad):
    model, objective = net().train(), Pareto(r=0.5, warm_up=1)
    memory, before = Memory(objective.start(2)), [p.clone() for p in model.parameters()]
    state = memory.state

    def spoilt(model, x, y, *, target=None, generator=None):
        return x * bad
    with pytest.raises(ValueError, match="'flow' returned invalid images"):
        train_step(model, next(batches(images(), 12)), torch.optim.SGD(model.parameters(), lr=0.1), objective,
                   {**FIXED, "flow": spoilt}, memory=memory)
    assert memory.state is state and not state["window"].any() and not memory.facts
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for terms in ([1.0, bad, 1.0], [1.0, -1.0, 1.0]):
        with pytest.raises(ValueError, match="finite losses"): objective.update(state, torch.tensor(terms).double())


def test_terms_that_are_not_finite_stop_the_step_though_the_loss_is():
    model, objective = net().train(), Follow()
    before = [p.clone() for p in model.parameters()]
    blind = replace(objective, factor=math.inf)
    with pytest.raises(FloatingPointError):
        train_step(model, next(batches(images(), 12)), torch.optim.SGD(model.parameters(), lr=0.1), blind, FIXED)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# Runs

@dataclass(frozen=True)
class Follow:
    "A memory of the tests' own: what it saw last."

    factor: float = 1.0

    def start(self, roles): return {"last": torch.zeros(1, dtype=torch.float64)}

    def __call__(self, model, batch, state, **attacks):
        loss = natural(model, batch)
        return loss, self.factor * loss.detach()[None]

    def update(self, state, terms): return {"last": terms}, {"before": state["last"].item(), "word": "ok"}


def test_algorithm_1_as_a_plain_loop():
    "Three epochs of the trainer against a loop without any of its parts."
    recipe = replace(PARETO, augment=(), schedule="constant", milestones=())
    trained, model = net(drop=0), net(drop=0).train()
    history = fit(trained, images(), recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    alpha, seen, log = np.full(3, 1 / 3), [], []
    for epoch in range(3):
        for batch in batches(images(), 16, shuffle=True, seed=(0, epoch)):
            x_pgd = pgd(model, batch.x, batch.y, **PGD[1], generator=batch.generator)
            x_flow = ggsm(model, batch.x, batch.y, **FLOW[1], generator=batch.generator)
            losses = torch.stack([F.cross_entropy(model(x), batch.y) for x in (batch.x, x_pgd, x_flow)])
            optimizer.zero_grad()
            (torch.tensor(alpha, dtype=torch.float32) * losses).sum().backward()
            optimizer.step()
            seen = [*seen, losses.detach().double().numpy()][-4:]
            if len(seen) >= 2:
                mean, second = np.mean(seen, 0), np.mean([np.outer(v, v) for v in seen], 0)
                alpha = solve_weights(mean, second, 0.5).alpha
            log.append(alpha)
    assert_close(list(trained.parameters()), list(model.parameters()), rtol=1e-3, atol=1e-4)
    means = np.array([r["objective"]["mean"]["alpha"] for r in history])
    assert np.abs(means - np.array(log).reshape(3, 3, 3).mean(1)).max() < 1e-3


def test_what_a_row_says():
    history = fit(net(), images(300), replace(PARETO, batch_size=8, epochs=1, milestones=(), objective_options={
        "r": 0.8, "warm_up": 2, "window": 4}))
    said = history[0]["objective"]
    assert list(said) == ["steps", "mean", "counts", "trace"] and said["steps"] == 38 == sum(said["counts"]["solver"].values())
    assert len(said["trace"]) <= 16 and [t["iteration"] for t in said["trace"]] == list(range(1, 39, 3))
    assert set(said["trace"][0]) == {"iteration", "alpha", "mean", "r", "clipped", "held", "solver"}
    assert set(said["mean"]) == {"alpha", "mean", "r", "clipped", "held"} and abs(sum(said["mean"]["alpha"]) - 1) < 1e-5
    short = fit(net(), images(), PARETO)[0]["objective"]  # three steps, all in the trace
    for name, value in short["mean"].items():
        assert np.allclose(np.mean([t[name] for t in short["trace"]], 0), value)
    assert "objective" not in fit(net(), images(), replace(PARETO, objective="average", objective_options={}))[0]


def dies(model, at):
    calls = itertools.count(1)

    def stop(module, inputs):
        if module.training and next(calls) == at: raise KeyboardInterrupt
    model.register_forward_pre_hook(stop)
    return model


@pytest.mark.parametrize("estimator", ["window", "batch"])
@pytest.mark.parametrize("at", [2, 11, 23])
def test_a_killed_run_ends_with_the_same_weights_of_both_kinds(tmp_path, at, estimator):
    options = {**PARETO.objective_options, "estimator": estimator}
    recipe = replace(PARETO, objective_options=options, ema=0.9)
    whole, resumed = net(), net(0 if at == 2 else 9)
    expected = fit(whole, images(), recipe, validation=images(20, 1), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): fit(dies(net(), at), images(), recipe, validation=images(20, 1), out=tmp_path / "run")
    history = fit(resumed, images(), recipe, validation=images(20, 1), out=tmp_path / "run")
    assert equal(whole, resumed) and bare(history) == bare(expected) == bare(read_jsonl(tmp_path / "run" / "log.jsonl"))
    ours, theirs = remembered(tmp_path / "run"), remembered(tmp_path / "whole")
    assert set(ours) == {"objective.alpha", "objective.window", "objective.seen"} and ours["objective.seen"] == 9
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_slices_of_time_in_mid_epoch_make_the_same_run(tmp_path):
    whole, calls = net(), itertools.count()
    expected = fit(whole, images(), PARETO, out=tmp_path / "whole")
    history = []
    while len(history) < 3:
        sliced = net(next(calls))
        history = fit(sliced, images(), PARETO, out=tmp_path / "run", seconds=0)
        if not history:  # in mid-epoch the header has what was said so far
            header = read_tensors(tmp_path / "run" / RESUME)[1]
            assert header["said"]["steps"] == header["iteration"] and len(header["said"]["trace"]) == header["iteration"]
    assert equal(whole, sliced) and bare(history) == bare(expected) and next(calls) == 9
    ours, theirs = remembered(tmp_path / "run"), remembered(tmp_path / "whole")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_file_without_what_the_objective_remembers_is_refused(tmp_path):
    model, objective = net(), Pareto(r=1.0)
    optimizer, state = make_optimizer(model, PARETO), objective.start(2)
    save_state(tmp_path / "with.safetensors", model, optimizer, {}, memory=state)
    save_state(tmp_path / "without.safetensors", model, optimizer, {})
    with pytest.raises(ValueError, match="does not hold a run.*the objective remembers"):
        load_state(tmp_path / "without.safetensors", model, optimizer, memory=objective.start(2))
    with pytest.raises(ValueError, match="does not hold a run"): load_state(tmp_path / "with.safetensors", model, optimizer)
    other = {k: v + 1 for k, v in objective.start(2).items()}
    load_state(tmp_path / "with.safetensors", model, optimizer, memory=other)
    assert all(torch.equal(v, other[k]) for k, v in state.items())


def test_a_resume_file_of_an_older_version_is_read(tmp_path):
    recipe = replace(PARETO, objective="natural", objective_options={}, attacks={})
    whole = net()
    fit(whole, images(), recipe, out=tmp_path / "whole")
    fit(net(), images(), recipe, out=tmp_path / "run", seconds=0)
    tensors, header = read_tensors(tmp_path / "run" / RESUME)
    assert header.pop("said") == {}
    write_tensors(tmp_path / "run" / RESUME, tensors, header)
    resumed = net(3)
    fit(resumed, images(), recipe, out=tmp_path / "run")
    assert equal(whole, resumed)


def test_the_order_of_the_roles_is_part_of_a_run(tmp_path):
    fit(net(), images(), PARETO, out=tmp_path)
    turned = replace(PARETO, attacks={"flow": [FLOW], "pgd": [PGD]})
    assert turned == PARETO  # dicts have no order, weights have
    with pytest.raises(ValueError, match="roles was"): fit(net(), images(), turned, out=tmp_path)


class Nameless:
    start, update, __call__ = Follow.start, Follow.update, Follow.__call__


def test_an_own_objective_with_memory(tmp_path):
    plain = replace(PARETO, objective="natural", objective_options={}, attacks={})
    history = fit(net(), images(), plain, objective=Follow(), out=tmp_path / "own")
    trace = [t for row in history for t in row["objective"]["trace"]]
    assert trace[0]["before"] == 0 and all(t["before"] > 0 for t in trace[1:])
    assert history[1]["objective"]["counts"] == {"word": {"ok": 3}}
    own = json.loads((tmp_path / "own" / "run.json").read_text())["own"]
    assert own == {"objective": f"{__name__}:Follow(factor=1.0)"} == function_names({"objective": Follow()})
    with pytest.raises(ValueError, match="holds another run"):
        fit(net(), images(), plain, objective=Follow(2.0), out=tmp_path / "own")
    with pytest.raises(ValueError, match="has none"): fit(net(), images(), plain, objective=Nameless(), out=tmp_path / "no")
    with pytest.raises(ValueError, match="has none"): function_names({"objective": Follow(factor=lambda: 0)})
    assert function_names({"objective": Pareto(r=2.2)})["objective"].startswith("jat_nb.pareto:Pareto(r=2.2, mode='clip'")


# Two processes

TOGETHER = replace(PARETO, batch_size=17, augment=(), epochs=2, milestones=(1,))  # pieces of 9 and 8


def together(out):
    rank = processes().rank
    model = net(norm="group", drop=0)
    fit(model, images(48), TOGETHER, objective=Counting(r=0.6, warm_up=2, window=4), attacks=FIXED)
    asked = len(updates)
    drawn = net(seed=rank)
    history = fit(drawn, images(48), replace(TOGETHER, accumulate=2), out=Path(out) / "run")
    torch.save({"model": model.state_dict(), "asked": asked, "rows": bare(history), "drawn": drawn.state_dict(),
                "memory": last_memory(out)}, Path(out) / f"ends-{rank}.pt")


def last_memory(out):
    "What a run that is over remembers in this process: one more call reads it back from the first."
    kept, real = [], pareto.Pareto.start

    def start(self, roles):
        kept.append(real(self, roles))
        return kept[-1]
    pareto.Pareto.start = start
    fit(net(), images(48), replace(TOGETHER, accumulate=2), out=Path(out) / "run")
    pareto.Pareto.start = real
    return kept[-1]


def test_two_processes_update_once_and_remember_the_same(tmp_path):
    well(launch(together, tmp_path, timeout=300))  # cvxpy and accelerate are slow to import
    first, second = (torch.load(tmp_path / f"ends-{rank}.pt") for rank in (0, 1))
    steps = 2 * math.ceil(48 / 17)
    assert (first["asked"], second["asked"]) == (steps, 0)  # the first asks, the other is told
    assert first["rows"] == second["rows"] and [r["objective"]["steps"] for r in first["rows"]] == [3, 3]
    for what in ("model", "drawn", "memory"):
        assert all(torch.equal(v, second[what][k]) for k, v in first[what].items()), what
    assert int(first["memory"]["seen"]) == steps and (first["memory"]["alpha"] != 1 / 3).all()
    one = net(norm="group", drop=0)
    fit(one, images(48), TOGETHER, objective=Counting(r=0.6, warm_up=2, window=4), attacks=FIXED)
    assert_close(first["model"], dict(one.state_dict()), rtol=1e-3, atol=1e-4)
