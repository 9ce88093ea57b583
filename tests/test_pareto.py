"The quadratic programme against the active set on thousands of windows, and the notions of a front."
import cvxpy as cp
import numpy as np
import pytest
from cvxpy.reductions.solvers.solving_chain import SolvingChain
from hypothesis import given, settings
from hypothesis import strategies as st

from jat_nb import pareto
from jat_nb.pareto import (active_set, disagreement, dominates, effective_r, feasible_r, hypervolume, knee, moments,
                           pareto_front, solve_weights)

MEAN = np.array([0.5, 1.5, 1.2, 2.0])
SECOND = np.outer(MEAN, MEAN) + 0.01 * np.eye(4)


def window(rng):
    "Losses of few or many batches, of two to eight kinds: ordinary, proportional, equal, far apart or zero."
    k = int(rng.integers(2, 9)) if rng.random() < 0.25 else 4
    kind, n = rng.integers(5), rng.choice([1, 2, 8, 50])
    mean = 10 ** rng.uniform(-3, 2, k) if kind == 0 else rng.uniform(0.01, 4, k)
    losses = np.abs(mean * (1 + rng.normal(size=(n, k)) * 10 ** rng.uniform(-6, 0)))
    if kind == 1: losses = losses[:, :1] * mean
    if kind == 2: losses[:, rng.integers(k)] = 0
    if kind == 3: losses[:, 1:] = losses[:, 1:2]
    return losses


def test_ten_thousand_windows():
    rng = np.random.default_rng(1)
    for trial in range(10_000):
        mean, second = moments(window(rng))
        largest = feasible_r(mean)[1]
        r = rng.uniform(0, largest) if trial % 7 else (0.0, largest)[trial % 2]
        found = solve_weights(mean, second, r)
        P, scale = disagreement(second), max(mean.mean(), 1e-12)
        oracle = active_set(P / scale**2, mean / scale, found.r / scale)
        best, ours = oracle @ P @ oracle, found.alpha @ P @ found.alpha
        assert found.solver in pareto.SOLVERS
        assert found.alpha.min() >= 0 and abs(found.alpha.sum() - 1) < 1e-9
        assert abs(found.alpha[1:] @ mean[1:] - found.r) < 1e-6 * scale
        assert abs(ours - best) <= 1e-6 * best + 1e-9 * np.trace(P), (trial, ours, best)
        values = np.linalg.eigvalsh(P)
        if values[0] > 1e-6 * values[-1]:
            assert np.abs(found.alpha - oracle).max() < 1e-5, trial


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_p_is_positive_semidefinite_and_scales(seed):
    losses = window(np.random.default_rng(seed))
    mean, second = moments(losses)
    P = disagreement(second)
    assert np.linalg.eigvalsh(P)[0] >= -1e-9 * max(np.trace(P), 1e-300)
    r = 0.6 * feasible_r(mean)[1]
    a, b = solve_weights(mean, second, r).alpha, solve_weights(7 * mean, 49 * second, 7 * r).alpha
    assert abs(a @ P @ a - b @ P @ b) <= 1e-7 * max(np.trace(P), 1e-300)


@pytest.mark.parametrize("r, alpha, value", [
    (0.2, (0.858817, 0.044468, 0.075166, 0.021549), 0.843102), (0.5, (0.663061, 0.111134, 0.147888, 0.077916), 0.193749),
    (0.75, (0.499932, 0.166690, 0.208490, 0.124889), 0.020208), (1.2, (0.206298, 0.266690, 0.317573, 0.209439), 0.549939),
    (1.9, (0, 0.2, 0, 0.8), 14.0208)])
@pytest.mark.parametrize("solvers", [("CLARABEL",), ("OSQP",), ()])
def test_known_values(r, alpha, value, solvers):
    found = solve_weights(MEAN, SECOND, r, solvers=solvers)
    assert np.abs(found.alpha - alpha).max() < 1e-6
    assert abs(found.alpha @ disagreement(SECOND) @ found.alpha - value) < 1e-4
    assert found.solver == (solvers[0] if solvers else "active set")


