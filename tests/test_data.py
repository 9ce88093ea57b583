"Data sets from disk in every layout, against what was put there; subsets as laws."
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torchvision import datasets
from torchvision.transforms import functional as TF

from jat_nb.data import DATASETS, Budget, ImageSet, available, default_budget, few_labels, load
from jat_nb.readers import _cut_out, picture_files, read_picture


def toy(n: int = 40, classes: int = 4, channels: int = 3, side: int = 8, name: str = "toy", seed: int = 0) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, channels, side, side), generator=g, dtype=torch.uint8)
    images.view(n, -1)[:, 0], images.view(n, -1)[:, 1] = torch.arange(n) % 256, torch.arange(n) // 256  # all distinct
    return ImageSet(name, images, torch.randint(classes, (n,), generator=g), tuple(map(str, range(classes))))


def keys(data: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.images}


def put(root: Path, split: str, label: str, images: np.ndarray, suffix: str = ".png") -> None:
    folder = root / split / label
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")


pictures = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 7), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_subsets_are_nested_and_disjoint(n, classes, share, seed, balanced):
    data, k = toy(n, classes, side=4), int(share * n)
    rest, held = data.split(k, seed, balanced=balanced)
    assert len(held) == k and len(rest) == n - k
    assert keys(rest) | keys(held) == keys(data) and not keys(rest) & keys(held)
    assert torch.equal(data.subset(k // 2, seed, balanced=balanced).images, held.images[:k // 2])
    assert torch.equal(data.subset(k, seed, balanced=balanced).images, held.images)
    counts, most = held.labels.bincount(minlength=classes), data.labels.bincount(minlength=classes)
    if balanced:  # a class that still has images was never behind by more than one
        unused = counts < most
        assert not unused.any() or counts.max() - counts[unused].min() <= 1
    else:
        assert (counts - k * most / n).min() > -1.5
        whole = (most > 0).sum()
        left = (rest.labels.bincount(minlength=classes) > 0).sum()
        assert 2 * k >= n or k > n - whole or left == whole, "no class leaves training"


def of(counts: list[int], seed: int = 0) -> ImageSet:
    "A set with so many images of each class, in random order."
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) % 256
    return ImageSet("shares", images.byte().contiguous(), labels, tuple(map(str, range(len(counts)))))


@pytest.mark.parametrize("counts, n, held", [([100, 5], 20, [19, 1]), ([60, 30, 10], 10, [6, 3, 1]), ([60, 30, 10], 50, [30, 15, 5]),
                                             ([980, 20], 100, [98, 2]), ([7, 7, 7], 4, None), ([4, 1, 2], 4, [2, 1, 1]), ([1, 1, 1, 997], 499, None),
                                             ([100] * 9 + [1], 100, None), ([2, 40, 41], 60, None)])
def test_held_out_images_have_the_shares_of_the_set(counts, n, held):
    for seed in range(5):
        rest, few = of(counts, seed).split(n, seed)
        seen = few.labels.bincount(minlength=len(counts))
        assert held is None or seen.tolist() == held
        assert 2 * n > sum(counts) or (rest.labels.bincount(minlength=len(counts)) > 0).all(), "no class leaves training"
        assert (seen - n * torch.tensor(counts) / sum(counts)).abs().max() <= 1.5


def test_balanced_subsets_must_be_asked_for():
    data = of([100, 5])
    assert data.subset(8).labels.bincount(minlength=2).tolist() == [8, 0]
    assert data.subset(8, balanced=True).labels.bincount().tolist() == [4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_equal_classes_are_dealt_as_they_always_were(seed):
    data = of([12] * 7, seed)
    shuffled = torch.randperm(84, generator=torch.Generator().manual_seed(seed))
    hits = torch.nn.functional.one_hot(data.labels[shuffled])
    order = shuffled[(hits.cumsum(0) * hits).sum(1).argsort(stable=True)]
    for n in (1, 7, 30, 84):
        assert torch.equal(data.subset(n, seed).images, data.images[order[:n]])
        assert torch.equal(data.subset(n, seed, balanced=True).images, data.images[order[:n]])


def test_labels_follow_the_names_of_the_run(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("cow", "dog", "owl")):
            put(tmp_path / "farm", split, name, pictures[2 * i:2 * i + 2])
    trained = load("farm", root=tmp_path).classes
    put(tmp_path / "farm", "train", "ant", pictures[:1])  # shifts every number that is taken from today's folder
    today, run = load("farm", "test", root=tmp_path), load("farm", "test", root=tmp_path, classes=trained)
    assert today.labels.tolist() == [1, 1, 2, 2, 3, 3]
    assert run.labels.tolist() == [0, 0, 1, 1, 2, 2] and run.classes == trained == ("cow", "dog", "owl")
    turned = load("farm", "test", root=tmp_path, classes=("owl", "cow", "dog"))
    assert turned.labels.tolist() == [1, 1, 2, 2, 0, 0] and torch.equal(turned.images, run.images)
    put(tmp_path / "farm", "test", "ant", pictures[:1])
    with pytest.raises(ValueError, match="unknown: ant"):
        load("farm", "test", root=tmp_path, classes=trained)
    with pytest.raises(ValueError, match="missing: cat"):
        load("farm", "test", root=tmp_path, classes=("ant", "cat", "cow", "dog", "owl"))


def test_official_classes_are_checked_too():
    digits = load("digits", "test", classes=tuple("9876543210"))
    assert torch.equal(digits.labels, 9 - load("digits", "test").labels)
    with pytest.raises(ValueError, match="missing: a"):
        load("digits", "test", classes=("a", *"0123456789"))


def test_moments_and_float_view():
    data = toy(channels=2)
    pixels = data.images.numpy().transpose(1, 0, 2, 3).reshape(2, -1) / 255
    assert data.mean == pytest.approx(pixels.mean(1), abs=1e-12)
    assert data.std == pytest.approx(pixels.std(1), abs=1e-12)
    assert torch.equal((data.x * 255).round().byte(), data.images) and data.x.dtype == torch.float32
    assert (data.channels, data.num_classes, len(data.to("cpu"))) == (2, 4, 40)


@pytest.mark.parametrize("images, labels, seen", [
    (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), "torch.float32"),
    (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"\(2, 4, 4\)"),
    (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), r"labels \(3,\)"),
    (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 5]), "from 0 to 5"),
    (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([-1, 0]), "from -1 to 0"),
])
def test_impossible_sets_are_refused(images, labels, seen):
    with pytest.raises(ValueError, match=seen):
        ImageSet("bad", images, labels, ("a", "b"))


