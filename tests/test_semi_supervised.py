"""Few labels: what the trainer does with unlabelled images, teachers and parts, against loops written out here."""
import inspect
import json
import math
import shlex
from dataclasses import fields, replace
from functools import partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE

from jat_nb.attacks import ATTACKS, pgd
from jat_nb.batches import Batch, batches, num_batches, shares
from jat_nb.catalogue import TIER, _planned, adapt, recipe, setting
from jat_nb.checkpoints import run_identity
from jat_nb.cli import jat_train
from jat_nb.data import ImageSet, Unlabelled, few_labels, load
from jat_nb.models import create
from jat_nb.objectives import OBJECTIVES, OWN_LOSS, adversarial, natural, networks, roles
from jat_nb.papers.srt import COUNTS, LAMBDAS, LENGTHS, RATES, RECIPES
from jat_nb.recipes import Recipe, bind
from jat_nb.records import read_jsonl
from jat_nb.rigid import SEARCHES, worst_of_k
from jat_nb.semi_supervised import rst, srt, trades, uat
from jat_nb.training import fit
from jat_nb.updates import train_step
from jat_nb.weights import pretrained
from torch import nn

WEAK = [["pgd", {"eps": 0.1, "step": 0.05, "steps": 2, "start_std": 0.001}]]
PLAN = Recipe(objective="srt", attacks={"attack": WEAK}, labelled=0.2, unlabelled=0.8, epochs=1, batch_size=40,
              lr=0.05, augment=(), data="digits", model="wrn_10_1_cifar")


def net(seed=0, norm="group"):
    torch.manual_seed(seed)
    return create("wrn_10_1_cifar", in_chans=1, norm=norm)


@pytest.fixture(scope="module")
def parts():
    return few_labels(load("digits"), 60, 140)


def test_no_label_can_be_read(parts):
    _, unknown = parts
    assert {f.name for f in fields(Unlabelled)} == {"name", "images"}
    batch = next(batches(parts[0], 40, unlabelled=unknown))
    assert len(batch.y) == len(batch.x) == 12 and len(batch.u) == 28
    assert not {"labels", "y"} & set(vars(unknown))


@pytest.mark.parametrize("objective", ["srt", "rst", "uat"])
def test_labels_of_the_unlabelled_part_change_nothing(objective):
    data = load("digits").subset(200)
    data = replace(data, images=data.images, labels=data.labels)
    other = replace(data, labels=torch.cat([data.labels[:60], (data.labels[60:] + 3) % 10]))
    trained = []
    for source in (data, other):
        known, unknown = few_labels(source, 60, 140)
        needs = {} if objective == "srt" else {"teacher": net(1)}
        plan = replace(PLAN, objective=objective, needs=dict.fromkeys(needs, "srt/mnist-long-standard"))
        model = net()
        fit(model, known, plan, unlabelled=unknown, needs=needs)
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_rt_is_srt_without_unlabelled_images_to_the_bit(parts):
    known, unknown = parts
    empty = Unlabelled("digits", unknown.images[:0])
    models = [net(norm="batch") for _ in range(2)]
    fit(models[0], known, replace(PLAN, unlabelled=0.0))
    fit(models[1], known, PLAN, unlabelled=empty)
    torch.testing.assert_close(*(m.state_dict() for m in models), rtol=0, atol=0)
    assert run_identity(PLAN, models[0], known, unlabelled=empty) == run_identity(PLAN, models[0], known)


@pytest.mark.parametrize("objective", ["srt", "uat", "rst"])
def test_images_that_a_recipe_counts_on_are_not_left_out_in_silence(parts, objective):
    needs = {} if objective == "srt" else {"teacher": net(1)}
    plan = replace(PLAN, objective=objective, needs=dict.fromkeys(needs, "srt/mnist-long-standard"), unlabelled=0.25)
    before = net().state_dict()
    model = net()
    with pytest.raises(ValueError, match="share of 0.25 of the images without their labels.*pass unlabelled=.*empty set"):
        fit(model, parts[0], plan, needs=needs)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert len(fit(net(), parts[0], replace(plan, unlabelled=0.0), needs=needs)) == 1


