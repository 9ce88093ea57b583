"Glow against automatic differentiation, torch.distributions, NumPy and normflows."
import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import AffineTransform, Independent, Normal
from torch.testing import assert_close

from jat_nb.flow_layers import ActNorm, AffineCoupling, InvertibleConv, Split, Squeeze
from jat_nb.glow import Glow, dequantise, round_trip_error
from jat_nb.models import frozen
from jat_nb.randomness import image_generators
from jat_nb.weights import read_tensors, write_tensors


def shaken(module, by=0.1):
    "The same module with every parameter moved, so that no layer is at its simple start."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += by * torch.randn(p.shape, generator=g).to(p)
    return module


def small(shape=(3, 8, 8), levels=2, steps=2, width=8, by=0.1):
    torch.manual_seed(0)
    return shaken(Glow(shape, levels=levels, steps=steps, width=width), by).eval()


def images(n=2, shape=(3, 8, 8), dtype=torch.float32):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def values(latents):
    return torch.cat([z.flatten(1) for z in latents], dim=1)


@pytest.fixture(scope="module")
def trained():
    "A small flow after a few steps on smooth grey images with a black ground, and those images."
    torch.manual_seed(0)
    coarse = (torch.rand(64, 1, 4, 4) - 0.6).clamp(min=0) * 2.5
    x = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").clamp(0, 1)
    flow, g = Glow((1, 16, 16), levels=2, steps=2, width=16), torch.Generator().manual_seed(0)
    flow.initialise(x, g)
    optimiser, losses = torch.optim.Adam(flow.parameters(), lr=2e-3), []
    for _ in range(50):
        loss = flow.bits_per_dim(x, g).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100.0)
        optimiser.step()
        losses.append(loss.item())
    return flow.eval().requires_grad_(False), x, losses


# layers

def test_squeeze_order_and_inverse():
    h = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    out, logdet = Squeeze()(h)
    for c in range(3):
        for a in (0, 1):
            for b in (0, 1):
                assert torch.equal(out[:, 4 * c + 2 * a + b], h[:, c, a::2, b::2])
    assert torch.equal(Squeeze().inverse(out), h) and torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize("sides", [(3, 4), (4, 5)])
def test_odd_sides_cannot_be_squeezed(sides):
    with pytest.raises(ValueError, match="even number"):
        Squeeze()(torch.zeros(1, 1, *sides))


@pytest.mark.parametrize("make", [lambda: ActNorm(6), lambda: InvertibleConv(6), lambda: AffineCoupling(6, 8)])
def test_layers_undo_and_know_their_determinant(make):
    torch.manual_seed(0)
    layer, h = shaken(make(), 0.3).double(), torch.randn(2, 6, 3, 2, dtype=torch.float64)
    out, logdet = layer(h)
    assert_close(layer.inverse(out), h, rtol=0, atol=1e-10)
    assert_close(layer(layer.inverse(h))[0], h, rtol=0, atol=1e-9)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0], h[i:i + 1]).view(36, 36)
        back = torch.autograd.functional.jacobian(layer.inverse, out[i:i + 1].detach()).view(36, 36)
        assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[i], rtol=0, atol=1e-8)
        assert_close(torch.linalg.slogdet(back).logabsdet, -logdet[i], rtol=0, atol=1e-8)


