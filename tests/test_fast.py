"""The fast copy: exact where it folds, tried before it is used, and never the judge."""
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb import evaluation, models
from jat_nb.autoattack import autoattack_at
from jat_nb.evaluation import clean, evaluate, ggsm_at, pgd_at, raw_accuracy
from jat_nb.masking import masking_report, transfer
from jat_nb.models import computes_bfloat16, create, fast_copy

bfloat16 = pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])


@pytest.fixture
def processor(monkeypatch, half):
    monkeypatch.setattr(models, "computes_bfloat16", lambda device: half)
    return half


def lively(model: nn.Module) -> nn.Module:
    "Batch norms as after training, not as they are born."
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for v, low in ((m.running_mean, -0.3), (m.running_var, 0.5), (m.weight.data, 0.5), (m.bias.data, -0.2)):
                v.copy_(low + torch.rand(v.shape, generator=generator))
    return model.eval()


def network(name: str = "wrn_10_1_cifar") -> nn.Module:
    torch.manual_seed(0)
    return lively(create(name, num_classes=10, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(1)
    model, x = network(), torch.rand(24, 3, 16, 16)
    y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    return model, x, y


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def called(model: nn.Module) -> int:
    seen = []
    handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(torch.rand(2, 3, 16, 16))
    [h.remove() for h in handles]
    return len(seen)


class ByName(nn.Module):
    "Hands images on by the name of the argument."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x): return self.out(self.norm(input=self.conv(input=x)).mean((2, 3)))


def test_a_batch_norm_called_by_name_is_folded_too():
    model, x = lively(ByName()), torch.rand(4, 3, 16, 16)
    copied = fast_copy(model, x)
    assert copied is not model and called(copied) == 0
    assert_close(copied(x), model(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name, left", [("wrn_10_1_cifar", 4), ("resnet18_cifar", 0)])
@pytest.mark.parametrize("half", [False])
def test_batch_norms_after_convolutions_are_folded(processor, name, left):
    model, x = network(name), torch.rand(3, 3, 16, 16)
    quick = fast_copy(model, x)
    assert called(quick) == left < norms(model)
    assert_close(quick(x), model(x), rtol=1e-3, atol=1e-3)


class Twice(nn.Module):
    "The convolution's result is read twice: folding would change the sum."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        h = self.conv(x)
        return self.head((h + self.norm(h)).mean((2, 3)))


class Shared(nn.Module):
    "One convolution, called twice, before one batch norm."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.conv(x))).mean((2, 3)))


class Bent(torch.autograd.Function):
    "Rounds, and passes the gradient as if it had not: torch.fx forgets the second half."

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
        self.body(torch.rand(2, 3, 16, 16))

    def forward(self, x):
        return self.body(Bent.apply(x))


class Branch(nn.Module):
    "Control flow that depends on the images."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        self.body(torch.rand(2, 3, 16, 16))

    def forward(self, x):
        return self.body(x if x.mean() > 0.1 else 1 - x)


class PartlyBlind(nn.Module):
    "Half of the network under no_grad, which torch.fx does not write down."

    def __init__(self):
        super().__init__()
        self.a, self.b = Branch().body, Branch().body

    def forward(self, x):
        with torch.no_grad():
            hidden = self.a(x)
        return hidden + self.b(x)


@pytest.mark.parametrize("build", [Twice, Shared, Straight, Branch, PartlyBlind])
@bfloat16
def test_a_copy_agrees_in_logits_and_gradient(processor, build):
    torch.manual_seed(0)
    model, x = lively(build()), torch.rand(6, 3, 16, 16)
    quick = fast_copy(model, x[:3])
    for a, b in zip(models._passes(model, x), models._passes(quick, x)):
        assert (a - b).norm() <= (0.1 if processor else 1e-3) * a.norm()


@pytest.mark.parametrize("half", [False])
def test_what_cannot_be_checked_is_attacked_as_it_is(processor):
    class Drawn(nn.Module):
        def forward(self, x): return x.flatten(1)[:, :5] + torch.randn(len(x), 5)

    class Uncopied(nn.Module):
        def __deepcopy__(self, memo): raise TypeError("no copies")
        def forward(self, x): return x.flatten(1)[:, :5]
    for model in (Drawn(), Uncopied()):
        assert fast_copy(model, torch.rand(2, 3, 8, 8)) is model