@pytest.mark.parametrize("name", ["srt", "klr", "trades", "rst", "uat", "mart", "iat", "robust_mixup", "attack_then_mix", "adversarial", "jat", "average", "maximum"])
def test_who_gives_attacks_a_loss_of_its_own(parts, name):
    seen, objective = [], OBJECTIVES[name]
    def spy(model, x, y, *, loss=None, **options):
        seen.append(loss)
        return x
    needs = {keyword: net(1) for keyword in networks(objective)}
    attacks = dict.fromkeys(roles(objective) or ("attack", "other"), spy)
    objective(net(), next(batches(parts[0], 20, unlabelled=parts[1] if name == "srt" else None)), **attacks, **needs)
    assert any(map(callable, seen)) == (name in OWN_LOSS) and seen
    assert set(OWN_LOSS) <= set(OBJECTIVES)


@pytest.mark.parametrize("name", ALONE)
def test_who_shows_a_loss_other_images_than_the_batch(name):
    "Attacks that are no searches may be given a loss that belongs to the images, each in its place."
    attack, x, y, seen = ATTACKS[name], torch.full((3, 1, 6, 6), 0.5), torch.tensor([0, 1, 2]), []
    def loss(logits, labels):
        seen.append(torch.equal(labels, y))
        return F.cross_entropy(logits, labels, reduction="none")
    short = {key: 1 for key in ("steps", "restarts") if key in attack.__kwdefaults__}
    attack(nn.Flatten(), x, y, loss=loss, generator=torch.Generator(), **short)
    assert all(seen) == (name not in SEARCHES) and seen and set(SEARCHES) <= set(ATTACKS)


@pytest.mark.parametrize("attack, options", [("grid_adv", {"n_deg": 3}), ("pgd_plus", {"eps": 0.1}), ("worst_of_k", {"k": 4}), ("rand_adv", {})])
@pytest.mark.parametrize("objective", OWN_LOSS)
def test_a_search_cannot_rank_by_a_loss_of_the_batch(parts, objective, attack, options):
    known = {"teacher": "srt/mnist-long-standard", "flow": "ijsat/glow"}
    needs = {keyword: known[keyword] for keyword in networks(OBJECTIVES[objective])}
    chain = [WEAK[0], [attack, options]]
    with pytest.raises(ValueError, match=f"objective '{objective}' .* attack '{attack}' tries copies of them.*'rigid' for movements"):
        Recipe(objective=objective, attacks={"attack": chain}, needs=needs, epochs=1)
    climbing = {"attack": [WEAK[0], ["rigid", {"steps": 2}]]}
    assert Recipe(objective=objective, attacks=climbing, needs=needs, epochs=1).attacks == climbing
    if "flow" in needs: return  # refuses before it asks the attack: a classifier is no flow
    more = {"teacher": net(1)} if needs else {}
    with pytest.raises(ValueError, match="attacks that search copy"):  # given as a function: at the first batch, with the mend
        OBJECTIVES[objective](net(), next(batches(parts[0], 20)), partial(ATTACKS[attack], **options), **more)


@pytest.mark.parametrize("labelled_only", [True, False])
def test_concat_is_one_pass_of_the_network(parts, labelled_only):
    "The published code: batch statistics of labelled and attacked images together."
    model, twin = net(2, norm="batch"), net(2, norm="batch")
    b = next(batches(parts[0], 40, unlabelled=None if labelled_only else parts[1], shuffle=True, seed=5))
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, output: sizes.append((module.training, len(output))))
    loss = srt(model, b, wavy, weight=0.7, reduction="concat")
    handle.remove()
    own = twin.eval()(b.mixed).argmax(1)
    twin.train()
    all_at_once = torch.cat([b.x, (b.mixed + 0.1 * torch.sin(40 * b.mixed)).clamp(0, 1)])
    each = F.cross_entropy(twin(all_at_once), torch.cat([b.y, own]), reduction="none")
    torch.testing.assert_close(loss, (each[:len(b.y)].sum() + 0.7 * each[len(b.y):].sum()) / len(each), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-5)
    assert sizes == [(False, len(b.mixed)), (True, len(b.y) + len(b.mixed))]


def wavy(model, x, y, **options):
    return (x + 0.1 * torch.sin(40 * x)).clamp(0, 1)


