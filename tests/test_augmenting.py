"Moves of codes, norms of their own: lengths, laws, losses written out, and runs."
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jat_nb.ascent import ascend
from jat_nb.attacks import pgd
from jat_nb.augmenting import AuxiliaryNorms, LatentBall, VaeGan, adversarial_la, advprop, by_class, randomized_la
from jat_nb.batches import Batch
from jat_nb.cli import jat_train
from jat_nb.data import ImageSet
from jat_nb.glow import Glow
from jat_nb.joint_space import om_pgd
from jat_nb.judging import open_run
from jat_nb.models import create, plain_state, unwrap
from jat_nb.objectives import OBJECTIVES, adversarial, in_form, natural, networks, roles
from jat_nb.randomness import image_generators
from jat_nb.recipes import Recipe
from jat_nb.records import read_jsonl
from jat_nb.training import fit
from jat_nb.weights import check_rebuildable, load_weights, save_weights
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


@pytest.mark.parametrize("objective", [randomized_la, adversarial_la])
@pytest.mark.parametrize("change, message", [
    (dict(x=lambda x: 255 * x), "divide bytes by 255"), (dict(x=lambda x: x * torch.nan), "remove NaN"),
    (dict(eta=1e12), r"breaks the flow.*choose a smaller eta"), (dict(eta=float("nan")), "eta must be finite"),
    (dict(eta=-1.0), "eta must be finite and >= 0"), (dict(flow=nn.Linear(2, 2)), "got Linear: train a Glow")])
def test_what_latent_augmentation_refuses(case, objective, change, message):
    model, flow, batch = case
    own = {"flow": copy.deepcopy(flow).float(), "eta": ETA} | {k: v for k, v in change.items() if k != "x"}
    wrong = batch._replace(x=change.get("x", lambda x: x)(batch.x.float()), generator=seeded())
    with pytest.raises(ValueError, match=message) as error:
        objective(copy.deepcopy(model).float(), wrong, **own)
    assert len(str(error.value)) < 200


def test_a_wide_but_sound_length_is_taken(case):
    model, flow, batch = case
    for objective in (randomized_la, adversarial_la):
        assert objective(model, batch._replace(generator=seeded()), flow=flow, eta=5.0).isfinite()


def test_objectives_by_name():
    for name in ("randomized_la", "adversarial_la"):
        assert roles(OBJECTIVES[name]) == () and networks(OBJECTIVES[name]) == ("flow",)


# A second set of norms

def normed(seed=0):
    torch.manual_seed(seed)
    return create("wrn_10_1_cifar", in_chans=1)


def grey(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g), seeded())


def still(model, x, y, *, target=None, generator=None):
    return 1 - x


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}


def test_attacked_images_leave_the_main_norms_alone_to_the_bit():
    model, twin, batch = normed().train(), normed().train(), grey()
    advprop(AuxiliaryNorms(model), batch, partial(pgd, steps=2))
    twin(batch.x)  # clean images only
    assert all(torch.equal(v, statistics(twin)[k]) for k, v in statistics(model).items())


def test_the_second_norms_see_attacked_images_alone():
    model, twin, batch = normed().train(), normed().train(), grey()
    paired = AuxiliaryNorms(model)
    advprop(paired, batch, still)
    twin(1 - batch.x)
    for name, norm in zip(paired.names, paired.second, strict=True):
        assert torch.equal(norm.running_mean, twin.get_submodule(name).running_mean)
        assert torch.equal(norm.running_var, twin.get_submodule(name).running_var) and norm.num_batches_tracked == 1


def test_advprop_written_out():
    model, batch = normed().eval(), grey()
    paired = AuxiliaryNorms(model).eval()
    second = normed().eval()
    with torch.no_grad():
        for name, norm in zip(paired.names, paired.second, strict=True):
            norm.weight += 0.3 * torch.randn_like(norm.weight)
            norm.running_mean += 0.1
            second.get_submodule(name).load_state_dict(norm.state_dict())
    attack = partial(pgd, steps=2, random_start=False)
    x_adv = attack(second, batch.x, batch.y)
    expected = (natural(model, batch) + F.cross_entropy(second(x_adv), batch.y)) / 2
    assert_close(advprop(paired, batch, attack), expected)
    assert abs(advprop(paired, batch, attack) - (natural(model, batch) + adversarial(model, batch, attack)) / 2) > 1e-3


