"The attacks in the space of codes: what they keep, what they reduce to, and what they cost."
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.ascent import ascend
from jat_nb.attacks import pgd
from jat_nb.contract import check_attack
from jat_nb.glow import Glow, round_trip_error
from jat_nb.joint_space import Latent, jsa, latent_report, om_pgd
from jat_nb.losses import soft_cross_entropy
from jat_nb.randomness import image_generators
from jat_nb.threats import Flow, Pixel

EPS = 8 / 255


class Counting(Glow):
    "A flow that counts how often it encodes and decodes."

    encodes = decodes = 0

    def encode(self, x, **options):
        self.encodes += 1
        return super().encode(x, **options)

    def decode(self, latents, **options):
        self.decodes += 1
        return super().decode(latents, **options)


def make(dtype=torch.float64, kind=Glow):
    torch.manual_seed(0)
    flow = kind((3, 8, 8), levels=2, steps=2, width=8)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 5))
    x = 0.2 + 0.6 * torch.rand(6, 3, 8, 8)
    return flow.to(dtype), model.to(dtype), x.to(dtype), torch.randint(5, (6,))


def seeds(n=6):
    return image_generators(3, range(n))


def reencoded(flow, x, y):
    return torch.cat([(b - a).flatten(1) for a, b in zip(flow.encode(x), flow.encode(y))], dim=1).detach()


def test_without_a_latent_budget_jsa_is_pgd():
    flow, model, x, y = make()
    ours = jsa(model, x, y, flow=flow, eta=0.0, random_start=False)
    theirs = pgd(model, x, y, eps=EPS, steps=10, random_start=False)
    assert (ours - x).abs().max() > 0.9 * EPS
    assert_close(ours, theirs, rtol=0, atol=10 * round_trip_error(flow, x).max().item() + 1e-12)


def test_without_a_pixel_budget_jsa_is_om_pgd():
    flow, model, x, y = make()
    ours = jsa(model, x, y, flow=flow, eps_pixel=0.0, eta=0.1, generator=seeds())
    theirs = om_pgd(model, x, y, flow=flow, eta=0.1, generator=seeds())
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (theirs - x).abs().max() > 1e-3


