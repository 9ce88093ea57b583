"Saliency, skewness and landscapes against closed forms."
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.explain import (cam_entropy, curvature, decision_value, difference_map, directions, gallery, grad_cam, grain, landscape,
                            local_maxima, overlay, plane,
                            saliency, signed_plane, skewness, smooth_grad, surfaces, to_grey)
from jat_nb.losses import correct, cross_entropy
from jat_nb.randomness import image_generators
from jat_nb.threats import Affine, Flow, Pixel


def linear(channels=2, side=5, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def curved(side=5):
    "A small network whose gradient depends on the image."
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * side * side, 20), nn.Tanh(), nn.Linear(20, 3))


def gradient(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)[0]


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


@pytest.mark.parametrize("n, batch_size", [(1, 1), (4, 7), (2, 100)])
def test_without_noise_it_is_the_gradient(n, batch_size):
    model, (x, y) = curved(), images()
    assert_close(smooth_grad(model, x, y, n=n, sigma=0.0, batch_size=batch_size), gradient(model, x, y))


def test_the_variance_falls_like_one_over_n():
    model, (x, y) = curved(), images(2)
    draws = lambda n: torch.stack([smooth_grad(model, x, y, n=n, sigma=0.5, generator=torch.Generator().manual_seed(s))
                                   for s in range(400)])
    one, sixteen = draws(1).var(0).mean(), draws(16).var(0).mean()
    assert abs(float(one / sixteen) / 16 - 1) < 0.15


def test_the_average_goes_to_the_mean_gradient_of_the_cloud():
    "In closed form: the gradient of a sum of cubes, averaged over a normal cloud."
    class Cubic(nn.Module):
        def forward(self, x): return x.flatten(1).pow(3).sum(1, keepdim=True).repeat(1, 2)
    x, y = images(2, channels=1)
    y, sigma = y % 2, 0.3 * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    found = smooth_grad(Cubic(), x, y, n=6000, sigma=0.3, generator=torch.Generator().manual_seed(0))
    assert_close(found, 3 * (x.square() + sigma.square()), atol=0.05, rtol=0.02)  # E 3 (x + q)^2


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_an_images_map_and_surface_do_not_depend_on_the_batch(batch_size):
    model, (x, y) = curved(), images()
    own = lambda rows: image_generators(5, rows)
    whole = smooth_grad(model, x, y, n=5, generator=own(range(4)), batch_size=batch_size)
    alone = smooth_grad(model, x[2:3], y[2:3], n=5, generator=own([2]))
    assert_close(alone[0], whole[2])
    params = [Affine(0.3).init(x, True, own(range(4)))]
    both = surfaces(model, x, y, [Affine(0.3)], params, points=3, generator=own(range(4)))
    one = surfaces(model, x[2:3], y[2:3], [Affine(0.3)], [params[0][2:3]], points=3, generator=own([2]))
    assert_close(one[0], both[2])


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), linear()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    smooth_grad(model, *images(), n=3)
    landscape(model, *images(), [Pixel(0.1)], [torch.full((4, 2, 5, 5), 0.1)], points=3)
    with pytest.raises(ValueError, match="expected labels"): smooth_grad(model, images()[0], torch.full((4,), 9))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_maps_are_distributions_and_skewness_is_odd():
    torch.manual_seed(2)
    a, b = (saliency(torch.randn(6, 3, 7, 4)) for _ in range(2))
    assert_close(a.sum(dim=(1, 2)), torch.ones(6))
    assert_close(skewness(a, b), -skewness(b, a))
    assert skewness(a, a).abs().max() == 0
    assert (grain(torch.rand(6, 8, 8)) <= 1).all() and grain(torch.ones(1, 8, 8)) == 0


@pytest.mark.parametrize("side", [3, 8, 28])
def test_a_spike_is_sparser_than_a_plain(side):
    spike, plain = torch.zeros(1, side, side), torch.full((1, side, side), side**-2.0)
    spike[0, 1, 1] = 1
    p = side**-2.0
    wanted = torch.tensor([(1 - 2 * p) / (p * (1 - p)) ** 0.5], dtype=torch.float64)  # of a coin with chance p
    assert_close(skewness(spike, plain), wanted, rtol=1e-5, atol=1e-6)
    assert_close(skewness(plain, spike), -wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2, 5, 5), (4, 7)])
def test_directions_have_the_length_of_their_block(shape):
    torch.manual_seed(6)
    blocks = [torch.randn(shape), 0.01 * torch.randn(4, 2, 3)]
    first, second = (directions(blocks, torch.Generator().manual_seed(s)) for s in (0, 1))
    for p, a, b in zip(blocks, first, second):
        assert a.shape == p.shape and not torch.allclose(a, b)
        assert_close(a.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))


