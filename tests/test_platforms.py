"""What other platforms lack: a sync on handles opened for reading (Windows), float64 (Apple's graphics processors)."""
import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from jat_nb import warp as warping
from jat_nb.attacks import double_pass, ggsm, pgd
from jat_nb.records import write_json
from jat_nb.threats import Affine, Flow, Pixel
from jat_nb.warp import affine_flow, rigid_flow, warp


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
