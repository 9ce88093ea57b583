"""Flow, RT and both on one grid; the smooth flow; how local a displacement is."""
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from scipy.fft import dctn
from torch import nn
from torch.testing import assert_close

from jat_nb.ascent import ascend
from jat_nb.attacks import ATTACKS, ggsm
from jat_nb.contract import check_attack
from jat_nb.losses import cross_entropy, margin_loss, soft_margin
from jat_nb.spatial import affine, displacement_frequency, flow_loss, grid_to_px, integrated, smooth_flow
from jat_nb.threats import Affine, Flow, Pixel, apply_chain
from jat_nb.warp import affine_flow, l2inf_norm, rigid_flow, warp

PACE = dict(eps_flow=1.2, step_flow=0.35, eps_affine=0.15, step_affine=0.08)
FLOW = dict(eps=1.2, step=0.35, norm="linf", padding="zeros")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, channels=1, height=10, width=12):
    return torch.rand(n, channels, height, width, generator=seeded(n))


def network(x, classes=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        body = nn.Sequential(nn.Conv2d(x.shape[1], 6, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes))
        body(x.float())
    with torch.no_grad():
        body[3].weight *= 4  # answers that are worth fooling
    return body.to(x.dtype).eval()


X = images().double()
Y = torch.tensor([0, 1, 2, 4])
NET = network(X)


def moved(w, x):
    return warp(x, affine_flow(torch.eye(2, 3, dtype=w.dtype) + w, *x.shape[2:]), padding="zeros")


def test_units():
    assert grid_to_px(2 / 28, 28) == 1 and grid_to_px(0.3, 28) == pytest.approx(4.2)
    reached = [grid_to_px(min(n * step, 0.3), side) for side, step, n in ((28, 0.01, 20), (32, 1e-3, 15), (224, 1e-5, 15))]
    assert reached == pytest.approx([2.8, 0.24, 0.0168])


@pytest.mark.parametrize("schedule, start", [("simultaneous", {}), ("alternating", {}), ("sequential", {}),
                                             ("simultaneous", {"random_start": True})])
def test_a_part_at_rest_leaves_the_other_attack(schedule, start):
    "Without a map it is the flow attack with a box, without a flow it is the affine one: to the last bit."
    for i, single in ((0, partial(ggsm, **FLOW)), (1, partial(affine, eps=0.15, step=0.08))):
        still = "eps_affine" if i == 0 else "eps_flow"
        both = integrated(NET, X, Y, **PACE | {still: 0.0}, steps=3, schedule=schedule, return_info=True,
                          generator=seeded(), **start)
        g = seeded()
        if start and i == 1:
            Flow(0.0, norm="linf").init(X, True, g)  # the flow draws first, whatever its budget
        alone = single(NET, X, Y, steps=3, **start or {"random_start": False}, generator=g, return_info=True)
        assert torch.equal(both.params[i], alone.params[0]) and torch.equal(both.x_adv, alone.x_adv)
        assert both.params[1 - i].count_nonzero() == 0


@pytest.mark.parametrize("schedule", ["simultaneous", "alternating"])
def test_the_paper_s_loop(schedule):
    "Eq. 7 to 9 in normalised units with PyTorch's sampler alone, from a Gaussian start off the kinks of interpolation."
    height, width = X.shape[2:]
    half = torch.tensor([width / 2, height / 2]).double().view(1, 2, 1, 1)
    g = seeded()
    w_flow = Flow(1.2, norm="linf", start_std=0.05).init(X, True, g) / half
    w_rt = Affine(0.15, start_std=0.02).init(X, True, g)
    v, u = torch.meshgrid(*((2 * torch.arange(n).double() + 1) / n - 1 for n in (height, width)), indexing="ij")
    place = torch.stack([u, v, torch.ones_like(u)])

    def bent():
        at = torch.einsum("bij,jhw->bihw", torch.eye(2, 3) + w_rt, place) + w_flow
        return F.grid_sample(X, at.permute(0, 2, 3, 1), align_corners=False)

    def gradients():
        return torch.autograd.grad(F.cross_entropy(NET(bent()), Y, reduction="sum"), [w_flow, w_rt])

    for _ in range(4):
        w_flow, w_rt = w_flow.requires_grad_(), w_rt.requires_grad_()
        g_flow, g_rt = gradients()
        moved_flow = torch.clamp(w_flow.detach() + 0.35 / half * g_flow.sign(), -1.2 / half, 1.2 / half)
        if schedule == "alternating":
            w_flow = moved_flow.requires_grad_()
            g_rt = gradients()[1]
        w_flow = moved_flow
        w_rt = (w_rt.detach() + 0.08 * g_rt.sign()).clamp(-0.15, 0.15)
    found = integrated(NET, X, Y, **PACE, steps=4, schedule=schedule, random_start=True, start_std_flow=0.05,
                       start_std_affine=0.02, generator=seeded(), return_info=True)
    assert_close(found.params[0], w_flow * half, rtol=0, atol=1e-12)
    assert_close(found.params[1], w_rt, rtol=0, atol=1e-12)
    assert_close(found.x_adv, bent(), rtol=0, atol=1e-12)
    assert found.within.all() and found.x_adv.isfinite().all()
    assert found.params[0].abs().max() == 1.2 and found.params[1].abs().max() == 0.15  # the clips are met, and hold
    assert found.n_backward == (4 if schedule == "simultaneous" else 8)


def test_all_three_climb():
    before = cross_entropy(NET(X), Y)
    found = [ggsm(NET, X, Y, **FLOW, steps=6, random_start=False, return_info=True),
             affine(NET, X, Y, eps=0.15, step=0.08, steps=6, keep_best=True, return_info=True),
             integrated(NET, X, Y, **PACE, steps=6, keep_best=True, return_info=True)]
    for info in found:
        assert (info.loss > before).all() and info.within.all()
        assert_close(info.loss, cross_entropy(NET(info.x_adv), Y))


def test_budgets_image_by_image_and_the_identity():
    eps_flow, eps_affine = torch.tensor([0.0, 0.5, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.2, 0.1])
    info = integrated(NET, X, Y, eps_flow=eps_flow, eps_affine=eps_affine, steps=3, return_info=True)
    flow, w = info.params
    assert (flow.flatten(1).abs().amax(1) <= eps_flow).all() and (w.flatten(1).abs().amax(1) <= eps_affine).all()
    assert torch.equal(info.x_adv[0], X[0]) and info.displacement_px[0] == 0
    assert (info.displacement_px[1:] > 0).all() and flow[2].count_nonzero() == 0 and w[1].count_nonzero() == 0
    round_one = integrated(NET, X, Y, eps_flow=eps_flow, norm="l2inf", eps_affine=0.0, steps=3, return_info=True)
    assert (l2inf_norm(round_one.params[0]) <= eps_flow * (1 + 1e-6)).all()


def test_a_gaussian_start_has_its_two_deviations():
    grey = torch.full((300, 1, 8, 8), 0.5)
    start = integrated(network(grey), grey, torch.zeros(300).long(), eps_flow=2.0, step_flow=0.0, step_affine=0.0,
                       steps=1, random_start=True, start_std_flow=0.2, start_std_affine=0.03,
                       generator=seeded(), return_info=True)
    for p, deviation in zip(start.params, (0.2, 0.03)):
        assert_close(p.std(), torch.tensor(deviation), rtol=0.05, atol=0)
    narrow = affine(network(grey), grey, torch.zeros(300).long(), step=0.0, steps=1, random_start=True,
                    start_std=0.03, generator=seeded(1), return_info=True)
    assert_close(narrow.params[0].std(), torch.tensor(0.03), rtol=0.05, atol=0)


@pytest.mark.parametrize("start", [{}, dict(random_start=True, start_std_flow=0.1, start_std_affine=0.02)], ids=str)
def test_integrated_with_other_options_keeps_the_contract(start):
    for schedule in ("simultaneous", "alternating"):
        fn = partial(ATTACKS["integrated"], steps=2, schedule=schedule, **start)
        threats = [Flow(norm="linf", padding="zeros"), Affine()]
        checks = check_attack(fn, threats=threats, zero=partial(fn, eps_flow=0.0, eps_affine=0.0))
        assert all(c.passed for c in checks), [c for c in checks if not c.passed]


@pytest.mark.parametrize("size", [(9, 9), (8, 14)])
def test_a_translation_of_two_over_w_is_a_pixel(size):
    x = torch.rand(2, 3, *size, generator=seeded())
    for entry, dim in ((0, 3), (1, 2)):
        w = torch.zeros(2, 2, 3)
        w[:, entry, 2] = 2 / x.shape[dim]
        shifted = moved(w, x)
        assert_close(shifted.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1), rtol=0, atol=1e-6)
        assert shifted.select(dim, -1).abs().max() < 1e-5  # black comes in


