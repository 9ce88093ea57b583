"""A budget may be given as Python's, NumPy's or PyTorch's number, or one per image: the images keep their precision."""
import inspect

import numpy as np
import pytest
import torch
from conftest import ALONE
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import ATTACKS, pgd
from jat_nb.autoattack import autoattack
from jat_nb.data import Budget
from jat_nb.evaluation import budget_curve, evaluate, pgd_at
from jat_nb.glow import Glow
from jat_nb.joint_space import Latent, jsa, om_pgd
from jat_nb.masking import budget_surface, local_linearity, random_flow, random_pixels, steps_curve
from jat_nb.minimum_norm import at_threshold, nearest
from jat_nb.perceptual import fast_lpa, layer_moves
from jat_nb.records import write_json
from jat_nb.rigid import Rigid
from jat_nb.spatial import smooth_flow
from jat_nb.suites import Job, run_suite
from jat_nb.threats import Affine, Flow, Pixel
from jat_nb.unseen import JPEG, Elastic, Gabor
from jat_nb.weather import Fog, Snow

B = 3
FEW = {"steps": 2, "restarts": 1, "k": 2, "n_deg": 2, "n_px": 1, "search_steps": 1}


def case():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 4)).eval()
    x = torch.rand(B, 1, 8, 8)
    return model, x, model(x).argmax(1)


def lengths(function):
    "Numbers among the keywords of an attack that are no counts, with their defaults."
    return {name: p.default for name, p in inspect.signature(function).parameters.items()
            if isinstance(p.default, float)}


def per_image(function, name):
    return "Tensor" in str(inspect.signature(function).parameters[name].annotation)


def numbers(value):
    "The same number in the types a budget comes in."
    yield from (np.float64(value), np.float32(value))
    if value == int(value): yield from (int(value), np.int64(value), np.uint8(value), np.float16(value))


def rows(value):
    "The same number for each image."
    column = np.zeros((2 * B, 2)) + value
    yield from (np.array(value), np.array(value, dtype=np.float32), np.full(1, value), np.full(B, value),
                np.full(B, value).astype(">f8"), column[::-2, 0], np.full(B, value, dtype=np.float32),
                torch.full((B,), value, dtype=torch.float64), torch.tensor(value))


FLOATS = [(name, keyword) for name in ALONE for keyword in lengths(ATTACKS[name])]


@pytest.mark.parametrize("name, keyword", FLOATS, ids=[f"{name}-{keyword}" for name, keyword in FLOATS])
def test_every_form_of_a_number_does_the_same(name, keyword):
    model, x, y = case()
    function = ATTACKS[name]
    few = {k: v for k, v in FEW.items() if k in inspect.signature(function).parameters}
    value = lengths(function)[keyword]
    again = lambda v: function(model, x, y, generator=torch.Generator().manual_seed(0), **few, **{keyword: v})
    expected = again(value)
    for form in numbers(value):
        found = again(form)
        assert found.dtype == torch.float32
        assert_close(found, expected, atol=1e-4, rtol=0, msg=repr(form))
    for form in rows(value):
        if per_image(function, keyword) or keyword in ("eps", "step"):
            assert_close(again(form), expected, atol=1e-4, rtol=0)
        else:
            with pytest.raises(ValueError, match="float|number|in \\[0, 1\\]"): again(form)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), "0.1", None, [0.1] * B, np.array(["0.1"] * B), np.ones((B, 1)),
                                   torch.ones(B, dtype=torch.bool), np.full(B, np.nan), -np.ones(B), 1j, np.float32("inf")],
                         ids=repr)
def test_what_is_no_budget_is_refused(wrong):
    for threat in (Pixel, Flow, Affine, Elastic, JPEG, Fog, Snow, Gabor):
        with pytest.raises(ValueError, match="one per image \\(B,\\) as a tensor or a NumPy array"): threat(wrong)
    with pytest.raises(ValueError, match="same for all images"): Rigid(max_deg=wrong)


def test_a_budget_of_another_length_is_refused():
    model, x, y = case()
    for eps in (np.full(B + 2, 0.1), torch.full((B + 2,), 0.1)):
        with pytest.raises(ValueError, match=f"each of {B} images, got {B + 2}"): pgd(model, x, y, eps=eps, steps=1)
    with pytest.raises(ValueError, match="grey levels by 255"): Pixel(np.array([8.0] * B))


