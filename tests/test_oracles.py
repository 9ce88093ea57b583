"""Answers that owe nothing to our own code: SciPy, torchvision, closed forms, two attack libraries."""
import foolbox
import numpy as np
import pytest
import torch
import torchattacks
from scipy.ndimage import map_coordinates
from torch import nn
from torchvision.transforms import functional as TF

from jat_nb.attacks import double_pass, fgsm, ggsm, mi_fgsm, pgd
from jat_nb.losses import margin_loss
from jat_nb.models import create
from jat_nb.warp import affine_flow, random_disc, rigid_flow, warp


@pytest.mark.parametrize("padding, mode", [("border", "nearest"), ("zeros", "grid-constant"), ("reflection", "reflect")])
@pytest.mark.parametrize("size", [(28, 28), (33, 47), (1, 17), (64, 5)])
def test_warp_is_scipys_interpolation(padding, mode, size):
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    flow = random_disc((2, 2, *size), 2.5, torch.Generator().manual_seed(0), like=x)
    rows, columns = np.mgrid[:size[0], :size[1]]
    expected = np.stack([[map_coordinates(c, (rows + f[1].numpy(), columns + f[0].numpy()), order=1, mode=mode)
                          for c in image] for image, f in zip(x.numpy(), flow)])
    torch.testing.assert_close(warp(x, flow, padding=padding), torch.tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle, dx, dy", [(0, 0, 0), (30, 0, 0), (-17, 3, -2), (90, 0, 0), (5.5, 1.5, 2.25)])
def test_rigid_motion_is_torchvisions(angle, dx, dy):
    x = torch.rand(1, 3, 31, 45)
    flow = rigid_flow(torch.tensor([float(angle)]), torch.tensor([float(dx)]), torch.tensor([float(dy)]), 31, 45)
    ours = warp(x, flow, padding="zeros")
    theirs = TF.affine(x, float(angle), [dx, dy], 1.0, [0.0, 0.0], interpolation=TF.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_affine_flow_is_affine_grid():
    x = torch.rand(3, 2, 17, 29, dtype=torch.float64)
    matrix = torch.eye(2, 3).double() + 0.4 * torch.randn(3, 2, 3).double()
    grid = nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
    theirs = nn.functional.grid_sample(x, grid, align_corners=False)
    torch.testing.assert_close(warp(x, affine_flow(matrix, 17, 29), padding="zeros"), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (28, 5)])
def test_both_grid_conventions_give_our_warp(corners, size):
    h, w = size
    x = torch.rand(2, 3, h, w, dtype=torch.float64)
    flow = random_disc((2, 2, h, w), 2.5, torch.Generator().manual_seed(0), like=x)
    columns, rows = torch.arange(w) + flow[:, 0], torch.arange(h).view(-1, 1) + flow[:, 1]
    scale = (lambda at, n: 2 * at / (n - 1) - 1) if corners else (lambda at, n: (2 * at + 1) / n - 1)
    grid = torch.stack([scale(columns, w), scale(rows, h)], dim=3)
    theirs = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=corners)
    torch.testing.assert_close(warp(x, flow), theirs, rtol=0, atol=1e-12)


def linear(pixels: int, classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double().eval()


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_pixel_attacks_reach_the_linear_optimum(norm, dual):
    model, x, y = linear(48), torch.full((4, 3, 4, 4), 0.5).double(), torch.tensor([0, 1, 0, 1])
    w = model[1].weight[1] - model[1].weight[0]
    margin = lambda v: (model(v)[:, 1] - model(v)[:, 0]) * (2 * y - 1)
    hit = pgd(model, x, y, eps=0.2, step=0.5, steps=40, norm=norm, loss=margin_loss)
    torch.testing.assert_close(margin(hit), margin(x) - 0.2 * w.norm(p=dual), rtol=0, atol=1e-8)


def test_clamped_linear_optimum_is_found_exactly():
    model, x = linear(48), torch.rand(6, 3, 4, 4).double()
    y = torch.arange(6) % 2
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(3, 4, 4)
    best = torch.where((w > 0) == (y == 0).view(-1, 1, 1, 1), (x + 0.3).clamp(max=1), (x - 0.3).clamp(min=0))
    for hit in (fgsm(model, x, y, eps=0.3), pgd(model, x, y, eps=0.3, step=0.05, steps=20),
                mi_fgsm(model, x, y, eps=0.3, step=0.05, steps=20)):
        torch.testing.assert_close(hit, best, rtol=0, atol=1e-12)


def test_small_flows_follow_the_first_order_prediction():
    model, y = linear(144), torch.tensor([1])
    x = torch.rand(1, 1, 12, 12).double()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    flow = (0.5 + torch.zeros(1, 2, 12, 12).double()).requires_grad_()  # away from the kinks at whole pixels
    slope, = torch.autograd.grad((warp(x, flow).flatten() * w).sum(), flow)
    start = warp(x, flow.detach())
    eps = 1e-3
    base = (model(start)[:, 1] - model(start)[:, 0]).item()
    moved = warp(x, flow.detach() - eps * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-30))
    drop = base - (model(moved)[:, 1] - model(moved)[:, 0]).item()
    assert abs(drop - eps * slope.norm(dim=1).sum().item()) < 1e-2 * drop
    found = ggsm(model, x, y, eps=eps, step=eps, steps=10, loss=margin_loss, keep_best=True, return_info=True)
    assert found.loss.item() > margin_loss(model(x), y).item()