def test_every_norm_gets_its_gradient_and_its_place_back():
    model, batch = normed().train(), grey()
    paired, before = AuxiliaryNorms(model), [id(m) for m in model.modules()]
    advprop(paired, batch, still).backward()
    assert all(p.grad is not None for p in paired.parameters())
    with pytest.raises(RuntimeError), paired.attacked():
        raise RuntimeError
    assert [id(m) for m in model.modules()] == before
    with paired.attacked():
        assert [id(m) for m in model.modules()] != before


def test_a_network_in_its_wrapper_is_the_network(tmp_path):
    model, batch = normed(), grey()
    paired = AuxiliaryNorms(model)
    assert unwrap(paired) is model and plain_state(paired).keys() > model.state_dict().keys()
    check_rebuildable(paired)
    advprop(paired.train(), batch, still)
    back = load_weights(save_weights(paired, tmp_path / "w.safetensors"))
    assert torch.equal(back(batch.x), model.eval()(batch.x)) and torch.equal(paired.eval()(batch.x), back(batch.x))
    assert not any("second" in k for k in back.state_dict())


def plan(**options):
    return Recipe(objective="advprop", attacks={"attack": [["pgd", {"steps": 1}]]}, model="wrn_10_1_cifar", augment=(),
                  batch_size=8, probe="pgd", probe_options={"steps": 1}, **{"epochs": 2, **options})


def grey_set(n=24):
    x = (grey(n).x * 255).to(torch.uint8)
    return ImageSet("toy", x, torch.arange(n) % 10, tuple("0123456789"))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_is_resumed_to_the_bit_and_leaves_a_plain_network(tmp_path, ema):
    ends, rows = [], grey_set()
    for name, seconds in (("whole", [float("inf")]), ("pieces", [0.0, float("inf")])):
        for limit in seconds:
            model = normed()
            fit(model, rows, plan(ema=ema), validation=rows, out=tmp_path / name, seconds=limit)
        ends.append(model)
        back = load_weights(tmp_path / name / "last.safetensors")
        assert back.state_dict().keys() == normed().state_dict().keys()
    assert all(torch.equal(v, ends[1].state_dict()[k]) for k, v in ends[0].state_dict().items())
    assert not ends[0].training and not any("second" in name for name, _ in ends[0].named_modules())


def test_refusals():
    with pytest.raises(ValueError, match="without"):
        AuxiliaryNorms(create("wrn_10_1_cifar", norm="group"))
    with pytest.raises(ValueError, match="fit wraps a network itself"):
        advprop(normed(), grey(), still)
    assert roles(OBJECTIVES["advprop"]) == ("attack",) and isinstance(in_form(partial(advprop), normed()), AuxiliaryNorms)


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


# An autoencoder that knows the class

SIZED = {"width": 4, "code": 6, "classes": 10}


def coder(seed=0):
    torch.manual_seed(seed)
    return create("vae_gan", in_chans=1, size=16, **SIZED)


def tiny(n=12):
    torch.manual_seed(1)
    return torch.rand(n, 1, 16, 16), torch.arange(n) % 10


def test_the_loss_of_an_autoencoder_term_by_term():
    own, (x, y), noise = coder(), tiny(), torch.randn(12, 6)
    mean, log_s = own.law(x, y)
    law, prior = torch.distributions.Normal(mean, log_s.exp()), torch.distributions.Normal(0.0, 1.0)
    images = own.drawn(mean + log_s.exp() * noise, y)
    pixels = torch.distributions.Normal(images, 0.1)
    nats = -pixels.log_prob(x).flatten(1).sum(1) - 256 * (torch.log(torch.tensor(0.1)) + 0.5 * torch.log(torch.tensor(2 * torch.pi)))
    nats = nats + torch.distributions.kl_divergence(law, prior).sum(1)
    own.eval()  # the spectral norm stands still
    found, game = own(x, y, noise)
    assert_close(found, nats, rtol=1e-4, atol=1e-3)
    hinge = F.relu(1 - own.critic(x)) + F.relu(1 + own.critic(images))
    assert_close(game, (hinge - own.critic(images))[:, 0], rtol=1e-5, atol=1e-5)


