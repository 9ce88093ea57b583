"The fifteen common corruptions: what they do to bytes, whom they depend on, and the score over them."
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from torch import nn

from jat_nb import corruptions
from jat_nb.corruptions import CORRUPTIONS, available_corruptions, cifar10_c, corrupt, corruption_accuracy, corruption_score

KINDS = available_corruptions()


def bytes_of(n=3, channels=3, side=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rough = torch.rand(n, channels, side, side, generator=g)
    return (255 * nn.functional.avg_pool2d(rough, 5, 1, 2)).byte()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("channels, side", [(3, 32), (1, 28)])
def test_every_corruption_keeps_the_form_and_needs_no_batch(name, channels, side):
    x = bytes_of(3, channels, side)
    before, state = x.clone(), np.random.get_state()[1].copy()
    for severity in (1, 5):
        out = corrupt(x, name, severity, seed=3)
        assert out.dtype == torch.uint8 and out.shape == x.shape and not torch.equal(out, x)
        assert torch.equal(out[1:2], corrupt(x[1:2], name, severity, seed=3, indices=[1]))
        assert torch.equal(out.flip(0), corrupt(x.flip(0), name, severity, seed=3, indices=[2, 1, 0]))
    assert torch.equal(x, before) and np.array_equal(state, np.random.get_state()[1])
    assert corrupt(x[:0], name, 1).shape == x[:0].shape


@pytest.mark.parametrize("name", KINDS)
def test_distance_grows_with_severity(name):
    "D07, kind by kind; the published constants of elastic_transform move pixels less and less."
    x = bytes_of(8)
    far = [(corrupt(x, name, severity).float() - x).square().mean().sqrt().item() for severity in (1, 2, 3, 4, 5)]
    slope = np.polyfit(range(5), far, 1)[0]
    assert min(far) > 0 and (slope < 0 if name == "elastic_transform" else far[4] > far[0] and slope > 0), far


@pytest.mark.parametrize("name", [k for k in KINDS if k not in ("brightness", "contrast", "defocus_blur", "zoom_blur", "pixelate", "jpeg_compression")])
def test_draws_depend_on_seed_and_image(name):
    x = bytes_of(1).repeat(2, 1, 1, 1)
    out = corrupt(x, name, 3)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out, corrupt(x, name, 3, seed=1))


@pytest.mark.parametrize("call, message", [
    (dict(severity=0), "from 1 to 5, got 0"), (dict(severity=6), "from 1 to 5"), (dict(severity=2.5), "from 1 to 5"),
    (dict(name="rain"), "unknown corruption 'rain': choose one of gaussian_noise"), (dict(images=torch.rand(1, 3, 32, 32)), "makes bytes"),
    (dict(images=bytes_of()[0]), "uint8 images"), (dict(images=bytes_of().repeat(1, 2, 1, 1)), "1 or 3"), (dict(images=bytes_of(side=8)), "16 pixels"),
    (dict(indices=[1]), "zip"),
])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        corrupt(**{**dict(images=bytes_of(), name="fog", severity=1), **call})


def test_frost_without_photographs_says_what_to_install(monkeypatch):
    corruptions._ice.cache_clear()
    monkeypatch.setattr(corruptions, "find_spec", lambda name: None)
    assert "frost" not in available_corruptions() and len(available_corruptions()) == 14
    with pytest.raises(ImportError, match="pip install imagecorruptions-imaug"): corrupt(bytes_of(), "frost", 1)


def draws(seed=0):
    return np.random.default_rng(seed)


def test_constants_and_closed_forms():
    assert len(CORRUPTIONS) == 15 and all(len(c) == 5 for c in CORRUPTIONS.values())
    x = bytes_of(1)
    byte = np.moveaxis(x[0].numpy(), 0, 2) / 255
    expected = ((byte - byte.mean((0, 1))) * 0.3 + byte.mean((0, 1))).clip(0, 1)
    found = np.moveaxis(corrupt(x, "contrast", 4)[0].numpy(), 0, 2)
    assert np.abs(found - np.floor(255 * expected + 1e-6)).max() == 0
    flat = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = corrupt(flat, "gaussian_noise", 5).float() / 255
    assert abs(noisy.std() - 0.10) < 0.004
    hit = corrupt(flat, "impulse_noise", 5)
    assert set(hit.unique().tolist()) == {0, 128, 255} and abs((hit != 128).float().mean() - 0.07) < 0.01


def test_a_streak_is_a_convolution():
    x = draws().random((20, 20, 1))
    radius, sigma = 4, 1.5
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma)**2)
    kernel = np.zeros(4 * radius + 1)
    kernel[2 * radius:] = weights / weights.sum()
    expected = ndimage.correlate1d(x, kernel, axis=1, mode="nearest")
    np.testing.assert_allclose(corruptions._streak(x, radius, sigma, 0.0), expected, atol=1e-12)