def test_flow_and_joint_optimum_on_a_ramp():
    model, y = linear(400), torch.tensor([1])
    with torch.no_grad():
        inner = torch.zeros(20, 20, dtype=torch.bool)
        inner[3:-3, 3:-3] = True
        model[1].weight.view(2, 20, 20)[:, ~inner] = 0
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    rows, columns = torch.meshgrid(*2 * [torch.arange(20).double()], indexing="ij")
    ramp = (0.2 + 0.012 * columns + 0.016 * rows)[None, None]  # slope 0.02 per pixel
    margin = lambda v: (model(v)[:, 1] - model(v)[:, 0]).item()
    only = margin(ggsm(model, ramp, y, eps=1.3, step=2.6, steps=30, loss=margin_loss))
    both = margin(double_pass(model, ramp, y, eps_flow=1.3, step_flow=2.6, eps_pixel=0.03, step_pixel=0.01, steps=30,
                              loss=margin_loss))
    assert abs(only - (margin(ramp) - 1.3 * 0.02 * w.abs().sum().item())) < 1e-9
    assert abs(both - (margin(ramp) - (1.3 * 0.02 + 0.03) * w.abs().sum().item())) < 1e-9


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = create("wrn_10_1_cifar").double().eval()
    return model, torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.arange(8)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_pgd_is_that_of_two_libraries_step_by_step(network, steps):
    model, x, y = network
    ours = pgd(model, x, y, eps=8 / 255, step=2 / 255, steps=steps, random_start=False)
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)(x, y)
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-9)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=2 / 255, steps=steps, random_start=False)
    third, _, _ = attack(wrapped, x, y, epsilons=8 / 255)
    torch.testing.assert_close(ours, third, rtol=0, atol=1e-9)


def test_fgsm_is_that_of_two_libraries(network):
    model, x, y = network
    ours = fgsm(model, x, y, eps=8 / 255)
    torch.testing.assert_close(ours, torchattacks.FGSM(model, eps=8 / 255)(x, y).double(), rtol=0, atol=1e-9)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    third, _, _ = foolbox.attacks.LinfFastGradientAttack(random_start=False)(wrapped, x, y, epsilons=8 / 255)
    torch.testing.assert_close(ours, third, rtol=0, atol=1e-9)


def test_mi_fgsm_is_a_loop_with_a_momentum_of_its_own_for_every_image():
    "Dong et al. 2018, Eq. 6 and 7 written out; images whose slopes differ a millionfold do not share a norm."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()
    x, y = torch.rand(4, 3, 4, 4).double(), torch.tensor([0, 1, 2, 0])
    height = torch.tensor([1.0, 1e-6, 1.0, 1e6]).double()
    loss = lambda logits, y: nn.functional.cross_entropy(logits, y, reduction="none") * height[:len(y)]
    moved, gathered = x.clone(), torch.zeros_like(x)
    for _ in range(5):
        moved.requires_grad_()
        slope, = torch.autograd.grad(loss(model(moved), y).sum(), moved)
        gathered = 0.7 * gathered + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True)
        moved = (moved.detach() + 0.03 * gathered.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    found = mi_fgsm(model, x, y, eps=0.1, step=0.03, steps=5, momentum=0.7, loss=loss)
    torch.testing.assert_close(found, moved, rtol=0, atol=1e-12)
    plain = pgd(model, x, y, eps=0.1, step=0.03, steps=5, random_start=False, loss=loss)
    torch.testing.assert_close(mi_fgsm(model, x, y, eps=0.1, step=0.03, steps=5, momentum=0.0, loss=loss), plain)
    assert not torch.equal(found, plain)
