"""The bench keeps its books: raw values, ratios formed from them, counts of passes. No test looks at a time."""
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ASCENTS, ROOT

from jat_nb import bench, bench_report
from jat_nb.attacks import ATTACKS
from jat_nb.bench import MEASUREMENTS, half_budget
from jat_nb.bench_report import run_bench, targets
from jat_nb.catalogue import recipe as published
from jat_nb.differences import paired_difference
from jat_nb.evaluation import evaluate, pgd_at
from jat_nb.glow import Glow
from jat_nb.joint_space import counted_codes
from jat_nb.models import create
from jat_nb.records import Record
from jat_nb.timing import PLANS, Plan, Rounds, floor_passes, interleave, slope, spread, step_cost

COMMITTED = sorted((ROOT / "nbs" / "results").glob("bench_*.json"))


def check_books(record: Record) -> int:
    "Form every ratio of a record again from its raw values; how many there were."
    formed = 0
    for measurement in record.metrics.values():
        raw = measurement.get("seconds") or measurement.get("bytes") or {}
        assert all(value > 0 for series in raw.values() for value in series)
        for label, found in measurement["findings"].items():
            assert found["low"] <= found["median"] <= found["high"], label
            if "base" in found:
                _, comma, where = label.partition(", ")
                case, base = (raw[(f"{where}, " if comma else "") + found[k]] for k in ("case", "base"))
                quotients = sorted(a / (found["scale"] * b) for a, b in zip(case, base, strict=True))
                middle = [quotients[(len(quotients) - 1) // 2], quotients[len(quotients) // 2]]
                assert math.isclose(found["median"], sum(middle) / 2, rel_tol=1e-9), label
                formed += 1
    return formed


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Record, str]:
    "The program as a user runs it, at the smallest size."
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "jat_nb.bench", "--tier", "smoke", "--out", path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return Record.load(path), done.stdout + done.stderr


def test_smoke_tier_measures_everything(smoke):
    record, said = smoke
    assert list(record.metrics) == list(MEASUREMENTS) and record.tier == "smoke" and record.threads == 1
    assert record.config == json.loads(json.dumps(asdict(PLANS["smoke"]) | {"clock": "process_time"}))
    for name, found in record.metrics.items():
        assert {"findings", "wall_seconds", "commit", "made"} <= set(found), name
        assert found["wall_seconds"] > 0 and (found["findings"] or name == "memory"), name
    assert record.seconds == pytest.approx(sum(m["wall_seconds"] for m in record.metrics.values()))
    assert "target" in said and "verdict" in said and "not measured: nothing" in said
    assert "call/s" not in said and "Warning" not in said  # no bars and no complaints outside a terminal


def test_every_ratio_follows_from_raw_values(smoke):
    assert check_books(smoke[0]) >= 10


def test_counts_of_the_smoke_record(smoke):
    metrics, p = smoke[0].metrics, PLANS["smoke"]
    assert metrics["floor"]["passes"] == {"pgd": p.steps, "double_pass": 2 * p.steps}
    assert {len(v) for v in metrics["floor"]["seconds"].values()} == {p.rounds}
    assert metrics["floor"]["findings"]["double_pass / floor"]["scale"] == 2
    assert metrics["training"]["predicted"] == {"natural": 1.0, "one-step-joint": 8 / 3}
    assert metrics["peers"]["n"] == p.n and metrics["peers"]["data"] == "digits"
    assert all(0 <= a <= 100 for a in metrics["peers"]["accuracy"].values())
    fast = metrics["fast"]
    assert {len(v) for v in fast["seconds"].values()} == {2} and fast["n"] == p.n  # half the rounds, at least two
    for kind in ("natural", "joint"):  # the same images: the gap is the difference of the two accuracies
        gap = fast["accuracy"][f"digits-{kind}, fast"] - fast["accuracy"][f"digits-{kind}, fp32"]
        assert fast["findings"][f"accuracy fast - fp32, digits-{kind}"]["median"] == pytest.approx(gap, abs=1e-9)
    active = metrics["active"]
    assert active["findings"]["equal verdicts"]["median"] == 1.0
    assert active["forwards"]["all"] > active["forwards"]["active"] > 0
    assert set(metrics["scaling"]["sizes"]) == {"batch size", "image side", "steps"}
    flow = metrics["flow"]
    assert flow["passes"] == {"encode": p.batch, "decode": (p.steps + 1) * p.batch}
    assert {"jsa / bare", "encode + decode / log_prob"} <= set(flow["findings"])


def test_the_floor_of_the_joint_attack_differentiates_flow_and_classifier():
    "Its passes are the engine's: the gradient in the codes, from a classifier of what they decode to."
    torch.manual_seed(0)
    flow, model = Glow((3, 8, 8), levels=2, steps=1, width=8).eval(), create("wrn_10_1_cifar").eval()
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([3, 5])
    decoded = bench._Decoded(model, flow, x)
    start = decoded.threat.init(x, random=False)
    with counted_codes(flow) as count:
        found = bench.bare_passes(decoded, start, y, 3)
    codes = [z.requires_grad_() for z in flow.encode(x)]
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(model(flow.decode(codes)), y, reduction="sum"), codes)
    torch.testing.assert_close(found, torch.cat([g.flatten(1) for g in grads], dim=1), rtol=1e-3, atol=1e-6)
    assert dict(count) == {"decode": 6}