@pytest.mark.parametrize("reduction", ["separate", "concat"])
def test_trainer_does_what_equation_9_says(parts, reduction):
    known, unknown = parts
    plan = replace(PLAN, objective_options={"weight": 0.4, "reduction": reduction}, schedule="constant",
                   epochs=None, iterations=2)  # every update makes a rounding some twenty times as large
    model, twin = net(), net()
    fit(model, known, plan, unlabelled=unknown, attacks={"attack": wavy})
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    for b in islice(batches(known, 40, unlabelled=unknown, shuffle=True, seed=(0, 0)), 2):
        x = torch.cat([b.x, b.u])
        own = twin.eval()(x).argmax(1)
        twin.train()
        x_adv = (x + 0.1 * torch.sin(40 * x)).clamp(0, 1)
        answers = (twin(b.x), twin(x_adv)) if reduction == "separate" else twin(torch.cat([b.x, x_adv])).tensor_split([len(b.x)])
        right = F.cross_entropy(answers[0], b.y, reduction="none")
        same = 0.4 * F.cross_entropy(answers[1], own, reduction="none")
        both = right.mean() + same.mean() if reduction == "separate" else (right.sum() + same.sum()) / (len(right) + len(same))
        optimizer.zero_grad()
        both.backward()
        optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-4)


def still(model, x, y, **options):
    return x