@pytest.mark.parametrize("angle", [-40.0, 7.0, 90.0])
def test_eq_4_turns_the_other_way_than_rigid_flow(angle):
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    w = torch.tensor([[[c - 1, -s, 0.0], [s, c - 1, 0.0]]])
    x, zero = images(1, 3, 16, 16), torch.zeros(1)
    field = affine_flow(torch.eye(2, 3) + w, 16, 16)
    assert_close(field, rigid_flow(torch.tensor([-angle]), zero, zero, 16, 16), rtol=0, atol=1e-5)
    bilinear = dict(interpolation=TF.InterpolationMode.BILINEAR)
    inside = (..., slice(4, 12), slice(4, 12))
    assert_close(TF.rotate(x, angle, **bilinear)[inside], moved(w, x)[inside], rtol=0, atol=1e-4)
    assert_close(TF.affine(x, -angle, [0, 0], 1.0, [0, 0], **bilinear)[inside], moved(w, x)[inside], rtol=0, atol=1e-4)
    other = TF.rotate(x, -angle, **bilinear)[inside]
    assert (other - moved(w, x)[inside]).abs().max() > 0.1  # the sign matters


def test_one_geometric_threat_climbs_as_before():
    "A flow and a perturbation alone on their grids: the plain double pass, to the last bit."
    flow, pixel = Flow(0.8, 0.3), Pixel(0.1, 0.04)
    omega, delta = flow.init(X, True, g := seeded()), None
    delta = pixel.init(flow.apply(X, omega), True, g)
    for _ in range(3):
        for i in (0, 1):
            live = [omega.detach().requires_grad_(i == 0), delta.detach().requires_grad_(i == 1)]
            loss = cross_entropy(NET(pixel.apply(flow.apply(X, live[0]), live[1])), Y).sum()
            grad, = torch.autograd.grad(loss, live[i])
            if i == 0:
                omega = flow.step(omega, grad, X)
            else:
                delta = pixel.step(delta, grad, flow.apply(X, omega))
    found = ascend(NET, X, Y, [flow, pixel], steps=3, schedule="alternating", generator=seeded(), return_info=True)
    assert torch.equal(found.params[0], omega) and torch.equal(found.params[1], delta)
    assert torch.equal(found.x_adv, (flow.apply(X, omega) + delta).clamp(0, 1))


