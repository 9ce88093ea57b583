"""The evaluator counts what survives: closed forms, invariance, and a model left as found."""
import copy
import json
import os
import socket
import subprocess
import sys
import warnings
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from test_processes import launch, well
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from jat_nb.attacks import fgsm, pgd
from jat_nb.autoattack import autoattack_at
from jat_nb.batches import Batch
from jat_nb.data import ImageSet
from jat_nb.evaluation import (Evaluation, budget_curve, clean, evaluate, ggsm_at, joint_at, pgd_at,
                               raw_accuracy, wilson_interval)
from jat_nb.models import Logits
from jat_nb.processes import processes
from jat_nb.updates import accuracy


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 3))
    x = torch.rand(40, 1, 8, 8)
    y = model.eval()(x).argmax(1)
    y[::8] = (y[::8] + 1) % 3  # some images are wrong when clean
    return model, x, y


def linear(w, b):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(w), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([0 * w, w]))
        model[1].bias.copy_(torch.tensor([0.0, b]))
    return model


@given(n=st.integers(1, 500), data=st.data())
@settings(max_examples=40, deadline=None)
def test_wilson_agrees_with_scipy(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert_close(torch.stack([low, high]), torch.tensor(list(expected), dtype=torch.float64), rtol=0, atol=1e-6)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


@pytest.mark.parametrize("k, n", [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(k, n)


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.03, 0.06])
def test_linear_model_matches_the_closed_form(eps):
    torch.manual_seed(1)
    x, w = 0.3 + 0.4 * torch.rand(60, 1, 6, 6), torch.randn(36)
    b = -float(x.flatten(1).mean(0) @ w)
    score = x.flatten(1) @ w + b
    y = (score + torch.randn(60) > 0).long()
    expected = (2 * y - 1) * score > eps * w.abs().sum()
    found = evaluate(linear(w, b), x, y, {"PGD": pgd_at(eps), "FGSM": partial(fgsm, eps=eps)})
    assert torch.equal(found.correct, torch.stack([expected, expected]))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batch_size_changes_nothing(case, batch_size):
    suite = {"PGD": pgd_at(0.03, 2), "Spatial": ggsm_at(0.3, 2), "Joint": joint_at(0.03, 0.3, 2)}
    reference = evaluate(*case, suite, batch_size=16)
    assert torch.equal(evaluate(*case, suite, batch_size=batch_size).correct, reference.correct)


def test_active_set_changes_only_the_cost(case):
    suite = {"all": [partial(fgsm, eps=0.02), pgd_at(0.02, 2), ggsm_at(0.3, 2)], "one": pgd_at(0.02, 2)}
    lazy, full = evaluate(*case, suite), evaluate(*case, suite, active=False)
    assert torch.equal(lazy.correct, full.correct) and (lazy.passes < full.passes).all()
    assert lazy.correct[0].sum() <= lazy.correct[1].sum()


def test_seed_matters_and_repeats(case):
    noise = lambda model, x, y, generator: (x + 0.3 * torch.stack([torch.rand(x.shape[1:], generator=g) for g in generator])).clamp(0, 1)
    a, b, c = (evaluate(*case, {"noise": noise}, seed=s).correct for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_union_is_per_image():
    correct = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    found = Evaluation(("a", "b"), correct, torch.ones(2, 2, dtype=torch.int64), 0)
    assert found.union.tolist() == [False, True, False]
    table = found.table()
    assert list(table.index) == ["a", "b", "Union"] and table["accuracy (%)"].round(1).tolist() == [66.7, 66.7, 33.3]
    assert table["text"]["Union"].startswith("33.3 (") and "n = 3" in table["text"]["Union"]
    kept = json.loads(json.dumps(found.record()))
    assert kept["n"] == 3 and kept["rows"]["a"]["forward / n"] == pytest.approx(1 / 3)


def test_clean_mistakes_count_everywhere(case):
    model, x, y = case
    cheat = lambda model, x, y, generator: torch.rand_like(x)
    found = evaluate(model, x, y, {"Clean": lambda model, x, y, **_: x, "cheat": cheat}, active=False)
    assert found.accuracy[0] == 35 / 40 and not found.correct[1][::8].any()


def test_passes_count_images(case):
    model, x, y = case
    found = evaluate(model, x, y, {"PGD": pgd_at(0.01, 3)})
    right = 35
    assert found.passes.tolist() == [[right * (3 + 1), right * 3]]


def test_model_is_left_as_found(case):
    model, x, y = case
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]

    def rude(model, x, y, generator):
        model.train()
        model(x)
        return x
    evaluate(model, x, y, {"rude": rude})
    with pytest.raises(RuntimeError, match="planted"):
        evaluate(model, x, y, {"bad": lambda *_, **__: (_ for _ in ()).throw(RuntimeError("planted"))})
    assert [m.training for m in model.modules()] == modes and not model._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()


def test_verdict_does_not_trust_autocast(case):
    model, x, y = case
    suite = {"Clean": lambda model, x, y, **_: x}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(model, x, y, suite)
    assert torch.equal(inside.correct, evaluate(model, x, y, suite).correct)


@pytest.mark.parametrize("result, message", [
    (lambda x: 2 * x, "invalid images"), (lambda x: x * torch.nan, "invalid images"), (lambda x: x[:, :, 1:], "expected images"),
    (lambda x: x.double(), "float64"), (lambda x: (x, None), "tuple")])
def test_bad_attacks_are_named(case, result, message):
    with pytest.raises(ValueError, match=f"'odd'.*{message}"):
        evaluate(*case, {"odd": lambda model, x, y, generator: result(x)})


def test_bad_input_is_refused(case):
    model, x, y = case
    for args, message in [((model, 255 * x, y), "divide bytes"), ((model, x, y.float()), "int64"), ((model, x, y + 5), "labels"),
                          ((nn.Flatten(0), x, y), "logits")]:
        with pytest.raises(ValueError, match=message):
            evaluate(*args, {"PGD": pgd_at(0.01, 1)})
    for suite, batch_size in (({"A": []}, 8), ({"Union": pgd}, 8), ({"PGD": pgd}, 0)):
        with pytest.raises(ValueError, match="none named 'Union'"):
            evaluate(model, x, y, suite, batch_size=batch_size)
    with pytest.raises(ValueError, match="increasing"):
        budget_curve(model, x, y, pgd_at, [0.1, 0.1])


@pytest.mark.parametrize("judge", [evaluate, raw_accuracy])
def test_a_network_that_answers_clean_images_with_nan_is_refused(case, judge):
    "Also where only some images have it, and in a later batch."
    model, x, y = case
    class Nan(nn.Module):
        def forward(self, v): return model(v) + torch.where(v.flatten(1).amax(1) > 0.999, torch.nan, 0.0)[:, None]
    x = 0.9 * x
    x[-3:, 0, 0, 0] = 1
    assert evaluate(Nan(), x[:-3], y[:-3], {"Clean": clean}).n == 37
    with pytest.raises(FloatingPointError, match="answers 3 of 8 clean images with NaN: load weights that are finite"):
        judge(Nan(), x, y, {"Clean": clean}, batch_size=8)


@pytest.mark.parametrize("suite, seen", [(clean, "<function clean"), ([clean], r"\[<function clean"), ("jat", "'jat'"), (None, "None"), ({}, "none"), ({1: clean}, "{1: <function clean")])
def test_what_is_no_suite_is_refused_with_its_form(case, suite, seen):
    for judge in (evaluate, raw_accuracy):
        with pytest.raises(ValueError, match=rf"by name, got {seen}.*: pass suite=\{{'Clean': clean"): judge(*case, suite)
    with pytest.raises(ValueError, match="attack_at.*pgd_at, got str"): budget_curve(*case, "pgd", [0.1])


@pytest.mark.parametrize("seen, model", [
    (True, nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1))), (True, Logits(nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Sigmoid()))),
    (False, nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), (False, Logits(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))),
    (False, nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Sigmoid())), (False, nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LogSoftmax(1)))])
