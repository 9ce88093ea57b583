"The attacks in the space of codes: what they keep, what they reduce to, and what they cost."
import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb import joint_space
from jat_nb.ascent import ascend
from jat_nb.attacks import pgd
from jat_nb.contract import check_attack
from jat_nb.data import load
from jat_nb.glow import Glow, round_trip_error
from jat_nb.joint_space import Latent, counted_codes, jsa, latent_report, om_pgd
from jat_nb.losses import soft_cross_entropy
from jat_nb.mixing import mixed_loss
from jat_nb.randomness import image_generators
from jat_nb.threats import Flow, Pixel

EPS = 8 / 255


class Counting(Glow):
    "A flow that counts how often it encodes and decodes."

    encodes = decodes = most = 0

    def encode(self, x, **options):
        self.encodes += 1
        return super().encode(x, **options)

    def decode(self, latents, **options):
        self.decodes += 1
        self.most = max(self.most, len(latents[0]))
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
    pairs = zip(flow.encode(x), flow.encode(y, unclamped=True))
    return torch.cat([(b - a).flatten(1) for a, b in pairs], dim=1).detach()


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
    moved = flow.encode(images, whitened=whitened, unclamped=True)
    for i, (a, b) in enumerate(zip(flow.encode(x, whitened=whitened), moved), start=1):
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
    jsa(model, x, y, flow=flow, restarts=3, keep_best=True, between=[Flow()])
    assert flow.encodes == 1
    jsa(model, x, y, flow=flow, return_info=True)
    assert flow.encodes == 3  # its own, and that of the check


def test_the_counter_agrees_with_a_flow_that_counts_itself():
    flow, model, x, y = make(kind=Counting)
    with counted_codes(flow) as count:
        jsa(model, x, y, flow=flow, steps=4)
    assert dict(count) == {"encode": 6 * flow.encodes, "decode": 6 * flow.decodes} == {"encode": 6, "decode": 30}
    with pytest.raises(ZeroDivisionError), counted_codes(flow):
        1 / 0
    jsa(model, x, y, flow=flow, steps=4)
    assert count["decode"] == 30 and {"encode", "decode"}.isdisjoint(vars(flow))


def test_batches_do_not_matter():
    flow, model, x, y = make()
    together = jsa(model, x, y, flow=flow, generator=seeds())
    assert torch.equal(together, jsa(model, x, y, flow=flow, generator=seeds()))
    alone = torch.cat([jsa(model, x[i:i + 1], y[i:i + 1], flow=flow, generator=seeds()[i:i + 1]) for i in range(6)])
    assert_close(alone, together, rtol=0, atol=1e-9)


def bytes_of(n):
    return n * 3 * 8 * 8 * 8  # images of 3 x 8 x 8 values in double precision


@pytest.mark.parametrize("attack", [om_pgd, jsa])
def test_a_memory_cap_changes_nothing(attack):
    "Two images at a time, each with its own budget, target and draws, also in the record."
    flow, model, x, y = make(kind=Counting)
    eta, target = torch.linspace(0.02, 0.1, 6), (y + 1) % 5
    options = dict(flow=flow, eta=eta, step_latent=eta / 2, target=target, steps=2)
    if attack is jsa:
        options |= dict(eps_pixel=torch.linspace(0.0, 0.05, 6), between=[Flow(torch.linspace(0, 0.3, 6), 0.1)])
    whole = attack(model, x, y, generator=seeds(), return_info=True, **options)
    assert flow.most == 6
    for cap, most in ((bytes_of(3) - 1, 2), (1, 1)):
        flow.most = 0
        found = attack(model, x, y, generator=seeds(), max_bytes=cap, return_info=True, **options)
        assert flow.most == most
        for name in ("x_adv", "loss"): assert_close(getattr(found, name), getattr(whole, name), rtol=0, atol=1e-6)
        assert_close(found.params, whole.params, rtol=0, atol=1e-6)
        assert torch.equal(found.success, whole.success) and found.within.all()
        assert_close(attack(model, x, y, generator=seeds(), max_bytes=cap, **options), whole.x_adv, rtol=0, atol=1e-6)
    assert (found.n_forward, found.n_backward) == (6 * whole.n_forward, 6 * whole.n_backward)
    assert_close(ascend(model, x, y, found.threats, steps=1, random_start=False),
                 ascend(model, x, y, whole.threats, steps=1, random_start=False))


