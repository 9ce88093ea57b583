"""Geometric neighbours share one grid: one resampling, whatever stands before and behind them."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from jat_nb.ascent import ascend
from jat_nb.threats import Affine, Flow, Pixel, apply_chain, contains_chain, grid_start
from jat_nb.warp import warp

PIXEL = Pixel(0.1, 0.04)
FLOW = Flow(1.0, 0.4, padding="zeros")
BOX = Flow(0.6, 0.2, "linf", "zeros")
AFFINE = Affine(0.1, 0.04)
SCHEDULES = ("simultaneous", "alternating", "sequential")


def images(n=3, channels=2, height=7, width=9):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(n))


def network(x):
    torch.manual_seed(1)
    channels, height, width = x.shape[1:]
    head = nn.Linear(4 * (height - 2) * (width - 2), 4)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), head).to(x.dtype).eval()


def by_hand(threats, x, params):
    "The image of a list of threats, written without the package's notion of a stage."
    field = None
    for threat, p in zip(threats, params):
        if isinstance(threat, Pixel):
            x = x if field is None else warp(x, field, padding="zeros")
            x, field = x + p, None
        else:
            moved = threat.displacement(x, p)
            field = moved if field is None else field + moved
    return x if field is None else warp(x, field, padding="zeros")


def climb_by_hand(model, x, y, threats, params, passes):
    "Every pass builds the whole image, and every projection the whole image before its grid."
    for active in passes:
        live = [p.detach().requires_grad_() for p in params]
        loss = nn.functional.cross_entropy(model(by_hand(threats, x, live)), y, reduction="sum")
        grads = torch.autograd.grad(loss, live)
        for i in active:
            start = i
            while start and not isinstance(threats[i], Pixel) and not isinstance(threats[start - 1], Pixel):
                start -= 1
            base = by_hand(threats[:start], x, params[:start])
            params[i] = threats[i].step(params[i], grads[i], base)
    return params


def passes_of(schedule, n, steps):
    return {"simultaneous": [tuple(range(n))] * steps, "alternating": [(i,) for i in range(n)] * steps,
            "sequential": [(i,) for i in range(n) for _ in range(steps)]}[schedule]


LISTS = [[FLOW, AFFINE], [AFFINE, FLOW], [PIXEL, FLOW, AFFINE], [FLOW, AFFINE, PIXEL], [AFFINE, PIXEL, FLOW],
         [PIXEL, AFFINE, BOX, PIXEL], [FLOW, BOX, AFFINE, PIXEL, AFFINE, FLOW]]


@pytest.mark.parametrize("threats", LISTS, ids=lambda ts: "-".join(type(t).__name__ for t in ts))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_climb_is_the_plain_loop(threats, schedule):
    x = images().double()
    y, model = torch.tensor([0, 1, 3]), network(x)
    found = ascend(model, x, y, threats, steps=3, schedule=schedule, random_start=False, return_info=True)
    start = [threat.init(x, False, None) for threat in threats]
    params = climb_by_hand(model, x, y, threats, start, passes_of(schedule, len(threats), 3))
    for ours, plain in zip(found.params, params):
        assert_close(ours, plain, rtol=0, atol=1e-12)
        assert plain.abs().max() > 0
    assert_close(found.x_adv, by_hand(threats, x, params).clamp(0, 1), rtol=0, atol=1e-12)
    assert found.within.all()
    assert found.n_backward == (3 if schedule == "simultaneous" else 3 * len(threats))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([PIXEL, FLOW, BOX, AFFINE]), max_size=5), st.integers(0, 99))
def test_chains_resample_once_per_grid(threats, seed):
    x, g = images(), torch.Generator().manual_seed(seed)
    params = []
    for i, threat in enumerate(threats):
        params.append(threat.init(by_hand(threats[:grid_start(threats, i)], x, params), True, g))
    assert_close(apply_chain(threats, x, params), by_hand(threats, x, params), rtol=0, atol=1e-6)
    assert contains_chain(threats, x, params).all()
    for i, p in enumerate(params):
        worse = [*params[:i], p + 1.5, *params[i + 1:]]
        assert not contains_chain(threats, x, worse).any()


def test_where_grids_begin():
    assert [grid_start([FLOW, AFFINE, BOX], i) for i in range(3)] == [0, 0, 0]
    assert [grid_start([FLOW, PIXEL, PIXEL, AFFINE], i) for i in range(4)] == [0, 1, 2, 3]


def test_still_parameters_give_the_image_back():
    x = images()
    for threats in LISTS:
        assert torch.equal(apply_chain(threats, x, [t.init(x, False, None) for t in threats]), x)


def test_one_shift_for_two_halves():
    "Half a pixel by the flow and half a pixel by the map are one whole pixel, without interpolation."
    x = images(2, 1, 6, 8)
    flow, w = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 3)
    flow[:, 0], w[:, 0, 2] = 0.5, 0.5 * 2 / 8
    once = apply_chain([FLOW, AFFINE], x, [flow, w])
    assert_close(once[..., :-1], x[..., 1:])
    assert once[..., -1].count_nonzero() == 0
    twice = AFFINE.apply(FLOW.apply(x, flow), w)
    assert (twice - once).abs().max() > 0.1


def test_order_means_nothing_within_a_grid():
    x, y = images(), torch.tensor([0, 1, 3])
    model = network(x)
    both = [ascend(model, x, y, ts, steps=4, schedule="simultaneous", random_start=False, return_info=True)
            for ts in ([FLOW, AFFINE], [AFFINE, FLOW])]
    assert torch.equal(both[0].x_adv, both[1].x_adv)
    assert torch.equal(both[0].params[0], both[1].params[1])


@pytest.mark.parametrize("threats", [[Flow(), AFFINE], [PIXEL, AFFINE, Flow(padding="reflection")]])
def test_one_grid_has_one_padding(threats):
    x, y = images(), torch.tensor([0, 1, 3])
    model = network(x).train()
    with pytest.raises(ValueError, match="one padding, got (border|reflection), zeros: give them the same"):
        ascend(model, x, y, threats, steps=1)
    assert model.training and all(p.requires_grad for p in model.parameters())
    apart = [Flow(), PIXEL, AFFINE]  # two grids may differ
    assert ascend(model, x, y, apart, steps=1, return_info=True).within.all()


def test_displacement_of_all_threats_together():
    x, y = images(2, 1, 8, 8), torch.tensor([0, 1])
    model = network(x)
    still = ascend(model, x, y, [PIXEL], steps=1, return_info=True)
    assert still.displacement_px.tolist() == [0, 0]
    shift = Affine(torch.tensor([0.0, 0.25]), 1.0)
    info = ascend(model, x, y, [Flow(2.0, 0.5, "linf", "zeros"), PIXEL, shift], steps=1, schedule="simultaneous",
                  random_start=False, return_info=True)
    field = info.params[0] + shift.displacement(x, info.params[2])
    assert_close(info.displacement_px, field.square().sum(1).sqrt().flatten(1).amax(1))
    assert_close(info.displacement_px[0], torch.tensor(0.5 * 2 ** 0.5))


@pytest.mark.parametrize("threat", [Pixel(0.1, start_std=0.02), Pixel(9.0, norm="l2", start_std=0.02),
                                    Flow(1.0, start_std=0.2), Flow(1.0, norm="linf", start_std=0.2),
                                    Affine(0.3, start_std=0.05)], ids=lambda t: type(t).__name__)
def test_gaussian_starts(threat):
    grey = torch.full((400, 1, 6, 6), 0.5)
    start = threat.init(grey, True, torch.Generator().manual_seed(0))
    assert_close(start.std(), torch.tensor(threat.start_std), rtol=0.04, atol=0)
    assert abs(start.mean()) < 0.05 * threat.start_std and threat.contains(grey, start).all()
    wide = type(threat)(**vars(threat) | {"start_std": 10.0})
    assert wide.contains(grey, wide.init(grey, True, torch.Generator().manual_seed(0))).all()
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    alone = threat.init(grey[:1], True, torch.Generator().manual_seed(2))
    assert torch.equal(threat.init(grey[:3], True, own)[2:], alone)
    assert threat.init(grey, False, None).count_nonzero() == 0


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf"), "wide", torch.ones(3)])
@pytest.mark.parametrize("kind", [Pixel, Flow, Affine])
def test_refused_deviations(kind, std):
    with pytest.raises(ValueError, match="start_std must be None or one finite number >= 0"):
        kind(start_std=std)
