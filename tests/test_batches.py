"Augmentation and batches as laws: against the slow way, image by image."
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from jat_nb.augmentations import (AUGMENTATIONS, _boxes, crop_flip, random_crop_flip,
                                  random_resized_crop_flip, resized_crop_flip)
from jat_nb.batches import Batch, batches, num_batches
from jat_nb.data import ImageSet


def toy(n: int = 40, classes: int = 4, channels: int = 3, side: int = 8, name: str = "toy", seed: int = 0) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, channels, side, side), generator=g, dtype=torch.uint8)
    images.view(n, -1)[:, 0], images.view(n, -1)[:, 1] = torch.arange(n) % 256, torch.arange(n) // 256  # all distinct
    return ImageSet(name, images, torch.randint(classes, (n,), generator=g), tuple(map(str, range(classes))))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(2, 9), st.integers(2, 9), st.integers(0, 4),
       st.booleans(), st.booleans(), st.integers(0, 9))
def test_crop_flip_equals_the_slow_way(b, c, h, w, pad_px, flip, as_float, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (b, c, h, w), generator=g, dtype=torch.uint8)
    x = x.float() / 255 if as_float else x
    out = random_crop_flip(x, pad_px=pad_px, flip=flip, generator=g.manual_seed(seed))
    g.manual_seed(seed)
    shifts = torch.randint(2 * pad_px + 1, (2, b, 1), generator=g).squeeze(2).T.tolist()
    mirror = torch.randint(2, (b, 1), generator=g).squeeze(1).tolist()
    for image, (down, right), m, ours in zip(x, shifts, mirror, out, strict=True):
        slow = TF.crop(TF.pad(image, pad_px), down, right, h, w)
        assert torch.equal(ours, TF.hflip(slow) if m and flip else slow)


def test_flip_rate_and_offsets_are_uniform():
    x = torch.zeros(9000, 1, 5, 5)
    x[:, :, 2, 1] = 1
    out = random_crop_flip(x, pad_px=1, generator=torch.Generator().manual_seed(0))
    place = out.flatten(1).argmax(1)
    rows = (place // 5).bincount(minlength=5)[1:4] / 9000
    assert (rows - 1 / 3).abs().max() < 3 * (2 / 9 / 9000) ** 0.5
    assert abs((place % 5 >= 3).float().mean() - 1 / 3) < 3 * (2 / 9 / 9000) ** 0.5  # mirrored, shift 0 or 1 inwards


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 24), st.integers(2, 24), st.floats(0.01, 1),
       st.booleans(), st.booleans(), st.integers(0, 99))
def test_boxes_lie_in_their_images_and_are_resized_as_torchvision_does(b, c, h, w, least, flip, as_float, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (b, c, h, w), generator=g, dtype=torch.uint8)
    x = x.float() / 255 if as_float else x
    out = random_resized_crop_flip(x, scale=(least, 1.0), flip=flip, generator=g.manual_seed(seed))
    boxes = _boxes(b, h, w, (least, 1.0), g.manual_seed(seed), x.device).T.int().tolist()
    mirror = torch.randint(2, (b, 1), generator=g).squeeze(1).tolist()
    assert out.dtype == x.dtype and out.shape == x.shape
    for image, (top, left, height, width), m, ours in zip(x, boxes, mirror, out, strict=True):
        assert 0 <= top <= top + height <= h and 0 <= left <= left + width <= w and min(height, width) >= 1
        slow = TF.resized_crop(image.float(), top, left, height, width, [h, w], antialias=False)
        slow = TF.hflip(slow) if m and flip else slow
        assert_close(ours.float(), slow, atol=1e-4 if as_float else 0.51, rtol=0)


def test_boxes_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(1)
    image = torch.zeros(3, 30, 40)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]).T
    ours = _boxes(3000, 30, 40, (0.08, 1.0), torch.Generator().manual_seed(0), image.device).numpy()
    for place in (lambda box: box[2] * box[3], lambda box: box[2] / box[3], lambda box: box[0], lambda box: box[1]):
        assert ks_2samp(place(ours), place(theirs)).statistic < 0.05  # 1 in 1,000 for equal distributions


