"What networks see: distances against NumPy, an attack that pays for distance, and moves of every layer."
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jat_nb.batches import Batch
from jat_nb.contract import check_attack
from jat_nb.models import create
from jat_nb.objectives import OBJECTIVES, networks, roles
from jat_nb.perceptual import fast_lpa, fast_pat, layer_moves, perceptual, perceptual_distance, rlat, stages
from jat_nb.randomness import image_generators
from torch import nn
from torch.testing import assert_close

LAYERS = ["1", "4"]


def net(seed=0, channels=3, classes=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12),
                         nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, classes))


def cut(model, x):
    "The outputs of the two layers, and the logits, in eval mode without hooks."
    first = model[1](model[0](x))
    second = F.relu(model[3](model[2](first)))
    return first, second, model[7](model[6](model[5](second)))


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 3, 8, 8, generator=g), torch.randint(5, (6,), generator=g)
    return net().eval(), net(1).eval(), Batch(x, y, torch.Generator().manual_seed(1))


def seeds(n=6):
    return image_generators(3, range(n))


# Stages

@pytest.mark.parametrize("name, ends", [
    ("resnet18_cifar", ["layer1", "layer2", "layer3", "layer4"]), ("convnext_atto", [f"stages.{i}" for i in range(4)]),
    ("preact_resnet18_cifar", ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]),
    ("wrn_16_1_cifar", ["blocks.1", "blocks.3", "blocks.5"]), ("resnet32_cifar", ["blocks.4", "blocks.9", "blocks.14"]),
    ("small_cnn_mnist", ["features.4", "features.9"])])
