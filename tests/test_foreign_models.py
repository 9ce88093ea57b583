"""Models that others wrote: outputs in other forms, other number formats, in-place work, hidden parts, threads."""
import copy
import functools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_training import images
from torch import nn
from torch.testing import assert_close

from jat_nb.ascent import logits_of
from jat_nb.attacks import double_pass, ggsm, pgd
from jat_nb.batches import Batch
from jat_nb.cli import jat_attack, jat_eval, jat_train
from jat_nb.evaluation import clean, evaluate, pgd_at
from jat_nb.losses import check_logits, cross_entropy, kl_divergence, soft_cross_entropy
from jat_nb.masking import transfer
from jat_nb.models import Logits, NormalizedModel, create, frozen
from jat_nb.objectives import OBJECTIVES, adversarial, average, jat, maximum, natural
from jat_nb.recipes import Recipe
from jat_nb.shell import _Strength
from jat_nb.training import fit
from jat_nb.weights import open_weights, read_tensors

X, Y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
SHORT = dict(epochs=1, batch_size=16, probe="pgd", probe_options={"steps": 1}, probe_images=10)
ATTACK = {"attack": [["pgd", {"steps": 1}]]}
RECIPES = [Recipe(**SHORT), Recipe(objective="adversarial", attacks=ATTACK, **SHORT),
           Recipe(objective="jat", attacks=ATTACK, **SHORT), Recipe(objective="average", attacks=ATTACK, **SHORT)]


class Around(nn.Module):
    "A small network whose forward is given."

    def __init__(self, forward, classes=3):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.how = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), forward

    def forward(self, x):
        return self.how(self.net, x)


plain = lambda net, x: net(x)
FORMS = {"tuple": lambda net, x: (net(x), x.mean()), "list": lambda net, x: [net(x)], "dict": lambda net, x: {"logits": net(x)},
         "object": lambda net, x: SimpleNamespace(logits=net(x), attentions=None),
         "one logit": lambda net, x: net(x)[:, :1], "flat": lambda net, x: net(x)[:, 0]}


# -- F12: outputs are checked wherever a model is asked

@pytest.mark.parametrize("form", FORMS)
def test_other_outputs_are_refused_by_name_everywhere(form):
    model, y, data = Around(FORMS[form]), Y % 2, images()
    for work in (lambda: pgd(model, X, y, steps=1), lambda: evaluate(model, X, y, {"clean": clean}),
                 *(functools.partial(fit, model, data, recipe) for recipe in RECIPES),
                 lambda: logits_of(model, X), lambda: cross_entropy(model(X), y),
                 lambda: soft_cross_entropy(model(X), torch.eye(3)[y]), lambda: kl_divergence(model(X), model(X))):
        with pytest.raises(ValueError, match=r"got .*wrap the model; jat_nb.models.Logits\(model\)"):
            work()


@pytest.mark.parametrize("form", FORMS)
def test_the_adapter_mends_every_form(form):
    model, y = Logits(Around(FORMS[form])), Y % 2
    logits = logits_of(model, X)
    inner = model.model.net(X)
    assert_close(logits, inner if "logit" not in form and form != "flat" else torch.stack([0 * inner[:, 0], inner[:, 0]], 1))
    assert evaluate(model, X, y, {"PGD": pgd_at(0.1, 2)}).n == 6
    data = images()
    before = copy.deepcopy(model.state_dict())
    fit(model, data, RECIPES[0] if logits.shape[1] == 3 else RECIPES[0]) if logits.shape[1] == 3 else None
    assert logits.shape[1] == 2 or not torch.equal(before["model.net.1.weight"], model.state_dict()["model.net.1.weight"])


def test_one_logit_is_the_logistic_loss_with_the_same_gradient():
    one = Around(plain, 1)
    two, y = Logits(one), Y % 2
    x = X.clone().requires_grad_()
    ours, theirs = cross_entropy(two(x), y), F.binary_cross_entropy_with_logits(one(x)[:, 0], y.float(), reduction="none")
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)))
    assert_close(two(x).softmax(1)[:, 1], one(x)[:, 0].sigmoid())
    # the attack that maximises the logistic loss of a linear model, in closed form
    w, inside = one.net[1].weight.view(1, 8, 8), 0.3 + 0.4 * X
    expected = inside + 0.1 * (1 - 2 * y).view(-1, 1, 1, 1) * w.sign()
    assert_close(pgd(two, inside, y, eps=0.1, step=0.05, steps=5), expected.detach())