def test_an_image_too_long_for_any_box_is_taken_whole():
    "One row: a box of half the area would be higher than the image."
    boxes = _boxes(50, 1, 64, (0.5, 1.0), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (boxes.T == torch.tensor([0, 0, 1, 64])).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.sampled_from([(), ("crop_flip",)]), st.integers(1, 3))
def test_batches_visit_every_image_once(n, size, shuffle, augment, parts):
    data = toy(n, name="svhn", side=4)  # svhn is never augmented
    if min(n, size) < parts:
        with pytest.raises(ValueError, match=f"{parts} parts"):
            next(batches(data, size, parts=parts))
        return
    walks = [list(batches(data, size, shuffle=shuffle, augment=augment, seed=1, part=p, parts=parts)) for p in range(parts)]
    whole = list(zip(*walks, strict=True))
    lengths = [sum(len(b.y) for b in pieces) for pieces in whole]
    assert len(whole) == num_batches(n, size, parts) and set(lengths[:-1]) <= {size} and sum(lengths) == n
    assert all(max(len(b.y) for b in pieces) - min(len(b.y) for b in pieces) <= 1 for pieces in whole)
    assert all(b.share == len(b.y) / k for pieces, k in zip(whole, lengths) for b in pieces)
    x, y = torch.cat([b.x for w in whole for b in w]), torch.cat([b.y for w in whole for b in w])
    order = (x.view(n, -1)[:, 0] * 255).round().long()
    assert sorted(order.tolist()) == [*range(n)]
    assert torch.equal(x, data.x[order]) and torch.equal(y, data.labels[order])
    assert shuffle or order.tolist() == [*range(n)]
    alone = torch.cat([b.x for b in batches(data, size, shuffle=shuffle, seed=1)])
    assert torch.equal(alone, x), "the order is the same for any number of parts"


@pytest.mark.parametrize("n, size, parts, lengths", [(17, 8, 1, [8, 9]), (18, 8, 1, [8, 8, 2]), (16, 8, 1, [8, 8]), (1, 8, 1, [1]),
                                                     (19, 8, 2, [8, 11]), (20, 8, 2, [8, 8, 4]), (9, 4, 3, [4, 5]), (3, 1, 1, [1, 1, 1])])
def test_a_last_batch_too_small_for_batch_norm_joins_the_one_before(n, size, parts, lengths):
    walks = [list(batches(toy(n), size, part=p, parts=parts)) for p in range(parts)]
    assert [sum(len(b.y) for b in pieces) for pieces in zip(*walks)] == lengths
    assert num_batches(n, size, parts) == len(lengths)


def test_batch_norm_survives_an_epoch_that_leaves_one_image_over():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4), nn.BatchNorm1d(4)).train()
    assert sum(len(layers(b.x)) for b in batches(toy(33), 16)) == 33


def test_batches_repeat_and_ignore_their_consumer():
    data = toy()

    def epochs(greedy: bool, seed: int) -> list[torch.Tensor]:
        out = []
        for epoch in range(2):
            for batch in batches(data, 16, shuffle=True, augment=("crop_flip",), seed=(seed, epoch)):
                assert isinstance(batch, Batch) and batch.x.dtype == torch.float32
                if greedy:
                    torch.rand(7, generator=batch.generator)
                out.append(batch.x)
        return out

    calm = epochs(False, 0)
    assert all(map(torch.equal, calm, epochs(True, 0)))
    assert not torch.equal(calm[0], calm[3]), "a new order and new shifts in every epoch"
    assert not torch.equal(calm[0], epochs(False, 1)[0])