def test_surfaces_average_to_the_landscape_and_meet_the_attack_in_the_middle():
    model, (x, y) = curved(), images()
    p = [0.3 * torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))]
    each = surfaces(model, x, y, [Flow(2.0)], p, points=5, generator=torch.Generator().manual_seed(1))
    mean = landscape(model, x, y, [Flow(2.0)], p, points=5, generator=torch.Generator().manual_seed(1))
    assert each.shape == (4, 5, 5)
    assert_close(each.mean(0), mean)
    assert_close(each[:, 2, 2], cross_entropy(model(Flow(2.0).apply(x, p[0])), y).detach())


@pytest.mark.parametrize("waves", [1, 2, 4])
def test_peaks_are_counted(waves):
    u = torch.linspace(0, waves, 20 * waves + 1)
    bumps = -(2 * torch.pi * u[:, None]).cos() - (2 * torch.pi * u[None]).cos()
    assert int(local_maxima(bumps).sum()) == waves**2
    assert local_maxima(torch.stack([bumps, -bumps])).sum(dim=(1, 2)).tolist() == [waves**2, (waves - 1) ** 2]


def test_slopes_ridges_and_plateaus_have_no_peak():
    u = torch.linspace(-1, 1, 9)
    for surface in (u[:, None] + u[None], -u[:, None].square().expand(9, 9), torch.zeros(9, 9)):
        assert not local_maxima(surface).any()
    spike = torch.zeros(5, 5)
    spike[0, 2] = spike[3, 3] = 1
    assert local_maxima(spike).nonzero().tolist() == [[3, 3]]  # the one on the rim cannot be judged


def test_maps_for_the_eye():
    torch.manual_seed(2)
    a, b = (saliency(torch.randn(3, 2, 20, 20)) for _ in range(2))
    grey = to_grey(a)
    assert grey.shape == (3, 1, 20, 20) and grey.min() >= 0 and (grey == 1).flatten(1).sum(1).tolist() == [4, 4, 4]
    assert_close(to_grey(5 * a), grey)
    colours = difference_map(a, b)
    assert ((colours[:, 0] > colours[:, 2]) == (a > b)).all()  # red where the first map is larger
    assert_close(difference_map(a, a), torch.ones(3, 3, 20, 20))
    figure = gallery({"image": torch.rand(3, 3, 20, 20), "one": a, "difference": colours})
    assert len(figure.axes) == 9 and [ax.get_ylabel() for ax in figure.axes[::3]] == ["image", "one", "difference"]


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
    (lambda x, y: landscape(linear(), x, y, [Pixel(0.1)], [torch.zeros_like(x)]), "not all zero"),
    (lambda x, y: landscape(linear(), x, y, [Pixel(0.1)], [x * (y == 0).view(-1, 1, 1, 1)]), "not all zero"),
    (lambda x, y: surfaces(linear(), x, y, [Pixel(0.1)], [x], points=4), "odd number of points"),
    (lambda x, y: local_maxima(x[:, 0, :2]), "at least 3 points"),
    (lambda x, y: gallery({"a": x[:, 0], "b": x[:1, 0]}), "the same images")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call(*images())


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_decision_value_by_hand_and_in_range(classes):
    torch.manual_seed(classes)
    logits, y = 3 * torch.randn(50, classes), torch.randint(classes, (50,))
    found = decision_value(logits, y)
    for row, label, value in zip(logits.softmax(1).tolist(), y.tolist(), found.tolist()):
        assert abs(row[label] - max(row[:label] + row[label + 1:]) - value) < 1e-6
    assert found.abs().max() <= 1 and torch.equal(found > 0, correct(logits, y))


def test_a_plane_is_what_the_network_says_point_by_point():
    model, (x, y) = curved(), images()
    def move(x, a, b): return (x + a).clamp(0, 1) * (1 - b)
    across, up = [-0.2, 0.0, 0.1], [0.0, 0.5]
    found = plane(model, x, y, move, across, up, measure=cross_entropy)
    assert found.shape == (4, 2, 3) and not found.requires_grad
    for i, b in enumerate(up):
        for j, a in enumerate(across):
            assert_close(found[:, i, j], cross_entropy(model(move(x, a, b)), y).detach())


def test_signed_plane_goes_uphill_one_way_and_leaves_the_model_alone():
    model, (x, y) = linear(), images()
    x = 0.3 + 0.4 * x
    move = signed_plane(model, x, y, image_generators(0, range(4)))
    assert_close(move(x, 0.0, 0.0), x)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    losses = [cross_entropy(model(move(x, a, 0.0)), y) for a in (-0.1, 0.0, 0.1)]
    assert (losses[0] < losses[1]).all() and (losses[1] < losses[2]).all()
    assert_close((move(x, 0.0, 0.1) - x).abs(), torch.full_like(x, 0.1))
    alone = signed_plane(model, x[2:3], y[2:3], image_generators(0, [2]))
    assert_close(alone(x[2:3], 0.05, 0.05), move(x, 0.05, 0.05)[2:3])


