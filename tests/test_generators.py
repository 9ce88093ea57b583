"""Generators, the search for codes, data that a generator drew, and attacks through it."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import pgd
from jat_nb.batches import Batch, batches
from jat_nb.checkpoints import run_identity
from jat_nb.gan import Discriminator, Generator, hinge_loss, train_gan
from jat_nb.generators import LatentSet, Projected, project, render, robust_mixup_codes
from jat_nb.joint_space import jsa, om_pgd
from jat_nb.mixing import partners
from jat_nb.objectives import OBJECTIVES, average
from jat_nb.perceptual import perceptual
from jat_nb.randomness import image_generators
from jat_nb.recipes import Recipe
from jat_nb.training import fit
from jat_nb.weights import tensor_hash

SHAPE = (1, 12, 12)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(144, 10)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).flatten(1))


def drawing(code=16):
    "A generator whose batch statistics are not those of its start."
    net = Generator(SHAPE, width=4, code=code)
    with torch.no_grad():
        for _ in range(20): net.train()(torch.randn(32, code))
    return net.eval()


@pytest.fixture
def parts():
    torch.manual_seed(0)
    generator, z = drawing(), torch.randn(20, 16)
    return generator, LatentSet(generator, z, torch.arange(20) % 10, tuple("0123456789")), Classifier()


def same(generators=range(20)): return image_generators(0, generators)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 9, 17)])
def test_shapes_and_range(shape):
    x = Generator(shape, width=4)(torch.randn(3, 128))
    assert x.shape == (3, *shape) and 0 <= x.min() and x.max() <= 1
    assert Discriminator(shape, width=4)(x).shape == (3,)


def test_size_of_the_papers_generator():
    "Three blocks of two 3x3 and one 1x1 convolution and two norms of 256 channels, and what stands around them."
    block = 2 * (9 * 256 * 256 + 256) + (256 * 256 + 256) + 2 * 2 * 256
    whole = 128 * 4096 + 4096 + 3 * block + 2 * 256 + 9 * 256 * 3 + 3
    assert sum(p.numel() for p in Generator().parameters()) == whole


def test_an_image_depends_on_its_own_code():
    generator, z = drawing(), torch.randn(6, 16)
    assert_close(generator(z)[2:3], generator(z[2:3]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [0, 3])
def test_largest_singular_values_stay_at_one(step):
    torch.manual_seed(0)
    critic = Discriminator(SHAPE, width=6)
    adam = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(step):
        adam.zero_grad()
        critic(torch.rand(8, *SHAPE)).square().mean().backward()
        adam.step()
    with torch.no_grad():
        for _ in range(60): critic(torch.rand(2, *SHAPE))
    for layer in (m for m in critic.modules() if hasattr(m, "parametrizations")):
        assert abs(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) - 1) < 0.02
        assert hasattr(layer.parametrizations.weight, "original")


def test_hinge_loss_by_hand():
    real, drawn = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert_close(hinge_loss(real, drawn), torch.tensor((0 + 0.5) / 2 + (0 + 1) / 2))


def test_training_learns_the_mean_picture():
    "Images that are all one picture: the generator draws something near it."
    torch.manual_seed(0)
    images = torch.zeros(64, *SHAPE, dtype=torch.uint8)
    images[..., :6] = 255
    generator = Generator(SHAPE, width=8, code=16)
    wanted, z = images[:1].float() / 255, torch.randn(64, 16)
    before = (render(generator, z) - wanted).abs().mean()
    train_gan(generator, Discriminator(SHAPE, width=8), images, steps=30, batch_size=16, critic_steps=2, lr=2e-3)
    assert (render(generator, z) - wanted).abs().mean() < 0.7 * before


@pytest.mark.parametrize("cut", [1, 3])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path, cut):
    images = (torch.rand(32, *SHAPE) * 255).byte()

    def players():
        torch.manual_seed(1)
        return Generator(SHAPE, width=4, code=8), Discriminator(SHAPE, width=4)

    options = dict(batch_size=8, critic_steps=2, save_every=1)
    whole, first, second = players(), players(), players()
    losses = train_gan(*whole, images, steps=4, **options)
    train_gan(*first, images, steps=cut, path=tmp_path / "run.safetensors", **options)
    assert train_gan(*second, images, steps=4, path=tmp_path / "run.safetensors", **options) == losses
    for a, b in zip(whole, second):
        assert tensor_hash(a.state_dict()) == tensor_hash(b.state_dict())
    with pytest.raises(ValueError, match="another run"):
        train_gan(*second, images[:16], steps=5, path=tmp_path / "run.safetensors", **options)


def test_projection_finds_the_codes_of_drawn_images(parts):
    generator, data, model = parts
    look = partial(perceptual, model, layers=["conv"])
    one = project(generator, data.x[:6], look, steps=60, restarts=1, draws=same(range(6)))
    assert (one.loss < one.trace[0, 0]).all() and one.loss.mean() < 0.5 * one.trace[0, 0].mean()
    more = project(generator, data.x[:6], look, steps=60, restarts=3, draws=same(range(6)))
    assert_close(more.trace[:1], one.trace, atol=1e-4, rtol=1e-3)
    assert (more.loss <= one.loss + 1e-4).all()
    drawn = generator(more.z)
    own = (look(drawn) - look(data.x[:6])).square().sum(1) + (drawn - data.x[:6]).abs().mean((1, 2, 3))
    assert_close(own.detach(), more.loss, atol=1e-4, rtol=1e-3)
    assert not generator.linear.weight.grad and generator.linear.weight.requires_grad


def test_projection_does_not_depend_on_the_batch(parts):
    generator, data, model = parts
    look = partial(perceptual, model, layers=["conv"])
    options = dict(steps=8, restarts=2)
    all_of_them = project(generator, data.x[:5], look, draws=same(range(5)), **options)
    alone = project(generator, data.x[3:4], look, draws=same([3]), **options)
    assert_close(alone.z[0], all_of_them.z[3], atol=2e-3, rtol=0)


def test_a_latent_set_is_a_data_set(parts):
    generator, data, _ = parts
    assert_close(data.x, generator(data.z).detach(), atol=1e-5, rtol=0)
    seen = list(batches(data, 6, shuffle=True, seed=3))
    assert sorted(len(b.y) for b in seen) == [2, 6, 6, 6] and {b.x.dtype for b in seen} == {torch.float32}
    x, y = torch.cat([b.x for b in seen]), torch.cat([b.y for b in seen])
    places = torch.cdist(x.flatten(1), data.x.flatten(1)).argmin(1)
    assert_close(x, data.x[places], atol=1e-5, rtol=0)
    assert (data.labels[places] == y).all() and len(places.unique()) == 20
    rest, held = data.split(8, seed=1)
    assert len(rest) == 12 and len(held) == 8 and len(data.subset(5)) == 5
    both = torch.cat([rest.z, held.z])
    assert_close(both.sum(0), data.z.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip", "cutout"])
def test_drawn_images_are_augmented_after_drawing(parts, augment):
    _, data, _ = parts
    x = next(batches(data, 20, augment=(augment,), seed=1)).x
    assert x.shape == (20, *SHAPE) and 0 <= x.min() and x.max() <= 1 and (x - data.x).abs().max() > 0.01


def test_a_run_on_drawn_images_is_known_by_codes_and_weights(parts):
    generator, data, _ = parts
    recipe, model = Recipe(objective="natural", epochs=1), nn.Module()
    facts = partial(run_identity, recipe, model)
    assert facts(data) == facts(copy.deepcopy(data))
    moved = LatentSet(generator, data.z + 0.1, data.labels, data.classes)
    assert facts(data) != facts(moved)
    other = LatentSet(drawing(), data.z, data.labels, data.classes)
    assert facts(data) != facts(other)


def test_fit_trains_on_drawn_images_with_jsa(parts):
    generator, data, _ = parts
    torch.manual_seed(0)
    model = Classifier()
    adapter = Projected(generator, data.images, data.z)
    recipe = Recipe(objective="robust_mixup_codes", attacks={"attack": [["jsa", {"steps": 1}]]}, augment=(), epochs=2,
                    batch_size=8, needs={"flow": "sngan"})
    rows = fit(model, data, recipe, needs={"flow": adapter})
    assert len(rows) == 2 and all(0 < row["loss"] < 100 for row in rows)


def test_the_adapter_knows_its_own_images_and_no_others(parts):
    generator, data, _ = parts
    adapter, order = Projected(generator, data.images, data.z), torch.randperm(20)
    assert_close(adapter.encode(data.x[order])[0], data.z[order])
    for batch in batches(data, 7, shuffle=True):
        assert_close(adapter.decode(adapter.encode(batch.x)), batch.x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="1 of 2 images.*project"):
        adapter.encode(torch.stack([data.x[0], data.x[1].flip(1)]))
    for wrong in (255 * data.x, data.x * torch.nan):
        with pytest.raises(ValueError, match="remove NaN"): adapter.encode(wrong)
    with pytest.raises(ValueError, match="a code for each image"):
        Projected(generator, data.images, data.z[:3])
    asked = []
    searching = Projected(generator, data.images, data.z, search=lambda x: asked.append(len(x)) or torch.ones(len(x), 16))
    z = searching.encode(torch.stack([data.x[0], data.x[1].flip(1)]))[0]
    assert asked == [1]
    assert_close(z, torch.stack([data.z[0], torch.ones(16)]))


def test_bytes_are_found_again_as_the_numbers_that_batches_make_of_them(parts):
    generator, data, _ = parts
    photos = (torch.rand(20, *SHAPE) * 255).byte()
    adapter = Projected(generator, photos, data.z)
    assert_close(adapter.encode(photos.flip(0).float().div(255))[0], data.z.flip(0))


def test_the_base_image_is_the_drawn_one(parts):
    generator, data, model = parts
    photos = torch.rand(20, *SHAPE)
    adapter = Projected(generator, photos, data.z)
    assert_close(om_pgd(model, photos, data.labels, flow=adapter, eta=0.0), data.x, atol=1e-5, rtol=0)
    x_adv = jsa(model, photos, data.labels, flow=adapter, eta=0.0, eps_pixel=0.03)
    assert (x_adv - data.x).abs().max() <= 0.03 + 1e-5


def test_attacks_through_the_adapter_keep_every_promise(parts):
    generator, data, model = parts
    adapter = Projected(generator, data.images, data.z)
    before = tensor_hash(adapter.state_dict()), adapter.training, [p.requires_grad for p in adapter.parameters()]
    for attack in (partial(om_pgd, flow=adapter), partial(jsa, flow=adapter)):
        options = dict(steps=3, return_info=True)
        info = attack(model, data.x, data.labels, generator=same(), **options)
        again = attack(model, data.x, data.labels, generator=same(), **options)
        assert info.within.all() and torch.equal(info.x_adv, again.x_adv)
        assert 0 <= info.x_adv.min() and info.x_adv.max() <= 1
        start = attack(model, data.x, data.labels, generator=same(), steps=1, step_latent=0.0, return_info=True)
        assert info.loss.mean() > start.loss.mean()
        alone = attack(model, data.x[4:5], data.labels[4:5], generator=same([4]), **options)
        assert (alone.x_adv - info.x_adv[4:5]).abs().mean() < 1e-3
    after = tensor_hash(adapter.state_dict()), adapter.training, [p.requires_grad for p in adapter.parameters()]
    assert before == after and all(p.grad is None for p in adapter.parameters())


def test_dmat_is_the_average_of_two_roles(parts):
    generator, data, model = parts
    adapter = Projected(generator, data.images, data.z)
    attacks = {"pgd": partial(pgd, steps=2), "om_pgd": partial(om_pgd, flow=adapter, steps=2, eta=0.2, step_latent=0.1)}
    source = torch.Generator().manual_seed(5)
    loss = average(model, Batch(data.x, data.labels, torch.Generator().manual_seed(5)), **attacks)
    images = [attack(model, data.x, data.labels, generator=source) for attack in attacks.values()]
    by_hand = sum(F.cross_entropy(model(x), data.labels) for x in images) / 2
    assert_close(loss, by_hand)


def test_mixed_codes_by_hand(parts):
    generator, data, model = parts
    adapter = Projected(generator, data.images, data.z)
    seeded = lambda: Batch(data.x, data.labels, torch.Generator().manual_seed(2))
    seen = []

    def idle(model, x, y, *, flow, loss, target, generator):
        seen.append(x)
        assert_close(flow.decode(flow.encode(x)), x, atol=1e-5, rtol=0)
        return x

    value = robust_mixup_codes(model, seeded(), idle, flow=adapter, alpha=0.3)
    other = partners(seeded(), alpha=0.3)
    assert_close(seen[0], generator(0.3 * data.z + 0.7 * data.z[other.order]).detach(), atol=1e-5, rtol=0)
    logits = model(seen[0])
    by_hand = 0.3 * F.cross_entropy(logits, data.labels) + 0.7 * F.cross_entropy(logits, data.labels[other.order])
    assert_close(value, by_hand)
    assert OBJECTIVES["robust_mixup_codes"] is robust_mixup_codes
    with pytest.raises(ValueError, match="stands on a Projected, got Classifier"):
        robust_mixup_codes(model, seeded(), idle, flow=model)