def test_proposition_1():
    generator = seeded(5)
    w = [torch.randn(shape, generator=generator, dtype=torch.float64) * width
         for shape, width in (((4, 2, 10, 12), 0.5), ((4, 2, 3), 0.1), ((4, 1, 10, 12), 0.05))]
    w = [part.requires_grad_() for part in w]
    logits = NET(apply_chain([Flow(padding="zeros"), Affine(), Pixel()], X, w))
    ce, soft = cross_entropy(logits, Y), soft_margin(logits, Y)
    tight = dict(rtol=0, atol=1e-10)
    ratio = 1 - (-ce).exp()
    assert_close(ce, F.softplus(soft), **tight)
    assert_close(ratio, soft.sigmoid(), **tight)
    of_ce, of_soft = (torch.autograd.grad(loss.sum(), w, retain_graph=True) for loss in (ce, soft))
    for a, b in zip(of_ce, of_soft):
        assert_close(a, ratio.view(-1, *[1] * (a.ndim - 1)) * b, **tight)
        clear = (a.abs() > 1e-12) & (b.abs() > 1e-12)
        assert clear.double().mean() > 0.5 and torch.equal(a.sign()[clear], b.sign()[clear])
    margin = margin_loss(logits, Y)
    assert (margin <= soft).all() and (soft <= margin + math.log(4)).all()