def test_the_adapter_refuses_what_holds_no_logits():
    for form in (lambda net, x: {"scores": net(x)}, lambda net, x: None, lambda net, x: ("a",)):
        with pytest.raises(ValueError, match="found no logits in"): Logits(Around(form))(X)
    for form, seen in ((lambda net, x: net(x)[:, :, None], r"\(6, 3, 1\)"), (lambda net, x: net(x)[:2], r"\(2, 3\)"),
                       (lambda net, x: net(x).long(), "torch.int64"), (lambda net, x: net(x).mean(), r"\(\)")):
        with pytest.raises(ValueError, match=rf"found no logits in .*{seen}.*return \(6, K\)"):  # not: wrap it in Logits
            evaluate(Logits(Around(form)), X, Y, {"Clean": clean})
    assert logits_of(NormalizedModel(Logits(Around(FORMS["object"])), [0.5], [0.2]), X).shape == (6, 3)
    model = Around(plain)
    assert torch.equal(Logits(model)(X), model(X))


@pytest.mark.parametrize("bad", [torch.zeros(6), torch.zeros(5, 3), torch.zeros(6, 3, 1, 1), torch.zeros(6, 3).long(),
                                 torch.zeros(6, 1), None, "logits", {"a": 1}], ids=str)
def test_check_logits_lets_only_scores_through(bad):
    check_logits(torch.zeros(6, 2), 6)
    with pytest.raises(ValueError, match=r"logits \(6, K\)"): check_logits(bad, 6)


def rude(net, x):
    "Standardises in place, as some published models do."
    return net(x.sub_(0.5).mul_(2))


@pytest.mark.parametrize("name", ["natural", "adversarial", "jat", "average", "maximum", "srt", "trades", "klr", "mart",
                                  "randomized_la", "mixup", "robust_mixup", "attack_then_mix", "iat", "uat"])
def test_no_objective_lets_a_model_spoil_the_batch(name):
    polite, spoiling, seen = Around(lambda net, x: rude(net, x.clone())), Around(rude), X.clone()
    found = []
    for model in (polite, spoiling):
        attack = lambda model, x, y, **o: pgd(model, x, y, steps=1, **{k: v for k, v in o.items() if k in ("generator", "target")})
        batch = Batch(X.clone(), Y, torch.Generator().manual_seed(0))
        try:
            roles = {"attack": attack} if name not in ("natural", "mixup", "randomized_la") else {}
            loss = OBJECTIVES[name](model, batch, **roles)
        except TypeError:
            pytest.skip("needs more than an attack")
        assert torch.equal(batch.x, seen)
        found.append(loss.detach())
    assert_close(*found, rtol=0, atol=0)


def test_a_model_that_works_in_place_is_judged_as_its_polite_twin():
    polite, spoiling = Around(lambda net, x: rude(net, x.clone())), Around(rude)
    suite = {"clean": clean, "PGD": pgd_at(0.1, 3)}
    for options in ({}, {"fast": True}):
        assert torch.equal(*(evaluate(m, X, Y, suite, **options).correct for m in (polite, spoiling)))


# -- F13: causes and mends instead of foreign errors

@pytest.mark.parametrize("forward", [lambda net, x: net(x).detach(), lambda net, x: torch.no_grad()(net)(x),
                                     lambda net, x: torch.from_numpy(net(x).detach().numpy()), lambda net, x: net(x.detach())],
                         ids=["detach", "no_grad", "numpy", "input"])
def test_no_gradient_is_named_with_a_mend(forward):
    model = Around(forward)
    for attack in (pgd, ggsm, double_pass):
        with pytest.raises(ValueError, match="no gradient in the images: .* transfer .* smooth stand-in"):
            attack(model, X, Y, steps=1)
    with pytest.raises(ValueError, match="no gradient in the images"): evaluate(model, X, Y, {"PGD": pgd_at(0.1, 1)})
    assert evaluate(model, X, Y, {"clean": clean}).n == 6, "without an attack no gradient is needed"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_quantised_network_has_no_gradient_and_is_judged_by_transfer():
    "Its products are in whole numbers: attacked only through its original, left as found, its own verdict counts."
    torch.manual_seed(0)
    original = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(original, {nn.Linear}, dtype=torch.qint8)
    y = quantised(X).argmax(1)
    for attack in (pgd, ggsm, double_pass):
        with pytest.raises(ValueError, match="in whole numbers.*jat_nb.masking.transfer"): attack(quantised, X, y, steps=1)
    assert evaluate(quantised, X, y, {"Clean": clean}).accuracy.item() == 1
    moved = transfer(original, quantised, X, y, {"PGD": pgd_at(1.0)})
    assert moved.accuracy.item() == 0 and not quantised.training