@pytest.mark.parametrize("accumulate", [2, 3, 5])
@pytest.mark.parametrize("name", ["srt", "rst", "uat"])
def test_parts_of_a_batch_add_up(parts, name, accumulate):
    batch = next(batches(parts[0], 40, unlabelled=parts[1]))
    options = {"teacher": net(1)} if name != "srt" else {"reduction": "concat"}
    found = []
    for n in (1, accumulate):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = train_step(model, batch, optimizer, partial(OBJECTIVES[name], **options), {"attack": still}, accumulate=n)
        found.append((loss, model.state_dict()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(found[0][1]), dict(found[1][1]), rtol=1e-3, atol=1e-5)


def test_worst_of_one_without_limits_is_plain_training(parts):
    model, batch = net(), next(batches(parts[0], 40, unlabelled=parts[1]))
    idle = partial(worst_of_k, k=1, max_deg=0.0, max_px=0.0)
    torch.testing.assert_close(adversarial(model, batch, idle), natural(model, batch), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(srt(model, batch, idle), srt(model, batch, still), rtol=1e-4, atol=1e-5)
    busy = partial(worst_of_k, k=1)
    assert (adversarial(model, batch, busy) - natural(model, batch)).abs() > 0.01


def test_a_killed_run_with_unlabelled_images_ends_at_the_same_bits(parts, tmp_path):
    known, unknown = parts
    whole = net(norm="batch")
    history = fit(whole, known, replace(PLAN, epochs=2), unlabelled=unknown)
    sliced = []
    while len(sliced) < 2:
        again = net(norm="batch")
        sliced = fit(again, known, replace(PLAN, epochs=2), unlabelled=unknown, out=tmp_path / "run", seconds=0)
    torch.testing.assert_close(whole.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert [r["loss"] for r in sliced] == [r["loss"] for r in history]
    other = Unlabelled("digits", unknown.images.flip(0))
    with pytest.raises(ValueError, match="unlabelled"): fit(net(), known, replace(PLAN, epochs=2), unlabelled=other, out=tmp_path / "run")


def test_one_answer_for_all_images_is_on_record(parts):
    known, unknown = parts
    model = net()
    nn.init.zeros_(model.model.fc.weight)
    with torch.no_grad(): model.model.fc.bias[3] = 50
    rows = fit(model, known, replace(PLAN, lr=1e-6), unlabelled=unknown, validation=known)
    assert rows[-1]["one_answer"] is True
    rows = fit(pretrained("digits-natural"), known, replace(PLAN, lr=1e-6), unlabelled=unknown, validation=known)
    assert rows[-1]["one_answer"] is False


@pytest.mark.parametrize("change, message", [
    (dict(labelled=0.0), "labelled"), (dict(labelled=0.5, unlabelled=0.6), "labelled"), (dict(unlabelled=-0.1), "labelled"),
    (dict(needs={"teacher": "srt/x"}), "stand on the networks"), (dict(objective="rst"), "stand on the networks")])
def test_recipes_refuse(change, message):
    with pytest.raises(ValueError, match=message): replace(PLAN, **change)


def test_a_missing_standard_model_is_named_with_its_command(tmp_path, capsys):
    words = ["--recipe", "srt/mnist-long-rst", "--data", "digits", "--tier", "smoke", "--out", str(tmp_path / "a")]
    assert jat_train(words) == 2
    said = capsys.readouterr().err
    assert "--recipe srt/mnist-long-standard --out FOLDER --data digits --tier smoke" in said and "--needs teacher=FOLDER" in said


def test_the_command_that_a_refusal_names_makes_the_network_that_was_missing(tmp_path, capsys):
    words = ["--recipe", "srt/mnist-long-rst", "--data", "digits", "--tier", "smoke", "--out", str(tmp_path / "a"), "--threads", "1"]
    assert jat_train(words) == 2
    named = capsys.readouterr().err.split("train it with jat_train ")[1].split(" and pass ")[0]
    teacher = tmp_path / "teacher"
    assert jat_train([*shlex.split(named.replace("FOLDER", str(teacher))), "--threads", "1", "--set", "epochs=1"]) == 0
    assert jat_train([*words, "--needs", f"teacher={teacher}", "--set", "epochs=1"]) == 0


def test_a_network_that_needs_another_is_trained_from_the_command_line(tmp_path, capsys):
    tail = ["--data", "digits", "--tier", "smoke", "--model", "wrn_10_1_cifar", "--threads", "1", "--set", "epochs=1"]
    teacher = tmp_path / "teacher"
    assert jat_train(["--recipe", "srt/mnist-long-standard", "--out", str(teacher), *tail]) == 0
    assert jat_train(["--recipe", "srt/mnist-long-uat", "--needs", f"teacher={teacher}", "--out", str(tmp_path / "uat"), *tail]) == 0
    assert len(read_jsonl(tmp_path / "uat" / "log.jsonl")) == 1
    assert jat_train(["--recipe", "srt/mnist-long-uat", "--needs", f"teacher={tmp_path / 'uat'}", "--out", str(tmp_path / "b"), *tail]) == 2
    assert "is a run of 'srt/mnist-long-uat'" in capsys.readouterr().err


def test_settings_hand_out_the_first_images():
    few = setting("srt/mnist-long-srt", data="digits", images=300)
    rest = load("digits").split(32)[0]
    labelled, unlabelled = len(few.train), len(few.unlabelled)
    assert (labelled, unlabelled) == (50, 250)
    assert torch.equal(few.train.images, rest.images[:labelled]) and torch.equal(few.train.labels, rest.labels[:labelled])
    assert torch.equal(few.unlabelled.images, rest.images[labelled:labelled + unlabelled])
    assert setting("srt/mnist-long-at", data="digits", images=300).unlabelled is None
    with pytest.raises(ValueError, match="lack"): few_labels(load("digits"), 3, 0)


@pytest.mark.parametrize("m, n_l, n_u, expected", [(128, 10_000, 40_000, (25, 103)), (128, 10_000, 50_000, (21, 107)),
                                                   (128, 10, 10_000, (1, 127)), (64, 100, 0, (64, 0))])
def test_shares(m, n_l, n_u, expected):
    assert shares(m, n_l, n_u) == expected


def test_trades_divergence_is_climbed_and_vanishes_at_the_image(parts):
    model, batch = net(), next(batches(parts[0], 40))
    assert torch.isclose(trades(model, batch, still), F.cross_entropy(model(batch.x), batch.y), atol=1e-6)
    seen = []
    def spy(model, x, y, *, loss, **options):
        seen.append(loss(model(x), y).abs().max().item())
        return x
    trades(model, batch, spy)
    assert max(seen) < 1e-5


def test_teachers_are_left_alone(parts):
    teacher, batch = net(1, norm="batch").train(), next(batches(parts[0], 40, unlabelled=parts[1]))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    for objective in (rst, uat): objective(net(), batch, still, teacher=teacher).backward()
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())


def test_every_recipe_of_the_paper_binds_and_equal_updates_are_equal():
    for name, r in RECIPES.items(): bind(r, dict.fromkeys(r.needs, nn.Identity()))
    for data in ("cifar10", "mnist"):
        for weight in LAMBDAS["pixel"]:
            rt, equal = RECIPES[f"srt/{data}-pixel-rt-{weight}"], RECIPES[f"srt/{data}-pixel-rt-{weight}-equal"]
            assert equal.iterations == rt.epochs * {"cifar10": 400, "mnist": 477}[data]


def of_size(name, n, channels=1):
    "As many images as a real set has, of two pixels each; every class is among the first."
    return ImageSet(name, torch.zeros(n, channels, 1, 2, dtype=torch.uint8), torch.arange(n) % 10, tuple("0123456789"))


SETS = {"mnist": of_size("mnist", 60_000), "cifar10": of_size("cifar10", 50_000)}


def updates(name, tier, images=None, **changes):
    "Updates of a recipe as a tier plans it, counted by walking, and the plan."
    whole = SETS[name.split("/")[1].split("-")[0]]
    rest = replace(whole, images=whole.images[TIER[tier].held_out:], labels=whole.labels[TIER[tier].held_out:])
    plan, train, unlabelled = _planned(name, None, tier, rest, len(whole), images, changes)
    per_epoch = num_batches(len(train), plan.batch_size, unlabelled=len(unlabelled or ()))
    return plan.iterations or plan.epochs * per_epoch, plan


@pytest.mark.parametrize("images", [None, 900])
@pytest.mark.parametrize("tier", TIER)
def test_equal_recipes_make_srts_updates_at_every_tier(tier, images):
    equal = [name for name in RECIPES if name.endswith("-equal")]
    assert len(equal) == 2 * (2 * 4 + 8 + 4)  # RT at four weights and two reductions, eight methods, four numbers of images
    for name in equal:
        stem = name.removesuffix("-equal")
        partner = stem.replace("rt-", "srt-") if "-pixel-" in name else f"{name.split('-long-')[0]}-long-srt"
        found, plan = updates(name, tier, images)
        assert found == updates(partner, tier, images)[0], name
        assert all(0 < m < plan.iterations for m in plan.milestones)


@pytest.mark.parametrize("tier", TIER)
@pytest.mark.parametrize("where", ["cifar10-long", "mnist-long", "cifar10-spatial", "mnist-spatial"])
def test_lengths_of_the_sweep_keep_their_proportion(where, tier):
    full = updates(f"srt/{where}-fast-srt", tier)[0]
    for rate in RATES:
        for share in LENGTHS[:-1]:
            found, plan = updates(f"srt/{where}-fast-srt-{rate}-{share}", tier)
            assert found == round(share * full) and plan.lr == rate, (rate, share)
            peak = [place for place, factor in plan.knots if factor == 1]
            assert abs(peak[0] / (plan.epochs or plan.iterations) - 0.5) < 1e-9
            if tier == "paper":
                assert plan.epochs == RECIPES[f"srt/{where}-fast-srt-{rate}-{share}"].epochs  # as published, where nothing is cut


def test_a_length_of_ones_own_comes_first():
    name, batch = "srt/mnist-long-trades-equal", {"batch_size": 40}
    assert updates(name, "cpu", iterations=70)[0] == 70
    assert updates(name, "cpu", **batch)[0] == updates("srt/mnist-long-srt", "cpu", **batch)[0] != updates(name, "cpu")[0]
    assert updates("srt/mnist-long-trades", "cpu")[0] == 8 * num_batches(2500, 64)  # no twin: its own epochs


def test_fewer_unlabelled_images_mean_fewer_updates_but_for_the_twins():
    found = [updates(f"srt/mnist-long-srt-u{n}{tail}", "gpu")[0] for tail in ("", "-equal") for n in COUNTS["mnist"]]
    assert found[:4] == sorted(set(found[:4])) and set(found[4:]) == {updates("srt/mnist-long-srt", "gpu")[0]}
    assert len({updates(f"srt/mnist-spatial-srt-u{n}", "gpu")[0] for n in COUNTS["mnist"]}) == 1


def test_a_trained_twin_makes_as_many_updates_and_says_so(tmp_path):
    tail = ["--data", "digits", "--tier", "smoke", "--images", "120", "--model", "wrn_10_1_cifar", "--threads", "1"]
    made = {}
    for name in ("srt/mnist-pixel-srt-0.2", "srt/mnist-pixel-rt-0.2-equal"):
        assert jat_train(["--recipe", name, "--out", str(tmp_path / name[-8:]), *tail]) == 0
        made[name] = sum(row["iterations"] for row in read_jsonl(tmp_path / name[-8:] / "log.jsonl"))
        facts = json.loads((tmp_path / name[-8:] / "run.json").read_text())
        plan = replace(adapt(recipe(name), "digits", "smoke"), **facts["about"]["changes"] | {"seed": 0, "model": "wrn_10_1_cifar"})
        assert Recipe.from_dict(facts["recipe"]) == plan  # what differs from the catalogue is on record
    assert len(set(made.values())) == 1


def test_a_batch_without_unlabelled_images_is_its_own_mixture():
    x, y = torch.rand(3, 1, 8, 8), torch.arange(3)
    assert Batch(x, y, torch.Generator()).mixed is x


def test_the_networks_own_answer_is_asked_once_and_stays_while_the_attack_climbs(parts):
    "Eq. 9's C(x) for labelled and unlabelled images alike, and the loss climbed is that of these classes."
    model, batch, seen = net(), next(batches(parts[0], 40, unlabelled=parts[1])), []

    def watched(model, x, classes, **options):
        found = pgd(model, x, classes, eps=0.3, step=0.1, steps=3, **options, return_info=True)
        seen.append((x, classes, found))
        return found.x_adv

    srt(model, batch, watched)
    [(x, classes, found)] = seen
    with torch.no_grad(): answers, moved = (model.eval()(v).argmax(1) for v in (x, found.x_adv))
    assert len(x) == len(batch.x) + len(batch.u) and torch.equal(classes, answers)
    assert (moved != classes).any(), "an attack that changes no answer tells nothing of targets that follow it"
    with torch.no_grad(): expected = F.cross_entropy(model(found.x_adv), classes, reduction="none")
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data, eps", [("mnist", 0.3), ("cifar10", 0.031)])
def test_fast_srt_takes_one_step_of_a_quarter_more_than_the_budget(data, eps):
    "Algorithm 2: a uniform start, one gradient, a step of 1.25 eps, projected."
    [[name, options]] = RECIPES[f"srt/{data}-long-fast-srt"].attacks["attack"]
    assert name == "pgd" and options["eps"] == pytest.approx(eps) and options["step"] == pytest.approx(1.25 * eps)
    model, x, y = net(), torch.rand(6, 1, 32, 32), torch.zeros(6, dtype=torch.int64)
    found = ATTACKS[name](model, x, y, **options, generator=torch.Generator().manual_seed(0), return_info=True)
    again = ATTACKS[name](model, x, y, **options, generator=torch.Generator().manual_seed(1), return_info=True)
    assert found.n_backward == 1 and found.within.all() and not torch.equal(found.x_adv, again.x_adv)


def test_without_unlabelled_images_one_mean_is_half_of_two(parts):
    """RT is the same training under both reductions, at half the learning rate, in a network without batch norm.
    With it the one pass of "concat" normalises clean and attacked images together, so RT is two trainings."""
    b = next(batches(parts[0], 40, shuffle=True, seed=5))
    two, one = (srt(net(2), b, wavy, weight=0.7, reduction=reduction) for reduction in ("separate", "concat"))
    torch.testing.assert_close(one, two / 2)


@pytest.mark.parametrize("labelled_only", [True, False])
def test_with_batch_norm_the_two_reductions_are_two_trainings(parts, labelled_only):
    "RT and SRT: other losses, other running statistics, other gradients, and not by one factor."
    b = next(batches(parts[0], 40, unlabelled=None if labelled_only else parts[1], shuffle=True, seed=5))
    found = []
    for reduction in ("separate", "concat"):
        model = net(2, norm="batch")
        loss = srt(model, b, wavy, weight=0.7, reduction=reduction)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), model.state_dict()))
    (two, slope, state), (one, other, merged) = found
    assert one != pytest.approx(two / (2 if labelled_only else 1), rel=1e-3)
    assert F.cosine_similarity(slope, other, dim=0) < 0.99
    means = [name for name in state if name.endswith("running_mean")]
    assert means and not any(torch.allclose(state[name], merged[name], rtol=1e-4, atol=1e-6) for name in means[1:])