def median_frequency(flow):
    "Written with SciPy's orthonormal cosine transform and a sort."
    power = (dctn(flow.double().numpy(), axes=(1, 2), norm="ortho") ** 2).sum(0)
    rows, columns = (np.arange(n) / (2 * n) for n in power.shape)
    frequency = np.hypot(rows[:, None], columns[None]).ravel()
    order = np.argsort(frequency, kind="stable")
    total = power.ravel()[order].cumsum()
    return frequency[order][np.searchsorted(total, total[-1] / 2)]


@pytest.mark.parametrize("size", [(10, 12), (7, 16), (1, 9), (33, 8)])
def test_frequency_against_scipy(size):
    flow = torch.randn(3, 2, *size, generator=seeded())
    smooth = flow.cumsum(2).cumsum(3)
    for field in (flow, smooth):
        expected = torch.tensor([median_frequency(one) for one in field])
        assert_close(displacement_frequency(field), expected, rtol=0, atol=1e-7)
    assert (displacement_frequency(7 * flow) == displacement_frequency(flow)).all()  # of any length


def test_frequencies_known_in_advance():
    column = torch.arange(20) + 0.5
    for k in range(0, 20, 3):
        wave = (math.pi * k * column / 20).cos().expand(1, 2, 6, 20)
        assert_close(displacement_frequency(wave), torch.tensor([k / 40]).double(), rtol=0, atol=1e-7)
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    assert 0.65 < displacement_frequency(board.expand(1, 2, 64, 64)).item() < math.sqrt(0.5)
    assert displacement_frequency(torch.zeros(1, 2, 5, 5)).item() == 0


@pytest.mark.parametrize("size", [(28, 28), (12, 31)])
def test_affine_fields_are_slow_by_construction(size):
    maps = 2 * torch.rand(200, 2, 3, generator=seeded()) - 1
    slow = displacement_frequency(affine_flow(torch.eye(2, 3) + maps, *size))
    assert slow.max() <= 1 / (2 * min(size)) + 1e-7
    signs = torch.randn(20, 2, *size, generator=seeded()).sign()
    assert displacement_frequency(signs).min() > 4 * slow.max()


@pytest.mark.parametrize("size", [(4, 5), (1, 6), (3, 1), (1, 1)])
def test_flow_loss_is_the_sum_over_neighbours(size):
    flow = torch.randn(3, 2, *size, generator=seeded(), dtype=torch.float64)
    height, width = size
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for k, l in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= k < height and 0 <= l < width:
                    apart = flow[:, :, i, j] - flow[:, :, k, l]
                    expected += (apart.square().sum(1) + 1e-8).sqrt() - 1e-4
    assert_close(flow_loss(flow), expected)


def test_flow_loss_of_constant_flows_and_its_gradient():
    flow = torch.full((2, 2, 6, 7), 0.37, requires_grad=True)
    assert flow_loss(flow).abs().max() < 1e-6
    grad, = torch.autograd.grad(flow_loss(flow).sum(), flow)
    assert grad.count_nonzero() == 0  # no NaN where the root would have none
    rough = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(flow_loss, rough)


@pytest.mark.parametrize("function", [flow_loss, displacement_frequency])
@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 3, 5, 5), (5, 5)])
def test_only_flows_have_a_loss_and_a_frequency(function, shape):
    with pytest.raises(ValueError, match=r"displacements \(B, 2, H, W\), got"):
        function(torch.zeros(shape))



RIGHT = NET(X).argmax(1)


def test_smooth_flows_lower_eq_1_and_their_price_smooths_them():
    uneven, before = [], -margin_loss(NET(X), RIGHT)
    for tau in (0.0, 0.01, 0.1):
        info = smooth_flow(NET, X, RIGHT, tau_flow=tau, steps=40, return_info=True)
        value = (-margin_loss(NET(info.x_adv), RIGHT)).clamp(min=0) + tau * flow_loss(info.params[0])
        assert_close(info.loss, -value)
        assert torch.equal(info.success, NET(info.x_adv).argmax(1) != RIGHT)
        assert (value[~info.success] <= before[~info.success]).all() and info.within.all()
        assert torch.equal(info.x_adv, warp(X, info.params[0], padding="zeros").clamp(0, 1))
        uneven.append(flow_loss(info.params[0]).mean().item())
        if tau == 0:
            assert info.success.all()
    assert uneven[0] > uneven[1] > uneven[2]
    assert (info.n_forward, info.n_backward) == (41, 40)
    assert_close(info.displacement_px, l2inf_norm(info.params[0]))