def test_digits_are_fixed_stratified_and_disjoint():
    train, test = load("digits"), load("digits", "test")
    assert (len(train), len(test), train.variant) == (1437, 360, "upscaled")
    assert train.images.shape[1:] == (1, 32, 32) and int(train.images.max()) == 255
    assert not keys(train) & keys(test)
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (share - 0.2).abs().max() < 0.01


def test_folders_come_back_byte_for_byte(tmp_path):
    put(tmp_path / "toy", "train", "b", pictures[:3])
    put(tmp_path / "toy", "train", "a", pictures[3:])
    put(tmp_path / "toy", "val", "b", pictures[:1])
    (tmp_path / "toy" / "train" / ".cache").mkdir()
    train, val = load("toy", root=tmp_path), load("toy", "test", root=tmp_path)
    assert train.classes == val.classes == ("a", "b") and train.variant == "folder"
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [1], "numbered by the classes of the training part"
    expected = torch.from_numpy(np.concatenate([pictures[3:], pictures[:3]])).permute(0, 3, 1, 2)
    assert torch.equal(train.images, expected)
    assert torch.equal(load(f"folder:{tmp_path / 'toy'}").images, expected)
    assert available("toy", tmp_path) and available(f"folder:{tmp_path / 'toy'}")
    theirs = datasets.ImageFolder(str(tmp_path / "toy" / "val"), TF.to_tensor)
    assert_close(val.x[0], theirs[0][0], rtol=0, atol=0)


def test_jpeg_copy_of_cifar100_says_so(tmp_path):
    put(tmp_path / "cifar100", "train", "apple", pictures, ".jpg")
    assert load("cifar100", root=tmp_path).variant == "jpeg"


