"""Weights files: wrappers, damage, and what a stranger may write into a header."""
import json
import random
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import nn
from torch.testing import assert_close

from jat_nb.catalogue import setting
from jat_nb.models import NormalizedModel, create, plain_state, unwrap
from jat_nb.weights import (check_rebuildable, load_weights, names_its_network, open_weights, pretrained,
                            read_tensors, save_weights, tensor_hash, write_tensors, zoo)


def small(**options) -> NormalizedModel:
    return create("wrn_10_1_cifar", num_classes=3, in_chans=1, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return tensor_hash(a.state_dict()) == tensor_hash(b.state_dict())


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "s"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled parallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "distributed": nn.parallel.DistributedDataParallel,
    "distributed compiled": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_never_reach_the_file(wrap, tmp_path, group):
    model = small(mean=[0.2])
    wrapped = wrap(model)
    assert same(unwrap(wrapped), model)
    check_rebuildable(wrapped)
    path = save_weights(wrapped, tmp_path / "a.safetensors")
    assert set(read_tensors(path)[0]) == set(model.state_dict())
    assert same(load_weights(path), model)


def test_a_part_that_was_compiled(tmp_path):
    model = small()
    model.model.blocks[1] = torch.compile(model.model.blocks[1], backend="eager")
    model.model = torch.compile(model.model, backend="eager")
    again = load_weights(save_weights(model, tmp_path / "a.safetensors"))
    assert tensor_hash(again.state_dict()) == tensor_hash(plain_state(model))


def test_a_part_called_module_is_no_wrapper(tmp_path):
    @timm.models.register_model
    def holder_of_module(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None,
                         num_classes=10, in_chans=3):
        return nn.Sequential()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 2)

    timm.models._registry._model_entrypoints["holder_of_module"] = lambda **_: Holder()
    model = create("holder_of_module")
    assert "model.module.weight" in plain_state(model)
    assert same(load_weights(save_weights(model, tmp_path / "a.safetensors")), model)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_older_files_are_mended(prefix, tmp_path):
    model = small()
    state = {prefix + k: v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors", metadata={"jat_nb": json.dumps(model.metadata)})
    assert same(load_weights(tmp_path / "old.safetensors"), model)


def replaced_head(model):
    model.model.fc = nn.Linear(64, 5)


def added_part(model):
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [replaced_head, added_part])
def test_what_cannot_be_rebuilt_is_known_before_training(change, tmp_path):
    model = small()
    change(model)
    for refuse in (check_rebuildable, lambda m: save_weights(m, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="other tensors"):
            refuse(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, words", [({"act_layer": nn.GELU}, "act_layer"), ({"block_args": {"a": 1}}, "block_args")])
def test_options_that_no_file_can_hold(options, words):
    model = small()
    model.metadata["options"] = options
    with pytest.raises(ValueError, match=words):
        check_rebuildable(model)
    with pytest.raises(ValueError, match=r"create\(name"):
        check_rebuildable(nn.Linear(2, 2))


def test_checking_leaves_the_random_numbers_alone():
    model = small()
    before = torch.get_rng_state()
    check_rebuildable(model)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("half", [False, True])
def test_any_flipped_bit_is_noticed(tmp_path, half):
    path = save_weights(small(), tmp_path / "a.safetensors", metadata={"record": {"epoch": 3}}, half=half)
    raw, (tensors, header) = path.read_bytes(), read_tensors(path)
    draw, start = random.Random(0), 8 + int.from_bytes(raw[:8], "little")
    places = [draw.randrange(start, len(raw)) for _ in range(60)] + [draw.randrange(start) for _ in range(120)]
    refused = []
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_tensors(path)
        except ValueError as error:
            assert "is damaged" in str(error) or "not a file" in str(error)
            assert "\n" not in str(error)
            refused.append(place)
        else:  # the bit may lie in the checksum's own key, and then everything it guards is whole
            assert place < start and found[1] == header
            assert tensor_hash(found[0]) == tensor_hash(tensors)
    assert {p for p in places if p >= start} <= set(refused)


def test_files_without_checksum_still_load(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "old.safetensors", metadata={"jat_nb": json.dumps(model.metadata)})
    assert same(load_weights(tmp_path / "old.safetensors"), model)


def test_the_hash_sees_names_types_shapes_and_every_bit():
    a = {"w": torch.arange(6.0), "n": torch.tensor(3), "e": torch.empty(0), "b": torch.tensor([True, False])}
    first = tensor_hash(a)
    variants = [a | {"w": torch.arange(6.0).view(2, 3)}, a | {"w": torch.arange(6.0).double()},
                a | {"w": -torch.arange(6.0)}, a | {"b": torch.tensor([False, True])}, {k: a[k] for k in "wne"},
                {k.upper(): v for k, v in a.items()}, a | {"n": torch.tensor([3])}]
    hashes = {tensor_hash(v) for v in variants} | {tensor_hash(a, "text")}
    assert len(hashes) == 8 and first not in hashes
    assert tensor_hash(dict(reversed(a.items()))) == first
    assert tensor_hash(a | {"w": torch.arange(12.0)[::2] / 2}) == first, "strides do not count"
    half = torch.arange(4.0).bfloat16()
    assert tensor_hash({"h": half}) != tensor_hash({"h": half.half()})


def test_names_may_share_memory(tmp_path):
    w = torch.arange(4.0)
    tensors, _ = read_tensors(write_tensors(tmp_path / "a.safetensors", {"a": w, "b": w}, {}))
    assert torch.equal(tensors["a"], w) and torch.equal(tensors["b"], w)


EVIL = ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/etc", "https://example.org/m.pth", "../wrn_10_1_cifar",
        "/etc/passwd", "timm/resnet18", "C:\\weights", "wrn_10_1_cifar\n", "", " ", 7, None, ["resnet18"]]


@pytest.fixture
def no_timm(monkeypatch):
    "timm must not be asked to build anything."
    def build(*args, **kwargs):
        raise AssertionError(f"timm was asked for {args} {kwargs}")

    monkeypatch.setattr(timm, "create_model", build)


@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_names_that_lead_elsewhere_never_reach_timm(name, tmp_path, no_timm):
    header = {"name": name, "num_classes": 3, "in_chans": 1, "mean": [0.0], "std": [1.0], "options": {}}
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, header)
    with pytest.raises(ValueError, match="name of timm's registry"):
        load_weights(path)
    with pytest.raises(ValueError, match="name of timm's registry"):
        create(name)


