"""The engine under odd formats, odd logits, compiled models and chains."""
import inspect
from functools import partial

import pytest
import torch
from conftest import ASCENTS
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from jat_nb.attacks import ATTACKS, ascend, chain, double_pass, fgsm, ggsm, mi_fgsm, pgd, plan
from jat_nb.evaluation import evaluate, pgd_at
from jat_nb.losses import LOSSES, margin_loss
from jat_nb.models import create
from jat_nb.threats import Pixel

HALF, BRAIN = torch.float16, torch.bfloat16


def zero_budget(attack):
    "Every budget of an attack, by its name in the signature, at zero."
    return {name: 0.0 for name in inspect.signature(attack).parameters if name.startswith(("eps", "max_deg", "max_px", "strength"))}


class Sure(nn.Module):
    "Three logits, `gap` apart on a grey image; every pixel pushes towards the second class."

    def __init__(self, gap: float, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3, bias=False)
        with torch.no_grad():
            self.linear.weight[0], self.linear.weight[1], self.linear.weight[2] = -scale, scale, 0
        self.gap = gap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x - 0.5).flatten(1)) + torch.tensor([self.gap, 0.0, -self.gap])


GREY, ZERO = torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 0])


@pytest.mark.parametrize("gap", [8.0, 20.0, 40.0, 70.0])
@pytest.mark.parametrize("attack", [partial(pgd, eps=0.4, step=0.1, steps=6), partial(fgsm, eps=0.4),
                                    partial(mi_fgsm, eps=0.4, step=0.1, steps=6)], ids=["pgd", "fgsm", "mi_fgsm"])
def test_float16_finds_what_float32_finds(gap, attack):
    model = Sure(gap)
    expected = attack(model, GREY, ZERO, random_start=False)
    with torch.autocast("cpu", HALF):
        found = attack(model, GREY, ZERO, random_start=False)
    assert (expected - GREY).abs().max() > 0.3
    torch.testing.assert_close(found, expected)


def test_float16_scales_image_by_image():
    "A sure image beside an unsure one: each moves as it would alone."
    model = Sure(6.0)
    easy, hard = torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.45)
    both = torch.cat([easy, hard])
    with torch.autocast("cpu", HALF):
        together = pgd(model, both, ZERO, eps=0.1, step=0.05, steps=4, random_start=False)
        alone = [pgd(model, v, ZERO[:1], eps=0.1, step=0.05, steps=4, random_start=False) for v in (easy, hard)]
    assert torch.equal(together, torch.cat(alone)) and ((together - both).abs().amax((1, 2, 3)) > 0.09).all()


def test_float16_evaluation_is_that_of_float32():
    model, suite = Sure(30.0), {"PGD": pgd_at(0.3, 8)}
    plain = evaluate(model, GREY, ZERO, suite).accuracy
    with torch.autocast("cpu", HALF):
        halved = evaluate(model, GREY, ZERO, suite).accuracy
    assert plain.item() == halved.item() == 0


def test_a_half_precision_forward_of_its_own():
    "Logits in float16 without any autocast around the attack."
    class Inner(Sure):
        def forward(self, x):
            with torch.autocast("cpu", HALF):
                return super().forward(x).half()

    found = pgd(Inner(25.0), GREY, ZERO, eps=0.2, step=0.1, steps=8, return_info=True)
    assert found.success.all()


@pytest.mark.parametrize("dtype", [None, BRAIN])
def test_other_formats_are_left_alone(dtype, monkeypatch):
    import jat_nb.ascent as module

    monkeypatch.setattr(module, "_scaled", lambda grad: pytest.fail("scaled without need"))
    with torch.autocast("cpu", dtype or BRAIN, enabled=dtype is not None):
        found = pgd(Sure(40.0), GREY, ZERO, eps=0.3, step=0.1, steps=8, return_info=True)
    assert found.success.all()


class Broken(nn.Module):
    "Logits of which some are no numbers, for images brighter than the middle."

    def __init__(self, value: float, where: int) -> None:
        super().__init__()
        self.linear, self.value, self.where = nn.Linear(192, 4), value, where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x.flatten(1)).clone()
        logits[x.mean((1, 2, 3)) > 0.5, self.where] = self.value
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("name", sorted(set(ASCENTS) - {"fog"}))  # which makes a dark image white at zero budget
def test_logits_that_are_no_numbers_are_broken_and_hit_no_target(name, value, where):
    x = torch.cat([torch.full((2, 3, 8, 8), 0.9), torch.full((2, 3, 8, 8), 0.1)])
    model = Broken(value, where)
    y = torch.tensor([where, 0, 0, 0])
    y[2:] = model(x)[2:].argmax(1)
    options = dict(random_start=False, return_info=True) | ({} if name == "fgsm" else {"steps": 1})
    still = zero_budget(ATTACKS[name])
    if value != value and name != "fast_lagrangian":
        with pytest.raises(FloatingPointError, match="answers 2 of 4 clean images with NaN"): ATTACKS[name](model, x, y, **options, **still)
        return
    found = ATTACKS[name](model, x, y, **options, **still)
    assert found.success.tolist() == [True, True, False, False]
    target = torch.full_like(y, where)
    aimed = ATTACKS[name](model, x, y, target=target, **options, **still)
    assert not aimed.success[:2].any()
    assert torch.equal(aimed.success[2:], model(x)[2:].argmax(1) == where)