def test_no_gradient_in_the_weights_is_named():
    with pytest.raises(ValueError, match="no gradient in the weights: .* no_grad"):
        fit(Around(lambda net, x: net(x).detach()), images(), RECIPES[0])
    with pytest.raises(ValueError, match="nn.Module with weights"): fit(nn.Flatten(), images(), RECIPES[0])


def test_parameters_that_no_image_reaches_are_named():
    model = Around(lambda net, x: net.learnt.expand(len(x), 3) * 1)
    model.net.learnt = torch.zeros(1, 3, requires_grad=True)  # no parameter: it keeps asking for a gradient
    with pytest.raises(ValueError, match="no gradient in the images"): pgd(model, X, Y, steps=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats_that_do_not_go_together_are_named(dtype):
    model = Around(plain).to(dtype)
    for work in (lambda: pgd(model, X, Y, steps=1), lambda: evaluate(model, X, Y, {"clean": clean}),
                 lambda: fit(model, images(), RECIPES[0])):
        with pytest.raises(ValueError, match=rf"weights are {dtype} and the images torch.float32: .*model.float\(\)"): work()
    with pytest.raises(ValueError, match="weights are torch.float32 and the images torch.float64"):
        pgd(Around(plain), X.double(), Y, steps=1)
    assert pgd(Around(plain).double(), X.double(), Y, steps=1).dtype == torch.float64


def test_a_model_that_converts_by_itself_is_left_alone():
    model = Around(lambda net, x: net(x.double()).float()).double()
    assert evaluate(model, X, Y, {"PGD": pgd_at(0.1, 1)}).n == 6
    with pytest.raises(RuntimeError, match="planted"): logits_of(Around(lambda net, x: (_ for _ in ()).throw(RuntimeError("planted"))), X)


@pytest.mark.parametrize("x, y, message", [
    (X.numpy(), Y, "images as a tensor, got ndarray: use torch.as_tensor"), (X.tolist(), Y, "got list"),
    (X, Y.numpy(), "labels as a tensor, got ndarray"), (X, Y.tolist(), "got list"), (X, None, "labels as a tensor, got NoneType")])
def test_arrays_and_lists_are_refused_with_the_mend(x, y, message):
    for work in (lambda: pgd(Around(plain), x, y, steps=1),
                 lambda: evaluate(Around(plain), x, y, {"clean": clean}) if y is not None or isinstance(x, torch.Tensor) else 1):
        with pytest.raises(ValueError, match=message): work()


# -- F14 and G15: everything that a call reaches is held still

def norm():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))


def facts(net):
    return ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
            [b.clone() for b in net.buffers()], [p.grad for p in net.parameters()])


@pytest.mark.parametrize("how", ["list", "dict", "method", "partial", "closure", "global", "nested"])
def test_hidden_networks_are_left_as_found(how):
    net = norm()
    keeper = Around(lambda own, x: net(x))
    if how == "list": keeper.others, model = [net], keeper
    if how == "dict": keeper.others, model = {"a": net}, keeper
    if how == "nested":
        keeper.others = (net,)
        model = nn.Sequential(keeper)
    if how == "method": model = net.forward
    if how == "partial": model = functools.partial(lambda network, x: network(x), net)
    if how == "closure": model = lambda x: net(x)
    if how == "global":
        globals()["GLOBAL"] = net
        def model(x): return GLOBAL(x)  # noqa: F821
    before = facts(net)
    first, second = (pgd(model, X, Y, steps=2, random_start=False) for _ in range(2))
    assert torch.equal(first, second), "dropout is silent"
    for a, b in zip(before, facts(net)):
        assert all(torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v for u, v in zip(a, b))


def test_weights_of_inference_mode_are_refused_before_anything_is_touched():
    with torch.inference_mode():
        head = nn.Linear(64, 3)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), head)
    stats = model[0].running_mean
    with pytest.raises(ValueError, match="inference_mode .*: build or load the model outside"): pgd(model, X, Y, steps=1)
    assert all(m.training for m in model.modules()) and model[0].running_mean is stats
    assert model[0].weight.requires_grad