@pytest.mark.parametrize("options", [
    {"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg": {"file": "evil.pth"}}, {"cache_dir": "/tmp"},
    {"pretrained_cfg_overlay": {"url": "https://example.org"}}, {"norm": {"a": 1}}, {"global_pool": "a/b"}, {"norm": "os.system('x')"},
    {"img_size": [[1]]}], ids=str)
def test_options_that_lead_elsewhere_never_reach_timm(options, tmp_path, no_timm):
    header = {"name": "resnet18", "num_classes": 3, "in_chans": 1, "mean": [0.0], "std": [1.0], "options": options}
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, header)
    with pytest.raises(ValueError, match="cannot hold the option"):
        load_weights(path)
    if not {"norm", "global_pool", "img_size", "pretrained"} & set(options):
        with pytest.raises(ValueError, match="reads no files"):
            create("resnet18", **options)


@pytest.mark.parametrize("change", [{"num_classes": 10**12}, {"num_classes": "3"}, {"in_chans": 0}, {"in_chans": True},
                                    {"mean": ["a"]}, {"mean": [124.0]}, {"std": []}, {"options": [1]}, {"name": "resnet18.no_tag"},
                                    {"options": {"norm": "layer"}}, {"options": {"img_size": 32}}], ids=str)
def test_headers_that_make_no_sense_are_refused(change, tmp_path):
    header = small().metadata | change
    path = write_tensors(tmp_path / "a.safetensors", small().state_dict(), header)
    with pytest.raises(ValueError, match="a.safetensors") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_a_header_without_bottom_is_refused(tmp_path):
    path, text = tmp_path / "deep.safetensors", "[" * 100_000 + "]" * 100_000
    path.write_bytes(save({"a": torch.ones(1)}, metadata={"jat_nb": text}))
    with pytest.raises(ValueError, match="is not a file of ours"): load_weights(path)