def test_promises_about_the_flow_are_judged():
    made_up = lambda value: dict.fromkeys(("median", "low", "high"), value)
    for value, kept in ((1.05, "met"), (1.2, "missed")):
        table = targets({"flow": {"findings": {"jsa / bare": made_up(value), "encode + decode / log_prob": made_up(2 * value), "pgd / jsa": made_up(0.2)}}})
        assert dict(zip(table["finding"], table["verdict"])) == {"jsa / bare": kept, "encode + decode / log_prob": kept}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_records(path):
    record = Record.load(path)
    assert path.stem == f"bench_{record.tier}" and set(MEASUREMENTS) - {"fast", "flow"} <= set(record.metrics) <= set(MEASUREMENTS)
    assert check_books(record) >= 15 and all(m["commit"] for m in record.metrics.values())
    assert record.tier != "cpu" or record.threads == 1
    table = targets(record.metrics)
    assert set(table["verdict"].str.split(",").str[0]) <= {"met", "missed"} and len(table) >= 12
    for name, predicted in record.metrics["training"]["predicted"].items():
        assert predicted == step_cost(published(f"jat/{name}")) / 3
    for attack, passes in record.metrics["floor"]["passes"].items():
        assert passes == floor_passes(attack, record.config["steps"])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", sorted(set(ASCENTS) - {"fgsm"}))
def test_floor_passes_are_what_the_engine_counts(name, steps):
    model, x, y = create("wrn_10_1_cifar"), torch.rand(2, 3, 16, 16), torch.tensor([3, 5])
    info = ATTACKS[name](model, x, y, steps=steps, return_info=True)
    assert info.n_backward == floor_passes(name, steps) == info.n_forward - 1


@pytest.mark.parametrize("name", ["rand_adv", "grid_adv", "worst_of_k"])
def test_searches_take_no_gradient(name):
    info = ATTACKS[name](create("wrn_10_1_cifar"), torch.rand(1, 3, 16, 16), torch.tensor([3]), return_info=True)
    assert info.n_backward == floor_passes(name) == 0 < info.n_forward


def test_turns_alternate_and_results_are_kept():
    seen, clock = [], iter(range(100))
    timed = interleave({n: lambda i, n=n: seen.append((n, i)) or n * i for n in "ab"}, 3, clock=lambda: float(next(clock)))
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert timed.results == {"a": ["", "a", "aa"], "b": ["", "b", "bb"]}
    assert timed.values == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_wait_comes_before_every_reading_of_the_clock():
    log = []
    interleave({"a": lambda i: log.append("call")}, 1, clock=lambda: log.append("clock") or 0.0, wait=lambda: log.append("wait"))
    assert log == ["wait", "clock", "call", "wait", "clock"]