def test_smooth_flows_aim_and_lead():
    target = (RIGHT + 1) % 5
    aimed = smooth_flow(NET, X, RIGHT, tau_flow=0.0, steps=60, target=target, return_info=True)
    assert torch.equal(aimed.success, NET(aimed.x_adv).argmax(1) == target) and aimed.success.any()
    assert (margin_loss(NET(aimed.x_adv), target) <= margin_loss(NET(X), target)).all()
    barely, sure = (smooth_flow(NET, X, RIGHT, tau_flow=0.0, kappa=kappa, steps=60) for kappa in (0.0, 1.0))
    assert margin_loss(NET(sure), RIGHT).min() >= 1 > margin_loss(NET(barely), RIGHT).mean()


def test_smooth_flows_find_no_less_than_lbfgs():
    "One image at a time with curvature and a line search, as in the original: on average not cheaper."
    tau, theirs = 0.02, []
    for i in range(len(X)):
        flow = torch.zeros(1, 2, *X.shape[2:], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([flow], max_iter=100, line_search_fn="strong_wolfe")

        def closure(i=i, flow=flow, optimiser=optimiser):
            optimiser.zero_grad()
            lead = -margin_loss(NET(warp(X[i:i + 1], flow, padding="zeros")), RIGHT[i:i + 1]).clamp(max=0)
            value = (lead + tau * flow_loss(flow)).sum()
            value.backward()
            return value

        optimiser.step(closure)
        theirs.append(closure().item())
    ours = -smooth_flow(NET, X, RIGHT, tau_flow=tau, return_info=True).loss
    assert ours.mean().item() <= sum(theirs) / len(theirs)


def test_smooth_flows_keep_the_contract():
    fn = partial(smooth_flow, steps=3)
    checks = check_attack(fn, within=lambda x, x_adv: torch.ones(len(x), dtype=torch.bool))
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_smooth_flows_where_gradients_are_off_and_logits_no_numbers():
    expected = smooth_flow(NET, X, RIGHT, steps=3)
    with torch.inference_mode():
        assert torch.equal(smooth_flow(NET, X, RIGHT, steps=3), expected)
    broken = smooth_flow(lambda v: NET(v) * torch.nan, X, RIGHT, steps=2, return_info=True)
    assert broken.success.all() and torch.equal(broken.x_adv, X)
    missed = smooth_flow(lambda v: NET(v) * torch.nan, X, RIGHT, target=RIGHT, steps=2, return_info=True)
    assert not missed.success.any()


@pytest.mark.parametrize("options, message", [
    (dict(tau_flow=-0.05), "tau_flow finite and >= 0, .* got -0.05"), (dict(tau_flow=math.nan), "tau_flow finite"),
    (dict(kappa=-1.0), "kappa finite and >= 0"), (dict(step_flow="0.1"), "step_flow finite"),
    (dict(steps=0), "at least one step, got steps=0"), (dict(steps=2.5), "at least one step, got steps=2.5"),
    (dict(target=torch.zeros(3).long()), "one label per image"), (dict(padding="black"), "unknown padding 'black'"),
])
def test_smooth_flows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        smooth_flow(NET, X, RIGHT, **options)


def test_bent_pictures_refuse():
    with pytest.raises(ValueError, match="eps_affine must be finite"):
        affine(NET, X, Y, eps=-0.1)
    with pytest.raises(ValueError, match="unknown schedule 'both'"):
        integrated(NET, X, Y, schedule="both")
    with pytest.raises(ValueError, match="unknown norm 'l2'"):
        integrated(NET, X, Y, norm="l2")
    with pytest.raises(ValueError, match="start_std must be None or one finite number"):
        integrated(NET, X, Y, random_start=True, start_std_affine=-1.0)
    with pytest.raises(ValueError, match="start_std would be ignored: pass random_start=True"):
        affine(NET, X, Y, start_std=0.01)
    with pytest.raises(ValueError, match="start_std_flow and start_std_affine would be ignored"):
        integrated(NET, X, Y, start_std_flow=0.01, start_std_affine=0.01)
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        smooth_flow(NET, 2 * X, Y)