def test_no_part_of_the_game_is_pulled_both_ways():
    own, (x, y) = coder().eval(), tiny()
    mean, _ = own.law(x, y)
    game = own(x, y, torch.zeros(12, 6))[1].sum()
    critics, drawers = list(own.critic.parameters()), list(own.draw.parameters())
    found = torch.autograd.grad(game, critics + drawers)
    images = own.drawn(mean, y)
    hinge = (F.relu(1 - own.critic(x)) + F.relu(1 + own.critic(images.detach()))).sum()
    alone = torch.autograd.grad(hinge, critics) + torch.autograd.grad(-own.critic(images).sum(), drawers)
    for one, other in zip(found, alone, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_a_moved_code_stays_in_its_box_and_with_its_class(eta):
    own, (x, y) = coder().eval(), tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    before = {k: v.clone() for k, v in own.state_dict().items()}
    attack = partial(om_pgd, eta=eta, step_latent=0.06, steps=10)
    info = attack(model, x, y, flow=own.given(y), return_info=True, generator=torch.Generator().manual_seed(0))
    assert info.within.all() and info.params[0].abs().max() <= eta * (1 + 1e-6)
    assert_close(info.x_adv, own.drawn(own.law(x, y)[0] + info.params[0], y), rtol=1e-5, atol=1e-5)
    batch = Batch(x, y, torch.Generator().manual_seed(0))
    assert_close(by_class(model, batch, attack, flow=own), F.cross_entropy(model(info.x_adv), y), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items()) and all(p.grad is None for p in own.parameters())


def test_an_autoencoder_is_trained_by_fit_and_stood_on_from_the_shell(tmp_path, capsys):
    common = dict(data="digits", tier="smoke", images=64, device="cpu")
    small = 'model_options={"width": 4, "code": 8, "classes": 10}'
    assert jat_train(recipe=["ijsat/vae-gan"], out=str(tmp_path / "vae"), set_=[small], **common) == 0
    rows = read_jsonl(tmp_path / "vae" / "log.jsonl")
    assert rows[1]["val_bits_per_dim"] < rows[0]["val_bits_per_dim"] and 0 < rows[1]["round_trip"] < 1
    facts, own = open_run(tmp_path / "vae")
    assert isinstance(own, VaeGan) and own.latent_shapes == [(8,)]
    with pytest.raises(ValueError, match="jat_train --recipe ijsat/vae-gan --out FOLDER"):
        jat_train(recipe=["ijsat/long-vae-gan"], out=str(tmp_path / "on"), **common)
    assert jat_train(recipe=["ijsat/long-vae-gan"], out=str(tmp_path / "on"), needs=[f"flow={tmp_path / 'vae'}"],
                     set_=["epochs=1"], **common) == 0
    assert "bits/dim" in capsys.readouterr().out


def test_an_autoencoder_resumes_to_the_bit(tmp_path):
    (x, y), recipe = tiny(32), Recipe(objective="vae_gan", model="vae_gan", model_options=SIZED, epochs=2, batch_size=16, lr=1e-3,
                                      optimizer="adamw", schedule="constant", augment=())
    data = ImageSet("tiny", (255 * x).byte(), y, tuple("0123456789"))
    fit(whole := coder(), data, recipe, out=tmp_path / "whole")
    for seed in range(4): fit(cut := coder(seed), data, recipe, out=tmp_path / "cut", seconds=0)
    assert all(torch.equal(v, cut.state_dict()[k]) for k, v in whole.state_dict().items())


def test_training_by_class_refuses_what_is_no_vae_gan(case):
    model, flow, batch = case
    with pytest.raises(ValueError, match="stands on a VaeGan, got Glow"):
        by_class(model, batch, lambda *a, **o: None, flow=flow)
