"""A model held still, seen by autograd: graphs that are still alive survive attacks, wrappers and odd buffers."""
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import double_pass, pgd
from jat_nb.models import create, frozen


class Writer(nn.Module):
    "Writes to its buffers in eval mode in every way PyTorch offers."

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("cache", None)
        self.register_buffer("links", torch.eye(6).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.data.add_(1)  # no version counter sees this
        self.scale.mul_(1.1)
        self.cache = x.detach().mean(dim=0)
        self.links = 2 * self.links
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(1))
        return self.linear(x) * self.scale


def objects(model: nn.Module) -> list[tuple[int, str, int]]:
    return [(i, name, id(b)) for i, m in enumerate(model.modules()) for name, b in m._buffers.items()]


def versions(model: nn.Module) -> list[int]:
    return [b._version for b in model.buffers()]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3)],
                         ids=["batch", "instance", "sync"])
def test_a_graph_outlives_a_write_to_statistics(norm):
    norm = copy.deepcopy(norm).eval()
    x = torch.rand(5, 3, 4, 4, requires_grad=True)
    loss = norm(x).pow(3).sum()  # keeps the running statistics for its backward pass
    expected, = torch.autograd.grad(loss, x, retain_graph=True)
    with frozen(norm):
        norm.running_mean.add_(3)
        norm.running_var.data.fill_(7)
        norm.num_batches_tracked += 5
    found, = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)
    assert torch.equal(norm.running_var, torch.ones(3)) and norm.num_batches_tracked == 0


def test_every_kind_of_write_is_undone_without_a_write():
    model = Writer()
    before, counters, links = objects(model), versions(model), model.links.to_dense().clone()
    for _ in range(2):
        with frozen(model):
            model(torch.rand(3, 6))
            assert model.count == 1 and "late" in model._buffers
    assert objects(model) == before and versions(model) == counters
    assert model.count == 0 and model.cache is None and torch.equal(model.links.to_dense(), links)


def test_deleted_and_sparse_row_buffers_come_back():
    model = nn.Module()
    model.register_buffer("rows", torch.eye(4).to_sparse_csr())
    model.register_buffer("empty", torch.empty(0))
    before = objects(model)
    with frozen(model):
        del model.rows
        model.empty = torch.ones(3)
    assert sorted(objects(model)) == sorted(before) and model.empty.numel() == 0


def test_a_buffer_in_two_modules_stays_one_buffer():
    a, b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    b.running_mean = a.running_mean
    model = nn.Sequential(a, b)
    shared = a.running_mean
    with frozen(model):
        assert a.running_mean is b.running_mean and a.running_mean is not shared
        a.running_mean.add_(1)
        assert b.running_mean[0] == 1
    assert a.running_mean is shared and b.running_mean is shared and shared[0] == 0


@pytest.mark.parametrize("where", ["inside", "while entering"])
def test_errors_put_the_same_objects_back(where):
    model, x = nn.Sequential(nn.BatchNorm1d(6), Writer()), torch.rand(3, 6, requires_grad=True)
    before, marks = objects(model), [m.training for m in model.modules()]
    loss = model[0](x).square().sum()
    if where == "while entering":
        model.add_module("lazy", nn.LazyBatchNorm1d())  # its buffers cannot be copied yet
    with pytest.raises(Exception, match="planted|uninitialized"):
        with frozen(model):
            model[0](x), model[1](x)
            raise RuntimeError("planted")
    model = model[:2]
    assert objects(model) == before and marks == [m.training for m in model.modules()]
    loss.backward()


def test_scripted_modules_hold_still_too():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    norm = list(model.modules())[2]
    with frozen(model):
        model(torch.rand(4, 1, 5, 5))
        assert not norm.training and not norm.running_mean.any()
        norm.running_mean.add_(1)
    assert model.training and norm.training and not norm.running_mean.any()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 4))


def whole_step(model, x, y, attack):
    "Clean forward in train mode, an attack, an adversarial forward, one backward over the sum."
    clean = model(x)
    x_adv = attack(model, x, y)
    loss = nn.functional.cross_entropy(clean, y) + nn.functional.cross_entropy(model(x_adv), y)
    loss.backward()
    return x_adv


@pytest.mark.parametrize("attack", [pgd, double_pass])
@pytest.mark.parametrize("touch", [False, True])
def test_a_training_step_around_an_attack(attack, touch):
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    model, twin = network(), network()
    if touch:  # a layer that writes when it is only asked
        def touch_statistics(layer, inputs):
            if not layer.training:
                layer.running_mean.mul_(1.0)

        for m in (model, twin):
            m[5].register_forward_pre_hook(touch_statistics)
    seeded = lambda m, x, y: attack(m, x, y, steps=3, generator=torch.Generator().manual_seed(0))
    x_adv = whole_step(model, x, y, seeded)
    # the twin: the attack is made in advance by a copy, so nothing stands between the forward passes
    state = copy.deepcopy(twin)
    state(x)
    given = seeded(state, x, y)
    assert torch.equal(given, x_adv)
    whole_step(twin, x, y, lambda *_: given)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=0, atol=0)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "s"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_attacks_leave_the_distributed_wrapper_alone(group):
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    plain, model = network(), nn.parallel.DistributedDataParallel(network())
    seeded = lambda m, x, y: double_pass(m, x, y, steps=2, generator=torch.Generator().manual_seed(0))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(whole_step(plain, x, y, seeded), whole_step(model, x, y, seeded))
    assert len(calls) == 2, "an attack must not call the wrapper, which talks to other processes"
    for p, q in zip(plain.parameters(), model.module.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_cost_does_not_wait_for_the_device():
    "No value is read inside `frozen`: on a GPU every such read stops the queue."
    model = create("wrn_10_1_cifar")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Ops():
        with frozen(model):
            pass
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & set(Ops.seen), Ops.seen