def test_folder_errors_name_the_mend(tmp_path):
    put(tmp_path / "toy", "train", "a", pictures[:2])
    put(tmp_path / "toy", "train", "b", pictures[2:4, :5])
    with pytest.raises(ValueError, match=r"8 x 8 and of 8 x 5 .*size="):
        load("toy", root=tmp_path)
    sized = load("toy", root=tmp_path, size=4)
    assert sized.images.shape == (4, 3, 4, 4) and sized.variant == "folder, 4 px"
    put(tmp_path / "toy", "test", "c", pictures[:1])
    with pytest.raises(ValueError, match=r"lacks: \['c'\]"):
        load("toy", "test", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="train/CLASS"):
        load(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "bare" / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no pictures"):
        load("bare", root=tmp_path)


def test_missing_and_unknown_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("JAT_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in set(DATASETS) - {"digits"}:
        assert not available(name)
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        mend = "train/CLASS" if name == "tiny-imagenet-10" else "download=True"
        for part in (str(tmp_path), "jat_nb", "JAT_DATA", "root=", mend):
            assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="tiny-imagenet-10/train/CLASS"):
        load("tiny-imagenet-10", download=True)
    with pytest.raises(ValueError, match="expected one of digits, mnist"):
        load("cifar-10")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load("digits", "val")


def test_root_comes_before_environment(tmp_path, monkeypatch):
    put(tmp_path / "env" / "toy", "train", "a", pictures[:1])
    put(tmp_path / "arg" / "toy", "train", "a", pictures[1:3])
    monkeypatch.setenv("JAT_DATA", str(tmp_path / "env"))
    assert len(load("toy")) == 1 and len(load("toy", root=tmp_path / "arg")) == 2


def test_svhn_layout(tmp_path, monkeypatch):
    from scipy.io import savemat

    labels = np.array([1, 10, 3, 10, 5, 6], dtype=np.uint8)[:, None]  # 10 stands for the digit 0
    savemat(tmp_path / "test_32x32.mat", {"X": pictures.transpose(1, 2, 3, 0), "y": labels})
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load("svhn", "test", root=tmp_path)  # not the published file
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    data = load("svhn", "test", root=tmp_path)
    assert data.labels.tolist() == [1, 0, 3, 0, 5, 6] and data.classes == tuple("0123456789")
    assert torch.equal(data.images, torch.from_numpy(pictures).permute(0, 3, 1, 2))


def test_caltech_layout(tmp_path):
    root = tmp_path / "caltech256" / "256_ObjectCategories"
    shapes = [(30, 20), (24, 48)]
    for label, name in enumerate(["001.ak47", "257.clutter"]):
        (root / name / "extra").mkdir(parents=True)
        for i in range(62):
            image = np.full((*shapes[label], 3), 3 * i, np.uint8)
            Image.fromarray(image).save(root / name / f"{label + 1:03}_{i:04}.png")
        Image.fromarray(pictures[0]).save(root / name / "extra" / "stray.png")
    train, test = (load("caltech256", split, root=tmp_path, size=16) for split in ("train", "test"))
    assert train.labels.bincount().tolist() == [60, 60] and test.labels.bincount().tolist() == [2, 2]
    assert train.classes == ("ak47", "clutter") and train.images.shape[1:] == (3, 16, 16)
    values = torch.cat([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]]).sort().values
    assert values.tolist() == sorted(3 * i for i in range(62) for _ in range(2))
    again = load("caltech256", "test", root=tmp_path, size=16)
    assert torch.equal(again.images, test.images)


def test_caltech_is_brought_to_224_pixels_and_says_what_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "caltech256" / "256_ObjectCategories" / "001.ak47"
    folder.mkdir(parents=True)
    tall = np.zeros((300, 250, 3), np.uint8)
    tall[:25], tall[-25:] = 255, 255  # cut away: the middle 250 of 300 rows stay
    Image.fromarray(tall).save(folder / "001_0001.png")
    data = load("caltech256", root=tmp_path)
    assert data.images.shape == (1, 3, 224, 224) and data.variant == "folder, 224 px"
    assert data.images.is_contiguous() and data.images[:, :, 2:-2].max() == 0

    def refused(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "Caltech256", refused)
    with pytest.raises(FileNotFoundError, match=r"no route to host\); put caltech256/256_ObjectCategories there"):
        load("caltech256", root=tmp_path / "empty", download=True)