WEIGHTS = {"srt": "weight", "klr": "weight", "trades": "beta", "rst": "beta", "uat": "beta", "mart": "beta"}


def test_every_weight_of_an_objective_is_known_here():
    takes = {name: {"weight", "beta"} & set(inspect.signature(f).parameters) for name, f in OBJECTIVES.items()}
    assert {name: {option} for name, option in WEIGHTS.items()} == {name: found for name, found in takes.items() if found}


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_objective_rewards_what_it_punishes(parts, name, value):
    needs = {keyword: net(1) for keyword in networks(OBJECTIVES[name])}
    batch, model = next(batches(parts[0], 8)), net()
    with pytest.raises(ValueError, match=f"expected {WEIGHTS[name]} to be a finite number of at least 0, got {value!r}"):
        OBJECTIVES[name](model, batch, still, **needs, **{WEIGHTS[name]: value})
    assert OBJECTIVES[name](model, batch, still, **needs, **{WEIGHTS[name]: 0}).isfinite()


def test_a_command_refuses_a_negative_weight_and_leaves_no_folder(tmp_path, capsys):
    words = ["--recipe", "srt/mnist-long-srt", "--out", str(tmp_path / "a"), *SMOKE, "--set", 'objective_options={"weight":-1}']
    assert jat_train(words) == 2
    assert "expected weight to be a finite number of at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