def test_probabilities_in_the_place_of_logits_are_said(case, seen, model):
    x, y = torch.rand(20, *case[1].shape[1:]), torch.arange(20) % 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluate(model, x, y, {"Clean": clean})
    assert ["return the logits before it" in str(one.message) for one in told] == [True] * seen


def test_curve_starts_at_the_clean_accuracy_and_is_exact_at_zero(case):
    model, x, y = case
    curve = budget_curve(model, x, y, partial(ggsm_at, steps=2), [0, 0.5, 2], batch_size=9)
    assert curve.names == ("0.0", "0.5", "2.0") and curve.accuracy[0] == 35 / 40


# -- an attack that could not see

class Steps(nn.Module):
    "Sixteen grey levels, then a network: the same classes nearly everywhere, no gradient anywhere."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((16 * x).floor() / 16)


def test_a_gradient_of_zero_is_counted_and_said(case):
    model, x, y = case
    hidden = Steps(model)
    y = hidden(x).argmax(1)
    y[:5] = (y[:5] + 1) % 3  # wrong when clean: never attacked, hence never asked
    found = evaluate(hidden, x, y, {"Clean": clean, "PGD": pgd_at(0.1, 3), "Spatial": ggsm_at(0.5, 3)})
    right = found.correct[0]
    assert torch.equal(found.blind, torch.stack([torch.zeros_like(right), right, right]))
    table = found.table()
    assert table["zero gradient"].tolist() == [0, 35, 35, 35]
    assert "zero gradient at 35" in table["text"]["PGD"] and "zero" not in table["text"]["Clean"]
    record = json.loads(json.dumps(found.record()))
    assert record["rows"]["PGD"]["zero gradient"] == 35 and "zero gradient at 35" in record["rows"]["Union"]["text"]