def test_actnorm_starts_at_mean_0_and_deviation_1():
    norm, h = ActNorm(3), 5 + 0.2 * torch.randn(32, 3, 6, 6)
    norm.initialise(h)
    out, _ = norm(h)
    assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(out.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_actnorm_is_torchs_affine_transform():
    norm, h = shaken(ActNorm(3), 0.5), torch.randn(2, 3, 4, 4)
    scale = norm.log_scale.exp()
    peer = AffineTransform(norm.bias * scale, scale)
    out, logdet = norm(h)
    assert_close(out, peer(h))
    assert_close(logdet, peer.log_abs_det_jacobian(h, out).expand(2, 3, 4, 4).sum(dim=(1, 2, 3)))


def test_actnorm_starts_once_and_never_in_eval_mode():
    norm, h = ActNorm(2), torch.randn(8, 2, 4, 4)
    with pytest.raises(ValueError, match="train mode"):
        norm.eval().initialise(h)
    norm.train().initialise(h)
    before = copy.deepcopy(norm.state_dict())
    norm.initialise(3 * h + 1)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_actnorm_of_a_constant_channel_has_a_floor():
    norm = ActNorm(1)
    norm.initialise(torch.full((4, 1, 4, 4), 0.25))
    assert_close(norm.log_scale.exp().item(), 1000.0, rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [2, 12, 96])
def test_mixing_starts_as_a_rotation(channels):
    conv, h = InvertibleConv(channels), torch.randn(2, channels, 3, 3)
    out, logdet = conv(h)
    assert_close(logdet, torch.zeros(2), atol=1e-4, rtol=0)
    assert_close(out.norm(dim=1), h.norm(dim=1))
    assert_close(conv.inverse(out), h, atol=1e-5, rtol=0)


def test_mixing_is_numpys_matrix():
    conv = shaken(InvertibleConv(5), 0.3).double()
    units = torch.eye(5, dtype=torch.float64).view(5, 5, 1, 1)
    matrix = conv(units)[0].flatten(1).T.detach().numpy()
    assert_close(conv(units)[1][0].item(), np.linalg.slogdet(matrix)[1], rtol=0, atol=1e-10)
    assert_close(conv.inverse(units).flatten(1).T, torch.from_numpy(np.linalg.inv(matrix)), rtol=0, atol=1e-10)


def test_coupling_starts_plain_and_keeps_one_half():
    coupling, h = AffineCoupling(4, 8), torch.randn(2, 4, 5, 5)
    out, logdet = coupling(h)
    assert torch.equal(out[:, :2], h[:, :2])
    assert_close(out[:, 2:], h[:, 2:] / (1 + math.exp(-2)))
    assert_close(logdet, torch.full((2,), -50 * math.log(1 + math.exp(-2))))


def test_coupling_never_divides_by_less_than_a_twentieth():
    coupling, h = AffineCoupling(4, 8), torch.ones(1, 4, 2, 2)
    torch.nn.init.constant_(coupling.net[-1].bias, -100.0)
    assert_close(coupling(h)[1].item(), -3.0 * 8, rtol=1e-6, atol=0)
    assert coupling.inverse(h).isfinite().all()


def test_an_odd_number_of_channels_cannot_be_halved():
    with pytest.raises(ValueError, match="got 5"):
        AffineCoupling(5, 8)


@pytest.mark.parametrize("last", [False, True])
def test_split_gives_back_and_its_prior_is_torchs_normal(last):
    from jat_nb.flow_layers import _log_normal
    split, h = shaken(Split(4, last), 0.2), torch.randn(3, 4, 5, 5)
    passed, z = split(h)
    mean, log_std = split.moments(passed)
    assert torch.equal(split.inverse(passed, z), h) and mean.shape == z.shape
    assert_close(_log_normal(z, mean, log_std), Independent(Normal(mean, log_std.exp()), 3).log_prob(z))
    if last:  # nothing is known: one mean and one deviation for each channel
        assert (mean == mean[:1, :, :1, :1]).all() and not passed.any()


# dequantisation

def test_noise_stays_in_its_bin():
    x = (torch.arange(256.0) / 255).expand(200, 1, 4, 256)
    u = dequantise(x, torch.Generator().manual_seed(0))
    assert torch.equal((256 * u).floor(), (255 * x).round()) and u.max() < 1
    assert abs((256 * u - (255 * x).round()).mean() - 0.5) < 0.01


def test_the_last_bin_is_not_left_by_rounding(monkeypatch):
    monkeypatch.setattr("jat_nb.glow.uniform", lambda like, generator: torch.full_like(like, 1 - 2**-24))
    assert dequantise(torch.ones(1, 1, 1, 1)) < 1


def test_noise_repeats_and_is_each_images_own():
    x = images(3)
    g = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(dequantise(x, g()), dequantise(x, g()))
    assert not torch.equal(dequantise(x, g()), dequantise(x, torch.Generator().manual_seed(6)))
    assert torch.equal(dequantise(x, image_generators(0, range(3)))[1:], dequantise(x[1:], image_generators(0, [1, 2])))
    flow = small()
    assert_close(flow.bits_per_dim(x, image_generators(0, range(3)))[1:],
                 flow.bits_per_dim(x[1:], image_generators(0, [1, 2])))


# the whole

def test_latent_sizes_of_the_paper():
    flow = Glow(steps=1, width=4)
    assert [math.prod(s) for s in flow.latent_shapes] == [1536, 768, 384, 384]
    assert [tuple(z.shape[1:]) for z in flow.encode(torch.rand(1, 3, 32, 32))] == flow.latent_shapes
    assert flow.latent_shapes == [(6, 16, 16), (12, 8, 8), (24, 4, 4), (96, 2, 2)]
    assert Glow().form == {"shape": [3, 32, 32], "levels": 4, "steps": 8, "width": 512}


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("shape, levels", [((3, 32, 32), 4), ((1, 28, 28), 4), ((1, 28, 28), 2), ((3, 64, 64), 4),
                                           ((1, 17, 22), 3), ((2, 8, 12), 1)])
def test_round_trip_at_any_size(shape, levels, whitened):
    flow, x = small(shape, levels, by=0.03), images(2, shape)
    assert round_trip_error(flow, x, whitened=whitened).max() <= 1e-4
    assert round_trip_error(copy.deepcopy(flow).double(), x.double(), whitened=whitened).max() <= 1e-10


def test_round_trip_at_the_papers_depth():
    torch.manual_seed(0)
    flow, x = shaken(Glow(width=32), 0.02).eval(), images(2, (3, 32, 32))
    assert round_trip_error(flow, x).max() <= 1e-4


def test_round_trip_of_latents():
    flow = small().double()
    for whitened in (False, True):
        z = [torch.randn(3, *s, dtype=torch.float64) for s in flow.latent_shapes]
        back = flow.encode(flow.decode(z, whitened=whitened), whitened=whitened, unclamped=True)
        assert_close(values(back), values(z), rtol=0, atol=1e-9)


def test_round_trip_after_training(trained):
    flow, x, losses = trained
    assert losses[-1] < losses[0] - 0.5 < 8
    assert round_trip_error(flow, x).max() <= 1e-4
    assert round_trip_error(flow, x, whitened=True).max() <= 1e-4
    assert round_trip_error(copy.deepcopy(flow).double(), x.double()).max() <= 1e-10


def test_round_trip_error_sees_a_broken_inverse(monkeypatch):
    flow, x = small(), images()
    monkeypatch.setattr(ActNorm, "inverse", lambda self, h: h * (-self.log_scale).exp() - 1.01 * self.bias)
    assert (round_trip_error(flow, x) > 1e-3).all()


def test_log_prob_is_change_of_variables():
    "Density of the latents by torch.distributions, stretch by the Jacobian of automatic differentiation."
    flow, x = small((3, 4, 4), 2, 2, 4, by=0.2).double(), images(2, (3, 4, 4), torch.float64)
    for i in range(2):
        one = x[i:i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v: values(flow.encode(v))[0], one).view(48, 48)
        white = torch.autograd.functional.jacobian(lambda v: values(flow.encode(v, whitened=True))[0], one).view(48, 48)
        e = values(flow.encode(one, whitened=True))
        expected = Normal(0, 1).log_prob(e).sum() + torch.linalg.slogdet(white).logabsdet
        assert_close(flow.log_prob(one)[0], expected, rtol=0, atol=1e-8)
        assert_close(flow.chain(one - 0.5)[1][0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-8)


def test_an_images_numbers_do_not_depend_on_the_batch():
    flow, x = small(), images(4)
    assert_close(flow.log_prob(x)[2:3], flow.log_prob(x[2:3]))
    assert_close(values(flow.encode(x))[1:2], values(flow.encode(x[1:2])))


def test_bits_of_a_chain_of_nothing():
    flow, x = Glow((2, 4, 4), levels=1, steps=0), images(3, (2, 4, 4))
    u = dequantise(x, torch.Generator().manual_seed(3))
    expected = 8 - Normal(0, 1).log_prob(u - 0.5).mean(dim=(1, 2, 3)) / math.log(2)
    assert_close(flow.bits_per_dim(x, torch.Generator().manual_seed(3)), expected)
    assert_close(flow(x, torch.Generator().manual_seed(3)), expected)


def test_a_uniform_density_needs_8_bits(monkeypatch):
    flow = small()
    monkeypatch.setattr(flow.chain, "log_density", lambda h: torch.zeros(len(h)))
    assert_close(flow.bits_per_dim(images(3)), torch.full((3,), 8.0))


def test_raw_and_whitened_agree_while_priors_are_standard():
    torch.manual_seed(0)
    flow, x = Glow((3, 8, 8), levels=2, steps=2, width=8), images()
    assert torch.equal(values(flow.encode(x)), values(flow.encode(x, whitened=True)))
    shaken(flow)
    assert (values(flow.encode(x)) - values(flow.encode(x, whitened=True))).abs().max() > 0.01


def test_whitened_coarse_latents_move_the_means_of_the_finer():
    "One coarse change leads to the same fine raw latents when raw (they are fixed), to others when whitened."
    flow, x = small(by=0.05), images()
    for whitened, moves in ((False, False), (True, True)):
        z = flow.encode(x, whitened=whitened)
        x_new = flow.decode([z[0], z[1] + 0.5], whitened=whitened)
        change = (flow.encode(x_new, unclamped=True)[0] - flow.encode(x)[0]).abs().max()
        assert (change > 1e-3) == moves


@pytest.mark.parametrize("whitened", [False, True])
def test_lemma_1(trained, whitened):
    "The largest latent change measured from the images equals the largest entry of lambda."
    flow, x, _ = trained
    for model, images_, dtype, tol in ((flow, x, torch.float32, 1e-4), (copy.deepcopy(flow).double(), x.double(),
                                                                       torch.float64, 1e-9)):
        for eta in (0.02, 0.1):
            z = model.encode(images_, whitened=whitened)
            g = torch.Generator().manual_seed(0)
            size = lambda latents: values(latents).abs().amax(1)
            noise = [2 * torch.rand(t.shape, generator=g, dtype=dtype) - 1 for t in z]
            shape = (-1, 1, 1, 1)
            lam = [eta * n / size(noise).view(shape) for n in noise]
            moved = model.decode([a + b for a, b in zip(z, lam)], whitened=whitened)
            back = model.encode(moved, whitened=whitened, unclamped=True)
            found = size([b - a for a, b in zip(z, back)])
            assert (found - eta).abs().max() <= tol


def test_lemma_1_the_other_way(trained):
    flow, x, _ = trained
    z, z_new = flow.encode(x[:8]), flow.encode(x[8:16])
    assert_close(flow.decode([a + (b - a) for a, b in zip(z, z_new)]), x[8:16], rtol=0, atol=1e-4)


def test_gradients_reach_latents_and_parameters():
    flow = small()
    z = [t.detach().requires_grad_() for t in flow.encode(images())]
    grads = torch.autograd.grad(flow.decode(z).square().sum(), z)
    assert all(g.isfinite().all() and g.any() for g in grads)
    flow.bits_per_dim(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


# start, samples, files, errors

def test_initialise_starts_every_actnorm_of_the_flow():
    torch.manual_seed(0)
    flow, x = Glow((1, 8, 8), levels=2, steps=2, width=8), images(64, (1, 8, 8))
    with pytest.raises(ValueError, match="initialise"):
        flow.bits_per_dim(x)
    flow.initialise(x, torch.Generator().manual_seed(0))
    norms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 4 and all(m.initialised for m in norms)
    seen = []
    for m in norms:
        m.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    flow.bits_per_dim(x, torch.Generator().manual_seed(0))
    for out in seen:
        assert out.mean(dim=(0, 2, 3)).abs().max() < 1e-4
        assert (out.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_samples():
    flow = small(by=0.05)
    g = lambda: torch.Generator().manual_seed(1)
    warm = [flow.sample(64, t, g()) for t in (0.0, 0.3, 0.6, 1.0)]
    spread = [s.var(dim=0).mean().item() for s in warm]
    assert spread == sorted(spread) and spread[0] < 1e-12 < spread[1]
    assert all(0 <= s.min() and s.max() <= 1 for s in warm)
    assert torch.equal(flow.sample(3, 0.7, g()), flow.sample(3, 0.7, g()))
    own = flow.sample(3, 0.7, image_generators(0, range(3)))
    assert_close(own[1:], flow.sample(2, 0.7, image_generators(0, [1, 2])))


def test_samples_follow_the_model():
    "Whitened latents of samples that were not clamped are standard normal."
    flow = small((1, 8, 8), by=0.02).double()
    z = [torch.randn(500, *s, dtype=torch.float64) for s in flow.latent_shapes]
    e = values(flow.encode(flow.decode(z, whitened=True), whitened=True, unclamped=True))
    assert abs(e.mean()) < 0.02 and abs(e.std() - 1) < 0.02


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    flow, x = Glow((1, 8, 8), levels=2, steps=2, width=8), images(16, (1, 8, 8))
    flow.initialise(x, torch.Generator().manual_seed(0))
    tensors, form = read_tensors(write_tensors(tmp_path / "flow.safetensors", flow.state_dict(), flow.form))
    again = Glow(**form)
    assert not again.chain.levels[0].layers[1].initialised
    again.load_state_dict(tensors)
    again.initialise(1 - x)
    assert torch.equal(values(again.encode(x)), values(flow.encode(x)))
    assert again.chain.levels[0].layers[1].initialised and again.shape == flow.shape


def test_half_precision_stays_outside():
    flow, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert round_trip_error(flow, x).max() <= 1e-4
        assert flow.encode(x)[0].dtype == torch.float32 and flow.log_prob(x).dtype == torch.float32


def test_a_frozen_flow_is_left_as_it_was():
    flow, x = small().train(), images()
    before = copy.deepcopy(flow.state_dict())
    with frozen(flow):
        z = [t.requires_grad_() for t in flow.encode(x)]
        grads = torch.autograd.grad(flow.decode(z).sum(), z)
    assert all(g.any() for g in grads) and flow.training
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())
    assert all(torch.equal(before[k], v) for k, v in flow.state_dict().items())


def test_matmul_precision_is_put_back():
    flow, x, before = small(), images(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        tf32 = torch.backends.cudnn.allow_tf32
        flow.decode(flow.encode(x))
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("call, message", [
    (lambda f, x: f.encode(x[:, :1]), r"images \(B, 3, 8, 8\)"),
    (lambda f, x: f.encode(x.double()), "torch.float64"),
    (lambda f, x: f.log_prob((255 * x).byte()), "torch.uint8"),
    (lambda f, x: f.bits_per_dim(255 * x), "divide bytes by 255"),
    (lambda f, x: f.encode(255 * x), "divide bytes by 255"),
    (lambda f, x: f.encode(x / 0), "remove NaN"),
    (lambda f, x: f.encode(x - 0.5), "keep normalisation inside the model"),
    (lambda f, x: f.log_prob(255 * x), "divide bytes by 255"),
    (lambda f, x: f.log_prob(x * torch.nan), "remove NaN"),
    (lambda f, x: round_trip_error(f, 255 * x), "divide bytes by 255"),
    (lambda f, x: f.encode([1]), "as a tensor, got list"),
    (lambda f, x: f.encode(x[:0]), "at least one image"),
    (lambda f, x: f.decode(f.encode(x)[:1]), "what encode returns"),
    (lambda f, x: f.decode(f.encode(x)[::-1]), "what encode returns"),
    (lambda f, x: f.decode([f.encode(x)[0], f.encode(x[:1])[1]]), "what encode returns"),
    (lambda f, x: f.sample(0), "n >= 1"),
    (lambda f, x: f.sample(1.5), "whole number n >= 1.*got 1.5"),
    (lambda f, x: f.sample(2, "warm"), "temperature >= 0, got 2 and 'warm'"),
    (lambda f, x: f.sample(1, -0.1), "temperature >= 0"),
    (lambda f, x: f.sample(1, float("nan")), "temperature >= 0"),
    (lambda f, x: f.initialise(x), "train mode"),
    (lambda f, x: Glow((3, 8, 8)), "fewer levels"),
    (lambda f, x: Glow((8, 8)), r"\(C, H, W\)"),
    (lambda f, x: Glow((3, 8, 8), levels=0), "at least one level"),
    (lambda f, x: Glow((3, 8, 8), levels=2.5), "in whole numbers.*levels=2.5"),
    (lambda f, x: Glow(3), r"\(C, H, W\).*got 3"),
    (lambda f, x: Glow((3, 8.0, 8), levels=2), "in whole numbers"),
    (lambda f, x: Glow((3, 8, 8), levels=2, steps=1.5), "steps of at least 0.*got 1.5"),
    (lambda f, x: Glow((3, 8, 8), levels=2, width=0), "width of at least 1"),
])
def test_errors_name_the_mend(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(small(), images())
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_decoded_images_may_leave_the_range():
    flow = small().double()
    z = [3 * torch.randn(2, *s, dtype=torch.float64) for s in flow.latent_shapes]
    x = flow.decode(z)
    assert x.min() < 0 and x.max() > 1
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"): flow.encode(x)
    assert_close(values(flow.encode(x, unclamped=True)), values(z), rtol=0, atol=1e-9)
    assert round_trip_error(flow, x, unclamped=True).max() < 1e-10


# a peer

def peer_of(flow, nf):
    "The flow's layers and weights in normflows, which counts from latents to images."
    bases, flows, merges = [], [], []
    for level, shape in zip(flow.chain.levels, flow.latent_shapes):
        blocks = []
        for norm, conv, coupling in zip(level.layers[1::3], level.layers[2::3], level.layers[3::3]):
            block = nf.flows.GlowBlock(len(conv.lower), coupling.net[0].out_channels)
            inner = block.flows[0].flows[1].param_map.net
            for ours, theirs in zip((coupling.net[0], coupling.net[2]), (inner[0], inner[2])):
                theirs.load_state_dict(ours.state_dict())
            last, gain = coupling.net[4], (3 * coupling.net[4].log_gain).exp()
            scale, shift = (last.weight * gain[..., None]).chunk(2), (last.bias * gain.flatten()).chunk(2)
            inner[4].weight.data = torch.stack([-scale[1], scale[0]], 1).flatten(0, 1).data  # shift, scale, shift, ...
            inner[4].bias.data = torch.stack([-shift[1], shift[0]], 1).flatten(0, 1).data
            mix = block.flows[1]
            mix.P, mix.sign_S = conv.permutation, conv.sign
            mix.L.data, mix.U.data, mix.log_S.data = conv.lower.data, conv.upper.data, conv.log_diagonal.data
            block.flows[2].s.data, block.flows[2].t.data = -norm.log_scale.data[None], -norm.bias.data[None]
            block.flows[2].data_dep_init_done = torch.tensor(1.0)
            blocks.append(block)
        flows.insert(0, [*reversed(blocks), nf.flows.Squeeze()])
        base = nf.distributions.GlowBase(shape)
        moments = (level.split.prior.bias * (3 * level.split.prior.log_gain).exp().flatten()).chunk(2)
        base.loc.data, base.log_scale.data = (m.data.view(1, -1, 1, 1) for m in moments)
        bases.insert(0, base)
        merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(bases, flows, merges[1:], class_cond=False)


def test_normflows_agrees():
    "Same weights, same latents, same density; its priors see no coarser half and its scales have no floor."
    nf = pytest.importorskip("normflows")
    flow, x = small((3, 8, 8), 2, 3, 8, by=0.1), images()
    for level in flow.chain.levels:
        torch.nn.init.zeros_(level.split.prior.weight)
    flow, x = flow.double(), x.double()
    peer = peer_of(flow, nf).double()
    with torch.no_grad():
        latents, logdet = peer.inverse_and_log_det(x - 0.5)
        assert logdet.isfinite().all() and flow.chain(x - 0.5)[1].abs().min() > 1
        assert_close(values(latents[::-1]), values(flow.encode(x)), rtol=0, atol=1e-10)
        assert_close(logdet, flow.chain(x - 0.5)[1], rtol=0, atol=1e-9)
        assert_close(peer.log_prob(x - 0.5, None), flow.log_prob(x), rtol=0, atol=1e-9)
        assert_close(peer.forward_and_log_det(latents)[0] + 0.5, flow.decode(flow.encode(x)), rtol=0, atol=1e-10)