def test_the_value_is_convex_in_r():
    P, grid = disagreement(SECOND), np.linspace(0, 2, 81)
    values = [a @ P @ a for a in (solve_weights(MEAN, SECOND, r, mode="hold").alpha for r in grid)]
    assert (np.diff(values, 2) > -1e-7).all()


def test_a_failing_solver_is_replaced_and_named(monkeypatch):
    def fail(self, *args, **kwargs): raise cp.SolverError("planted")
    monkeypatch.setattr(cp.Problem, "solve", fail)
    found = solve_weights(MEAN, SECOND, 0.5)
    assert found.solver == "active set" and np.abs(found.alpha - (0.663061, 0.111134, 0.147888, 0.077916)).max() < 1e-6


def test_a_wrong_answer_is_never_used(monkeypatch):
    real = cp.Problem.solve

    def lie(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.variables()[0].save_value(np.array([-0.15, -0.15, -0.15, 1.45]))
    monkeypatch.setattr(cp.Problem, "solve", lie)
    found = solve_weights(MEAN, SECOND, 0.5)
    assert found.solver == "active set" and found.alpha.min() >= 0


@pytest.mark.parametrize("mode", ["clip", "hold", "slack"])
def test_out_of_reach(mode):
    before = np.array([0.4, 0.3, 0.2, 0.1])
    found = solve_weights(MEAN, SECOND, 4.0, mode=mode, previous=before)
    assert found.clipped and found.alpha.min() >= 0 and abs(found.alpha.sum() - 1) < 1e-9
    if mode == "hold": assert (found.alpha == before).all()
    else: assert found.alpha[3] > 0.95


def test_a_hundred_solves_compile_once(monkeypatch):
    compiled, real = [], SolvingChain.apply
    monkeypatch.setattr(SolvingChain, "apply", lambda self, *a, **k: compiled.append(self) or real(self, *a, **k))
    pareto._programme.cache_clear()
    rng = np.random.default_rng(0)
    for r in np.linspace(0.01, 1.9, 100):
        mean, second = moments(MEAN * rng.uniform(0.9, 1.1, (8, 4)))
        assert solve_weights(mean, second, r).solver == "CLARABEL"
    assert len(compiled) == 1
    cp.Problem(cp.Minimize(cp.sum_squares(cp.Variable(2)))).solve()
    assert len(compiled) == 2  # this is where cvxpy compiles


@pytest.mark.parametrize("demand", [True, False])
@pytest.mark.parametrize("k", range(2, 9))
def test_two_to_eight_losses(k, demand):
    assert pareto._programme(k, demand)[0].is_dcp(dpp=True)
    rng = np.random.default_rng(k)
    mean, second = moments(rng.uniform(0.5, 3, (50, k)))
    P, r = disagreement(second), rng.uniform(0.2, 0.9) * feasible_r(mean)[1]
    found = solve_weights(mean, second, r, mode="clip" if demand else "slack")
    assert found.solver == "CLARABEL" and found.alpha.shape == (k,) and abs(found.alpha.sum() - 1) < 1e-9
    if demand:
        assert np.abs(found.alpha - active_set(P, mean, r)).max() < 1e-5
    else:  # the penalised objective, on a simplex of many points
        m, c = np.r_[0, mean[1:]], 10 * np.trace(P) / k / mean.mean() ** 2
        value = lambda a: ((a @ P) * a).sum(-1) + c * (a @ m - r) ** 2
        assert value(found.alpha) <= value(rng.dirichlet(np.ones(k), 20_000)).min() * (1 + 1e-6)


INSTALLED = [s for s in ("CLARABEL", "OSQP", "CVXOPT") if s in cp.installed_solvers()]


@pytest.mark.parametrize("solver", INSTALLED)
def test_a_solver_that_finds_no_solution_is_not_believed(solver):
    "CVXOPT is the paper's solver; what it returns for a requirement out of reach has negative weights."
    P = disagreement(SECOND)
    assert pareto._ask(solver, P, MEAN, 2.1, slack=False) is None
    assert np.abs(pareto._ask(solver, P, MEAN, 0.75, slack=False) - (0.499932, 0.166690, 0.208490, 0.124889)).max() < 1e-4
    for r in (2.1, 4.0):
        for mode in ("clip", "hold", "slack"):
            found = solve_weights(MEAN, SECOND, r, mode=mode, solvers=[solver])
            assert found.alpha.min() >= 0 and abs(found.alpha.sum() - 1) < 1e-9


def test_a_solver_that_is_not_installed_is_passed_over():
    assert solve_weights(MEAN, SECOND, 0.5, solvers=["NO SUCH SOLVER", "OSQP"]).solver == "OSQP"


@pytest.mark.parametrize("solvers", [*([s] for s in INSTALLED), []])
def test_of_equally_good_weights_the_nearest_to_the_previous_are_taken(solvers):
    "Two losses that are zero share what is left in any way; the shares move as little as possible."
    window = np.array([[0.5, 1.5, 0, 0], [0.7, 1.1, 0, 0], [0.4, 1.3, 0, 0]])
    mean, second = moments(window)
    for previous in ([0.2, 0.2, 0.35, 0.25], [0.1, 0.3, 0.2, 0.4], [0.25] * 4):
        found = solve_weights(mean, second, 0.4, previous=np.array(previous), solvers=solvers).alpha
        best = active_set(disagreement(second), mean, 0.4)
        assert np.isclose(found[1] * mean[1], 0.4) and np.allclose(found[:2], best[:2], atol=1e-6)
        assert np.isclose(found[2] - found[3], previous[2] - previous[3], atol=1e-6)


@pytest.mark.parametrize("call, message", [
    (lambda: moments([1.0, 2.0]), "one row for each batch"), (lambda: moments([[1.0], [2.0]]), "at least two kinds"),
    (lambda: moments([[1.0, np.inf]]), "finite"), (lambda: moments([[1.0, -1.0]]), "finite losses of at least 0"),
    (lambda: effective_r(np.nan, MEAN), "at least 0"), (lambda: effective_r(-1.0, MEAN), "at least 0"),
    (lambda: effective_r(2.0, MEAN, "relative"), r"\[-1, 1\]"), (lambda: solve_weights(MEAN, SECOND, 1.0, mode="x"), "unknown mode"),
    (lambda: effective_r(1.0, MEAN, "soft"), "unknown mode 'soft'"), (lambda: effective_r(np.inf, MEAN), "at least 0"),
    (lambda: active_set(disagreement(SECOND), MEAN, 3.0), "no weights"), (lambda: pareto_front([[np.nan, 1.0]]), "without NaN")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call()


POINTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12)


@given(POINTS)
@settings(max_examples=100, deadline=None)
def test_dominance_is_a_strict_order_and_fronts_cover_the_rest(points):
    kept = pareto_front(points)
    for a in points:
        assert not dominates(a, a)
        assert any(b == a or dominates(b, a) for b, k in zip(points, kept) if k)
        assert not any(dominates(a, b) and dominates(b, a) for b in points)
    front = [p for p, k in zip(points, kept) if k]
    assert np.isclose(hypervolume(front, (-1, -1, -1)), hypervolume(points, (-1, -1, -1)))
    cells = {(i, j, k) for p in points for i in range(p[0] + 1) for j in range(p[1] + 1) for k in range(p[2] + 1)}
    assert hypervolume(points, (-1, -1, -1)) == len(cells)


def test_a_chain_has_one_point_and_order_does_not_matter():
    assert pareto_front([[i, i] for i in range(5)]).tolist() == [False] * 4 + [True]
    points = np.random.default_rng(0).random((9, 2))
    assert (pareto_front(points)[::-1] == pareto_front(points[::-1])).all()
    assert (points[knee(points)] == points[::-1][knee(points[::-1])]).all()
