"""Pictures draw the arrays they are given: colours, orientation, errors, and no state left behind."""
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from jat_nb import pictures as pic
from jat_nb.pictures import similarity, ssim


def drawn(ax):
    return torch.tensor(np.asarray(ax.images[0].get_array()))


@given(angle=st.floats(0, 1, exclude_max=True), length=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_wheel_agrees_with_matplotlib(angle, length):
    w = length * torch.tensor([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)]).view(1, 2, 1, 1)
    expected = torch.tensor(hsv_to_rgb([angle, min(length, 1), 1]))
    assert_close(pic.flow_to_rgb(w, 1.0).flatten(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_flow_colours_keep_dtype_and_range(dtype):
    flow = torch.randn(3, 2, 5, 7, dtype=dtype)
    rgb = pic.flow_to_rgb(flow, 10.0)
    assert rgb.dtype == dtype and rgb.shape == (3, 3, 5, 7) and rgb.min() >= 0 and rgb.max() <= 1
    assert (pic.flow_to_rgb(0 * flow, 0.0) == 1).all()


def test_opposite_displacements_are_complementary():
    flow = torch.nn.functional.normalize(torch.randn(1, 2, 9, 9), dim=1)
    assert_close(pic.flow_to_rgb(flow, 1.0) + pic.flow_to_rgb(-flow, 1.0), torch.ones(1, 3, 9, 9))


@pytest.mark.parametrize("flow, eps, message", [
    (torch.zeros(2, 4, 4), 1.0, "shape"), (torch.zeros(1, 3, 4, 4), 1.0, "shape"),
    (torch.full((1, 2, 4, 4), 1.0), 1.0, "beyond eps_flow"), (torch.full((1, 2, 4, 4), np.nan), 1.0, "beyond eps_flow")])
def test_flow_colours_refuse(flow, eps, message):
    with pytest.raises(ValueError, match=message):
        pic.flow_to_rgb(flow, eps)


@pytest.mark.parametrize("channels", [1, 3])
def test_show_images_draws_the_values(channels):
    x = torch.rand(7, channels, 6, 9)
    fig = pic.show_images(x, [str(i) for i in range(7)], columns=3, suptitle="all")
    assert len(fig.axes) == 9 and [ax.get_title() for ax in fig.axes[:7]] == [str(i) for i in range(7)]
    expected = x[4].permute(1, 2, 0).squeeze(-1)
    assert_close(drawn(fig.axes[4]), expected)
    assert fig.axes[4].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("x, message", [
    (torch.rand(3, 4, 4), "one image is"), (torch.rand(2, 2, 4, 4), "1 or 3"), (torch.rand(1, 1, 4, 4) + 1, "undo any"),
    (torch.full((1, 1, 2, 2), np.nan), "undo any"), (torch.zeros(65, 1, 2, 2), "got 65"), (torch.zeros(0, 1, 2, 2), "got 0")])
def test_show_images_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        pic.show_images(x)


def test_difference_is_odd_and_saturates():
    a, b = torch.rand(2, 2, 3, 4, 4)
    assert_close(pic.signed_difference(a, b, 40) + pic.signed_difference(b, a, 40), torch.ones_like(a))
    assert pic.signed_difference(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).item() == 1
    with pytest.raises(ValueError, match="one shape"):
        pic.signed_difference(a, b[:, :1])


def test_arrows_point_down_for_downward_displacements():
    fig = pic.show_images(torch.zeros(1, 1, 32, 32))
    flow = torch.zeros(2, 32, 32)
    flow[1] = 0.3
    arrows = pic.quiver(fig.axes[0], flow, stride=4)
    assert fig.axes[0].yaxis_inverted() and len(arrows.U) == 64
    assert (arrows.U == 0).all() and (arrows.V > 0).all()
    np.testing.assert_allclose(arrows.V.max() / arrows.scale, 4, rtol=1e-5)


def test_zero_flow_has_arrows_of_length_zero():
    fig = pic.show_attack(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), torch.zeros(1, 2, 8, 8))
    assert_close(drawn(fig.axes[6]), torch.ones(8, 8, 3))
    assert len(fig._repr_png_()) > 1000


def test_show_attack_rows():
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    fig = pic.show_attack(x, (x + 0.02).clamp(0, 1), 0.2 * torch.ones(2, 2, 8, 8), eps_flow=0.3, titles=["a", "b"])
    assert len(fig.axes) == 12 and [fig.axes[i].get_ylabel() for i in (0, 3, 6, 9)] == [
        "original", "attacked", "difference × 10", "flow"]
    assert_close(drawn(fig.axes[1]), x[1].permute(1, 2, 0).detach())
    with pytest.raises(ValueError, match="titles"):
        pic.show_attack(x, x, titles=["one"])
    with pytest.raises(ValueError, match="expected a flow"):
        pic.show_attack(x, x, torch.zeros(1, 2, 8, 8))


def test_strip_colours_wrong_answers():
    fig = pic.budget_strip(torch.rand(3, 1, 8, 8), [0, 0.1, 0.3], ["cat", "cat", "dog"], "cat")
    assert [ax.xaxis.label.get_color() == pic.PALETTE["red"] for ax in fig.axes] == [False, False, True]
    assert fig.axes[2].get_title() == "0.3 px"


def test_curves_and_their_bands():
    a = torch.tensor([0.9, 0.5])
    fig = pic.plot_curves([0, 1], {"m": a}, intervals={"m": (a - 0.1, a + 0.1)}, xlabel="px", trained_at=0.3)
    ax = fig.axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [90, 50], rtol=1e-5)
    assert ax.get_xlabel() == "px" and len(ax.collections) == 1 and len(ax.lines) == 2
    _, own = plt.subplots()
    assert pic.plot_curves([0, 1], {"m": a}, ax=own) is own.figure
    plt.close(own.figure)
    with pytest.raises(ValueError, match="divide percent"):
        pic.plot_curves([0, 1], {"m": 100 * a})
    with pytest.raises(ValueError, match="at most 6"):
        pic.plot_curves([0, 1], {str(i): a for i in range(7)})


