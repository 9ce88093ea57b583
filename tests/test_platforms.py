"""What other platforms lack: a sync on handles opened for reading (Windows), float64 (Apple's graphics processors)."""
import sys
import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from jat_nb import generators
from jat_nb import warp as warping
from jat_nb.attacks import double_pass, ggsm, pgd
from jat_nb.evaluation import wilson_interval
from jat_nb.explain import cam_entropy, curvature, skewness
from jat_nb.flow_layers import InvertibleConv
from jat_nb.gan import Generator
from jat_nb.generators import Projected
from jat_nb.masking import local_linearity
from jat_nb.minimum_norm import at_threshold, distance, jsma, pointwise
from jat_nb.mixing import draw_share
from jat_nb.own_pictures import to_png
from jat_nb.pictures import similarity, ssim
from jat_nb.records import write_json
from jat_nb.risks import Risks
from jat_nb.spatial import displacement_frequency
from jat_nb.threats import Affine, Flow, Pixel
from jat_nb.unseen import gabor, jpeg
from jat_nb.warp import affine_flow, rigid_flow, warp
from jat_nb.weather import fog, snow


def test_files_are_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    plain = os.fsync

    def as_windows(fd):
        os.write(fd, b"")  # EBADF on a handle for reading, as FlushFileBuffers refuses it
        plain(fd)

    monkeypatch.setattr(os, "fsync", as_windows)
    assert write_json(tmp_path / "a.json", {"a": 1}).read_text() == '{\n "a": 1\n}\n'


class NoDoubles(TorchDispatchMode):
    "Fails as Apple's graphics processors do when a float64 tensor is made."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64 and out.ndim > 1:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out


def test_the_guard_bites():
    with NoDoubles(), pytest.raises(TypeError): torch.rand(2, 2).double()
    with NoDoubles(), pytest.raises(TypeError): warp(torch.rand(1, 1, 4, 4), torch.rand(1, 2, 4, 4))


def test_warps_work_without_doubles(monkeypatch):
    x, flow, turn = torch.rand(2, 1, 7, 6), torch.randn(2, 2, 7, 6), torch.tensor([30.0, -20.0])
    matrix = torch.eye(2, 3).repeat(2, 1, 1) + 0.1 * torch.randn(2, 2, 3)
    work = lambda: (warp(x, flow), affine_flow(matrix, 7, 6), rigid_flow(turn, turn / 10, turn / 20, 7, 6))
    exact = work()
    monkeypatch.setattr(warping, "_wide", lambda device: torch.float32)
    with NoDoubles(): found = work()
    for a, b in zip(exact, found): assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(warp(x, 0 * flow), x)


def test_attacks_work_without_doubles(monkeypatch):
    monkeypatch.setattr(warping, "_wide", lambda device: torch.float32)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(3, 1, 4, 4), torch.arange(3)
    with NoDoubles():
        for attack in (pgd, ggsm, double_pass):
            assert attack(model, x, y, steps=2).shape == x.shape
        assert Flow(eps_flow=torch.tensor([0.3, 0.2, 0.1])) and Pixel() and Affine()


def test_the_working_precision_follows_the_device():
    assert warping._wide(torch.device("mps")) == torch.float32
    assert warping._wide(torch.device("cpu")) == warping._wide(torch.device("cuda")) == torch.float64


class Apple(torch.Tensor):
    "A tensor of a device that knows no float64; `cpu` leaves the device."

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu: return out.as_subclass(torch.Tensor)
        if any(isinstance(v, Apple) and v.dtype == torch.float64 for v in (out if isinstance(out, tuple) else [out])):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out


@pytest.fixture
def apple(monkeypatch):
    "The device knows no float64: its working precision is single in every module that asks."
    single = lambda device: torch.float32
    plain = warping._wide
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "jat_nb"]
    for module in ours:
        for name in [name for name, value in vars(module).items() if value is plain]: monkeypatch.setattr(module, name, single)
    return lambda *tensors: [t.clone().as_subclass(Apple) for t in tensors]


def test_the_stand_in_bites(apple):
    x, = apple(torch.rand(2, 2))
    with pytest.raises(TypeError): x.double()
    assert (x + x).__class__ is Apple and x.cpu().double().dtype == torch.float64