SMOKE = ["--data", "digits", "--tier", "smoke", "--model", "wrn_10_1_cifar", "--threads", "1"]


@pytest.mark.parametrize("unlabelled, found", [
    (Unlabelled("x", torch.zeros(20, 3, 32, 32, dtype=torch.uint8)), r"\(3, 32, 32\)"), ([1, 2], "list"),
    (Unlabelled("x", torch.zeros(20, 1, 28, 28, dtype=torch.uint8)), r"\(1, 28, 28\)")])
def test_unlabelled_images_of_another_shape_are_refused_in_a_line(parts, unlabelled, found):
    with pytest.raises(ValueError, match=rf"training images have the shape \(1, 32, 32\), the unlabelled ones {found}"):
        fit(net(), parts[0], PLAN, unlabelled=unlabelled)


@pytest.mark.parametrize("labelled, unlabelled", [(0, 10), (-1, 0), (100, -1), (100.5, 10), (100, 10.5), ("100", 10), (None, 10), (1437, 1), (1438, 0)])
def test_numbers_of_images_that_cannot_be_taken(labelled, unlabelled):
    expected = "whole numbers labelled >= 1 and unlabelled >= 0, of the images of 'digits'"
    with pytest.raises(ValueError, match=rf"{expected} \(1437\), got {labelled!r} and {unlabelled!r}"): few_labels(load("digits"), labelled, unlabelled)


