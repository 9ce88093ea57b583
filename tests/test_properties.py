"""Laws that hold for every shape, type and budget."""
import pytest
import torch
from conftest import ALONE, ASCENTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jat_nb.attacks import ATTACKS, ascend, double_pass, ggsm, pgd
from jat_nb.threats import Affine, Flow, Pixel, apply_chain, contains_chain
from jat_nb.warp import l2inf_norm, project_disc, random_disc, rigid_flow, warp

quick = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40))
budgets = st.floats(0, 4)
floats = st.sampled_from([torch.float32, torch.float64])


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (33, 47), (224, 224), (1, 19), (19, 1), (513, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
def test_zero_flow_is_the_identity(size, dtype, padding):
    x = torch.rand(1, 3, *size).round(decimals=1).to(dtype)  # many exact zeros and ones
    assert torch.equal(warp(x, torch.zeros(1, 2, *size, dtype=dtype), padding=padding), x)


@pytest.mark.parametrize("size", [(28, 28), (33, 47), (224, 224)])
@pytest.mark.parametrize("right, down", [(1, 0), (0, 1), (-2, 3), (5, -5)])
def test_whole_shifts(size, right, down):
    x = torch.rand(1, 3, *size)
    flow = torch.tensor([float(right), float(down)]).view(1, 2, 1, 1).expand(1, 2, *size)
    expected = torch.roll(x, (-down, -right), (2, 3))
    inner = (..., slice(max(0, -down), size[0] - max(0, down)), slice(max(0, -right), size[1] - max(0, right)))
    torch.testing.assert_close(warp(x, flow)[inner], expected[inner], rtol=0, atol=1e-12)


@quick
@given(sizes, budgets, floats)
def test_flows_stay_in_their_disc(size, eps, dtype):
    b, c, h, w = size
    flow = random_disc((b, 2, h, w), eps, torch.Generator().manual_seed(0), like=torch.empty(0, dtype=dtype))
    assert (l2inf_norm(flow) <= eps * (1 + 1e-6)).all()
    projected = project_disc(3 * flow, eps)
    assert (l2inf_norm(projected) <= eps * (1 + 1e-6)).all()
    torch.testing.assert_close(project_disc(projected, eps), projected)
    assert torch.equal(project_disc(flow, eps + 1), flow)


@quick
@given(sizes, budgets)
def test_warped_values_are_mixtures_of_neighbours(size, eps):
    b, c, h, w = size
    x = torch.rand(b, c, h, w)
    out = warp(x, random_disc((b, 2, h, w), min(eps, 0.99), torch.Generator().manual_seed(0)))
    around = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    assert (out >= around.amin(-1) - 1e-6).all() and (out <= around.amax(-1) + 1e-6).all()


@quick
@given(sizes, st.floats(0, 1), st.sampled_from(["linf", "l2"]), floats)
def test_pixel_projection(size, eps, norm, dtype):
    base, delta = torch.rand(size, dtype=dtype), torch.randn(size, dtype=dtype)
    threat = Pixel(eps, norm=norm)
    p = threat.project(delta, base)
    assert threat.contains(base, p).all()
    torch.testing.assert_close(threat.project(p, base), p, rtol=0, atol=1e-6)
    rival = threat.init(base, True, torch.Generator().manual_seed(0))  # any feasible point is at least as far
    assert ((p - delta).flatten(1).norm(dim=1) <= (rival - delta).flatten(1).norm(dim=1) + 1e-5).all()


@quick
@given(sizes, st.permutations([Pixel(0.1, 0.05), Flow(0.7, 0.3, padding="zeros"), Affine(0.1, 0.05)]), st.integers(1, 3))
def test_every_chain_and_schedule_stays_inside(size, threats, steps):
    b, c, h, w = size
    model = nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 3))
    x, y = torch.rand(size), torch.arange(b) % 3
    for schedule in ("alternating", "simultaneous", "sequential"):
        info = ascend(model, x, y, threats, steps=steps, schedule=schedule, keep_best=True, return_info=True)
        assert info.within.all() and contains_chain(threats, x, info.params).all()
        torch.testing.assert_close(apply_chain(threats, x, info.params), info.x_adv)
        assert 0 <= info.x_adv.min() and info.x_adv.max() <= 1 and info.x_adv.isfinite().all()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("image", ["black", "white", "flat"])
def test_constant_images_and_flat_losses_give_no_nan(name, image):
    x = torch.full((2, 1, 8, 8), {"black": 0.0, "white": 1.0, "flat": 0.4}[image])
    blind = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.zeros_(blind[1].weight)
    out = ATTACKS[name](blind, x, torch.tensor([0, 1]))
    assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1


def test_budgets_may_differ_from_image_to_image():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8), torch.arange(4)
    eps_flow, eps_pixel = torch.tensor([0.0, 0.2, 0.5, 1.0]), torch.tensor([0.0, 0.1, 0.0, 0.3])
    info = double_pass(model, x, y, eps_flow=eps_flow, eps_pixel=eps_pixel, step_flow=0.3, return_info=True)
    omega, delta = info.params
    assert (l2inf_norm(omega) <= eps_flow * (1 + 1e-6)).all()
    assert (delta.abs().amax((1, 2, 3)) <= eps_pixel + 1e-6).all()
    assert torch.equal(info.x_adv[0], x[0]) and info.within.all()


