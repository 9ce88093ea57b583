"""Training on streams, a function told of every epoch, and stopping early."""
import itertools
from dataclasses import replace

import pytest
import torch
from test_processes import launch, well
from test_training import JOINT, NATURAL, dies, equal, images, net
from torch.testing import assert_close
from torch.utils.data import DataLoader

from jat_nb.batches import Stream, batches
from jat_nb.data import Unlabelled
from jat_nb.models import create
from jat_nb.processes import processes
from jat_nb.recipes import Recipe
from jat_nb.records import read_jsonl
from jat_nb.training import fit

PLAIN = replace(NATURAL, augment=())


def epochs_of(data, batch_size=16, floats=True):
    "A function that gives, at every call, the batches of the next epoch of a run on `data`."
    numbers = itertools.count()

    def read():
        order = replace(data, labels=torch.arange(len(data)), classes=tuple(map(str, range(len(data)))))
        for batch in batches(order, batch_size, shuffle=True, seed=(0, next(numbers))):
            yield (data.x if floats else data.images)[batch.y], data.labels[batch.y]

    return read


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("recipe", [PLAIN, replace(JOINT, augment=()), replace(NATURAL, ema=0.9), replace(JOINT, accumulate=2)],
                         ids=["natural", "joint", "augmented", "parts"])
def test_a_stream_trains_to_the_weights_of_the_set(recipe):
    data, held = images(), images(12, seed=1)
    a, b = net(), net()
    expected = fit(a, data, recipe, validation=held)
    stream = Stream(epochs_of(data, floats=not recipe.augment), length=3, name="toy")
    found = fit(b, stream, recipe, validation=held)
    assert equal(a, b) and without_time(found) == without_time(expected)


def test_a_loader_repeats_its_order_by_the_seed_and_resumes(tmp_path):
    data = images()
    loader = DataLoader(list(zip(data.x, data.labels)), 16, shuffle=True)
    whole, other, killed, after = net(), net(), dies(net(), 5), net(seed=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = fit(whole, loader, PLAIN)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state is left as it was"
    fit(other, loader, replace(PLAIN, seed=1))
    assert not equal(whole, other)
    with pytest.raises(KeyboardInterrupt): fit(killed, loader, PLAIN, out=tmp_path)
    assert [row["epoch"] for row in read_jsonl(tmp_path / "log.jsonl")] == [1]
    torch.manual_seed(9)
    assert without_time(fit(after, loader, PLAIN, out=tmp_path)) == without_time(rows)
    assert equal(whole, after)


def test_time_is_looked_at_between_epochs(tmp_path):
    data, whole = images(), net()
    stream = [(b.x, b.y) for b in batches(data, 16)]
    fit(whole, stream, PLAIN)
    for done in (1, 2, 3):
        model = net()
        assert len(fit(model, stream, PLAIN, out=tmp_path, seconds=0)) == done
    assert equal(model, whole)
    with pytest.raises(ValueError, match="batches"):
        fit(net(), stream[:2], PLAIN, out=tmp_path)


def test_a_run_by_iterations_ends_in_mid_epoch():
    data = images()
    rows = fit(net(), [(b.x, b.y) for b in batches(data, 16)], replace(PLAIN, epochs=None, iterations=5))
    assert [row["iterations"] for row in rows] == [3, 2]


@pytest.mark.parametrize("augment", [(), ("crop_flip",)])
def test_the_parts_of_a_stream_make_the_whole(augment):
    data = images()
    stream = Stream([(data.images[:21], data.labels[:21]), (data.images[21:], data.labels[21:])], name="toy")
    parts = [list(stream.epoch((0, 0), augment=augment, part=p, parts=3)) for p in range(3)]
    whole = list(stream.epoch((0, 0)))
    for i, batch in enumerate(whole):
        mine = [part[i] for part in parts]
        assert_close(sum(b.share for b in mine), 1.0)
        assert torch.equal(torch.cat([b.y for b in mine]), batch.y)
        assert all(torch.equal(b.whole().x, torch.cat([m.x for m in mine])) for b in mine)
        if not augment: assert torch.equal(torch.cat([b.x for b in mine]), batch.x)
    with pytest.raises(ValueError, match="30 processes cannot share a batch of 21 images"):
        next(stream.epoch((0, 0), part=1, parts=30))


X, Y = images().x, images().labels


def used_up():
    kept = iter([(X, Y)] * 4)
    return lambda: kept


@pytest.mark.parametrize("stream, message", [
    (iter([(X, Y)]), "list_iterator is used up after one epoch: pass the DataLoader itself"),
    (((X, Y) for _ in range(3)), "generator is used up"),
    (lambda: iter([(X, Y)]), r"Stream\(source, length=...\)"),
    (Stream(used_up(), 4), "ended after 0 of 4 batches"),
    (Stream(lambda: iter([(X, Y)]), 2), "ended after 1 of 2 batches: state its true length"),
    ([(4 * X - 2, Y)], "divide bytes by 255"),
    ([{"x": X, "y": Y}], "batch 0 is a dict of x, y"),
    ([(X, Y.float())], "use y.long"),
    ([(X, Y - 1)], "got -1 to 1"),
    ([], "the list is empty"),
    (7, "got int"),
], ids=range(11))
def test_what_cannot_train_is_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        fit(net(), stream, PLAIN)


def test_iterators_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="used up"):
        fit(net(), iter([(X, Y)]), PLAIN, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_must_be_at_hand_is_named():
    with pytest.raises(ValueError, match="validation is judged after every epoch .* got list"):
        fit(net(), [(X, Y)], PLAIN, validation=[(X, Y)])
    with pytest.raises(ValueError, match="no unlabelled images beside it"):
        fit(net(), [(X, Y)], PLAIN, unlabelled=Unlabelled("toy", images().images))


def test_a_flow_starts_from_the_first_batch_of_a_stream():
    flows = []
    data = replace(images(32), images=images(32).images.expand(-1, 3, -1, -1))
    likely = Recipe(objective="likelihood", model="glow", epochs=1, batch_size=16, optimizer="adamw", lr=1e-3, augment=())
    for train in (data, Stream(epochs_of(data), 2, name="toy")):
        torch.manual_seed(0)
        flows.append(create("glow", in_chans=3, size=8, levels=2, steps=1, width=8))
        fit(flows[-1], train, likely)
    a, b = (f.state_dict() for f in flows)
    assert all(v.isfinite().all() for v in b.values() if v.is_floating_point()) and a.keys() == b.keys()


# -- on_epoch and patience

def test_on_epoch_hears_of_every_row_and_changes_nothing(tmp_path):
    data, held, heard = images(), images(12, seed=1), []

    def listen(row, network):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        network.train()
        network(torch.rand(5, 1, 8, 8))  # draws, and moves running statistics
        row["loss"], row["mine"] = 0, 1
        heard.append(row["epoch"])

    plain, watched = net(), net()
    expected = fit(plain, data, NATURAL, validation=held)
    found = fit(watched, data, NATURAL, validation=held, on_epoch=listen, out=tmp_path)
    assert heard == [1, 2, 3] and equal(plain, watched)
    assert without_time(found) == without_time(expected) == without_time(read_jsonl(tmp_path / "log.jsonl"))


def test_true_stops_for_good(tmp_path):
    data, one = images(), net()
    rows = fit(one, data, NATURAL, on_epoch=lambda row, network: row["epoch"] == 2, out=tmp_path)
    assert [row.get("stopped") for row in rows] == [None, "on_epoch"] and not one.training
    again = net(seed=4)
    assert without_time(fit(again, data, NATURAL, out=tmp_path)) == without_time(rows) and equal(one, again)


def test_a_callback_that_fails_costs_no_epoch(tmp_path):
    data, whole, after = images(), net(), net()
    fit(whole, data, NATURAL)

    def full(row, network):
        if row["epoch"] == 2: raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"): fit(net(), data, NATURAL, on_epoch=full, out=tmp_path)
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 2
    fit(after, data, NATURAL, out=tmp_path)
    assert equal(whole, after)


@pytest.mark.parametrize("merits, patience, length", [
    ([0.1, 0.2, 0.2, 0.2, 0.9], 2, 4), ([0.5, 0.4, 0.6, 0.5, 0.4], 2, 5), ([0.0] * 5, 1, 2), ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5)])
