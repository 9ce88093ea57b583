"Saliency, skewness and landscapes against closed forms."
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.explain import curvature, directions, grain, landscape, saliency, skewness, smooth_grad
from jat_nb.losses import cross_entropy
from jat_nb.threats import Flow, Pixel


def linear(channels=2, side=5, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def images(n=4, channels=2, side=5):
    torch.manual_seed(1)
    return torch.rand(n, channels, side, side), torch.arange(n) % 3


@pytest.mark.parametrize("n, batch_size", [(1, 1), (5, 3), (9, 1000)])
def test_a_linear_model_gives_its_weight(n, batch_size):
    model, (x, y) = linear(), images()
    found = smooth_grad(model, x, y, n=n, sigma=0.3, batch_size=batch_size)
    assert_close(found, model[1].weight[y].view_as(x).detach())


def test_the_noise_has_the_size_of_each_images_range():
    class Square(nn.Module):
        def forward(self, x): return x.flatten(1).square().sum(1, keepdim=True).repeat(1, 2) / 2
    x = torch.stack([torch.full((1, 4, 4), 0.5), torch.linspace(0.2, 0.8, 16).view(1, 4, 4)])
    g = torch.Generator().manual_seed(0)
    noise = torch.stack([smooth_grad(Square(), x, torch.tensor([0, 0]), n=1, sigma=0.5, generator=g) - x for _ in range(300)])
    assert noise[:, 0].abs().max() == 0  # a constant image has no range
    assert abs(float(noise[:, 1].std()) / (0.5 * 0.6) - 1) < 0.05


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), linear()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    smooth_grad(model, *images(), n=3)
    landscape(model, *images(), [Pixel(0.1)], [torch.full((4, 2, 5, 5), 0.1)], points=3)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_maps_are_distributions_and_skewness_is_odd():
    torch.manual_seed(2)
    a, b = (saliency(torch.randn(6, 3, 7, 4)) for _ in range(2))
    assert_close(a.sum(dim=(1, 2)), torch.ones(6))
    assert_close(skewness(a, b), -skewness(b, a))
    assert skewness(a, a).abs().max() == 0
    assert (grain(torch.rand(6, 8, 8)) <= 1).all() and grain(torch.ones(1, 8, 8)) == 0


def test_a_landscape_is_the_loss_on_its_plane():
    model, (x, y) = linear(), images()
    torch.manual_seed(3)
    p = [0.05 * torch.randn(4, 2, 5, 5), 0.3 * torch.randn(4, 2, 5, 5)]
    threats = [Pixel(1.0), Flow(2.0)]
    surface = landscape(model, x, y, threats, p, points=5, generator=torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    first, second = directions(p, g), directions(p, g)
    for i, a in ((0, -1.0), (2, 0.0), (4, 1.0)):
        moved = [q + a * d + 0.5 * e for q, d, e in zip(p, first, second)]
        x_adv = threats[1].apply(threats[0].apply(x, moved[0]), moved[1])
        assert_close(surface[i, 3], cross_entropy(model(x_adv), y).mean().detach())


def test_curvature_of_a_quadratic():
    u = torch.linspace(-1, 1, 7, dtype=torch.float64)
    a, b = torch.meshgrid(u, u, indexing="ij")
    surface = 3 + a - 2 * b + 0.5 * (-2 * a * a + 2 * a * b - 3 * b * b)
    wanted = torch.linalg.eigvalsh(torch.tensor([[-2.0, 1.0], [1.0, -3.0]], dtype=torch.float64))
    assert_close(curvature(surface), wanted)


@pytest.mark.parametrize("call, message", [
    (lambda x, y: smooth_grad(linear(), x, y, n=0), "n >= 1"), (lambda x, y: smooth_grad(linear(), x, y, sigma=-1), "sigma >= 0"),
    (lambda x, y: smooth_grad(linear(), 255 * x, y), "divide bytes"), (lambda x, y: skewness(x[:, 0], x[:2, 0]), "same images"),
    (lambda x, y: landscape(linear(), x, y, [Pixel(0.1)], [torch.zeros_like(x)]), "not all zero")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call(*images())