# Grad-CAM

def convolutional(channels=2, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1),
                         nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)).eval()


def by_formula(model, x, y):
    "Weights from the head: behind the mean over h x w places each place has the head's weight over hw."
    maps = model[:6](x)
    weights = model[8].weight[y] / maps[0, 0].numel()
    rough = (weights[..., None, None] * maps).sum(1).relu()
    fine = nn.functional.interpolate(rough[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return fine.detach()


@pytest.mark.parametrize("side", [(8, 8), (12, 10)])
def test_grad_cam_is_its_formula(side):
    torch.manual_seed(1)
    model, x, y = convolutional(), torch.rand(5, 2, *side), torch.arange(5) % 3
    found, expected = grad_cam(model, x, y, batch_size=2), by_formula(model, x, y)
    assert found.shape == (5, *side) and (found >= 0).all()
    top = expected.amax((1, 2))
    assert_close(found, expected / top.where(top > 0, 1)[:, None, None], rtol=1e-4, atol=1e-6)
    assert_close(found.amax((1, 2)), (top > 0).float())
    assert_close(grad_cam(model, x[3:4], y[3:4])[0], found[3], rtol=1e-4, atol=1e-6)
    assert_close(grad_cam(model, x, y, layer="5"), found)
    assert grad_cam(model, x, y, layer="2").shape == found.shape


def test_grad_cam_leaves_the_model_alone():
    model, x, y = convolutional().train(), torch.rand(4, 2, 8, 8), torch.zeros(4, dtype=torch.int64)
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    grad_cam(model, x, y)
    with pytest.raises(ValueError, match="no layer 'head': choose one of 0, 1"): grad_cam(model, x, y, layer="head")
    with pytest.raises(ValueError, match="needs a layer"): grad_cam(linear(side=8), x, y)
    with pytest.raises(ValueError, match="needs a layer"): grad_cam(model, x, y, layer="6")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and model.training
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters())) and not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_grad_cam_is_that_of_the_library():
    library = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    torch.manual_seed(1)
    model, x, y = convolutional(), torch.rand(6, 2, 8, 8), torch.arange(6) % 3
    theirs = library.GradCAM(model=model, target_layers=[model[5]])(input_tensor=x, targets=[ClassifierOutputTarget(c) for c in y.tolist()])
    found = grad_cam(model, x, y)
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    assert (high[:, 0, 0] > 0).any()
    moved = (found - low) / (high - low).clamp(min=1e-12)  # the library moves the least value of each map to 0
    assert_close(torch.from_numpy(theirs), moved, rtol=1e-3, atol=1e-3)



def test_entropy_of_maps():
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(20, 6, 7, generator=g)
    found, most = cam_entropy(maps), torch.tensor(42.0).double().log()
    assert (found < most).all() and (found > 0).all()
    assert_close(cam_entropy(torch.full((1, 6, 7), 0.2)), most[None])
    assert_close(cam_entropy(3 * maps), found)
    from scipy.stats import entropy
    assert_close(found, torch.from_numpy(entropy(maps.double().flatten(1).numpy(), axis=1)), rtol=1e-6, atol=1e-6)
    dot = torch.zeros(2, 6, 7)
    dot[0, 2, 3] = 5.0
    assert_close(cam_entropy(dot), torch.stack([0 * most, most]))
    with pytest.raises(ValueError, match="not negative"): cam_entropy(maps - 1)
    with pytest.raises(ValueError, match="B, H, W"): cam_entropy(maps[0])


def test_overlays_and_their_grid():
    x, maps = torch.rand(3, 1, 5, 5), torch.rand(3, 5, 5)
    assert overlay(x, maps).shape == (3, 3, 5, 5) and overlay(x, maps).min() >= 0 and overlay(x, maps).max() <= 1
    assert_close(overlay(x, maps, 0.0), x.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="maps of the images"): overlay(x, maps[:2])
    fig = gallery({"AT": overlay(x, maps), "JSA": overlay(x, maps)}, columns=["clean", "PGD", "elastic"])
    assert [ax.get_title() for ax in fig.axes[:6]] == ["clean", "PGD", "elastic", "", "", ""]
    assert [fig.axes[i].get_ylabel() for i in (0, 3)] == ["AT", "JSA"]
    with pytest.raises(ValueError, match="same images"): gallery({"AT": x}, columns=["clean"])