def test_a_bad_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        save_weights(small(), tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize("name", zoo())
def test_the_packaged_models_carry_their_checksum(name):
    path = Path(__import__("jat_nb").__file__).parent / "zoo" / f"{name}.safetensors"
    raw = path.read_bytes()
    facts = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert "checksum" in facts and len(raw) < 1_000_000
    check_rebuildable(pretrained(name))


@pytest.mark.parametrize("mean", [[123.675, 116.28, 103.53], [1.5] * 3, [-0.5] * 3, [float("nan")] * 3])
def test_means_of_bytes_are_refused(mean):
    with pytest.raises(ValueError, match="divide .* by 255"):
        NormalizedModel(nn.Flatten(), mean, [58.4] * 3)
    with pytest.raises(ValueError, match="divide .* by 255"):
        create("resnet18", mean=mean, std=[58.4] * 3)


def plain(folder, state, suffix=".pth"):
    file = folder / f"theirs{suffix}"
    save_file({k: v.contiguous() for k, v in state.items()}, file) if suffix == ".safetensors" else torch.save(state, file)
    return file


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("name, classes, channels", [("preact_resnet18_cifar", 7, 1), ("mobilenetv3_small_050", 3, 3)])
def test_weights_from_elsewhere_compute_the_same(tmp_path, prefix, suffix, name, classes, channels):
    torch.manual_seed(3)
    theirs = create(name, num_classes=classes, in_chans=channels, mean=[0.4] * channels, std=[0.3] * channels).eval()
    file = plain(tmp_path, {prefix + k: v for k, v in theirs.model.state_dict().items()}, suffix)
    ours = open_weights(file, name, mean=[0.4] * channels, std=[0.3] * channels)
    x = torch.rand(2, channels, 32, 32)
    assert torch.equal(ours(x), theirs(x)) and not ours.training
    assert ours.metadata["num_classes"] == classes and load_weights(save_weights(ours, tmp_path / "ours.safetensors"))


@pytest.mark.parametrize("around", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {"lr": 0.1}},
                                    lambda s: {"net": {"model_state_dict": s}}])
def test_weights_within_a_dictionary_are_found(tmp_path, around):
    theirs = small().eval()
    ours = open_weights(plain(tmp_path, around(theirs.model.state_dict())), "wrn_10_1_cifar")
    assert same(ours.model, theirs.model) and ours.metadata["in_chans"] == 1


def test_normalisation_in_the_file_is_used_unless_said_otherwise(tmp_path):
    theirs = create("small_cnn_mnist", in_chans=1, mean=[0.2], std=[0.6])
    file = plain(tmp_path, theirs.state_dict())  # as of the wrapped network: mean, std, model.…
    assert same(open_weights(file, "small_cnn_mnist"), theirs)
    assert_close(open_weights(file, "small_cnn_mnist", mean=[0.5]).mean.item(), 0.5)
    known = open_weights(plain(tmp_path, create("resnet18").model.state_dict()), "resnet18")
    assert_close(known.mean.flatten().tolist(), [0.485, 0.456, 0.406], atol=1e-6, rtol=0)  # as timm records


