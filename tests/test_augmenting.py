"Moves of codes, norms of their own: lengths, laws, losses written out, and runs."
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jat_nb.ascent import ascend
from jat_nb.attacks import pgd
from jat_nb.augmenting import LatentBall, adversarial_la, randomized_la
from jat_nb.batches import Batch
from jat_nb.glow import Glow
from jat_nb.objectives import OBJECTIVES, networks, roles
from jat_nb.randomness import image_generators
from torch import nn
from torch.testing import assert_close

ETA = 0.7


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    flow = Glow((3, 8, 8), levels=2, steps=2, width=8)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 5))
    x, y = 0.2 + 0.6 * torch.rand(8, 3, 8, 8), torch.randint(5, (8,))
    return model.double(), flow.double(), Batch(x.double(), y, seeded())


def moved(flow, x, p):
    "Codes moved by p and decoded."
    pieces, codes = p.split([z[0].numel() for z in flow.encode(x)], dim=1), flow.encode(x)
    return flow.decode([z + piece.view_as(z) for z, piece in zip(codes, pieces)]).clamp(0, 1)


# Moves of codes

@pytest.mark.parametrize("levels", [None, [1], [2]])
@pytest.mark.parametrize("eta", [0.0, 1e-3, 1.1, torch.linspace(0.1, 2, 8)])
def test_random_moves_have_the_length_asked_for(case, eta, levels):
    ball = LatentBall(case[1], eta, levels=levels)
    p = ball.init(case[2].x, generator=seeded())
    assert_close(p.norm(dim=1), torch.as_tensor(eta, dtype=p.dtype).expand(8), rtol=1e-12, atol=0)
    inside = {None: (0, 192), (1,): (0, 96), (2,): (96, 192)}[levels and tuple(levels)]
    assert (p[:, :inside[0]] == 0).all() and (p[:, inside[1]:] == 0).all() and ball.contains(case[2].x, p).all()


def test_directions_are_even(case):
    p = LatentBall(case[1], 1.0).init(case[2].x[:1].expand(500, -1, -1, -1), generator=seeded())
    spread = p.T @ p / 500 * p.shape[1]
    assert (p.mean(0).abs() < 5 / (500 * 192) ** 0.5).all()
    assert (spread.diagonal() - 1).abs().max() < 0.4 and (spread - spread.diagonal().diag()).abs().max() < 0.3


def test_each_image_has_its_own_draw(case):
    ball, x = LatentBall(case[1], ETA), case[2].x
    together = ball.init(x, generator=image_generators(0, range(8)))
    assert torch.equal(together[5:6], ball.init(x[5:6], generator=image_generators(0, [5])))


def test_a_step_stays_in_the_ball(case):
    ball = LatentBall(case[1], ETA, 0.3)
    p = torch.zeros(8, 192, dtype=torch.float64)
    for i in range(5):
        p = ball.step(p, torch.randn(8, 192, generator=seeded(i), dtype=torch.float64), case[2].x)
        assert ball.contains(case[2].x, p).all() and (p.norm(dim=1) <= ETA).all()
    assert torch.equal(ball.step(p, torch.zeros_like(p), case[2].x), p)
    far = ball.step(100 * p, torch.zeros_like(p), case[2].x)
    assert_close(far, ETA * p / p.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-8)


def test_randomized_written_out(case):
    model, flow, batch = case
    drawn = torch.special.ndtri(torch.rand(8, 192, generator=seeded(), dtype=torch.float64).clamp(1e-7, 1 - 1e-7))
    x = moved(flow, batch.x, ETA * drawn / drawn.norm(dim=1, keepdim=True))
    expected = (F.cross_entropy(model(batch.x), batch.y) + F.cross_entropy(model(x), batch.y)) / 2
    assert_close(randomized_la(model, batch._replace(generator=seeded()), flow=flow, eta=ETA), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_written_out(case, steps):
    model, flow, batch = case
    p = torch.zeros(8, 192, dtype=torch.float64)
    for _ in range(steps):
        p = p.detach().requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(moved(flow, batch.x, p)), batch.y, reduction="sum"), p)[0]
        p = p + 0.5 * g / g.norm(dim=1, keepdim=True)
        p = p * (ETA / p.norm(dim=1, keepdim=True)).clamp(max=1)
    x = moved(flow, batch.x, p)
    expected = (F.cross_entropy(model(batch.x), batch.y) + F.cross_entropy(model(x), batch.y)) / 2
    found = adversarial_la(model, batch, flow=flow, eta=ETA, step_latent=0.5, steps=steps)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_step_uses_the_whole_length_and_beats_chance(case):
    model, flow, batch = case
    ball = LatentBall(flow, ETA, ETA)
    info = ascend(model, batch.x, batch.y, [ball], steps=1, random_start=False, return_info=True)
    assert_close(info.params[0].norm(dim=1), torch.full((8,), ETA, dtype=torch.float64), rtol=2e-6, atol=0)
    against = adversarial_la(model, batch, flow=flow, eta=ETA)
    chance = [randomized_la(model, batch._replace(generator=seeded(i)), flow=flow, eta=ETA) for i in range(10)]
    assert against > max(chance)


@pytest.mark.parametrize("objective", [randomized_la, adversarial_la])
def test_flow_and_network_are_left_alone(case, objective):
    model, flow, batch = case[0].train(), case[1], case[2]
    before = copy.deepcopy((flow.state_dict(), [p.requires_grad for p in flow.parameters()]))
    objective(model, batch, flow=flow, eta=ETA).backward()
    assert all(torch.equal(v, before[0][k]) for k, v in flow.state_dict().items())
    assert [p.requires_grad for p in flow.parameters()] == before[1] and all(p.grad is None for p in flow.parameters())
    assert all(p.grad is not None for p in model.parameters()) and model.training
    model.zero_grad()


def test_objectives_by_name():
    for name in ("randomized_la", "adversarial_la"):
        assert roles(OBJECTIVES[name]) == () and networks(OBJECTIVES[name]) == ("flow",)


# Norm bounds in pixels

@pytest.mark.parametrize("eps", [0.1, 0.5, 4.0])
def test_l2_training_for_corruptions_is_exact(case, eps):
    model, _, batch = case
    attack = partial(pgd, norm="l2", eps=eps, step=eps / 4, steps=10)
    found = attack(model, batch.x, batch.y, generator=seeded(), return_info=True)
    change = (found.x_adv - batch.x).flatten(1).norm(dim=1)
    assert found.within.all() and (change <= eps * (1 + 1e-9)).all()
    assert 0 <= found.x_adv.min() and found.x_adv.max() <= 1
    assert_close(change, torch.full((8,), eps, dtype=torch.float64), rtol=1e-6, atol=0) if eps < 1 else None
    stay = torch.equal(attack(model, batch.x, batch.y, generator=seeded()), found.x_adv)
    assert stay


def test_l2_steps_written_out(case):
    model, _, batch = case
    x, eps = batch.x, 0.3
    for _ in range(10):
        x = x.detach().requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(x), batch.y, reduction="sum"), x)[0]
        delta = x - batch.x + eps / 4 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        x = batch.x + delta  # far from 0 and 1, where the exact projection is the ball's
    assert 0 < x.min() and x.max() < 1
    found = pgd(model, batch.x, batch.y, norm="l2", eps=eps, step=eps / 4, steps=10, random_start=False)
    assert_close(found, x.detach(), rtol=1e-6, atol=1e-7)