def test_no_two_batches_share_their_draws():
    "Whatever the run, the epoch, the step and the part: seed 1, epoch 0 is not seed 0, epoch 1."
    draws = {torch.rand(3, generator=b.generator).numpy().tobytes() for seed in range(4) for epoch in range(4)
             for part in range(2) for b in batches(toy(), 8, seed=(seed, epoch), part=part, parts=2)}
    assert len(draws) == 4 * 4 * 2 * 5
    orders = {b.y.numpy().tobytes() for s in range(5) for e in range(5) for b in batches(toy(), 40, shuffle=True, seed=(s, e))}
    assert len(orders) == 25


def test_the_global_seed_plays_no_part():
    seen = []
    for state in (3, 4):
        torch.manual_seed(state)
        seen.append(next(batches(toy(), 8, shuffle=True, augment=("crop_flip",))).x)
    assert torch.equal(*seen)
    assert torch.equal(seen[0], next(batches(toy(), 8, shuffle=True, augment=("crop_flip",), seed=0)).x)


def test_a_resumed_epoch_sees_the_batches_it_has_not_seen():
    whole = [b.x for b in batches(toy(), 8, shuffle=True, augment=("crop_flip",), seed=(2, 1))]
    assert all(map(torch.equal, whole[3:], (b.x for b in islice(batches(toy(), 8, shuffle=True, augment=("crop_flip",), seed=(2, 1)), 3, None))))


def test_augmentations_by_name_in_order(monkeypatch):
    invert = lambda x, name, generator: 255 - x
    halve = lambda x, name, generator: x // 2
    monkeypatch.setitem(AUGMENTATIONS, "invert", invert)
    monkeypatch.setitem(AUGMENTATIONS, "halve", halve)
    x = next(batches(toy(), 8, augment=("invert", "halve"))).x
    assert torch.equal((x * 255).round().to(torch.uint8), (255 - toy().images[:8]) // 2)
    for wrong, seen in ((("mirror",), "mirror"), ("crop_flip", "'crop_flip'"), (True, "True")):
        with pytest.raises(ValueError, match=seen):
            next(batches(toy(), 8, augment=wrong))
    with pytest.raises(ValueError, match="part 2 of 2"):
        next(batches(toy(), 8, part=2, parts=2))


@pytest.mark.parametrize("name, may_flip, pad_px", [("digits", False, 2), ("mnist", False, 2), ("svhn", False, 0),
                                                    ("fashion_mnist", False, 2), ("cifar10", True, 4)])
def test_augmentation_policy(name, may_flip, pad_px):
    ramp = torch.arange(1, 33, dtype=torch.uint8).expand(400, 1, 32, 32)  # grows to the right
    data = ImageSet(name, ramp.contiguous(), torch.zeros(400).long(), ("a",))
    x = next(batches(data, 400, augment=("crop_flip",))).x
    middle = x[:, 0, 16]
    flipped = middle[:, 20] < middle[:, 12]
    assert flipped.any() == may_flip
    black = (middle == 0).sum(1)
    assert black.max() == pad_px


@pytest.mark.parametrize("name, cropped", [("digits", False), ("mnist", False), ("svhn", False), ("cifar10", True),
                                           ("caltech256", True), ("tiny-imagenet-10", True)])
def test_only_photographs_are_cropped_at_every_size(name, cropped):
    x = toy(side=32, name=name).images
    draws = lambda: torch.Generator().manual_seed(3)
    policy = random_resized_crop_flip(x, generator=draws()) if cropped else crop_flip(x, name, draws())
    assert torch.equal(resized_crop_flip(x, name, draws()), policy)
    batch = next(batches(toy(side=32, name=name), 40, augment=("resized_crop_flip",)))
    assert torch.equal(batch.x * 255, (batch.x * 255).round()), "bytes stay bytes"


def test_bad_sizes():
    with pytest.raises(ValueError, match="got 0"):
        next(batches(toy(), 0))
    with pytest.raises(ValueError, match="got -1"):
        random_crop_flip(toy().images, pad_px=-1)
    for scale in ((0, 1), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="shares of the area"):
            random_resized_crop_flip(toy().images, scale=scale)
