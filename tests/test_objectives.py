"Objectives: Algorithm 3 by hand, what they call, what they leave alone, and what they refuse."
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import cascade, double_pass, ggsm, one_pass, pgd
from jat_nb.batches import Batch
from jat_nb.glow import Glow
from jat_nb.losses import bilateral_labels
from jat_nb.models import create
from jat_nb.objectives import (JUDGES, OBJECTIVES, adversarial, choose_target, clean_logits, in_form, jat, natural, networks, roles,
                               training_labels)

ONE_STEP = partial(double_pass, steps=1, step_pixel=8 / 255, step_flow=0.3)


def idle(model, x, y, *, target=None, generator=None):
    return x


def small_model(num_classes=5, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))


def network(keyword, num_classes, channels):
    "What an objective stands on, for images of 8 pixels."
    if keyword == "flow":
        return Glow((channels, 8, 8), levels=2, steps=1, width=8)
    if keyword == "features":
        return create("wrn_10_1_cifar", in_chans=channels)
    return small_model(num_classes, channels)


def batch_of(n=12, num_classes=5, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, channels, 8, 8, generator=g), torch.randint(num_classes, (n,), generator=g),
                 torch.Generator().manual_seed(seed + 1))


def test_natural_and_adversarial_are_cross_entropies():
    model, batch = small_model().eval(), batch_of()
    assert_close(natural(model, batch), F.cross_entropy(model(batch.x), batch.y))
    assert_close(adversarial(model, batch, idle), natural(model, batch))
    x_adv = pgd(model, batch.x, batch.y, steps=2, generator=torch.Generator().manual_seed(1))
    assert_close(adversarial(model, batch, partial(pgd, steps=2)), F.cross_entropy(model(x_adv), batch.y))


def test_jat_is_algorithm_3():
    model, batch, g = small_model().eval(), batch_of(), torch.Generator().manual_seed(1)
    target = (batch.y + 1 + (torch.rand(12, generator=g) * 4).long()) % 5
    x_adv = ONE_STEP(model, batch.x, batch.y, target=target, generator=g)
    label = bilateral_labels(model(batch.x), batch.y)
    by_hand = -(label * model(x_adv).log_softmax(1)).sum(1).mean()
    assert_close(jat(model, batch, ONE_STEP), by_hand)


def test_what_the_attack_is_given():
    seen = {}

    def spy(model, x, y, *, target=None, generator=None):
        seen.update(x=x, y=y, target=target, generator=generator)
        return x

    model, batch = small_model(), batch_of()
    adversarial(model, batch, spy)
    assert seen["target"] is None and seen["generator"] is batch.generator and seen["y"] is batch.y
    for kind in ("random", "most_confusing"):
        jat(model, batch, spy, target=kind)
        assert (seen["target"] != batch.y).all() and seen["x"] is batch.x
    jat(model, batch, spy, target=None)
    assert seen["target"] is None


@pytest.mark.parametrize("labels", ["bilateral", "uniform", "smooth", "hard"])
@pytest.mark.parametrize("target", ["random", "most_confusing", None])
def test_family(labels, target):
    model, batch = small_model().eval(), batch_of()
    loss = jat(model, batch, idle, target=target, labels=labels)
    if labels == "hard":
        assert_close(loss, natural(model, batch))
    soft = training_labels(labels, model(batch.x), batch.y)
    assert loss >= -(soft * soft.clamp(min=1e-12).log()).sum(1).mean() - 1e-5


@pytest.mark.parametrize("attack", [ONE_STEP, partial(ggsm, steps=1), partial(one_pass, steps=1), partial(cascade, steps=1)])
@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradients(attack, training):
    model, batch = small_model().train(training), batch_of()
    model[1].eval()  # a frozen layer stays frozen
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    for objective in (natural, adversarial, jat):
        loss = objective(model, batch, *[attack] * len(roles(objective)))
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_clean_look_uses_eval_mode_and_leaves_no_trace():
    model, batch = small_model().train(), batch_of()
    before = copy.deepcopy(model.state_dict())
    logits = clean_logits(model, batch.x)
    assert model.training and not logits.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_close(logits, copy.deepcopy(model).eval()(batch.x))


def test_batch_statistics_are_those_of_the_attacked_images():
    model, batch = small_model().train(), batch_of()
    twin = copy.deepcopy(model)
    shifted = lambda model, x, y, *, target=None, generator=None: x * 0.5
    jat(model, batch, shifted)
    twin(batch.x * 0.5)
    for (k, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(a, b), k


def test_same_generator_same_bits():
    model = small_model().eval()
    assert torch.equal(jat(model, batch_of(), ONE_STEP), jat(model, batch_of(), ONE_STEP))
    assert not torch.equal(jat(model, batch_of(), ONE_STEP), jat(model, batch_of(seed=0)._replace(
        generator=torch.Generator().manual_seed(9)), ONE_STEP))


@pytest.mark.parametrize("options, passes", [({}, 4), ({"labels": "uniform"}, 4)])
def test_passes(options, passes):
    model, batch, sizes = small_model(), batch_of(), []
    model.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    jat(model, batch, ONE_STEP, **options)
    assert len(sizes) == passes and (sizes[0] == 12) == (not options)


@pytest.mark.parametrize("num_classes, channels", [(2, 1), (7, 3), (100, 2)])
def test_any_shape(num_classes, channels):
    model, batch = small_model(num_classes, channels), batch_of(6, num_classes, channels)
    elsewhere = {"pareto", "robust_mixup_codes", "by_class", *JUDGES}  # tests of memory, generators, augmenting, flows
    for name in set(OBJECTIVES) - elsewhere:
        asked = roles(OBJECTIVES[name])
        given = dict.fromkeys(("near", "far") if asked is None else asked, ONE_STEP)
        given |= {keyword: network(keyword, num_classes, channels) for keyword in networks(OBJECTIVES[name])}
        given |= {"rlat": {"layers": ["2"]}}.get(name, {})
        assert OBJECTIVES[name](in_form(OBJECTIVES[name], model), batch, **given).isfinite(), name


def test_bfloat16_autocast_trains_every_weight():
    model, batch = small_model(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = jat(model, batch, ONE_STEP)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_refusals():
    model, batch = small_model(), batch_of()
    with pytest.raises(ValueError, match="unknown target 'nearest'"): jat(model, batch, idle, target="nearest")
    with pytest.raises(ValueError, match="unknown labels 'sharp'"): jat(model, batch, idle, labels="sharp")
    with pytest.raises(ValueError, match="ratio.*floor"): jat(model, batch, idle, eps_y=0.5)
    with pytest.raises(ValueError, match="take the options"): training_labels("hard", torch.zeros(12, 5), batch.y, eps_y=0.1)
    with pytest.raises(ValueError, match="choose 'random'"): choose_target("", torch.zeros(12, 5), batch.y)
    with pytest.raises(ValueError, match="in 0..4"): natural(model, batch._replace(y=batch.y + 5))


def test_roles_stand_in_the_signature():
    def pair(model, batch, near, far, *, weight=0.5, **options): return batch.x.sum()

    assert [roles(f) for f in (natural, adversarial, jat, pair)] == [(), ("attack",), ("attack",), ("near", "far")]
    assert roles(partial(pair, weight=0.1)) == ("near", "far") and roles(partial(jat, target=None)) == ("attack",)
    assert roles(lambda model, batch: 0) == ()
    with pytest.raises(TypeError): natural(small_model(), batch_of(), idle)