def test_a_gradient_counts_from_the_first_pass_that_has_one(case):
    model, x, y = case
    hidden = Steps(model)

    def mixed(network, x, y, generator):
        pgd(hidden, x, y, steps=1)  # not the network on trial
        return pgd(network, x, y, steps=2, eps=0.01)
    assert not evaluate(model, x, y, {"mixed": mixed}).blind.any()
    sequence = {"both": [lambda m, x, y, generator: x, pgd_at(0.1, 2)]}
    assert evaluate(hidden, x, y, sequence).blind.any() and not evaluate(model, x, y, sequence).blind.any()


@pytest.mark.parametrize("copies", [1, 3])
def test_no_alarm_where_passes_cannot_be_told_apart(case, copies):
    "An attack that sends several copies of the batch: one gradient is enough to keep quiet, none to speak."
    model, x, y = case

    def several(network, x, y, generator):
        many = x.repeat(copies, 1, 1, 1).requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(network(many).sum(), many)
        return x
    assert not evaluate(model, x, y, {"several": several}).blind.any()
    assert torch.equal(evaluate(Steps(model), x, y, {"several": several}).blind[0], evaluate(Steps(model), x, y, {"Clean": clean}).correct[0])


def test_an_evaluation_that_was_not_watched_says_nothing():
    found = Evaluation(("a",), torch.ones(1, 4).bool(), torch.zeros(1, 2, dtype=torch.int64), 0)
    assert found.table()["zero gradient"].tolist() == [0, 0] and "zero" not in found.table()["text"]["a"]


# -- raw accuracy, joint_at, clean

def test_raw_accuracy_lets_an_attack_help(case):
    model, x, y = case
    labels = {"helper": lambda network, v, y, generator: x[[int((v[i] == x).flatten(1).all(1).nonzero()[0]) for i in range(len(v))]]}
    raw, strict = raw_accuracy(model, x, y, labels, batch_size=7), evaluate(model, x, y, labels)
    assert torch.equal(raw.correct, strict.correct)  # an attack that changes nothing helps nobody
    flipped = {"fixed": lambda network, v, y, generator: torch.full_like(v, 0.5)}
    expected = model(torch.full_like(x, 0.5)).argmax(1) == y
    assert torch.equal(raw_accuracy(model, x, y, flipped).correct[0], expected)
    assert (raw_accuracy(model, x, y, flipped).correct >= evaluate(model, x, y, flipped).correct).all()
    draws = {"noise": lambda m, v, y, generator: torch.stack([torch.rand(v.shape[1:], generator=g) for g in generator])}
    assert torch.equal(raw_accuracy(model, x, y, draws, batch_size=3).correct, raw_accuracy(model, x, y, draws).correct)


