"Networks against published counts and a second implementation; frozen models against every way to be changed."
import json
import math
import os
import stat
import warnings

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from jat_nb import backbones
from jat_nb.backbones import PreActBlock, PreActResNet, SmallCNN, wide_resnet
from jat_nb.cli import jat_train
from jat_nb.models import NormalizedModel, create, frozen
from jat_nb.recipes import Recipe
from jat_nb.weights import check_options, load_weights, pretrained, save_weights, zoo


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def snapshot(model: nn.Module):
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()],
            [p.detach().clone() for p in model.parameters()])


def assert_same(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert all(x is y for x, y in zip(a[2], b[2], strict=True)), "the very same .grad"
    assert all(map(torch.equal, a[3], b[3])) and all(map(torch.equal, a[4], b[4]))


@pytest.mark.parametrize("name, options, expected", [
    ("small_cnn_mnist", {"in_chans": 1}, 312_202),
    ("resnet18_cifar", {}, 11_173_962),
    ("preact_resnet18_cifar", {}, 11_171_146),
    ("preact_resnet18_cifar", {"norm": "group"}, 11_171_146),
    ("resnet32_cifar", {}, 464_154),
    ("wrn_28_10_cifar", {}, 36_479_194),
    ("wrn_28_10_cifar", {"num_classes": 100}, 36_536_884),
    ("wrn_34_10_cifar", {}, 46_160_474),
])
def test_published_parameter_counts(name, options, expected):
    with torch.device("meta"):
        assert count(create(name, **options)) == expected


@pytest.mark.parametrize("name", sorted({*timm.list_models("wrn_*_cifar"), *timm.list_models("*resnet18_cifar")}))
def test_every_name_runs_and_is_in_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, in_chans=1)
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)
        assert model.forward_features(torch.rand(2, 1, 32, 32)).shape[:2] == (2, model.num_features)
    assert callable(getattr(backbones, name))


@settings(max_examples=15, deadline=None)
@given(st.integers(22, 48), st.integers(22, 48), st.integers(1, 4), st.integers(2, 12))
def test_small_cnn_takes_any_size(h, w, channels, classes):
    assert SmallCNN(classes, channels)(torch.rand(2, channels, h, w)).shape == (2, classes)


def test_small_cnn_starts_undecided():
    model = create("small_cnn_mnist", in_chans=1).eval()
    assert torch.equal(model(torch.rand(3, 1, 28, 28)), torch.zeros(3, 10))


def test_small_cnn_has_plain_pools_at_28():
    model = SmallCNN().eval()
    nn.init.normal_(model.head[-1].weight)
    plain = nn.Sequential(*model.features[:-1], nn.MaxPool2d(2), model.head)
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(model(x), plain(x))


def test_resnet18_equals_torchvision():
    ours, theirs = timm.create_model("resnet18_cifar"), torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert_close(ours.train()(x), theirs.train()(x))
    assert_close(ours.eval()(x), theirs.eval()(x))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(2, 30))
def test_wrn_counts_by_hand(n, k, classes):
    with torch.device("meta"):
        got = count(wide_resnet(6 * n + 4, k, num_classes=classes))
    w = [16, 16 * k, 32 * k, 64 * k]
    expected = 27 * 16 + 2 * w[3] + (w[3] + 1) * classes
    for a, b in zip(w, w[1:]):
        expected += 9 * a * b + (2 * n - 1) * 9 * b * b + a * b + 2 * a + 2 * (2 * n - 1) * b
    assert got == expected


@pytest.mark.parametrize("depth, width", [(12, 1), (4, 1), (16, 0)])
def test_impossible_wrn(depth, width):
    with pytest.raises(ValueError, match=f"got {depth} and {width}"):
        wide_resnet(depth, width)


def test_block_without_branch_is_the_identity():
    block = PreActBlock(6, 6)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 6, 5, 7)
    assert torch.equal(block(x), x)