def test_threads_on_one_model_take_turns():
    model = norm()
    before, found, errors = facts(model), {}, []
    alone = pgd(model, X, Y, steps=3, generator=torch.Generator().manual_seed(0))

    def work(i):
        try:
            for _ in range(6):
                found[i] = pgd(model, X, Y, steps=3, generator=torch.Generator().manual_seed(0))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(timeout=60)
    assert not errors and len(found) == 4 and all(torch.equal(f, alone) for f in found.values())
    for a, b in zip(before, facts(model)):
        assert all(torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v for u, v in zip(a, b))


def test_threads_do_not_meet_inside_and_nesting_is_free():
    model, inside, most = norm(), [], []

    def work():
        for _ in range(50):
            with frozen(model), frozen(model):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(timeout=60)
    assert max(most) == 1 and len(most) == 200 and model.training
    with frozen(model), frozen(copy.deepcopy(model)), frozen(create("wrn_10_1_cifar")): pass


def test_threads_that_freeze_two_networks_in_opposite_order_do_not_wait_for_ever():
    first, second, done = norm(), norm(), []
    together = [threading.Event(), threading.Event()]

    def work(i, outer, inner):
        with frozen(outer):
            together[i].set()
            together[1 - i].wait(timeout=0.3)  # both hold one, where each network has a lock of its own
            with frozen(inner): done.append(i)

    threads = [threading.Thread(target=work, args=args, daemon=True) for args in ((0, first, second), (1, second, first))]
    for t in threads: t.start()
    for t in threads: t.join(timeout=3)
    assert sorted(done) == [0, 1] and first.training and second.training


def test_networks_that_share_a_part_take_turns():
    first, second, inside, most = norm(), norm(), [], []

    def work(held):
        for _ in range(50):
            with frozen(held):
                inside.append(1)
                most.append(len(inside))
                time.sleep(1e-4)
                inside.pop()

    holds = nn.ModuleList([first, second]), nn.ModuleList([second, first])
    threads = [threading.Thread(target=work, args=(held,), daemon=True) for held in holds]
    for t in threads: t.start()
    for t in threads: t.join(timeout=30)
    assert len(most) == 100 and max(most) == 1 and first.training and second.training


# -- Functions and words of one's own that do not fit: refused at the entry, with the mend

MADRY = Recipe(objective="adversarial", attacks=ATTACK, **SHORT)
def whole(model, x, y, *, target=None, generator=None): return x
def no_target(model, x, y, generator=None): return x
def no_generator(model, x, y): return x
def of_images(model, x, y): return cross_entropy(model(x), y).mean()
def vector(model, batch): return cross_entropy(model(batch.x), batch.y)
def number(model, batch): return vector(model, batch).mean().item()
def nothing(model, batch): pass
def own_logits(model, batch): return vector(model, batch).mean()
def own_role(model, batch, attack): return cross_entropy(model(attack(model, batch.x, batch.y)), batch.y).mean()
def trained(recipe=RECIPES[0], **given): return fit(Around(plain), images(), recipe, **given)
def loader(sides=(8, 9)): return torch.utils.data.DataLoader([(torch.rand(1, side, 8), 0) for side in sides], 2)
def judged(suite): return evaluate(Around(plain), X, Y, suite)