def test_joint_at_keeps_the_ratios():
    attack = joint_at(0.08, 0.6, 7, "pixel-spatial")
    assert attack.keywords == dict(eps_pixel=0.08, eps_flow=0.6, step_pixel=0.02, step_flow=0.3, steps=7, order="pixel-spatial")
    assert joint_at(8 / 255, 0.3).keywords["steps"] == 20


def test_clean_takes_what_any_attack_takes():
    x = torch.rand(2, 1, 4, 4)
    assert clean(None, x, torch.zeros(2), generator=None, target=None, return_info=False) is x


# -- streams

def noise(model, x, y, generator):
    "Random attack: the image's own generator decides."
    return torch.stack([(image + 0.3 * torch.rand(image.shape, generator=g)).clamp(0, 1) for image, g in zip(x, generator)])


def company(model, x, y, generator):
    "An attack whose images depend on their companions."
    return (x + 0.3 * torch.rand(x.shape, generator=generator[0]) - 0.02 * len(x)).clamp(0, 1)


company.block = 6
SUITE = {"clean": clean, "noise": noise, "blocks": company, "all": [pgd_at(0.02, 3), noise, company]}


class Disk(torch.utils.data.IterableDataset):
    "Images that are known to nobody before they are read."

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y))


@pytest.mark.parametrize("batch_size", [4, 16, 128])
@pytest.mark.parametrize("options", [{}, {"active": False}, {"fast": True}], ids=str)
def test_a_stream_gives_the_verdicts_of_arrays(case, batch_size, options):
    model, x, y = case
    expected = evaluate(model, x, y, SUITE, **options)
    assert 0 < expected.correct[1].sum() < 35, "random attacks should break some images and spare others"
    streams = [DataLoader(TensorDataset(x, y), 7), DataLoader(Disk(x, y), 40), zip(x.split(1), y.split(1)),
               [[x[:3], y[:3]], (x[3:], y[3:])], [Batch(x, y, torch.Generator())]]
    for stream in streams:
        found = evaluate(model, stream, suite=SUITE, batch_size=batch_size, **options)
        assert torch.equal(found.correct, expected.correct) and torch.equal(found.labels, y)
        assert torch.equal(found.blind, expected.blind)
    raw = raw_accuracy(model, zip(x.split(9), y.split(9)), None, SUITE, batch_size=batch_size)
    assert torch.equal(raw.correct, raw_accuracy(model, x, y, SUITE).correct)


def test_a_stream_is_never_held_as_a_whole(case):
    model, x, y = case
    alive = []

    def reader():
        for rows in torch.arange(40).split(5):
            images = x[rows].clone()
            alive.append(weakref.ref(images))
            assert sum(r() is not None for r in alive) <= 4
            yield images, y[rows]
            del images

    found = budget_curve(model, reader(), None, pgd_at, [0, 0.05], batch_size=5)
    assert found.n == 40 and len(alive) == 8


def test_per_class_counts_class_by_class():
    correct = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    found = Evaluation(("a", "b"), correct, torch.ones(2, 2, dtype=torch.int64), 0, labels=torch.tensor([0, 0, 2, 2, 2]))
    table = found.per_class(["cat", "dog", "owl"])
    assert table.index.tolist() == ["cat", "dog", "owl"] and table["n"].tolist() == [2, 0, 3]
    assert table.loc["cat"].tolist() == [100, 50, 50, 2] and table["a"].isna().tolist() == [False, True, False]
    assert table.loc["owl", ["a", "b", "Union"]].tolist() == pytest.approx([100 / 3, 200 / 3, 100 / 3])
    assert found.per_class()["Union"].iloc[2] == pytest.approx(100 / 3)
    for names in (["cat", "dog"], "cat", []):
        with pytest.raises(ValueError, match="a name for each of the classes 0 to 2, got"): found.per_class(names)
    with pytest.raises(ValueError, match="no labels were kept"):
        Evaluation(("a", "b"), correct, torch.ones(2, 2, dtype=torch.int64), 0).per_class()