def test_threats_keep_the_precision_of_the_images():
    x = torch.rand(B, 3, 8, 8)
    for threat in (Pixel, Flow, Affine, Elastic, JPEG, Fog, Snow, Gabor):
        for eps in (np.full(B, 0.1), np.float32(0.1), np.array(0.1)):
            made = threat(eps)
            p = made.init(x, True, torch.Generator().manual_seed(0))
            p = made.step(p, torch.ones_like(p), x)
            assert p.dtype == made.apply(x, p).dtype == torch.float32
            assert made.contains(x, p).all()


def test_attacks_on_codes_and_by_perception():
    model, x, y = case()
    flow = Glow((1, 8, 8), levels=1, steps=1, width=4).eval()
    seen = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    seen(x)
    made = lambda function, **options: function(model, x, y, steps=1, generator=torch.Generator().manual_seed(0), **options)
    for form in (np.float32(0.25), np.array(0.25), np.full(B, 0.25)):
        for function, name, options in ((om_pgd, "eta", {"flow": flow}), (jsa, "eps_pixel", {"flow": flow}),
                                        (fast_lpa, "eps", {"features": seen, "layers": ["0"]}),
                                        (fast_lpa, "step", {"features": seen, "layers": ["0"]})):
            found = made(function, **options, **{name: form})
            assert_close(found, made(function, **options, **{name: 0.25}), atol=1e-5, rtol=0)
    assert Latent(flow, eta=np.float32(0.1)).step(torch.zeros(B, 64), torch.ones(B, 64), x).dtype == torch.float32
    for wrong in (np.full(B, 0.1), torch.full((B,), 0.1)):
        with pytest.raises(ValueError, match="float\\(eps\\)"): layer_moves(seen, x, y, eps=wrong, layers=["0"])
        with pytest.raises(ValueError, match="float\\(eps\\)"): autoattack(model, x, y, eps=wrong)
        with pytest.raises(ValueError, match="float\\(limit\\)"):
            nearest(model, x, y, lambda f, x, y, t: x, norm="l2", limit=wrong)
        with pytest.raises(ValueError, match="float\\(value\\)"): smooth_flow(model, x, y, tau_flow=wrong, steps=1)


def test_evaluations_take_budgets_from_numpy(tmp_path):
    model, x, y = case()
    grid = np.linspace(0, 0.1, 3, dtype=np.float32)
    curve = budget_curve(model, x, y, lambda eps: pgd_at(eps, steps=1), grid)
    assert_close(curve.accuracy, budget_curve(model, x, y, lambda eps: pgd_at(eps, steps=1), grid.tolist()).accuracy)
    surface = budget_surface(model, x, y, grid, grid[:2], steps=1)
    assert surface.correct.shape[:2] == (3, 2)
    assert len(steps_curve(model, x, y, lambda n: pgd_at(0.1, steps=n), np.array([1, 2])).names) == 2
    noisy = evaluate(model, x, y, {"noise": random_pixels(np.float32(0.1)), "flow": random_flow(np.array(0.1)),
                                   "pgd": pgd_at(np.float32(0.1), steps=1)})
    assert len(noisy.names) == 3 and write_json(tmp_path / "a.json", {"eps": np.float32(0.1)}).exists()
    assert_close(at_threshold(torch.tensor([0.1, 0.3]), np.array([0.0, 0.2], dtype=np.float32)),
                 torch.tensor([1.0, 0.5], dtype=torch.float64))
    for form in (np.float32(0.25), np.float64(0.25)):
        assert_close(local_linearity(model, x, y, eps=form), local_linearity(model, x, y, eps=0.25))


@pytest.mark.parametrize("name", ["surface", "transfer"])
def test_suites_take_budgets_from_numpy(name, tmp_path):
    model, x, y = case()
    asked = lambda kind: Job(model, x, y, Budget(kind(0.125), kind(0.25)), steps=1, sources={"twin": model}, data="digits")
    found, plain = (run_suite(name, asked(kind)) for kind in (np.float32, float))
    write_json(tmp_path / "a.json", found), write_json(tmp_path / "b.json", plain)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