def test_targeted_descends_and_untargeted_ascends():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(16, 3, 8, 8), torch.arange(16) % 5
    ce = lambda v, label: nn.functional.cross_entropy(model(v), label).item()
    target = (y + 1) % 5
    for attack in (pgd, ggsm, double_pass):
        assert ce(attack(model, x, y), y) > ce(x, y)
        assert ce(attack(model, x, y, target=target), target) < ce(x, target)


def test_autocast_climb_is_verified_in_single_precision():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(16, 3, 8, 8), torch.arange(16) % 5
    with torch.autocast("cpu", torch.bfloat16):
        info = double_pass(model, x, y, return_info=True)
    assert info.x_adv.dtype == info.loss.dtype == torch.float32
    torch.testing.assert_close(info.loss, nn.functional.cross_entropy(model(info.x_adv), y, reduction="none"))


def test_attacks_work_where_gradients_are_switched_off():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8), torch.arange(4)
    seeded = lambda: double_pass(model, x, y, steps=3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = seeded()
    with torch.inference_mode():
        second = seeded()
    assert torch.equal(first, seeded()) and torch.equal(second, first)


@quick
@given(st.floats(-180, 180), st.floats(-3, 3), st.floats(-3, 3))
def test_rigid_motions_keep_distances(angle, right, down):
    flow = rigid_flow(*(torch.tensor([v], dtype=torch.float64) for v in (angle, right, down)), 9, 13)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(13.0), indexing="ij")
    place = (torch.stack([columns, rows]).double() + flow[0]).flatten(1).T
    start = torch.stack([columns, rows]).double().flatten(1).T
    torch.testing.assert_close(torch.cdist(place, place), torch.cdist(start, start), rtol=0, atol=1e-6)


def _nan_weights() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    nn.init.constant_(model[1].weight, torch.nan)
    return model


class Standardised(nn.Module):
    "Divides by the spread of an image, whose gradient is NaN where the image is constant."

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = x - x.mean((1, 2, 3), keepdim=True)
        return self.head((c / (c.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3)).flatten(1))


@pytest.mark.parametrize("name", sorted(ASCENTS))
def test_gradients_that_are_not_numbers_leave_the_image_valid(name):
    options = dict(random_start=False, return_info=True) | ({} if name == "fgsm" else {"steps": 3})
    x, y = torch.full((2, 3, 8, 8), 0.4), torch.tensor([0, 1])
    info = ATTACKS[name](Standardised(), x, y, **options)
    assert info.within.all() and info.x_adv.isfinite().all()
    with pytest.raises(FloatingPointError, match="2 of 2 clean images with NaN"): ATTACKS[name](_nan_weights(), x, y, **options)


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_no_flow_crashes_the_warp(padding, value):
    flow = torch.full((1, 2, 5, 5), value, dtype=torch.float64, requires_grad=True)
    x = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    out = warp(x, flow, padding=padding)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and flow.grad.isfinite().all()


def test_a_model_that_works_in_place_does_not_spoil_the_result():
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    model = lambda v: head(v.sub_(0.5) if not v.requires_grad else v - 0.5)
    info = pgd(model, torch.rand(3, 3, 8, 8), torch.arange(3), return_info=True)
    assert info.within.all() and info.x_adv.min() >= 0 and info.x_adv.max() <= 1


@pytest.mark.parametrize("bad, words", [
    (dict(loss=nn.functional.cross_entropy), "reduction='none'"),
    (dict(eps=torch.zeros(3)), "budget for each of 2 images"),
    (dict(eps="8/255"), "eps_pixel must be finite"),
    (dict(steps=2.5), "steps=2.5"),
    (dict(target=torch.tensor([0, 9])), "got 0 to 9"),
])
def test_mistakes_are_named(bad, words):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        pgd(model, torch.rand(2, 3, 8, 8), torch.arange(2), **bad)
    with pytest.raises(ValueError, match="got 7 to 7"):
        pgd(model, torch.rand(1, 3, 8, 8), torch.tensor([7]), target=torch.tensor([1]))


@pytest.mark.parametrize("eps", [8, 16.0, 1.001, torch.tensor(8.0), torch.tensor([0.03, 8.0]), torch.tensor([255])])
def test_budgets_in_grey_levels_are_refused(eps):
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(2, 3, 8, 8), torch.arange(2)
    calls = [lambda: Pixel(eps), lambda: pgd(model, x, y, eps=eps), lambda: double_pass(model, x, y, eps_pixel=eps),
             lambda: ATTACKS["fgsm"](model, x, y, eps=eps)]
    for call in calls:
        with pytest.raises(ValueError, match="divide grey levels by 255"):
            call()


def test_budgets_that_are_large_but_possible():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(2, 3, 8, 8), torch.arange(2)
    assert pgd(model, x, y, eps=1.0, steps=2).shape == x.shape
    assert pgd(model, x, y, eps=torch.tensor([1.0, 0.0]), steps=2).shape == x.shape
    assert pgd(model, x, y, eps=3.0, norm="l2", steps=2).shape == x.shape
    assert ggsm(model, x, y, eps=2.5, steps=2).shape == x.shape