def test_tiny_imagenet_layout(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for i, name in enumerate(("n01443537_goldfish", "n02129165_lion")):
            large = pictures[i:i + 1].repeat(8, axis=1).repeat(8, axis=2).repeat(count, axis=0)  # 64 x 64
            put(tmp_path / "tiny-imagenet-10", split, name, large, ".JPEG")
    grey = Image.fromarray(pictures[0, ..., 0].repeat(8, axis=0).repeat(8, axis=1))
    grey.save(tmp_path / "tiny-imagenet-10" / "train" / "n02129165_lion" / "grey.JPEG")
    train, val = (load("tiny-imagenet-10", split, root=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (9, 3, 64, 64) and val.labels.tolist() == [0, 0, 1, 1]
    assert train.classes == ("n01443537_goldfish", "n02129165_lion") and train.variant == "jpeg"
    assert (train.images[8] - train.images[8][:1] == 0).all(), "grey.JPEG comes after the numbers"
    theirs = datasets.ImageFolder(str(tmp_path / "tiny-imagenet-10" / "val"), TF.to_tensor)
    assert_close(val.x, torch.stack([image for image, _ in theirs]), rtol=0, atol=0)
    assert load("tiny-imagenet-10", root=tmp_path, size=96).images.shape[2:] == (96, 96)


def test_mnist_layout(tmp_path, monkeypatch):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    images, labels = pictures[..., 0], np.arange(6, dtype=np.uint8)
    for stem, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        for part in ("train", "t10k"):
            (tmp_path / "MNIST" / "raw" / f"{part}-{stem}-ubyte").write_bytes(head + array.tobytes())
    data = load("mnist", "test", root=tmp_path)
    assert torch.equal(data.images[:, 0], torch.from_numpy(images.copy())) and data.labels.tolist() == [*range(6)]
    assert data.classes == tuple("0123456789") and data.variant == "official"
    for name in ("mnist", "digits"):
        with pytest.raises(ValueError, match=f"'{name}' comes in one size"):
            load(name, root=tmp_path, size=48)


@pytest.mark.parametrize("name, train, test, classes", [("cifar10", 50_000, 10_000, 10), ("mnist", 60_000, 10_000, 10),
                                                        ("cifar100", 50_000, 10_000, 100), ("svhn", 73_257, 26_032, 10),
                                                        ("tiny-imagenet-10", 5_000, 500, 10)])
def test_published_sizes(name, train, test, classes):
    if not available(name):
        pytest.skip(f"{name} is not at hand")
    for split, n in (("train", train), ("test", test)):
        data = load(name, split)
        assert (len(data), data.num_classes, len(data.labels.unique())) == (n, classes, classes)


@pytest.mark.skipif(not available("cifar10"), reason="CIFAR-10 is not at hand")
def test_cifar10_equals_torchvision():
    root = next(Path(p).expanduser() for p in (os.environ.get("JAT_DATA", ""), "~/.cache/jat_nb")
                if p and (Path(p).expanduser() / "cifar-10-batches-py").exists())
    theirs, ours = datasets.CIFAR10(str(root), train=False, transform=TF.to_tensor), load("cifar10", "test")
    for i in (0, 17, 9999):
        assert_close(ours.images[i].float() / 255, theirs[i][0], rtol=0, atol=0)
        assert ours.labels[i] == theirs[i][1]
    assert ours.classes[:2] == ("airplane", "automobile")


def test_a_subset_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="cannot take 41 images out of the 40"):
        toy().subset(41)


def test_budgets():
    assert default_budget("mnist") == Budget(0.3, 0.3) and default_budget("digits") == Budget(0.1, 0.5)
    for name in ("cifar10", "cifar100", "svhn", "folder:/x"):
        assert default_budget(name) == Budget(8 / 255, 0.3)
    for name, side in (("tiny-imagenet-10", 64), ("caltech256", 224)):  # the same share of the side
        budget = default_budget(name)
        assert budget.eps_pixel == 8 / 255 and budget.eps_flow / side == pytest.approx(0.3 / 32)
    assert default_budget("cifar10").step_pixel == 2 / 255 and default_budget("cifar10").step_flow == 0.15


def saved(path: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    Image.fromarray(values, mode).save(path, **options) if mode else Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize("tag, expected", [(1, [[1, 2, 3], [4, 5, 6]]), (3, [[6, 5, 4], [3, 2, 1]]),
                                           (6, [[4, 1], [5, 2], [6, 3]]), (8, [[3, 6], [2, 5], [1, 4]])])
def test_pictures_are_turned_as_the_camera_was_held(tmp_path, tag, expected):
    picture = Image.fromarray(10 * np.arange(1, 7, dtype=np.uint8).reshape(2, 3))
    exif = picture.getexif()
    exif[0x0112] = tag
    picture.save(tmp_path / "turned.png", exif=exif)
    assert (read_picture(tmp_path / "turned.png")[..., 0] // 10).tolist() == expected


@pytest.mark.parametrize("name, values, seen", [
    ("rgba", [[0, 0, 255, 128], [9, 9, 9, 0]], [[127, 127, 255], [255, 255, 255]]), ("la", [[200, 0], [200, 255]], [[255] * 3, [200] * 3])])
def test_what_is_transparent_lies_on_white(tmp_path, name, values, seen):
    path = saved(tmp_path / f"{name}.png", np.array([values], np.uint8))
    assert read_picture(path)[0].tolist() == seen
    assert read_picture(path, channels=len(values[0]))[0].tolist() == values  # alpha as it is, if asked for


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "palette.png", transparency=1)
    assert read_picture(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("file, values, seen", [
    ("deep.png", np.array([[0, 1000, 65535]], np.uint16), [0, 4, 255]), ("deep.tif", np.array([[257, 514, 2570]], np.uint16), [1, 2, 10]),
    ("part.tif", np.array([[0, 0.25, 1]], np.float32), [0, 64, 255]), ("part.tif", np.array([[0, 0.5, 1.5]], np.float32), "from 0 to 1.5"),
    ("part.tif", np.array([[0, math.nan]], np.float32), "nan"), ("wide.tif", np.array([[-1, 90_000]], np.int32), "from -1 to 90000")])
def test_wider_numbers_are_converted_by_rule_or_refused(tmp_path, file, values, seen):
    path = saved(tmp_path / file, values)
    if isinstance(seen, list):
        assert read_picture(path, channels=1).ravel().tolist() == seen
    else:
        with pytest.raises(ValueError, match=f"{file}.*{seen}.*save it as PNG"):
            read_picture(path)


def test_pictures_that_exhaust_are_refused_or_cut_first(tmp_path):
    Image.new("1", (16_000, 12_000)).save(tmp_path / "bomb.png")  # 24 kB, 192 million pixels
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")  # Pillow warns
    for name in ("bomb", "large"):
        with pytest.raises(ValueError, match=rf"{name}.png as a picture \(Image size"):
            read_picture(tmp_path / f"{name}.png", 8)
    line = np.full((1, 3_000_000), 7, np.uint8)
    assert (read_picture(saved(tmp_path / "line.png", line), 64) == 7).all()


def test_the_part_that_stays_is_that_of_the_scaled_picture():
    rng = np.random.default_rng(0)
    for w, h, size in ((90, 60, 32), (31, 200, 48), (64, 64, 16), (50, 20, 20)):
        picture = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        scale = size / min(w, h)
        whole = np.asarray(picture.resize((round(w * scale), round(h * scale)), Image.Resampling.BILINEAR)).astype(int)
        top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
        part = whole[top:top + size, left:left + size]
        assert np.abs(np.asarray(_cut_out(picture, size, size)).astype(int) - part).max() <= 1


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture", b"II*\0\xff\xff\xff\xff", b"BM" + bytes(60)])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ValueError, match="odd.png"):
        read_picture(tmp_path / "odd.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_are_one_error_or_a_picture(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".tif", ".ppm"):
        whole = saved(tmp_path / f"whole{suffix}", pictures[0]).read_bytes()
        for _ in range(25):
            content = bytearray(whole[:rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(content), 3):
                content[place] = rng.integers(256)
            (tmp_path / f"odd{suffix}").write_bytes(content)
            try:
                assert read_picture(tmp_path / f"odd{suffix}", 8).shape == (8, 8, 3)
            except ValueError as error:
                assert f"odd{suffix}" in str(error)


def test_files_that_nobody_meant_are_left_out(tmp_path):
    put(tmp_path / "set", "train", "cow", pictures[:2])
    put(tmp_path / "far", "x", "pig", pictures[2:4])
    (tmp_path / "set" / "train" / "pig").symlink_to(tmp_path / "far" / "x" / "pig")  # a class elsewhere
    for odd in ("train/cow/._000.png", "train/cow/.trash/a.png", "train/__MACOSX/cow/a.png", "train/cow/__MACOSX/b.png"):
        (tmp_path / "set" / odd).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / odd).write_bytes(b"rubbish")
    (tmp_path / "set" / "train" / "cow" / "folder.png").mkdir()
    (tmp_path / "set" / "train" / "cow" / "all").symlink_to(tmp_path / "set")  # round in a circle
    found = load("set", root=tmp_path)
    assert found.classes == ("cow", "pig") and found.labels.bincount().tolist()[1] == 2
    assert len(picture_files(tmp_path / "set" / "train" / "pig")) == 2
    names = [f.relative_to(tmp_path / "set").as_posix() for f in picture_files(tmp_path / "set")]
    assert not any("/." in name or "__MACOSX" in name for name in names)


@pytest.mark.parametrize("name", ["b.gif", "b.HEIC", "deep/b.avif", "link.png", "link"])
def test_pictures_that_would_be_lost_are_refused(tmp_path, name):
    put(tmp_path / "set", "train", "cow", pictures[:2])
    for silent in ("notes.txt", ".DS_Store", "Thumbs.db", "a.png.part"):
        (tmp_path / "set" / "train" / "cow" / silent).touch()
    assert len(load("set", root=tmp_path)) == 2
    odd = tmp_path / "set" / "train" / "cow" / name
    odd.parent.mkdir(exist_ok=True)
    odd.symlink_to(tmp_path / "nowhere") if "link" in name else odd.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=rf"cannot read 1 of the pictures .*{odd.name}.*save them as PNG"):
        load("set", root=tmp_path)


def test_a_class_that_is_a_link_to_nowhere_is_refused(tmp_path):
    put(tmp_path / "set", "train", "cow", pictures[:2])
    (tmp_path / "set" / "train" / "pig").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="train.pig is a link that leads nowhere: mend it or remove it"):
        load("set", root=tmp_path)


def test_portable_greymaps_are_read(tmp_path):
    (tmp_path / "set" / "train" / "cow").mkdir(parents=True)
    saved(tmp_path / "set" / "train" / "cow" / "a.pgm", np.full((4, 4), 77, np.uint8))
    assert load("set", root=tmp_path).images.unique().tolist() == [77]


@pytest.mark.parametrize("given, seen", [
    (dict(labels=[0, 1]), "labels as a tensor, got list: torch.as_tensor"), (dict(labels=np.array([0, 1])), "labels as a tensor, got ndarray"),
    (dict(images=np.zeros((2, 1, 4, 4), np.uint8)), "images as a tensor, got ndarray"), (dict(classes=2), "names of the classes, got 2"),
    (dict(labels=torch.tensor([0, 1]).int()), "torch.int32 .*labels.long"), (dict(labels=torch.tensor([0.0, 1.0])), "labels.long")])
def test_sets_made_by_hand_say_what_they_take(given, seen):
    good = dict(images=torch.zeros(2, 1, 4, 4).byte(), labels=torch.tensor([0, 1]), classes=("a", "b"))
    assert len(ImageSet("good", **good)) == 2
    with pytest.raises(ValueError, match=seen): ImageSet("bad", **good | given)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_classes_are_named(tmp_path, split):
    for part in ("train", "test"):
        put(tmp_path / "set", part, "cow", pictures[:2])
        put(tmp_path / "set", part, "pig", pictures[:1])
    for file in (tmp_path / "set" / split / "pig").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(ValueError, match=f"{split} holds no pictures of pig: fill the folder or remove it"):
        load("set", split, root=tmp_path)


def test_pictures_of_any_size_become_one_rectangle(tmp_path):
    put(tmp_path / "set", "train", "cow", pictures[:2, :5])
    put(tmp_path / "set", "train", "pig", pictures[2:4, :, :3])
    found = load("set", root=tmp_path, size=(6, 4))
    assert found.images.shape == (4, 3, 6, 4) and found.variant == "folder, 6 x 4 px"
    for bad in (0, (4, 0), -3):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            load("set", root=tmp_path, size=bad)


def test_sets_are_shown_in_a_line():
    shown = repr(toy())
    assert shown == "ImageSet('toy', 40 images (3, 8, 8), 4 classes, official, cpu)"
    assert repr(few_labels(load("digits"), 100, 30)[1]) == "Unlabelled('digits', 30 images (1, 32, 32))"


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "sets" / "toy", "train", "a", pictures[:1])
    for found in (load("toy", root="~/sets"), load("folder:~/sets/toy")):
        assert len(found) == 1
    assert picture_files("~/sets/toy") and available("toy", "~/sets")
