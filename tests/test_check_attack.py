"""The attack contract: every attack of the package keeps it, and every planted fault is caught."""
import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ASCENTS, CHANGING
import torch.nn.functional as F
from torch import nn

from jat_nb.attacks import ATTACKS, double_pass, ggsm, joint_threats, pgd
from jat_nb.contract import Promise, check_attack
from jat_nb.models import frozen
from jat_nb.randomness import uniform
from jat_nb.rigid import Rigid
from jat_nb.threats import Affine, Flow, Pixel
from jat_nb.unseen import JPEG, Elastic, Gabor
from jat_nb.warp import warp
from jat_nb.weather import Fog, Snow

EPS = 8 / 255
BUDGETS = {"rigid": [Rigid()], "fgsm": [Pixel()], "pgd": [Pixel()], "mi_fgsm": [Pixel()], "ggsm": [Flow()], "affine": [Affine()],
           "integrated": [Flow(norm="linf", padding="zeros"), Affine()], "elastic": [Elastic()], "jpeg": [JPEG()], "fog": [Fog()],
           "snow": [Snow()], "gabor": [Gabor()]}


def broken(checks):
    return {c.promise for c in checks if not c.passed}


@pytest.mark.parametrize("options", [{}, dict(restarts=2), dict(keep_best=True), dict(random_start=False)], ids=str)
@pytest.mark.parametrize("name", ASCENTS)
def test_every_attack_of_the_package_keeps_the_contract(name, options):
    if name == "fgsm" and options.keys() - {"random_start"}:
        pytest.skip("one step from one start")
    fn = partial(ATTACKS[name], **options, **({} if name == "fgsm" else dict(steps=2)))
    parameters = inspect.signature(ATTACKS[name]).parameters
    zero = partial(fn, **{budget: 0.0 for budget in parameters if budget.startswith(("eps", "max_deg", "max_px", "strength"))})
    checks = check_attack(fn, threats=BUDGETS.get(name, joint_threats()), zero=None if name in CHANGING else zero)
    assert len(checks) == 14 - (name in CHANGING) and broken(checks) == set(), [c for c in checks if not c.passed]


def test_orders_and_independent_cascade():
    for fn in (partial(double_pass, order="pixel-spatial", steps=2), partial(ATTACKS["cascade"], independent=True, steps=2)):
        order = [*reversed(joint_threats())] if "order" in fn.keywords else joint_threats()
        assert broken(check_attack(fn, threats=order)) == set()