def test_pyplot_is_left_alone():
    before = plt.get_fignums()
    pic.show_images(torch.rand(1, 1, 4, 4))
    pic.show_attack(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4))
    assert plt.get_fignums() == before


# -- similarity

def naive_ssim(a, b, size=11, sigma=1.5):
    "Window by window, channel by channel, as in the paper."
    r = np.arange(size) - size // 2
    window = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / (2 * sigma**2))
    window /= window.sum()
    values = []
    for u, v in zip(a, b):
        for i in range(u.shape[0] - size + 1):
            for j in range(u.shape[1] - size + 1):
                p, q = u[i:i + size, j:j + size], v[i:i + size, j:j + size]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("shape, size", [((3, 14, 17), 11), ((1, 11, 11), 11), ((1, 8, 8), 7), ((2, 3, 20), 3)])
def test_ssim_against_a_naive_loop(shape, size):
    x = torch.rand(2, *shape)
    noisy = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    expected = [naive_ssim(a, b, size) for a, b in zip(x.double().numpy(), noisy.double().numpy())]
    assert_close(ssim(x, noisy), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_ssim_against_scipy():
    x = torch.rand(1, 1, 32, 32)
    y = (0.7 * x + 0.1 + 0.1 * torch.rand_like(x)).clamp(0, 1)
    a, b = (v[0, 0].double().numpy() for v in (x, y))
    blur = lambda v: gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    expected = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-12)


def test_ssim_laws():
    x, y = torch.rand(3, 3, 20, 13), torch.rand(3, 3, 20, 13)
    assert torch.equal(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert_close(ssim(x, y), ssim(y, x))
    assert (ssim(x, y) < 1).all() and (ssim(x, y) > -1).all()
    flat = torch.full((1, 1, 16, 16), 0.5)
    assert_close(ssim(flat, flat * 0 + 0.25), torch.tensor([(2 * 0.125 + 1e-4) / (0.3125 + 1e-4)], dtype=torch.float64))
    with pytest.raises(ValueError, match="images of one shape"):
        ssim(x, y[:2])
    with pytest.raises(ValueError, match="divide bytes"):
        ssim(x, 255 * y)


def test_similarity():
    x = torch.rand(2, 1, 12, 12) * 0.5
    found = similarity(x, x + torch.tensor([0.0, 0.25]).view(2, 1, 1, 1))
    assert found["SSIM"][0] == 1 and found["SSIM"][1] < 1
    assert found["linf"].tolist() == pytest.approx([0, 0.25], abs=1e-6)


def test_bytes_are_no_images():
    x = torch.rand(2, 1, 12, 12)
    for wrong in ((x * 255).byte(), x - 0.5, x.masked_fill(x > 0.9, torch.nan)):
        with pytest.raises(ValueError, match="divide bytes"):
            similarity(x, wrong)
    assert len(similarity(x[:0], x[:0])) == 0