def test_numbers_about_pictures_are_made_without_doubles(apple):
    a, b, flow = torch.rand(2, 1, 12, 12), torch.rand(2, 1, 12, 12), torch.randn(2, 2, 12, 12)
    x, x_adv = apple(a, b)
    assert_close(ssim(x, x_adv), ssim(a, b))
    assert_close(similarity(x, x_adv)["SSIM"].tolist(), similarity(a, b)["SSIM"].tolist())
    assert_close(displacement_frequency(*apple(flow)), displacement_frequency(flow))
    maps, others = apple(a[:, 0], b[:, 0])
    assert_close(skewness(maps, others), skewness(a[:, 0], b[:, 0]))
    assert_close(cam_entropy(maps), cam_entropy(a[:, 0]))
    assert_close(curvature(maps[0]), curvature(a[0, 0]))
    for norm in ("l2", "pixels", "share"):
        assert_close(distance(x, x_adv, norm).cpu(), distance(a, b, norm), check_dtype=False)
    norms = distance(a, b, "l2")
    assert_close(at_threshold(*apple(norms.float()), [0.0, 1.0]), at_threshold(norms, [0.0, 1.0]))
    wrong = torch.tensor([True, False, True])
    assert Risks(*apple(wrong, wrong, ~wrong)).means == Risks(wrong, wrong, ~wrong).means
    assert_close(wilson_interval(*apple(torch.tensor([1, 2])), 3)[0], wilson_interval(torch.tensor([1, 2]), 3)[0])


def test_flows_decode_without_doubles(apple):
    layer = InvertibleConv(4)
    h = torch.randn(2, 4, 3, 3)
    expected = layer.inverse(h)
    plain = layer._factors
    layer._factors = lambda: tuple(apple(*plain()))
    layer.permutation, = apple(layer.permutation)
    found = layer.inverse(*apple(h))
    assert found.dtype == torch.float32
    assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-6)
    with torch.device("meta"): assert InvertibleConv(4).permutation.device.type == "meta"


def test_codes_are_found_again_without_doubles(apple):
    generator, images, codes = Generator((3, 64, 64), width=2, code=8), torch.rand(6, 3, 64, 64), torch.randn(6, 8)
    known = Projected(generator, *apple(images), codes)
    assert known.marks.dtype == torch.float32
    assert_close(known.encode(*apple(images.flip(0)))[0], codes.flip(0))
    images[0, 0, 9, 9] += 1 / 255
    with pytest.raises(ValueError, match="1 of 1 images"): known.encode(*apple(images[:1]))


def test_known_codes_move_to_a_device_without_doubles_and_back(monkeypatch):
    images, codes = torch.rand(6, 3, 64, 64), torch.randn(6, 8)
    known, away = (Projected(Generator((3, 64, 64), width=2, code=8), images, codes) for _ in range(2))
    exact = known.marks.clone()
    assert exact.dtype == torch.float64 and torch.equal(known.to("cpu").marks, exact)
    monkeypatch.setattr(generators, "_wide", lambda device: torch.float32 if device.type == "meta" else torch.float64)
    assert (away.to("meta").marks.dtype, away.marks.device.type, away.codes.device.type) == (torch.float32, "meta", "meta")
    assert nn.Sequential(away).to("meta")[0].marks.dtype == torch.float32
    known.marks.data = exact.float()  # as they come back
    assert_close(known.encode(images.flip(0))[0], codes.flip(0))


def test_searches_and_ascents_work_without_doubles(apple):
    model, (x,), y = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), apple(torch.rand(3, 1, 8, 8)), torch.arange(3)
    for attack in (jpeg, pgd, double_pass, fog, snow, gabor):
        assert attack(model, x, y, steps=2).cpu().shape == x.shape
    assert jpeg(model, x, y, steps=1, norm="l1", eps_quanta=2.0).cpu().shape == x.shape
    assert (jsma(model, x, y, gamma=0.05).cpu() <= 1).all() and (pointwise(model, x, y, restarts=1).cpu() <= 1).all()
    assert local_linearity(model, x.as_subclass(torch.Tensor), y).dtype == torch.float64
    fixed, generator = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.Generator().manual_seed(0)
    with NoDoubles(): assert 0 <= draw_share(0.5, generator) <= 1
    assert to_png(fixed, *apple(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)), torch.arange(2))[0].dtype == torch.uint8