@bfloat16
def test_the_verdict_is_the_model_s_own(processor, case):
    model, x, y = case
    suite = {"Clean": clean, "PGD": pgd_at(0.02, 4), "two": [pgd_at(0.01, 2), ggsm_at(0.5, 2)]}
    plain, seen = evaluate(model, x, y, suite), []

    def spy(target, x, y, generator=None):
        x_adv = pgd_at(0.02, 4)(target, x, y, generator=generator)
        seen.append((type(target).__name__, model(x_adv).argmax(1) == y))
        return x_adv
    found = evaluate(model, x, y, {"spy": spy}, fast=True)
    assert seen[0][0] == "_Quick" and torch.equal(found.correct[0][found.correct[0]], seen[0][1][seen[0][1]])
    quick = evaluate(model, x, y, suite, fast=True)
    assert torch.equal(quick.correct[0], plain.correct[0]) and quick.names == plain.names
    assert (quick.correct != plain.correct).float().mean() <= 0.05
    right = plain.correct[0].sum()  # the copy's passes count like the model's; its own verdict is one more
    assert (quick.passes[:2, 0] == plain.passes[:2, 0] + right).all() and torch.equal(quick.passes[:2, 1], plain.passes[:2, 1])


@bfloat16
def test_the_model_is_left_as_found(processor, case):
    model, x, y = case
    model.train()
    before, hooks = copy.deepcopy(model.state_dict()), len(model._forward_hooks)
    evaluate(model, x, y, {"PGD": pgd_at(0.02, 2)}, fast=True)
    assert model.training and len(model._forward_hooks) == hooks and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert norms(model) == norms(network()) and next(model.parameters()).dtype == torch.float32
    model.eval()


@bfloat16
def test_autoattack_s_survivors_are_attacked_again_on_the_model(processor, case, monkeypatch):
    model, x, y = case
    suite = {"AutoAttack": autoattack_at(0.01, block=10, attacks=["apgd-ce"])}
    plain, quick = evaluate(model, x, y, suite), evaluate(model, x, y, suite, fast=True)
    assert (plain.correct != quick.correct).sum() <= 1

    class Gullible(nn.Module):
        "A copy that any change fools."
        def forward(self, v):
            logits = model(v)
            same = torch.stack([(v == clean_image).all(dim=3).all(dim=2).all(dim=1) for clean_image in x]).any(dim=0)
            return torch.where(same[:, None], logits, logits.roll(1, dims=1))
    monkeypatch.setattr(evaluation, "fast_copy", lambda *_: Gullible().eval())
    assert torch.equal(evaluate(model, x, y, suite, fast=True).correct, plain.correct)


@bfloat16
def test_everything_takes_fast(processor, case):
    model, x, y = case
    few = x[:8], y[:8]
    assert transfer(model, model, *few, {"PGD": pgd_at(0.02, 2)}, fast=True).n == 8
    assert raw_accuracy(model, *few, {"PGD": pgd_at(0.02, 2)}, fast=True).n == 8
    report = masking_report(model, *few, eps_pixel=0.05, eps_flow=0.5, steps=(8, 8), restarts=1, siamese=model, fast=True)
    assert len(report.rows) == 6


def test_the_processor_is_asked(monkeypatch):
    ask = lambda **known: (monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False),
                           computes_bfloat16(torch.device("cpu")))[1]
    assert ask(avx512_bf16=True) and ask(amx_bf16=True) and not ask(avx512_bf16=False, avx2=True) and not ask()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_bfloat16(torch.device("cpu")) and not computes_bfloat16(torch.device("mps"))


class Threshold(nn.Module):
    "Class 1 above a mean brightness."

    def __init__(self, limit: float):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, x):
        above = x.flatten(1).mean(1) - self.limit
        return torch.stack([-above, above], dim=1)


def test_an_attack_that_stops_too_early_on_the_copy_is_carried_out_on_the_network(monkeypatch):
    model, hasty = Threshold(0.5), Threshold(0.4)  # the copy is fooled a little earlier
    monkeypatch.setattr(evaluation, "fast_copy", lambda model, x: hasty)

    def brighten(net, x, y, generator=None):
        "The first step that fools the network it is given."
        for step in (0.1, 0.2, 0.4):
            x_adv = x + step
            if (net(x_adv).argmax(1) != y).all(): return x_adv
        return x_adv

    x, y = torch.full((3, 1, 2, 2), 0.25), torch.zeros(3, dtype=torch.long)
    slow, fast = (evaluate(model, x, y, {"brighten": brighten}, fast=fast) for fast in (False, True))
    assert not slow.correct.any() and torch.equal(slow.correct, fast.correct)