def test_nan_under_attack_is_broken_and_hits_no_target():
    "The clean images are dark and have none; the random start makes some of them bright."
    x, y = torch.full((8, 3, 8, 8), 0.4999), torch.zeros(8, dtype=torch.int64)
    model, threat = Broken(torch.nan, 1), Pixel(0.2, 0.0)
    found = ascend(model, x, y, [threat], steps=1, generator=torch.Generator().manual_seed(0), return_info=True)
    shining = found.x_adv.mean((1, 2, 3)) > 0.5
    assert shining.any() and found.success[shining].all()
    assert not ascend(model, x, y, [threat], steps=1, target=y + 1, generator=torch.Generator().manual_seed(0), return_info=True).success[shining].any()


@pytest.mark.parametrize("threats", [Pixel(), [pgd], ["pixel"], "pixel", None, [None], [Pixel], 5, iter([Pixel()])])
def test_what_is_no_list_of_threats_is_refused(threats):
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8), torch.arange(4)
    with pytest.raises(ValueError, match=r"a list of threats, such as \[Pixel\(8 / 255\)\], got"): ascend(model, x, y, threats, steps=1)
    assert ascend(model, x, y, (Pixel(),), steps=1).shape == x.shape


@pytest.mark.parametrize("asked, message", [(("2", 3, "sequential"), "number of threats, at least 1, got '2'"), ((2.0, 3, "sequential"), "got 2.0"),
                                            (([Pixel()], 3, "sequential"), r"len\(threats\)"), ((None, 1, "sequential"), "got None"),
                                            ((2, 3, ["sequential"]), "unknown schedule"), ((2, 2.0, "sequential"), "steps=2.0")])
def test_a_plan_of_something_else_is_refused(asked, message):
    with pytest.raises(ValueError, match=message): plan(*asked)


def test_losses_go_by_name():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8), torch.arange(4)
    for name, loss in LOSSES.items():
        for attack in (partial(pgd, steps=2), partial(double_pass, steps=2), partial(ATTACKS["cascade"], steps=2, independent=True)):
            runs = [attack(model, x, y, loss=given, generator=torch.Generator().manual_seed(0)) for given in (name, loss)]
            assert torch.equal(*runs)
    with pytest.raises(ValueError, match="unknown loss 'carlini': choose one of cross_entropy, margin, soft_margin, dlr"):
        pgd(model, x, y, loss="carlini")


def test_chains_pass_on_images_target_and_randomness():
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8), torch.arange(4)
    first, second = partial(ggsm, eps=0.7, steps=2), partial(pgd, eps=0.1, steps=2, loss=margin_loss)
    target = (y + 1) % 5
    for given in ({}, {"target": target}):
        found = chain([first, second])(model, x, y, generator=torch.Generator().manual_seed(0), **given)
        g = torch.Generator().manual_seed(0)
        expected = second(model, first(model, x, y, generator=g, **given), y, generator=g, **given)
        assert torch.equal(found, expected)
    seen = []
    spy = lambda model, x, y, **options: seen.append((x.clone(), options)) or x + 0.01
    chain([spy, spy, spy])(model, x, y, target=target)
    assert all(options == {"target": target} for _, options in seen)
    torch.testing.assert_close(seen[2][0], x + 0.02)
    assert chain([spy]) is spy
    with pytest.raises(ValueError, match="at least one attack"):
        chain([])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def snapshot(model: nn.Module):
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [(id(b), b._version) for b in model.buffers()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("attack", [partial(pgd, steps=3), partial(double_pass, steps=2, keep_best=True)], ids=["pgd", "double_pass"])
def test_compiled_models_give_the_same_images(backend, attack, fresh_dynamo):
    torch.manual_seed(1)
    model = create("wrn_10_1_cifar", num_classes=4)
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    compiled(x).sum().backward()
    expected = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    before, programs = snapshot(compiled), []
    for seed in range(4):
        found = attack(compiled, x, y, generator=torch.Generator().manual_seed(0), return_info=seed == 3)
        programs.append(counter.frame_count)
    torch.testing.assert_close(found.x_adv, expected, rtol=0, atol=1e-5)
    after = snapshot(compiled)
    assert before[:3] == after[:3] and all(a is b for a, b in zip(before[3], after[3]))
    assert programs[0] == programs[2] and programs[3] <= 4, f"programs compiled: {programs}"


def test_training_and_attacking_a_compiled_model_settles(fresh_dynamo):
    "Batch norm in train mode and attacks in turn: after the first round nothing is compiled again."
    counter = CompileCounter()
    model = torch.compile(create("wrn_10_1_cifar", num_classes=4).train(), backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y, programs = torch.rand(4, 3, 16, 16), torch.arange(4), []
    for _ in range(4):
        clean = model(x)
        x_adv = double_pass(model, x, y, steps=1)
        (nn.functional.cross_entropy(clean, y) + nn.functional.cross_entropy(model(x_adv), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        programs.append(counter.frame_count)
    assert programs[1] == programs[-1] and programs[-1] <= 4, programs