def test_the_two_cascades_differ():
    x, y = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 4))
    found = [ATTACKS["cascade"](model, x, y, steps=5, random_start=False, independent=independent, return_info=True)
             for independent in (False, True)]
    assert all(f.within.all() for f in found)
    torch.testing.assert_close(found[0].params[0], found[1].params[0])  # the same flow comes first
    assert (found[0].params[1] - found[1].params[1]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def honest(model, x, y, generator=None):
    return pgd(model, x, y, eps=EPS, steps=2, generator=generator)


def gradient(model, loss_of, at):
    with frozen(model):
        return torch.autograd.grad(loss_of(at.requires_grad_()), at)[0]


def root_flag(model, x, y, generator=None):
    model.eval()
    x_adv = honest(model, x, y, generator)
    model.training = True
    return x_adv


def thaws(model, x, y, generator=None):
    was = model.training
    model.eval()
    x_adv = honest(model, x, y, generator)
    model.train(was)
    return x_adv


def leaves_eval(model, x, y, generator=None):
    return honest(model.eval(), x, y, generator)


def buffers(model, x, y, generator=None):
    modes = [m.training for m in model.modules()]
    with torch.random.fork_rng(devices=[]):
        model.train()(x)
    for m, mode in zip(model.modules(), modes):
        m.training = mode
    return honest(model, x, y, generator)


def writes_grad(model, x, y, generator=None):
    x_adv = honest(model, x, y, generator)
    modes = [m.training for m in model.modules()]
    F.cross_entropy(model.eval()(x_adv), y).backward()
    for m, mode in zip(model.modules(), modes):
        m.training = mode
    return x_adv


def clears_grad(model, x, y, generator=None):
    model.zero_grad()
    return honest(model, x, y, generator)


def unfreezes(model, x, y, generator=None):
    model.requires_grad_(True)
    return honest(model, x, y, generator)


def no_finally(model, x, y, generator=None):
    modes = [m.training for m in model.modules()]
    model.eval()
    x_adv = honest(model, x, y, generator)
    for m, mode in zip(model.modules(), modes):
        m.training = mode
    return x_adv


def overspends(model, x, y, generator=None):
    x_adv = honest(model, x, y, generator)
    return (x_adv + 1e-3 * (x_adv - x).sign()).clamp(0, 1)


def batch_scale(model, x, y, generator=None):
    g = gradient(model, lambda v: F.cross_entropy(model(v), y, reduction="sum"), x.clone())
    return (x + EPS * g / g.abs().max().clamp(min=1e-12)).clamp(0, 1)


def one_start_for_all(model, x, y, generator=None):
    start = torch.rand(x.shape[1:], generator=generator[0])
    return (x + EPS * (2 * start - 1)).clamp(0, 1)


def position(model, x, y, generator=None):
    return (x + EPS * torch.linspace(-1, 1, len(x)).view(-1, 1, 1, 1)).clamp(0, 1)


def nan_flow(model, x, y, generator=None, return_info=False):
    start = torch.zeros(len(x), 2, *x.shape[2:])
    g = gradient(model, lambda v: F.cross_entropy(model(warp(x, v)), y, reduction="sum"), start)
    flow = 0.3 * g / g.norm(dim=1, keepdim=True)
    return SimpleNamespace(x_adv=warp(x, flow), params=[flow]) if return_info else warp(x, flow)


def nan_pixels(model, x, y, generator=None):
    g = gradient(model, lambda v: F.cross_entropy(model(v), y, reduction="sum"), x.clone())
    return (x + EPS * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)


def hidden(model, x, y, generator=None):
    return (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


def hidden_numpy(model, x, y, generator=None):
    return (x + EPS * torch.tensor(np.random.uniform(-1, 1, x.shape), dtype=x.dtype)).clamp(0, 1)


def reseeds(model, x, y, generator=None):
    torch.manual_seed(0)
    return hidden(model, x, y)


def out_of_range(model, x, y, generator=None):
    return x + EPS


def in_place(model, x, y, generator=None):
    return x.mul_(1 - EPS)


def edits_labels(model, x, y, generator=None):
    x_adv = honest(model, x, y, generator)
    y.add_(1)
    return x_adv


def leaks_no_grad(model, x, y, generator=None):
    x_adv = honest(model, x, y, generator)
    torch.set_grad_enabled(False)
    return x_adv


def leaves_hook(model, x, y, generator=None):
    next(model.children()).register_forward_hook(lambda *_: None)
    return honest(model, x, y, generator)


def swaps_buffer(model, x, y, generator=None):
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    layer.running_mean = layer.running_mean.clone()
    return honest(model, x, y, generator)


def keeps_graph(model, x, y, generator=None):
    return honest(model, x, y, generator).requires_grad_()


def ten_classes(model, x, y, generator=None):
    model(x)[:, 4] * F.one_hot(y, 5)[:, 0]
    return x


@pytest.mark.parametrize("fn, promise", [
    (root_flag, "training flags restored"), (thaws, "training flags restored"), (leaves_eval, "training flags restored"),
    (buffers, "buffers untouched"), (writes_grad, "parameters and .grad untouched"),
    (clears_grad, "parameters and .grad untouched"), (unfreezes, "parameters and .grad untouched"),
    (no_finally, "state restored after an error"), (overspends, "the budget holds"),
    (batch_scale, "companions do not matter"), (one_start_for_all, "alone or in another order"),
    (position, "alone or in another order"), (nan_pixels, "valid on hard inputs"),
    (hidden, "no global randomness"), (hidden, "same generators, same images"),
    (hidden_numpy, "same generators, same images"), (reseeds, "no global randomness"),
    (out_of_range, "valid images out, inputs left alone"), (in_place, "valid images out, inputs left alone"),
    (edits_labels, "valid images out, inputs left alone"), (leaks_no_grad, "valid images out, inputs left alone"),
    (leaves_hook, "no hooks left behind"), (swaps_buffer, "buffers untouched"),
    (keeps_graph, "valid images out, inputs left alone"), (ten_classes, "any shape and class count")])
def test_planted_faults_are_caught(fn, promise):
    checks = check_attack(fn, eps_pixel=EPS)
    assert promise in broken(checks)
    assert all(isinstance(c, Promise) and bool(c.witness) != c.passed for c in checks)


def test_nan_in_a_flow_is_caught_even_when_the_image_hides_it():
    assert {"the budget holds", "valid on hard inputs"} <= broken(check_attack(nan_flow, threats=[Flow(0.3)]))


def test_params_must_explain_the_images():
    def lies(model, x, y, generator=None, return_info=False):
        info = ggsm(model, x, y, steps=2, generator=generator, return_info=True)
        x_adv = (info.x_adv + 0.1).clamp(0, 1)
        return SimpleNamespace(x_adv=x_adv, params=info.params) if return_info else x_adv
    assert "the budget holds" in broken(check_attack(lies, threats=[Flow()]))


def test_zero_variant_is_checked():
    checks = check_attack(honest, eps_pixel=EPS, zero=partial(pgd, eps=1e-5))
    assert broken(checks) == {"zero budget gives x back"}


def test_home_made_attacks_and_own_models_pass():
    def noise(model, x, y, generator=None):
        return (x + EPS * (2 * uniform(x, generator) - 1)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0])
    for options in ({}, dict(model=model, x=x, y=y)):
        assert broken(check_attack(noise, eps_pixel=EPS, **options)) == set()
        assert broken(check_attack(noise, within=lambda a, b: (a - b).flatten(1).abs().amax(1) < 0.04, **options)) == set()
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_an_attack_that_raises_is_reported():
    def raises(model, x, y, generator=None): raise KeyError("eps")
    checks = check_attack(raises, eps_pixel=EPS)
    assert "raised KeyError" in checks[0].witness and not any(c.passed for c in checks)


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    for fn in (reseeds, leaks_no_grad):
        check_attack(fn, eps_pixel=EPS)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


@pytest.mark.parametrize("options, message", [
    ({}, "exactly one way"), (dict(eps_pixel=EPS, threats=[Pixel()]), "exactly one way"),
    (dict(eps_pixel=EPS, x=torch.rand(2, 1, 4, 4)), "together"),
    (dict(eps_pixel=EPS, model=nn.Flatten(), x=torch.rand(1, 1, 4, 4), y=torch.zeros(1).long()), "at least 2")])
def test_calls_that_cannot_be_checked(options, message):
    with pytest.raises(ValueError, match=message):
        check_attack(honest, **options)