@pytest.mark.parametrize("work, message", [
    (lambda: trained(MADRY, attacks={"adversary": whole}), r"argument 'adversary': .*roles of attacks, here \['attack'\]"),
    (lambda: trained(attacks={"attack": whole}), r"argument 'attack': .*roles of attacks, here \[\]"),
    (lambda: trained(MADRY, attacks={"attack": no_target}), r"attacks\['attack'\] is called .*'target': def attack\(model, x, y, target=None"),
    (lambda: trained(MADRY, attacks={"attack": None}), r"attacks\['attack'\] must be a function of .*got NoneType"),
    (lambda: trained(Recipe(objective="trades", attacks=ATTACK, **SHORT), attacks={"attack": whole}), "unexpected keyword argument 'loss'"),
    (lambda: trained(objective=of_images), "'y': .*images and labels are batch.x and batch.y"),
    (lambda: trained(MADRY, objective=of_images), "the objective is called with .*batch.x and batch.y"),
    (lambda: trained(objective=own_role), r"missing a required argument: 'attack': .*here \['attack'\]"),
    (lambda: trained(objective="natural"), "the objective must be a function of .*got str"),
    (lambda: trained(objective=vector), r"got a tensor \(16,\): return the mean"),
    (lambda: trained(objective=number), r"got a float: return the mean"), (lambda: trained(objective=nothing), "got a NoneType"),
    (lambda: trained(probe=no_generator, validation=images(12, 1)), "the probe is called with .*'generator'"),
    (lambda: trained(validation=loader((8, 8))), r"at hand, got DataLoader: .*load\('folder:PATH'"),
    (lambda: fit(Around(plain), loader((8, 8)), RECIPES[0], validation=loader((8, 8))), "at hand, got DataLoader"),
    (lambda: fit(Around(plain), loader(), RECIPES[0]), r"several sizes: .*Resize\(64\), CenterCrop\(64\)"),
    (lambda: evaluate(Around(plain), loader(), suite={"Clean": clean}), r"several sizes: .*Resize\(64\)"),
    (lambda: trained("jat/madry"), r"expected a Recipe, got 'jat/madry': recipes\(\)\["), (lambda: trained({"epochs": 1}), "expected a Recipe, got {"),
    (lambda: trained(MADRY, attacks=[whole]), r"attacks by role, got list: pass attacks=\{"),
    (lambda: trained(on_epoch=True), r"on_epoch must be a function of \(row, network\), got bool"),
    (lambda: trained(on_epoch=lambda row: None), r"on_epoch is called with \(row, network\), and it has too many"),
    (lambda: trained(judge="accuracy"), r"the judge must be a function of \(model, validation, few\), got str"),
    (lambda: trained(patience=1.5, validation=images(12, 1)), "a whole number of at least 1, got 1.5"), (lambda: trained(patience="2", validation=images(12, 1)), "got '2'"),
    (lambda: fit(Around(plain), [], RECIPES[0]), "hold no batch"), (lambda: fit(Around(plain), torch.utils.data.DataLoader([], 4), RECIPES[0]), "hold no batch"),
    (lambda: fit(Around(plain).requires_grad_(False), images(), MADRY), r"every weight is frozen: .*requires_grad_\(True\)"),
    (lambda: fit(Around(plain).half(), images(), RECIPES[0], objective=own_logits), r"weights are torch.float16 .*model.float\(\)"),
    (lambda: evaluate(Around(plain), loader((8, 8))), r"attacks by name, got none: pass suite=\{"), (lambda: judged({}), "got none"),
    (lambda: judged({"mine": no_generator}), "attack 'mine' is called .*'generator'"), (lambda: judged({"mine": None}), "attack 'mine' .*NoneType"),
    (lambda: judged({"mine": [clean, 7]}), "attack 'mine' must be a function .*got int"),
    (lambda: judged({"mine": "pgd"}), "attack 'mine' must be a function .*got str")])
def test_what_does_not_fit_is_refused_with_its_mend(work, message):
    with pytest.raises(ValueError, match=message): work()


@pytest.mark.parametrize("result, message", [
    (lambda x: x + 1, "returned invalid images: .*from 1 to"), (lambda x: x * torch.nan, "returned invalid images: .*remove NaN"),
    (lambda x: x[:1], r"expected images \(16, 1, 8, 8\) torch.float32, got \(1, 1, 8, 8\)"), (lambda x: None, "got NoneType"),
    (lambda x: x.double(), "got .*torch.float64")])
def test_what_an_attack_returns_is_checked_in_training(result, message):
    with pytest.raises(ValueError, match=f"attack 'attack'.*{message}"):
        trained(MADRY, attacks={"attack": lambda model, x, y, target=None, generator=None: result(x)})


def test_functions_that_fit_are_not_refused():
    extra = lambda model, batch, attack, weight=1.0: weight * own_role(model, batch, attack)
    trained(objective=extra, attacks={"attack": no_generator})
    trained(MADRY, attacks={"attack": functools.partial(whole, target=None)})
    trained(MADRY, attacks={"attack": lambda model, x, y, **options: x}, probe=lambda model, x, y, generator: x)
    assert judged({"a": lambda *given, **_: given[1], "b": functools.partial(no_target)}).n == 6
    with pytest.raises(RuntimeError, match="planted"):
        evaluate(Around(plain), iter_that_fails(), suite={"Clean": clean})


def iter_that_fails():
    yield X, Y
    raise RuntimeError("planted")


@pytest.mark.parametrize("words, message", [
    ("--eps-pixel 300", "counts grey levels of 255, 0 or from 1 to 255, got 300"), ("--eps-pixel 0.03", "0.03 of the whole range is 7.65"),
    ("--eps-pixel 0.999", "0.999 of the whole range is 254.7"), ("--eps-pixel -1", "eps_pixel >= 0"), ("--eps-pixel nan", "eps_pixel >= 0"),
    ("--weights {grey} --model small_cnn_mnist --data folder:{set} --size 32", "judged from Python, by evaluate(Logits(network)"),
    ("--weights {one} --model test_resnet --data folder:{set} --size 32", "a network of one output"),
    ("--weights {one} --model my_net --data folder:{set}", "of your own class is trained and judged from Python, by fit and evaluate")])