def test_ratio_ignores_a_disturbed_round():
    timed = Rounds({"a": [1.0, 2.0, 1.0, 3.0, 1.0], "b": [2.0, 4.0, 90.0, 6.0, 2.0]})
    found = timed.ratio("b", "a", scale=2)
    assert (found["low"], found["median"], found["high"]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError):
        Rounds({"a": [1.0], "b": [1.0, 2.0]}).ratio("a", "b")


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope_of_a_power_law(power):
    sizes = [1, 2, 7, 30]
    assert slope(sizes, [0.3 * s**power for s in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("sizes, costs", [([1], [1]), ([1, 2], [1, 0]), ([1, 2], [1]), ([2, 2], [1, 2])])
def test_slope_refuses(sizes, costs):
    with pytest.raises(ValueError, match="positive costs"):
        slope(sizes, costs)


def test_spread_and_paired_difference():
    assert spread([5.0]) == [5.0, 5.0, 5.0]
    a, b = torch.rand(400) < 0.6, torch.rand(400) < 0.5
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there["median"] == pytest.approx(100 * (a.double().mean() - b.double().mean()).item())
    assert there["low"] == pytest.approx(-back["high"]) and there["low"] < there["median"] < there["high"]


def test_targets_tell_clear_from_unclear():
    make = lambda *v: {"floor": {"findings": {"pgd / floor": dict(zip(("median", "low", "high"), v))}}}
    verdict = lambda *v: targets(make(*v))["verdict"].item()
    assert verdict(1.0, 0.9, 1.01) == "met" and verdict(1.2, 1.1, 1.3) == "missed"
    assert verdict(1.0, 0.9, 1.2) == "met, within spread" and verdict(1.1, 1.0, 1.2) == "missed, within spread"
    gap = {"peers": {"findings": {"accuracy bf16 - fp32, net": {"median": -0.5, "low": -0.6, "high": -0.4}}}}
    assert targets(gap)["verdict"].item() == "missed"  # a difference counts in both directions
    fast = {"fast": {"findings": {"fast / fp32, net": dict(median=0.42, low=0.41, high=0.51),
                                  "accuracy fast - fp32, net": dict(median=0.1, low=-0.1, high=0.2)}}}
    assert list(targets(fast)["verdict"]) == ["met, within spread", "met"]


def test_half_budget_halves():
    class Threshold(torch.nn.Module):
        "Class 1 where the mean grey value exceeds one half."
        def forward(self, x): return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)
    x = (0.5 + torch.linspace(0.001, 0.2, 40)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    y = torch.ones(40, dtype=torch.int64)
    eps = half_budget(Threshold(), x, y, lambda e: pgd_at(e, steps=8), high=0.2)
    assert evaluate(Threshold(), x, y, {"PGD": pgd_at(eps, steps=8)}).accuracy.item() == pytest.approx(0.5, abs=0.05)
    assert eps == pytest.approx(0.1, abs=0.01)  # the middle image is 0.1 away from the boundary


def test_peers_are_optional(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    found = bench.measure_peers(PLANS["smoke"])
    assert set(found["seconds"]) == {f"digits-{kind}, jat_nb {mode}" for kind in ("natural", "joint") for mode in ("fp32", "bf16")}
    assert found["findings"]


def test_memory_without_proc_is_left_out(monkeypatch):
    monkeypatch.setattr(bench.Path, "exists", lambda self: False)
    assert bench.measure_memory(Plan()) == {"bytes": {}, "findings": {}}


@pytest.mark.parametrize("options, words", [(dict(tier="huge"), "tiers are"), (dict(only=["memry"]), "memry")])
def test_run_refuses(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run_bench(**{"tier": "smoke", "out": tmp_path / "b.json", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments, words", [(["--tier", "gpu"], "CUDA"), (["--only", "memry"], "memry")])
def test_program_ends_in_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_report.main([*arguments, "--out", str(tmp_path / "b.json")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and len(said.splitlines()) == 1


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    "Measurements replaced by ones that take no time; the names of those that ran."
    ran = []
    for name in MEASUREMENTS:
        monkeypatch.setitem(bench.MEASUREMENTS, name, lambda p, name=name: ran.append(name) or {"findings": {}, "seconds": {}})
    return ran


def test_only_continues_a_record_of_the_same_machine(tmp_path, counted):
    path = tmp_path / "b.json"
    run_bench("smoke", out=path, only=["modes"])
    assert set(run_bench("smoke", out=path, only=["scaling"]).metrics) == {"modes", "scaling"}
    assert set(Record.load(path).metrics) == {"modes", "scaling"} and counted == ["modes", "scaling"]
    assert list(run_bench("smoke", out=path).metrics) == list(MEASUREMENTS)  # without `only` a fresh record
    first = json.loads(path.read_text())
    path.write_text(json.dumps(first | {"versions": {"torch": "2.6"}, "commit": "older"}))
    joined = run_bench("smoke", out=path, only=["memory"])  # another version may join; the note says which was which
    assert (joined.commit, joined.versions) == ("older", {"torch": "2.6"})
    assert joined.metrics["memory"]["made"]["versions"] == first["versions"]
    assert joined.metrics["memory"]["made"]["when"] >= first["metrics"]["modes"]["made"]["when"]
    path.write_text(json.dumps(first | {"config": first["config"] | {"batch": 7}}))
    with pytest.raises(ValueError, match="another batch"):
        run_bench("smoke", out=path, only=["scaling"])
    path.write_text(json.dumps(first | {"device": "abacus"}))
    with pytest.raises(ValueError, match="another device"):
        run_bench("smoke", out=path, only=["scaling"])


def test_time_budget_stops_between_measurements(tmp_path, counted, monkeypatch):
    ticks = iter(range(0, 1000, 4))
    monkeypatch.setattr(bench_report.time, "perf_counter", lambda: float(next(ticks)))
    record = run_bench("smoke", out=tmp_path / "b.json", time_budget=13.0)
    assert list(record.metrics) == counted == list(MEASUREMENTS)[:2]  # at 4 and at 12 seconds; the third would start at 20
    assert list(Record.load(tmp_path / "b.json").metrics) == counted