@pytest.mark.parametrize("stream, message", [
    ([{"pixel_values": torch.rand(2, 1, 8, 8), "labels": torch.zeros(2)}], "batch 0 is a dict of pixel_values, labels"),
    ([(torch.rand(2, 1, 8, 8),)], r"batch 0 is \(Tensor\)"),
    ([torch.rand(2, 1, 8, 8)], "batch 0 is a Tensor"),
    ([(torch.rand(2, 1, 8, 8), [0, 1])], r"\(Tensor, list\)"),
    ([(torch.rand(2, 1, 8, 8), torch.zeros(3).long())], "2 images and 3 labels"),
    ([(torch.rand(2, 1, 8, 8), torch.zeros(2).long()), (torch.rand(2, 1, 9, 8), torch.zeros(2).long())], "in batch 1 after"),
    ([(torch.full((2, 1, 8, 8), 200.0), torch.zeros(2).long())], "divide bytes by 255"),
    ([], "the stream held none"), (iter([]), "used up"), (5, "got int"), (torch.rand(2, 1, 8, 8), "label"),
])
def test_bad_streams_are_refused(case, stream, message):
    with pytest.raises(ValueError, match=message):
        evaluate(case[0], stream, suite={"clean": clean})


def test_a_suite_in_the_place_of_labels_is_explained(case):
    with pytest.raises(ValueError, match=r"evaluate\(model, stream, suite=...\)"):
        evaluate(case[0], [(case[1], case[2])], {"clean": clean})


# -- progress

@pytest.mark.parametrize("stream", [False, True])
def test_progress_speaks_where_somebody_looks(case, capsys, monkeypatch, stream):
    model, x, y = case
    given = (DataLoader(TensorDataset(x, y), 8),) if stream else (x, y)
    run = lambda **options: evaluate(model, *given, suite={"clean": clean, "noise": noise}, batch_size=8, **options)
    run()
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run()
    shown = capsys.readouterr().err
    assert "80/80" in shown and "noise" in shown
    run(progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CI", "true")
    run()
    assert capsys.readouterr().err == ""


# -- several processes

PROGRAM = """
import sys, torch
from functools import partial
from pathlib import Path
from jat_nb.attacks import fgsm
from jat_nb.evaluation import evaluate, ggsm_at, joint_at, pgd_at, raw_accuracy
from jat_nb.processes import processes
torch.set_num_threads(1)
model, x, y = torch.load(sys.argv[1], weights_only=False)

def company(model, x, y, generator):  # an attack whose images depend on their companions
    return (x + 0.3 * torch.rand(x.shape, generator=generator[0]) - 0.02 * len(x)).clamp(0, 1)
company.block = 7
suite = {"FGSM": partial(fgsm, eps=0.01), "joint": joint_at(0.02, 0.4, 3), "blocks": company,
         "all": [pgd_at(0.01, 2), company, ggsm_at(0.5, 2)]}
found = [evaluate(model, x, y, suite, batch_size=5, **o) for o in ({}, {"fast": True}, {"active": False})]
found.append(raw_accuracy(model, x, y, suite, batch_size=5))
found.append(evaluate(model, iter([(x[:9], y[:9]), (x[9:], y[9:])]), suite=suite, batch_size=5))
torch.save([(f.correct, f.passes, f.blind) for f in found], f"{sys.argv[2]}-{processes().rank}-{processes().count}")
"""


def test_two_processes_find_what_one_finds(case, tmp_path):
    torch.save(case, tmp_path / "case")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    alone = [{}]
    both = [{"WORLD_SIZE": "2", "RANK": r, "LOCAL_RANK": r, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in "01"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "case"), str(tmp_path / "found")]
    children = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **e}, stderr=subprocess.PIPE, text=True)
                for e in alone + both]
    for child in children:
        said = child.communicate(timeout=150)[1]
        assert child.returncode == 0, said[-2000:]
    one, *two = (torch.load(tmp_path / f"found-{name}") for name in ("0-1", "0-2", "1-2"))
    for other in two:
        for a, b in zip(one, other):
            assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
            assert torch.equal(a[1], b[1])  # the passes of all processes together
    assert 0 < one[0][0][2].sum() < 35
    assert all(torch.equal(a, b) for a, b in zip(one[0], one[-1]))  # a stream, beside the same images at hand