def test_stages_end_where_the_resolution_ends(name, ends):
    model = create(name).eval()
    assert list(stages(model)) == list(stages(model.model)) == list(stages(nn.DataParallel(model))) == ends
    sides = []
    handles = [m.register_forward_hook(lambda m, i, o: sides.append(o.shape)) for m in stages(model).values()]
    model(torch.rand(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    widths = [info["num_chs"] for info in model.model.feature_info][-len(ends):]
    assert [s[1] for s in sides] == widths
    assert all(a[2] > b[2] for a, b in zip(sides, sides[1:]))


def test_stages_refuse():
    for layers, message in ((None, "got none"), ([], "got none"), (["1", "nine"], "got \\['1', 'nine'\\]")):
        with pytest.raises(ValueError, match=message):
            stages(net(), layers)


# Distance

def test_distance_written_out(case):
    _, features, batch = case
    other, codes = batch.x.flip(0), []
    for x in (batch.x, other):
        maps = [a.double() for a in cut(features, x)[:2]]
        units = [a / a.square().sum(1, keepdim=True).sqrt().clamp(min=1e-8) for a in maps]
        codes.append(torch.cat([(u / (a.shape[2] * a.shape[3]) ** 0.5).flatten(1) for u, a in zip(units, maps)], 1))
    found = perceptual_distance(features, batch.x, other, LAYERS)
    assert_close(found.double(), (codes[0] - codes[1]).norm(dim=1), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, perceptual_distance(features, other, batch.x, LAYERS))
    assert not perceptual_distance(features, batch.x, batch.x.clone(), LAYERS).any()
    assert (found <= 2 * 2 ** 0.5).all() and (found > 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_no_trace(case, training):
    features, x = case[1].train(training), case[2].x
    before = copy.deepcopy(features.state_dict())
    live = x.clone().requires_grad_()
    perceptual(features, live, LAYERS).sum().backward()
    assert live.grad.isfinite().all() and live.grad.any() and features.training == training
    assert all(torch.equal(v, before[k]) for k, v in features.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in features.parameters())
    with pytest.raises(ValueError, match="maps"):
        perceptual(features, x, ["6"])
    assert not any(m._forward_hooks for m in features.modules())


def test_no_nan_where_nothing_is_seen():
    dead = net().eval()
    nn.init.constant_(dead[0].weight, 0.0), nn.init.constant_(dead[0].bias, -1.0)
    x = torch.rand(2, 3, 8, 8).requires_grad_()
    d = perceptual_distance(dead, x, x.detach().flip(0), ["1"])
    d.sum().backward()
    assert not d.any() and x.grad.isfinite().all()


def test_a_layer_that_does_not_run_is_named():
    model = net()
    model.spare = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: nn.Sequential(*list(model.children())[:8])(x)
    with pytest.raises(ValueError, match="spare.*did not run"):
        perceptual(model, torch.rand(2, 3, 8, 8), ["1", "spare"])
    with pytest.raises(ValueError, match="spare.*did not run"):
        layer_moves(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), layers=["spare"])


# Fast-LPA

@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
def test_the_bound_is_nearly_kept(case, eps):
    model, features, (x, y, *_) = case
    info = fast_lpa(model, x, y, features=features, layers=LAYERS, eps=eps, generator=seeds(), return_info=True)
    d = perceptual_distance(features, x, info.x_adv, LAYERS)
    assert (d < 1.25 * eps).all() and d.median() > 0.5 * eps
    assert torch.equal(info.within, d <= eps + 1e-6)
    clean = fast_lpa(model, x, y, features=features, layers=LAYERS, eps=0.0, return_info=True).loss
    assert (info.loss > clean).float().mean() > 0.8


def test_budgets_and_targets(case):
    model, features, (x, y, *_) = case
    attack = partial(fast_lpa, model, x, y, features=features, layers=LAYERS)
    budgets = torch.linspace(0, 0.3, 6)
    d = perceptual_distance(features, x, attack(eps=budgets, generator=seeds()), LAYERS)
    assert d[0] == 0 and (d < 1.25 * budgets + 1e-6).all() and d[5] > d[1]
    target = (y + 1) % 5
    aimed = attack(eps=0.3, target=target, generator=seeds())
    assert (F.cross_entropy(model(aimed), target) < F.cross_entropy(model(x), target))
    assert torch.equal(attack(random_start=False), attack(random_start=False))


def test_one_step_written_out(case):
    model, features, (x, y, *_) = case
    live = x.clone().requires_grad_()
    logits = cut(model, live)[2]
    others = logits.masked_fill(F.one_hot(y, 5).bool(), -torch.inf).amax(1)
    g = torch.autograd.grad((others - logits.gather(1, y[:, None])[:, 0]).sum(), live)[0]
    unit = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    slope = (perceptual(features, x + 0.1 * unit, LAYERS) - perceptual(features, x, LAYERS)).norm(dim=1) / 0.1
    expected = (x + unit * (0.05 / (slope + 1e-4)).view(-1, 1, 1, 1)).clamp(0, 1)
    found = fast_lpa(model, x, y, features=features, layers=LAYERS, eps=0.05, steps=1, random_start=False)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_promises_of_an_attack():
    features = net(1).eval()
    attack = partial(fast_lpa, features=features, layers=LAYERS, eps=0.1, steps=2)
    checks = check_attack(attack, within=lambda x, x_adv: torch.ones(len(x), dtype=torch.bool),
                          zero=partial(attack, eps=0.0), shapes=((3, 8, 8, 2), (3, 9, 14, 10)))
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


@pytest.mark.parametrize("options, message", [(dict(eps=-0.1), "eps must"), (dict(xi=-1.0), "xi must"), (dict(steps=0), "one step"),
                                              (dict(step=-1.0), "step must"), (dict(layers=["x"]), "pass layers")])
def test_refusals(case, options, message):
    model, features, (x, y, *_) = case
    with pytest.raises(ValueError, match=message):
        fast_lpa(model, x, y, **{"features": features, "layers": LAYERS, **options})


def test_fast_pat_is_adversarial_training(case):
    model, features, batch = case
    x_adv = fast_lpa(model, batch.x, batch.y, features=features, layers=LAYERS, generator=torch.Generator().manual_seed(1))
    found = fast_pat(model, batch, features=features, layers=LAYERS)
    assert_close(found, F.cross_entropy(model(x_adv), batch.y))


# RLAT

@pytest.mark.parametrize("eps", [0.0, 0.08, 1.0])
def test_moves_have_the_length_asked_for(case, eps):
    model, _, (x, y, *_) = case
    moves = layer_moves(model, x, y, eps=eps, layers=LAYERS)
    assert list(moves) == ["input", *LAYERS]
    for place, move in enumerate(moves.values(), start=1):
        length = eps * move[0].numel() / x[0].numel() / place
        assert_close(move.flatten(1).norm(dim=1), torch.full((6,), length), rtol=1e-6, atol=1e-7)


def test_rlat_written_out(case):
    model, _, batch = case
    live = batch.x.clone().requires_grad_()
    first, second, logits = cut(model, live)
    slopes = torch.autograd.grad(F.cross_entropy(logits, batch.y, reduction="sum"), [live, first, second])
    a, b, c = (0.3 * g[0].numel() / batch.x[0].numel() / place * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
               for place, g in enumerate(slopes, start=1))
    second = F.relu(model[3](model[2](model[1](model[0]((batch.x + a).clamp(0, 1))) + b))) + c
    expected = F.cross_entropy(model[7](model[6](model[5](second))), batch.y)
    assert_close(rlat(model, batch, eps=0.3, layers=LAYERS), expected, rtol=1e-5, atol=1e-6)
    assert expected > F.cross_entropy(model(batch.x), batch.y)


def test_rlat_trains_and_searches_without_a_trace(case):
    model, batch = case[0].train(), case[2]
    before = copy.deepcopy(model.state_dict())
    layer_moves(model, batch.x, batch.y, layers=LAYERS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    rlat(model, batch, layers=LAYERS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model[3].num_batches_tracked == 1 and not any(m._forward_hooks for m in model.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert rlat(model, batch, layers=LAYERS).dtype == torch.float32


def test_flat_networks_move_nothing(case):
    blind = case[0]
    nn.init.zeros_(blind[7].weight)
    assert not any(m.any() for m in layer_moves(blind, case[2].x, case[2].y, layers=LAYERS).values())


def test_moves_do_not_depend_on_companions(case):
    model, _, (x, y, *_) = case
    together, alone = (layer_moves(model, x[:n], y[:n], layers=LAYERS) for n in (6, 1))
    for name in together:
        assert_close(together[name][:1], alone[name], rtol=1e-4, atol=1e-6)


def test_objectives_by_name():
    assert roles(OBJECTIVES["rlat"]) == roles(OBJECTIVES["fast_pat"]) == ()
    assert networks(OBJECTIVES["rlat"]) == () and networks(OBJECTIVES["fast_pat"]) == ("features",)