def test_a_loss_of_the_whole_batch_is_not_climbed_in_parts():
    flow, model, x, y = make()
    blended = mixed_loss(y, y.flip(0), 0.5)
    assert jsa(model, x, y, flow=flow, steps=1, loss=blended).shape == x.shape
    with pytest.raises(ValueError, match="classes of the 6 blended images"):
        jsa(model, x, y, flow=flow, steps=1, loss=blended, max_bytes=1)


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


def ssim_by_hand(a, b, side=7):
    "Structural similarity from weighted means in every window that fits, deviation 1.5, written out with NumPy."
    line = np.exp(-(np.arange(side) - side // 2) ** 2 / (2 * 1.5**2))
    weights, found = np.outer(line, line) / line.sum() ** 2, []
    for u, v in zip(a.numpy(), b.numpy()):  # channel by channel
        for i, j in np.ndindex(*(n - side + 1 for n in u.shape)):
            p, q = (w[i:i + side, j:j + side].ravel() for w in (u, v))
            m, n = np.average(np.stack([p, q]), axis=1, weights=weights.ravel())
            (pp, pq), (_, qq) = np.cov(p, q, aweights=weights.ravel(), bias=True)
            found.append((2 * m * n + 1e-4) * (2 * pq + 9e-4) / ((m * m + n * n + 1e-4) * (pp + qq + 9e-4)))
    return torch.tensor(np.mean(found))


def test_the_report():
    flow, model, x, y = make()
    found = jsa(model, x, y, flow=flow, generator=seeds())
    report = latent_report(flow, x, found)
    assert all(v.shape == (6,) and v.isfinite().all() and not v.requires_grad for v in report.values())
    assert_close(report["l2"], (found - x).square().sum((1, 2, 3)).sqrt())
    assert_close(report["linf"], torch.stack([(a - b).abs().max() for a, b in zip(found, x)]))
    assert EPS < report["linf"].min()  # the code adds to the pixels
    assert_close(report["ssim"], torch.stack([ssim_by_hand(a, b) for a, b in zip(x, found)]))
    assert_close(report["nll_clean"], -flow.log_prob(x).detach())
    assert_close(report["nll"], -flow.log_prob(found).detach())
    assert_close(report["latent"], reencoded(flow, x, found).abs().amax(1))
    flow, x, found = flow.float(), x.float(), found.float()  # where rounding shows
    with torch.no_grad():
        back = flow.eval().decode(flow.encode(found))
    by_hand = torch.stack([(a - b).abs().max() for a, b in zip(back, found)])
    assert_close(latent_report(flow, x, found)["round_trip"], by_hand, rtol=0, atol=1e-8)
    assert (back != found).any()


@pytest.mark.parametrize("change, message", [
    (dict(eta=-0.1), "eta must be finite"), (dict(eta=float("nan")), "eta must be finite"),
    (dict(levels=[3]), "levels from 1"), (dict(levels=[0]), "levels from 1"), (dict(levels=[]), "None moves all"),
    (dict(levels=1), r"got 1: pass a list such as \[1\]"), (dict(levels=[[1]]), "levels from 1"),
    (dict(max_bytes=0), "max_bytes of at least 1"), (dict(max_bytes=1.5), "max_bytes of at least 1"),
    (dict(y=torch.zeros(7, dtype=torch.int64), max_bytes=1), "one label per image"),
    (dict(flow=None), "train a Glow"), (dict(flow=nn.Sequential(*[nn.Linear(9, 9)] * 99)), "got Sequential: train a Glow"), (dict(x=torch.rand(6, 3, 16, 16).double()), "build Glow"),
    (dict(x=torch.full((6, 3, 8, 8), float("nan")).double()), "remove NaN"),
    (dict(eta=torch.zeros(3)), "got 3"), (dict(steps=0), "steps=0")])
@pytest.mark.parametrize("attack", [om_pgd, jsa])
def test_bad_input(attack, change, message):
    flow, model, x, y = make()
    call = dict(flow=flow, x=x, y=y) | change
    with pytest.raises(ValueError, match=message) as error:
        attack(model, call.pop("x"), call.pop("y"), **call)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_what_is_no_flow_is_refused_before_anything_is_computed():
    _, model, x, _ = make()
    for use in (Latent, lambda given: counted_codes(given).__enter__(), partial(latent_report, x=x, x_adv=x)):
        with pytest.raises(ValueError, match="expected a flow with encode, decode, latent_shapes.*got Sequential: train a Glow"):
            use(model)


def trained_flow():
    "A small flow of digits of 8 x 8 pixels and a classifier, in seconds."
    train, test = load("digits", "train"), load("digits", "test").subset(200)
    x, classes = train.x[..., ::4, ::4], train.labels
    torch.manual_seed(0)
    flow, noise = Glow((1, 8, 8), levels=2, steps=2, width=16), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    flow.initialise(x[:128], noise)
    for network, loss_of in ((flow, lambda rows: flow.bits_per_dim(x[rows], noise).mean()),
                             (model, lambda rows: nn.functional.cross_entropy(model(x[rows]), classes[rows]))):
        adam = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(150):
            adam.zero_grad()
            loss_of(torch.randint(len(x), (64,), generator=noise)).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 100.0)
            adam.step()
    return flow.eval(), model.eval(), test.x[..., ::4, ::4], test.labels


@pytest.fixture(scope="module")
def digits():
    return trained_flow()


@pytest.mark.parametrize("random_start", [False, True])
def test_more_steps_of_jsa_leave_no_more_right(digits, random_start):
    "I17: ten steps to train, fifty to evaluate; to one point, which on 200 images is two of them."
    flow, model, x, y = digits
    right = []
    for steps in (0, 1, 2, 5, 10, 20, 50):
        images = jsa(model, x, y, flow=flow, eps_pixel=0.06, step_pixel=0.015, eta=0.03, step_latent=0.0075, steps=steps,
                     random_start=random_start, generator=image_generators(0, range(200))) if steps else x
        with torch.no_grad():
            right.append(100 * (model(images).argmax(1) == y).float().mean().item())
    assert all(later <= earlier + 1 for earlier, later in zip(right, right[1:])), right
    assert right[0] > 85 and right[1] > right[4] + 20 and right[4] > 0, right


def test_the_image_changes_smoothly_with_eta(digits):
    "I19: on a grid of budgets twice as fine, the largest change between neighbours halves, so there is no jump."
    flow, _, x, _ = digits
    signs = Latent(flow).init(x[:8], generator=torch.Generator().manual_seed(0)).sign()
    jumps = []
    for cells in (4, 8, 16, 32, 64):
        with torch.no_grad():
            images = torch.stack([Latent(flow, 0.2).decode(x[:8], eta * signs) for eta in torch.linspace(0, 0.2, cells + 1)])
        jumps.append(images.diff(dim=0).abs().max().item())
    assert jumps[0] > 0.01 and all(0.4 < fine / coarse < 0.7 for coarse, fine in zip(jumps, jumps[1:])), jumps


@pytest.mark.parametrize("attack", [om_pgd, jsa])
@pytest.mark.parametrize("return_info", [False, True])
def test_a_budget_that_breaks_the_inverse_is_refused_with_the_error(attack, return_info):
    flow, model, x, y = make(torch.float32)
    with pytest.raises(ValueError, match=r"misses it by [\d.e+]+, more than half a grey level: choose a smaller eta"):
        attack(model, x, y, flow=flow, eta=1e4, step_latent=2.5e3, return_info=return_info)
    for eta in (0.1, 0.5):  # without and with the check
        plain = attack(model, x, y, flow=flow, eta=eta, generator=seeds())
        info = attack(model, x, y, flow=flow, eta=eta, generator=seeds(), return_info=True)
        assert torch.equal(plain, info.x_adv) and info.within.all()


def test_the_error_that_is_reported_is_that_of_the_moved_code():
    flow, model, x, y = make(torch.float32)
    threat, signs = Latent(flow, 1e4).prepare(x), Latent(flow, 1e4).init(x, generator=torch.Generator().manual_seed(0)).sign()
    moved = threat.decode(x, 1e4 * signs)
    with pytest.raises(ValueError) as error:
        joint_space._check_way_back(threat, 1e4 * signs)
    assert f"{round_trip_error(flow, moved, unclamped=True).max().item():.3g}" in str(error.value)


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