def test_words_of_the_shell_that_do_not_fit_are_refused_with_their_mend(tmp_path, capsys, words, message):
    for name in "ab":
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "set" / "test" / name / "1.png")
    torch.save(create("small_cnn_mnist", in_chans=1, num_classes=2).model.state_dict(), tmp_path / "grey.pth")
    torch.save(create("test_resnet", num_classes=1).model.state_dict(), tmp_path / "one.pth")
    words = words.format(grey=tmp_path / "grey.pth", one=tmp_path / "one.pth", set=tmp_path / "set")
    assert jat_eval([*words.split(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_eps_pixel_takes_its_ends(tmp_path):
    assert [_Strength(eps_pixel=levels).budget("digits").eps_pixel for levels in (0, 1, 255)] == [0, 1 / 255, 1]


def test_an_own_class_is_no_name_for_training(capsys):
    assert jat_train("--recipe jat/natural --data digits --model my_net --out x".split()) == 2
    assert "by fit and evaluate" in capsys.readouterr().err


def test_classes_that_nobody_named_are_named_in_the_answer(tmp_path, capsys):
    torch.save(create("test_resnet", num_classes=2).model.state_dict(), tmp_path / "two.pth")
    for name in ("lily", "rose"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "in" / name / "1.png")
    words = f"--weights {tmp_path}/two.pth --model test_resnet --size 32 --images {tmp_path}/in --steps 1 --out {tmp_path}/out".split()
    assert jat_attack(words) == 0 and "--classes names the classes as their folders are called" in capsys.readouterr().out
    assert jat_attack([*words, "--classes", "lily", "rose"]) == 0
    said = capsys.readouterr().out
    assert "labelled by their folders" in said and "--classes" not in said


def test_the_layout_of_a_folder_is_in_the_help(capsys):
    for command, layout in ((jat_train, "PATH/train/CLASS and PATH/test/CLASS"), (jat_eval, "PATH/test/CLASS")):
        with pytest.raises(SystemExit): command(["--help"])
        assert layout in " ".join(capsys.readouterr().out.split())


def test_a_run_of_an_own_class_is_judged_as_the_message_says(tmp_path, capsys):
    model = Around(plain)
    fit(model, images(), RECIPES[0], validation=images(12, 1), out=tmp_path / "run")
    file = tmp_path / "run" / "last.safetensors"
    for command, words in ((jat_eval, f"{tmp_path}/run"), (jat_eval, f"--weights {file} --data digits --out {tmp_path}/x"),
                           (jat_attack, f"{tmp_path}/run --images {tmp_path}/run --out {tmp_path}/y")):
        assert command(words.split()) == 2
        said = capsys.readouterr().err
        assert "own class" in said and "load_state_dict(read_tensors(FILE)[0])" in said and said.count("\n") == 1
    again = Around(plain)
    again.load_state_dict(read_tensors(file)[0])
    assert evaluate(again, X, Y, {"Clean": clean}).n == 6 and torch.equal(again(X), model(X))


@pytest.mark.parametrize("words", ["", "--model resnet18"])
def test_weights_of_an_own_class_are_sent_to_python(tmp_path, capsys, words):
    torch.save(Around(plain).state_dict(), tmp_path / "own.pth")
    assert jat_eval(f"--weights {tmp_path}/own.pth {words} --data digits --out {tmp_path}/x".split()) == 2
    assert "own class is judged from Python" in capsys.readouterr().err


def test_one_output_is_attacked_from_python(tmp_path, capsys):
    torch.save(create("test_resnet", num_classes=1).model.state_dict(), tmp_path / "one.pth")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "in" / "1.png")
    words = f"--weights {tmp_path}/one.pth --model test_resnet --size 32 --images {tmp_path}/in --steps 1 --out {tmp_path}/out"
    assert jat_attack(words.split()) == 2
    assert "one output: attack it from Python, as double_pass(Logits(network), x, y)" in capsys.readouterr().err
    x = torch.rand(2, 3, 32, 32)
    assert double_pass(Logits(open_weights(tmp_path / "one.pth", "test_resnet")), x, torch.tensor([0, 1]), eps_pixel=0.1, eps_flow=0.5,
                       step_pixel=0.1, step_flow=0.5, steps=1).shape == x.shape