@pytest.mark.parametrize("images", [12, 20, 33, 50, 100, 1405])
def test_labelled_and_unlabelled_images_add_up_to_what_was_asked(images):
    few = setting("srt/mnist-long-srt", data="digits", images=images)
    assert len(few.train) + len(few.unlabelled) == images
    assert set(few.train.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("name, images, least", [("srt", 1, 11), ("srt", 5, 11), ("srt", 10, 11), ("rt", 5, 10), ("rt", 9, 10)])
def test_fewer_images_than_labels_are_needed_are_refused(name, images, least):
    with pytest.raises(ValueError, match=f"{images} training images are too few.*ask for at least {least}$"):
        setting(f"srt/mnist-long-{name}", data="digits", images=images)
    assert len(setting(f"srt/mnist-long-{name}", data="digits", images=least).train) == 10


@pytest.mark.parametrize("images", ["100000", "5"])
def test_a_number_of_images_that_is_refused_leaves_no_folder(tmp_path, capsys, images):
    words = ["--recipe", "srt/mnist-long-srt", "--out", str(tmp_path / "a"), *SMOKE, "--images", images]
    assert jat_train(words) == 2 and jat_train([*words, "--seed", "0", "1"]) == 2
    assert "training images" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_run_is_another_with_another_teacher(parts, tmp_path):
    plan = replace(PLAN, objective="rst", needs={"teacher": "srt/mnist-long-standard"}, epochs=2)
    first, second = net(1), net(3)
    one, two = (run_identity(plan, net(), parts[0], unlabelled=parts[1], needs={"teacher": teacher}) for teacher in (first, second))
    assert {k for k in one if one[k] != two[k]} == {"needs"}
    fit(net(), parts[0], plan, unlabelled=parts[1], needs={"teacher": first}, out=tmp_path, seconds=0)
    with pytest.raises(ValueError, match=r"holds another run \(needs was"):
        fit(net(), parts[0], plan, unlabelled=parts[1], needs={"teacher": second}, out=tmp_path)
    assert len(fit(net(), parts[0], plan, unlabelled=parts[1], needs={"teacher": net(1)}, out=tmp_path)) == 2