def test_zero_budgets_give_the_image_back_up_to_rounding():
    flow, model, x, y = make()
    back = jsa(model, x, y, flow=flow, eps_pixel=0.0, eta=0.0)
    assert (back - x).abs().max() <= round_trip_error(flow, x).max() < 1e-10


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("whitened", [False, True])
def test_only_the_chosen_level_moves(level, whitened):
    flow, model, x, y = make()
    info = om_pgd(model, x, y, flow=flow, eta=0.1, levels=[level], whitened=whitened, generator=seeds(), return_info=True)
    assert info.within.all()
    images = info.threats[0].decode(x, info.params[0])
    for i, (a, b) in enumerate(zip(flow.encode(x, whitened=whitened), flow.encode(images, whitened=whitened)), start=1):
        assert ((b - a).abs().max() > 0.05) if i == level else ((b - a).abs().max() < 1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_lemma_1_on_what_the_attack_found(dtype, atol):
    flow, model, x, y = make(dtype)
    info = om_pgd(model, x, y, flow=flow, eta=0.1, step_latent=0.05, generator=seeds(), return_info=True)
    before_clamp = info.threats[0].decode(x, info.params[0])
    assert_close(reencoded(flow, x, before_clamp), info.params[0], rtol=0, atol=atol)
    assert_close(reencoded(flow, x, before_clamp).abs().amax(1), torch.full((6,), 0.1, dtype=dtype), rtol=0, atol=atol)


def test_boxes_and_the_image():
    flow, model, x, y = make()
    x = x.round()  # black and white: the clamp has work to do
    info = jsa(model, x, y, flow=flow, eta=0.1, step_latent=0.05, generator=seeds(), return_info=True)
    lam, delta = info.params
    assert info.within.all() and lam.abs().max() <= 0.1 and delta.abs().max() <= EPS
    decoded = info.threats[0].decode(x, lam)
    assert torch.equal(info.x_adv, (decoded + delta).clamp(0, 1))
    assert ((info.x_adv - decoded.clamp(0, 1)).abs() <= EPS + 1e-12).all()
    assert (decoded + delta).min() < 0 < 1 < (decoded + delta).max()


def test_both_spaces_beat_either():
    flow, model, x, y = make()
    start = dict(random_start=False, return_info=True)
    joint = jsa(model, x, y, flow=flow, **start)
    for alone in (om_pgd(model, x, y, flow=flow, **start), pgd(model, x, y, eps=EPS, steps=10, **start)):
        assert joint.loss.mean() > alone.loss.mean()


def test_what_it_costs():
    flow, model, x, y = make(kind=Counting)
    for schedule, gradients in (("simultaneous", 10), ("alternating", 20)):
        flow.encodes = flow.decodes = 0
        images = jsa(model, x, y, flow=flow, schedule=schedule)
        assert flow.encodes == 1 and images.shape == x.shape
        assert flow.decodes <= gradients + 1  # one for each gradient, one for the result
        assert jsa(model, x, y, flow=flow, schedule=schedule, return_info=True).n_backward == gradients
    flow.encodes = 0
    jsa(model, x, y, flow=flow, restarts=3, keep_best=True, between=[Flow()], return_info=True)
    assert flow.encodes == 1


def test_batches_do_not_matter():
    flow, model, x, y = make()
    together = jsa(model, x, y, flow=flow, generator=seeds())
    assert torch.equal(together, jsa(model, x, y, flow=flow, generator=seeds()))
    alone = torch.cat([jsa(model, x[i:i + 1], y[i:i + 1], flow=flow, generator=seeds()[i:i + 1]) for i in range(6)])
    assert_close(alone, together, rtol=0, atol=1e-9)


def state(module):
    own = {f"flag {n}": m.training for n, m in module.named_modules()}
    own |= {f"wants {n}": p.requires_grad for n, p in module.named_parameters()}
    own |= {f"grad {n}": p.grad.clone() for n, p in module.named_parameters()}
    return own | {n: v.clone() for n, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("broken", [False, True])
def test_model_and_flow_are_left_as_found(broken):
    flow, model, x, y = make()
    for module in (flow, model):
        for i, m in enumerate(module.modules()):
            m.training = i % 2 == 0
        for i, p in enumerate(module.parameters()):
            p.requires_grad_(i % 3 > 0)
            p.grad = torch.full_like(p, 0.5)
    before = state(flow), state(model)
    options = dict(loss=lambda logits, labels: 1 / 0) if broken else {}
    try:
        jsa(model, x, y, flow=flow, steps=2, **options)
        ascend(model, x, y, [Latent(flow)], steps=2, **options)
    except ZeroDivisionError:
        assert broken
    assert same(before[0], state(flow)) and same(before[1], state(model))


def test_the_contract():
    flow, model, x, y = make(torch.float32)
    joint = [Latent(flow, clamp=False), Pixel(valid="clamp")]
    for attack, threats in ((jsa, joint), (om_pgd, [Latent(flow)])):
        checks = check_attack(partial(attack, flow=flow, steps=3), threats=threats, model=model, x=x, y=y, shapes=())
        assert not [c for c in checks if not c.passed]


def test_targets_and_soft_labels():
    flow, model, x, y = make()
    target = (y + 1) % 5
    at_target = lambda v: nn.functional.cross_entropy(model.eval()(v), target).item()
    assert at_target(jsa(model, x, y, flow=flow, target=target)) < at_target(x)
    soft = nn.functional.one_hot(y, 5).double()
    by_class = jsa(model, x, y, flow=flow, random_start=False)
    by_soft = jsa(model, x, y, flow=flow, random_start=False, loss=lambda logits, _: soft_cross_entropy(logits, soft))
    assert_close(by_soft, by_class, rtol=0, atol=1e-12)


def test_a_budget_for_each_image():
    flow, model, x, y = make()
    eta = torch.tensor([0.0, 0.02, 0.1] * 2)
    info = om_pgd(model, x, y, flow=flow, eta=eta, step_latent=0.05, generator=seeds(), return_info=True)
    assert_close(info.params[0].abs().amax(1), eta.double(), rtol=1e-6, atol=0)
    again = ascend(model, x, y, info.threats, steps=1)  # threats of a record can be used again
    assert again.shape == x.shape


def test_a_latent_threat_anywhere_in_the_chain():
    flow, model, x, y = make()
    info = ascend(model, x, y, [Pixel(), Latent(flow)], steps=2, return_info=True)
    assert info.within.all()
    first = (x + info.params[0]).detach()
    assert_close(info.x_adv, Latent(flow).apply(first, info.params[1]).detach(), rtol=0, atol=1e-12)


def test_the_report():
    flow, model, x, y = make()
    found = jsa(model, x, y, flow=flow, generator=seeds())
    report = latent_report(flow, x, found)
    assert all(v.shape == (6,) and v.isfinite().all() and not v.requires_grad for v in report.values())
    assert_close(report["l2"], (found - x).square().sum((1, 2, 3)).sqrt())
    assert_close(report["nll"], -flow.log_prob(found).detach())
    assert_close(report["latent"], reencoded(flow, x, found).abs().amax(1))


@pytest.mark.parametrize("change, message", [
    (dict(eta=-0.1), "eta must be finite"), (dict(eta=float("nan")), "eta must be finite"),
    (dict(levels=[3]), "levels from 1"), (dict(levels=[0]), "levels from 1"), (dict(levels=[]), "None moves all"),
    (dict(flow=None), "train a Glow"), (dict(x=torch.rand(6, 3, 16, 16).double()), "build Glow"),
    (dict(x=torch.full((6, 3, 8, 8), float("nan")).double()), "remove NaN"),
    (dict(eta=torch.zeros(3)), "got 3"), (dict(steps=0), "steps=0")])
@pytest.mark.parametrize("attack", [om_pgd, jsa])
def test_bad_input(attack, change, message):
    flow, model, x, y = make()
    call = dict(flow=flow, x=x) | change
    with pytest.raises(ValueError, match=message):
        attack(model, call.pop("x"), y, **call)


def test_a_flow_that_is_not_finite():
    flow, model, x, y = make()
    with torch.no_grad():
        copy_ = copy.deepcopy(flow)
        next(copy_.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        om_pgd(model, x, y, flow=copy_)
    flow, model, x, y = make(torch.float32)
    with pytest.raises(ValueError, match="smaller eta"):  # such codes overflow
        om_pgd(model, x, y, flow=flow, eta=3e38, step_latent=3e38)