def test_block_by_hand():
    block, x = PreActBlock(4, 6, stride=2).eval(), torch.randn(2, 4, 8, 8)
    h = torch.relu(x / math.sqrt(1 + 1e-5))  # fresh batch norm in eval mode
    inner = torch.relu(torch.conv2d(h, block.conv1.weight, stride=2, padding=1) / math.sqrt(1 + 1e-5))
    expected = torch.conv2d(h, block.shortcut.weight, stride=2) + torch.conv2d(inner, block.conv2.weight, padding=1)
    assert_close(block(x), expected)


def test_kaiming_variance():
    conv = wide_resnet(16, 8).blocks[-1].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.02)


def test_group_norm_sees_one_image_and_holds_no_buffers():
    net = PreActResNet(16, (16, 32), 1, norm="group").train()
    x = torch.rand(4, 3, 8, 8)
    assert_close(torch.cat([net(image[None]) for image in x]), net(x), atol=1e-5, rtol=1e-5)
    assert not list(net.buffers())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_normalisation_is_inside(channels, seed):
    g = torch.Generator().manual_seed(seed)
    bare = nn.Sequential(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    mean, std = torch.rand(channels, generator=g), 0.1 + 0.9 * torch.rand(channels, generator=g)
    x = torch.rand(3, channels, 8, 8, generator=g)
    model = NormalizedModel(bare, mean.tolist(), std.tolist())
    expected = bare((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert_close(model(x), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=rf"\(B, {channels}, H, W\), got \(3, {channels + 1}, 8, 8\)"):
        model(torch.rand(3, channels + 1, 8, 8))
    with pytest.raises(ValueError, match=rf"got \({channels}, 8, 8\)"):
        model(x[0])


@pytest.mark.parametrize("mean, std", [([0.5], [0.5, 0.5]), ([0.5], [0.0]), ([], []), (0.5, 0.5), ([0.5], [float("nan")])])
def test_impossible_statistics(mean, std):
    with pytest.raises(ValueError, match="one mean and one std"):
        NormalizedModel(nn.Flatten(), mean, std)


@pytest.mark.parametrize("mean, std", [([124.0], [58.0]), ([0.485], [58.0]), ((0.485, 0.456), (0.2, 57.0)), ([-0.1], [0.5])])
def test_statistics_in_grey_levels_are_refused(mean, std):
    with pytest.raises(ValueError, match="by 255"): NormalizedModel(nn.Flatten(), mean, std)


@pytest.mark.parametrize("channels, shape, mend", [(3, (2, 8, 8, 3), r"x.permute\(0, 3, 1, 2\)"), (1, (2, 8, 8, 1), "x.permute"), (3, (2, 1, 8, 8), "in_chans"), (3, (8, 8, 3), "in_chans")])
def test_channels_that_come_last_are_named(channels, shape, mend):
    model = NormalizedModel(nn.Flatten(), [0.5] * channels, [0.5] * channels)
    with pytest.raises(ValueError, match=mend): model(torch.zeros(shape))


class Odd(nn.Module):
    "Writes to its buffers in eval mode too, replaces one, and takes dropout and batch norm along."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("none", None)

    def forward(self, x):
        h = self.drop(self.norm(self.conv(x)))
        self.calls += 1
        self.last = h.mean(dim=(0, 2, 3)).detach()
        return h.mean(dim=(2, 3))


@pytest.fixture
def odd() -> Odd:
    model = Odd()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model(torch.rand(2, 3, 6, 6)).sum().backward()
    return model


def test_frozen_gives_everything_back(odd):
    before, last = snapshot(odd), odd.last
    with frozen(odd) as inside:
        assert inside is odd
        assert not any(m.training for m in odd.modules()) and not any(p.requires_grad for p in odd.parameters())
        x = torch.rand(2, 3, 6, 6, requires_grad=True)
        assert_close(odd(x), odd(x), rtol=0, atol=0)
        torch.autograd.grad(odd(x).sum(), x)
    assert_same(before, snapshot(odd))
    assert odd.last is last


def test_frozen_after_an_error_and_nested(odd):
    before = snapshot(odd)
    with pytest.raises(RuntimeError, match="inside"):
        with frozen(odd), frozen(odd.norm), frozen(odd):
            odd(torch.rand(2, 3, 6, 6))
            odd.train()
            raise RuntimeError("inside")
    assert_same(before, snapshot(odd))
    with frozen(odd):
        with frozen(odd):
            pass
        assert not odd.training, "leaving the inner block must not thaw the outer one"
    assert_same(before, snapshot(odd))


def test_frozen_does_not_write_to_buffers_that_nobody_changed():
    model = create("wrn_10_1_cifar")
    versions = [b._version for b in model.buffers()]
    with frozen(model):
        model(torch.rand(2, 3, 16, 16))
    assert [b._version for b in model.buffers()] == versions


def test_frozen_lets_plain_functions_through():
    with frozen(torch.sin) as f:
        assert f is torch.sin


def test_frozen_under_inference_mode_and_no_grad(odd):
    before = snapshot(odd)
    with torch.no_grad(), frozen(odd):
        odd(torch.rand(1, 3, 6, 6))
    assert_same(before, snapshot(odd))


def test_create_takes_recorded_statistics_only_where_they_fit():
    with torch.device("meta"):
        assert create("resnet18").metadata["mean"] == [0.485, 0.456, 0.406]
        assert create("resnet18", in_chans=1).metadata["mean"] == [0.0]
        assert create("resnet18", mean=(0.5,) * 3, std=(0.5,) * 3).metadata["std"] == [0.5] * 3
        assert create("wrn_16_2_cifar").metadata["std"] == [1.0] * 3
    with pytest.raises(ValueError, match="one mean and one std"):
        create("wrn_10_1_cifar", mean=[0.5])


def test_create_errors_help():
    with pytest.raises(ValueError, match="wrn_28_10_cifar"):
        create("wrn_28_10")
    with pytest.raises(ValueError, match="timm has no weights"):
        create("wrn_10_1_cifar", pretrained=True)
    with pytest.raises(ValueError, match="got 'layer'"):
        create("wrn_10_1_cifar", norm="layer")


@pytest.mark.parametrize("half", [False, True])
def test_weights_survive_the_file(tmp_path, half):
    model = create("wrn_10_1_cifar", in_chans=1, num_classes=4, mean=[0.3], std=[0.2], norm="group")
    path = save_weights(model, tmp_path / "a.safetensors", metadata={"record": {"seed": 3}}, half=half)
    again = load_weights(path)
    assert again.metadata == {**model.metadata, "record": {"seed": 3}} and not again.training
    assert again.metadata["options"] == {"norm": "group"}
    for k, v in model.state_dict().items():
        exact = not half or v.ndim < 2 or k in ("mean", "std")
        assert again.state_dict()[k].dtype == v.dtype
        assert_close(again.state_dict()[k], v if exact else v.half().float(), rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_batch_norm_statistics_stay_whole_in_half(tmp_path):
    model = create("wrn_10_1_cifar")
    model.model.norm[0].running_var.fill_(1e6)
    again = load_weights(save_weights(model, tmp_path / "a.safetensors", half=True))
    assert_close(again.model.norm[0].running_var, torch.full((64,), 1e6))


def test_what_cannot_be_saved(tmp_path):
    model = create("small_cnn_mnist", in_chans=1)
    with pytest.raises(ValueError, match="create"):
        save_weights(NormalizedModel(nn.Flatten(), [0.0], [1.0]), tmp_path / "a.safetensors")
    with torch.no_grad():
        model.model.head[1].weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="65504 in half"):
        save_weights(model, tmp_path / "a.safetensors", half=True)
    save_weights(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        model.model.head[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        save_weights(model, tmp_path / "a.safetensors")
    assert load_weights(tmp_path / "a.safetensors").model.head[1].weight[0, 0] == 1e5, "the old file is untouched"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("these are no weights")
    with pytest.raises(ValueError, match="not a file of"):
        load_weights(tmp_path / "text.safetensors")
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="not a file of"):
        load_weights(tmp_path / "bare.safetensors")


def test_header_is_plain_json(tmp_path):
    path = save_weights(create("small_cnn_mnist", in_chans=1), tmp_path / "a.safetensors")
    raw = path.read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["jat_nb"])["name"] == "small_cnn_mnist"


def test_zoo_lists_and_loads(tmp_path):
    assert zoo(tmp_path) == [] and zoo(tmp_path / "nowhere") == []
    model = create("small_cnn_mnist", in_chans=1)
    for name in ("b", "a"):
        save_weights(model, tmp_path / f"{name}.safetensors")
    assert zoo(tmp_path) == ["a", "b"]
    assert pretrained("a", folder=tmp_path).metadata["name"] == "small_cnn_mnist"
    with pytest.raises(ValueError, match=r"'../a'; expected one of \['a', 'b'\]"):
        pretrained("../a", folder=tmp_path)


@pytest.mark.parametrize("name", zoo() or [pytest.param("", marks=pytest.mark.skip("the package has no zoo yet"))])
def test_packaged_models_load(name):
    model = pretrained(name)
    x = torch.rand(2, model.metadata["in_chans"], 32, 32)
    assert model(x).isfinite().all() and "record" in model.metadata


def test_running_the_chapter_again_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbones._register_wrn(10, 1)


@pytest.mark.parametrize("options, words", [({"nrom": "group"}, "nearest is 'norm'"), ({"num_classes": 3}, "unknown option 'num_classes'"),
                                            ({"droprate": 0.1}, "nearest is 'drop_rate'")])
def test_a_recipe_refuses_options_that_no_network_takes(options, words):
    with pytest.raises(ValueError, match=words): Recipe(model="wrn_10_1_cifar", model_options=options, epochs=1)


@pytest.mark.parametrize("name, options", [("wrn_10_1_cifar", {"drop_rate": "much"}), ("small_cnn_mnist", {"patch_size": 4}),
                                           ("glow", {"levels": "many"}), ("wrn_10_1_cifar", {"norm": "grupe"})])
def test_options_of_another_kind_are_refused_before_any_image_is_read(name, options):
    with pytest.raises(ValueError, match=f"cannot build {name} with|grupe|whole numbers"): check_options(name, options)


def test_options_that_a_network_takes_pass():
    before = torch.get_rng_state()
    check_options("wrn_10_1_cifar", {"norm": "group"})
    check_options("small_cnn_mnist", {"drop_rate": 0.1})
    check_options("resnet18", {"drop_rate": 0.1, "pretrained": True})
    check_options("glow", {"levels": 2, "steps": 1, "width": 4})
    check_options("vae_gan", {"width": 4, "code": 8, "classes": 10})
    assert torch.equal(before, torch.get_rng_state())


def test_the_command_tries_options_before_it_loads_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAT_DATA", "/nonexistent")
    words = "--recipe jat/natural --data cifar10 --tier smoke --threads 1 --set".split()
    found = jat_train([*words, 'model_options={"drop_rate": "much"}', "--out", str(tmp_path / "run")])
    assert found == 2 and "cannot build" in capsys.readouterr().err


def test_an_assertion_of_another_kind_is_left_as_it_is():
    class Strict(nn.Module):
        def forward(self, x): raise AssertionError("a promise of my own")
    with pytest.raises(AssertionError, match="^a promise of my own$"):
        NormalizedModel(Strict(), [0.5], [0.5])(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("sides, mend", [((32, 32), r"img_size=\[32, 32\] "), ((32, 64), r"img_size=\[32, 64\] ")])
def test_a_network_of_one_size_says_how_to_get_another(sides, mend):
    network = create("vit_tiny_patch16_224", in_chans=1)
    with pytest.raises(ValueError, match=f"doesn't match model .*Create it with {mend}.*--set .*--size"):
        network(torch.zeros(1, 1, *sides))
    assert create("vit_tiny_patch16_224", in_chans=1, img_size=[*sides])(torch.zeros(1, 1, *sides)).shape == (1, 10)