def test_the_library_for_large_images_agrees_where_nothing_is_drawn():
    theirs = pytest.importorskip("imagecorruptions.corruptions")
    from PIL import Image
    byte = np.moveaxis(bytes_of(1, side=64)[0].numpy(), 0, 2)
    picture, x = Image.fromarray(byte), byte / 255
    for severity, (c, q) in enumerate(zip((0.4, 0.3, 0.2, 0.1, 0.05), (25, 18, 15, 10, 7)), 1):
        np.testing.assert_allclose(255 * corruptions._contrast(x, c, None), theirs.contrast(picture, severity), atol=1e-6)
        np.testing.assert_allclose(255 * corruptions._brightness(x, severity / 10, None), theirs.brightness(picture, severity), atol=1e-4)
        assert np.array_equal(np.rint(255 * corruptions._jpeg_compression(x, q, None)), np.asarray(theirs.jpeg_compression(picture, severity)))
    lens = corruptions._defocus_blur(np.pad([[[1.0]]], ((10, 10), (10, 10), (0, 0))), (3, 0.1), None)[..., 0]
    np.testing.assert_allclose(lens[2:19, 2:19], theirs.disk(3, 0.1), atol=1e-6)


def official(folder, n=4):
    folder = folder / "CIFAR-10-C"
    folder.mkdir()
    images = draws().integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "snow.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(n, dtype=np.uint8), 5))
    return images


def test_official_files(tmp_path, monkeypatch):
    images = official(tmp_path)
    monkeypatch.setenv("JAT_DATA", str(tmp_path))
    third = cifar10_c("snow", 3)
    assert np.array_equal(third.images.permute(0, 2, 3, 1).numpy(), images[8:12]) and third.labels.tolist() == [0, 1, 2, 3]
    assert third.name == "cifar10-c/snow-3" and third.classes[3] == "cat"
    with pytest.raises(FileNotFoundError, match="fog.npy"): cifar10_c("fog", 1, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="from 1 to 5"): cifar10_c("snow", 0)
    np.save(tmp_path / "CIFAR-10-C" / "snow.npy", images[:7])
    with pytest.raises(ValueError, match="download it again"): cifar10_c("snow", 1)
    np.save(tmp_path / "CIFAR-10-C" / "snow.npy", np.array([{}] * 5), allow_pickle=True)
    with pytest.raises(ValueError): cifar10_c("snow", 1)  # never unpickled


def test_official_files_judge_the_test_set_where_they_are(tmp_path, monkeypatch):
    official(tmp_path)
    for name in CORRUPTIONS: (tmp_path / "CIFAR-10-C" / f"{name}.npy").write_bytes((tmp_path / "CIFAR-10-C" / "snow.npy").read_bytes())
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    monkeypatch.setenv("JAT_DATA", str(tmp_path))
    table = corruption_accuracy(model, images, labels, names=("fog",), severities=(2,))
    assert torch.equal(seen[0], cifar10_c("fog", 2).images / 255) and table["made"].tolist() == ["official"]
    other = corruption_accuracy(model, images, labels.flip(0), names=("fog",), severities=(2,))
    assert other["made"].tolist() == ["here"]  # other images: never the files of these


def net(channels=3, side=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 4), nn.Dropout(0.9))


def test_the_table_and_the_score():
    x, model = bytes_of(6), net().train()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    table = corruption_accuracy(model, x, y, names=("fog", "contrast"), severities=(2, 5), batch_size=4, seed=2)
    assert model.training and table[["corruption", "severity"]].values.tolist() == [["fog", 2], ["fog", 5], ["contrast", 2], ["contrast", 5]]
    model.eval()
    for row in table.itertuples():
        right = (model(corrupt(x, row.corruption, row.severity, seed=2) / 255).argmax(1) == y).double().mean().item()
        assert row.accuracy == pytest.approx(right) and row.n == 6 and row.low <= row.accuracy <= row.high
    assert table.equals(corruption_accuracy(model, x, y, names=("fog", "contrast"), severities=(2, 5), batch_size=1, seed=2))
    with pytest.raises(ValueError, match="expected 75 sets, got 4"): corruption_score(table)
    seen = []
    whole = corruption_accuracy(model, x, y, read=lambda name, severity: seen.append((name, severity)) or x)
    assert len(seen) == 75 and corruption_score(whole) == pytest.approx((model(x / 255).argmax(1) == y).double().mean().item())
    with pytest.raises(ValueError, match="some stand there twice"): corruption_score(pd.concat([whole, whole[:1]]))


def test_intervals_are_wilsons():
    from jat_nb.evaluation import wilson_interval
    x, y = bytes_of(5), torch.zeros(5, dtype=torch.int64)
    row = corruption_accuracy(net(), x, y, names=["contrast"], severities=[1]).iloc[0]
    low, high = wilson_interval(round(row.accuracy * 5), 5)
    assert row.low == pytest.approx(low.item(), abs=1e-6) and row.high == pytest.approx(high.item(), abs=1e-6)


def test_a_suite_asks_for_them():
    from jat_nb.data import default_budget
    from jat_nb.suites import Job, Suite, check_answer, run_suite
    x, y, model = bytes_of(4), torch.tensor([0, 1, 2, 3]), net().eval()
    suite = Suite(kind="corruptions", options={"names": ["fog", "contrast"], "severities": [1, 5], "n": 3})
    answer = run_suite(suite, Job(model, x / 255, y, default_budget("cifar10"), seed=4))
    expected = corruption_accuracy(model, x[:3], y[:3], names=["fog", "contrast"], severities=[1, 5], seed=4)
    assert answer == expected.to_dict("list") and answer["n"] == [3] * 4
    check_answer(suite, answer)
    for damage in ({"accuracy": [1.5] * 4}, {"low": [0.9] * 4, "high": [0.8] * 4}):
        with pytest.raises(ValueError, match="lies in its interval"): check_answer(suite, answer | damage)
    with pytest.raises(KeyError): check_answer(suite, {"n": [3]})