def test_old_files_lack_counters_and_half_files_are_read(tmp_path):
    theirs = small()
    state = {k: v.half() for k, v in theirs.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    ours = open_weights(plain(tmp_path, state), "wrn_10_1_cifar")
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    for p, q in zip(ours.model.parameters(), theirs.model.parameters()): assert_close(p, q, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("change, words", [
    (lambda s: {k: v for k, v in s.items() if "conv1" not in k}, "tensors of .* lack|lack, such as"),
    (lambda s: s | {"extra.weight": torch.ones(2)}, "1 are unknown to it, such as extra.weight"),
    (lambda s: s | {next(iter(s)): torch.ones(3)}, "1 have another shape, such as"),
    (lambda s: {"epoch": 3}, "no tensors by name"), (lambda s: [1, 2], "no tensors by name"), (lambda s: small(), "no file of tensors alone")])
def test_what_does_not_fit_is_said_in_a_line(tmp_path, change, words):
    file = plain(tmp_path, change(small().model.state_dict()))
    with pytest.raises(ValueError, match=words) as error: open_weights(file, "wrn_10_1_cifar")
    assert "\n" not in str(error.value) and "theirs.pth" in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    for suffix, content in ((".pth", b""), (".pth", b"PK\x03\x04rubbish"), (".safetensors", b"\0" * 9), (".pt", b"\x80\x04K\x01.")):
        (tmp_path / f"x{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\{suffix} is no file of tensors|holds no tensors|is damaged"): open_weights(tmp_path / f"x{suffix}", "resnet18")
    with pytest.raises(FileNotFoundError, match="no weights at"): open_weights(tmp_path / "nowhere.pth", "resnet18")
    file = plain(tmp_path, small().model.state_dict())
    with pytest.raises(ValueError, match="--model NAME"): open_weights(file)
    with pytest.raises(ValueError, match="no classifier"): open_weights(file, "glow")
    with pytest.raises(ValueError, match="unknown model"): open_weights(file, "wrn_10_l_cifar")
    with pytest.raises(ValueError, match="has 3 classes, not 4"): open_weights(file, "wrn_10_1_cifar", num_classes=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_on_reading(tmp_path, suffix, bad):
    state = {k: v.clone() for k, v in small().model.state_dict().items()}
    state["fc.weight"][0, 0] = bad
    file = plain(tmp_path, state, suffix)
    with pytest.raises(ValueError, match=rf"theirs\{suffix} .*'fc.weight'"): open_weights(file, "wrn_10_1_cifar")


def test_names_that_do_not_fit_are_told_from_a_wrong_number_of_classes(tmp_path):
    file = plain(tmp_path, {"net." + k: v for k, v in small().model.state_dict().items()})
    with pytest.raises(ValueError, match="unknown to it, such as net."): open_weights(file, "wrn_10_1_cifar", num_classes=3)


@pytest.mark.parametrize("said, word", [({"mean": [0.5], "std": [0.5]}, "mean"), ({"mean": [0.5] * 3, "std": [0.5]}, "std")])
def test_moments_are_asked_for_every_channel(tmp_path, said, word):
    file = plain(tmp_path, create("wrn_10_1_cifar").model.state_dict())
    with pytest.raises(ValueError, match=f"3 channels.* --{word}"): open_weights(file, "wrn_10_1_cifar", **said)


def test_a_file_of_ours_names_its_network(tmp_path):
    ours = save_weights(small(), tmp_path / "ours.safetensors")
    assert names_its_network(ours) and not names_its_network(plain(tmp_path, small().model.state_dict(), ".safetensors"))
    assert same(open_weights(ours), load_weights(ours))
    with pytest.raises(ValueError, match="brings its own network"): open_weights(ours, "wrn_10_1_cifar")


def test_a_pickle_is_never_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    torch.save({"state_dict": {"a": torch.ones(1)}, "harm": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(ValueError, match="no file of tensors alone"): open_weights(tmp_path / "harm.pth", "resnet18")
    assert not (tmp_path / "harmed").exists()


def test_training_starts_from_a_plain_file(tmp_path):
    theirs = create("small_cnn_mnist", in_chans=1, num_classes=4)
    file = plain(tmp_path, theirs.model.state_dict())
    s = setting("jat/natural", data="digits", init=file, model="small_cnn_mnist", mean=[0.1], std=[0.3])
    before, after = theirs.model.state_dict(), s.model.model.state_dict()
    fresh = [k for k in after if after[k].shape != before[k].shape]
    assert len(fresh) == 2 and all(torch.equal(after[k], before[k]) for k in after if k not in fresh)
    assert s.recipe.model == "small_cnn_mnist" and "start" in s.model.metadata and s.model.training
    assert_close(s.model.mean.item(), 0.1)
    with pytest.raises(ValueError, match="--init FILE"): setting("jat/natural", data="digits", mean=[0.1])
    colour = plain(tmp_path, create("small_cnn_mnist", in_chans=3).model.state_dict())
    with pytest.raises(ValueError, match="3 channels, digits has 1"):
        setting("jat/natural", data="digits", init=colour, model="small_cnn_mnist")


@pytest.mark.parametrize("other", ["ema", "state_dict_ema"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_of_two_sets_of_weights_says_which_is_taken(tmp_path, other, nested):
    ours, averaged = (small().model.state_dict() for _ in range(2))
    file = plain(tmp_path, {"model": ours, other: {"state_dict": averaged} if nested else averaged, "optimizer": {"state": {0: {"m": torch.ones(1)}}}})
    with pytest.warns(UserWarning, match=rf"theirs.pth holds several sets of weights: 'model' is taken, '{other}' is not.*\['{other}'\]") as told:
        assert tensor_hash(open_weights(file, "wrn_10_1_cifar").model.state_dict()) == tensor_hash(ours)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    torch.save(torch.load(file)[other], tmp_path / "other.pth")  # what the message says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tensor_hash(open_weights(tmp_path / "other.pth", "wrn_10_1_cifar").model.state_dict()) == tensor_hash(averaged)


def test_a_folder_is_no_file_of_weights(tmp_path):
    save_weights(small(), tmp_path / "best.safetensors")
    for read in (open_weights, load_weights):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is a folder: .*{tmp_path.name}.best.safetensors"): read(tmp_path)