def test_patience_counts_epochs_that_are_no_better(merits, patience, length):
    given = iter(merits)
    judge = lambda model, validation, few: {"val_robust": next(given)}
    rows = fit(net(), images(), replace(NATURAL, epochs=5), validation=images(12), judge=judge, patience=patience)
    assert len(rows) == length and ("stopped" in rows[-1]) == (merits[:length].index(max(merits[:length])) + patience < length)


def test_patience_survives_a_kill_and_hands_back_the_average(tmp_path):
    def script(model, validation, few):
        return {"val_robust": 0.5 - 0.1 * next(count)}

    data, held, recipe = images(), images(12), replace(NATURAL, epochs=9, ema=0.9)
    count, whole = itertools.count(), net()
    assert len(fit(whole, data, recipe, validation=held, judge=script, patience=3)) == 4
    count, killed, after = itertools.count(), dies(net(), 8), net()
    script.__qualname__ = "script"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, data, recipe, validation=held, judge=script, patience=3, out=tmp_path)
    assert len(fit(after, data, recipe, validation=held, judge=script, patience=3, out=tmp_path)) == 4
    assert equal(whole, after)


@pytest.mark.parametrize("options, message", [({"patience": 2}, "pass it"), ({"patience": 0, "validation": images(12)}, "at least 1")])
def test_patience_needs_something_to_count(options, message):
    with pytest.raises(ValueError, match=message): fit(net(), images(), NATURAL, **options)


def test_patience_needs_a_judge_that_can_compare():
    with pytest.raises(ValueError, match="val_robust"):
        fit(net(), images(), NATURAL, validation=images(12), judge=lambda *_: {"grey": 1.0}, patience=1)


# -- several processes

def smooth_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def shared_stream(path):
    "Both processes read the stream, each trains on its part of every batch."
    data, heard = images(), []
    model = smooth_net()
    stream = [(b.x, b.y) for b in batches(data, 13)]
    rows = fit(model, stream, replace(PLAIN, epochs=2, milestones=(1,)), on_epoch=lambda row, network: heard.append(row["epoch"]))
    expected, losses = torch.load(path)
    assert_close(dict(model.state_dict()), expected, rtol=1e-4, atol=1e-5)
    assert_close([row["loss"] for row in rows], losses, rtol=1e-4, atol=1e-5)
    assert heard == ([1, 2] if processes().rank == 0 else [])


def test_two_processes_share_a_stream(tmp_path):
    model = smooth_net()
    rows = fit(model, [(b.x, b.y) for b in batches(images(), 13)], replace(PLAIN, epochs=2, milestones=(1,)))
    torch.save((dict(model.state_dict()), [row["loss"] for row in rows]), tmp_path / "alone")
    well(launch(shared_stream, tmp_path / "alone", timeout=100))