def streams_that_differ():
    "The second process has one batch less, or other labels: both are refused in both processes."
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    rank = processes().rank
    for stream, message in (([(x, y)] * (2 - rank), "images is .* in process 1"), ([(x, (y + rank) % 3)], "labels is")):
        with pytest.raises(ValueError, match=message): evaluate(model, stream, suite={"clean": clean}, batch_size=4)


def test_streams_that_differ_are_refused():
    well(launch(streams_that_differ, timeout=100))


def as_they_come(model, x, y, generator):
    "An attack that calls the model itself, once for every image that it is given."
    return torch.cat([x[i:i + 1] + 0 * model(x[i:i + 1]).sum() for i in range(len(x))]).detach()


def again(model, more):
    "The model, with another bias."
    other = copy.deepcopy(model)
    other[-1].bias.data += more
    return other


def wrapped_as_bare():
    "A distributed model waits for all processes in every pass; here they make different numbers of them."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(11, 1, 8, 8)
    y, shared = model(x).argmax(1), nn.parallel.DistributedDataParallel(model) if processes().count > 1 else model
    data = ImageSet("toy", (255 * x).byte(), y, tuple("abc"))
    suite = {"PGD": pgd_at(0.01, 3), "direct": as_they_come, "AutoAttack": autoattack_at(0.01, block=3, attacks=["apgd-ce"])}
    compiled = torch.compile(shared, backend="eager")
    for wrapped, options in ((shared, {}), (shared, {"fast": True}), (compiled, {})):
        alone, found = (evaluate(m, x, y, suite, batch_size=2, **options) for m in (model, wrapped))
        assert torch.equal(alone.correct, found.correct) and torch.equal(alone.passes, found.passes)
        assert torch.equal(alone.blind, found.blind) and found.passes[0, 1] > 0
    for message, given in (("weights is .* in process 1", (again(model, processes().rank), y)),
                           ("labels is .* in process 1", (model, (y + processes().rank) % 3))):
        with pytest.raises(ValueError, match=message): evaluate(given[0], x, given[1], suite)
    assert accuracy(shared, data, pgd_at(0.01, 3), batch_size=3) == accuracy(model, data, pgd_at(0.01, 3), batch_size=3)


def test_a_distributed_model_is_judged_without_its_wrapper():
    well(launch(wrapped_as_bare, timeout=100))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_logit_that_is_no_number_breaks_an_image(case, value):
    "Under attack one image in four gets such a logit, beside a true class that stays ahead."
    _, x, y = case

    class Fragile(nn.Module):
        def forward(self, v):
            logits = 10 * nn.functional.one_hot(y[:1].expand(len(v)) * 0, 3).float() + 0 * v.sum()
            logits[:, 2] = torch.where(v.flatten(1).amax(1) > 0.999999, torch.full_like(logits[:, 2], value), logits[:, 2])
            return logits
    dim = 0.9 * x
    spoil = lambda m, v, y, generator: torch.where(torch.arange(len(v)).view(-1, 1, 1, 1) % 4 == 0, torch.ones_like(v), v)
    found = evaluate(Fragile(), dim, torch.zeros_like(y), {"Clean": clean, "spoil": spoil}, batch_size=40)
    assert found.accuracy.tolist() == [1, 0.75]
