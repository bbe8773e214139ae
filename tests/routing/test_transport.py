import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routing.transport import entropic_plan, plan_nonzeros, project_on_simplex, quadratic_plan
from tests.routing.routers import compiled

G, S, E = 3, 11, 5
MASK = np.array([[True] * S, [s % 3 > 0 for s in range(S)], [False] * S])  # 11, 7 and no real tokens
every_mask = pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])


def random(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def projected(x):
    """Onto the simplex, by bisection for the amount that is taken from every entry."""
    low, high = x.min() - 1.0, x.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(x - low, 0)


def sparsely_projected(x, nonzeros):
    """The nearest of the projections onto all faces with so many corners; the first of them that is."""
    best, least = np.zeros(0), np.inf
    for corners in itertools.combinations(range(len(x)), nonzeros):
        candidate = np.zeros(len(x))
        candidate[list(corners)] = projected(x[list(corners)])
        distance = np.square(x - candidate).sum()
        if distance < least - 1e-9:
            best, least = candidate, distance
    return best


project = compiled(lambda nonzeros, x: project_on_simplex(x, nonzeros))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_projection_is_the_nearest_point_of_the_simplex(scale):
    x = random(0, 4, 7, scale=scale)
    actual = project(None, x)
    np.testing.assert_allclose(actual, [projected(row.astype(np.float64)) for row in x], atol=2e-6)


@pytest.mark.parametrize("nonzeros", [1, 3, 7])
def test_the_sparse_projection_is_the_nearest_with_so_few_nonzeros(nonzeros):
    x = np.round(random(1, 5, 7), 1)  # rounded, so that there are equal entries, of which the first counts
    actual = project(nonzeros, x)
    expected = [sparsely_projected(row.astype(np.float64), nonzeros) for row in x]
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert ((actual > 0).sum(axis=-1) <= nonzeros).all()


def test_what_is_minus_infinite_gets_nothing():
    x = np.array([[0.2, -np.inf, 0.4], [-np.inf, -np.inf, -np.inf]], np.float32)
    for nonzeros, first in ((None, [0.4, 0.0, 0.6]), (2, [0.4, 0.0, 0.6]), (1, [0.0, 0.0, 1.0])):
        np.testing.assert_allclose(project(nonzeros, x), [first, [0.0, 0.0, 0.0]], atol=1e-7)


def semi_dual(similarity, share, nonzeros, steps, learning_rate):
    """The plan of one group, [choosers, chosen], as loops; shares of choosers are equal, and so is what others want."""
    N, M = similarity.shape
    wanted = share * N / M
    price, mean, square = np.zeros(M), np.zeros(M), np.zeros(M)

    def plan():
        divided = np.zeros((N, M))
        for n in range(N):
            x = (price + similarity[n]) / share
            largest = np.argsort(-x, kind="stable")[:nonzeros]  # all of them if nonzeros is None
            divided[n, largest] = share * projected(x[largest])
        return divided

    for t in range(1, steps + 1):
        excess = plan().sum(axis=0) - wanted
        mean, square = 0.9 * mean + 0.1 * excess, 0.999 * square + 0.001 * excess**2
        price = price - learning_rate * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        if np.sqrt(np.sum(excess**2)) <= 1e-3:
            break
    return plan()


def of_real_tokens(mask, solve):
    """Solves each group for its real tokens alone, and puts zeros in the place of the others."""
    plan = np.zeros((G, S, E))
    for g in range(G):
        real = np.ones(S, bool) if mask is None else mask[g]
        if real.any():
            plan[g, real] = solve(g, real)
    return plan


quadratic = compiled(lambda options, similarity, mask: quadratic_plan(similarity, mask, **dict(options)))


@every_mask
@pytest.mark.parametrize("choosers", ["tokens", "experts"])
@pytest.mark.parametrize("nonzeros", [None, 2])
def test_the_quadratic_plan_is_that_of_adam_on_the_semi_dual(mask, choosers, nonzeros):
    similarity = softmax(random(2, G, S, E, scale=2.0))  # so that every plan has zeros; see the note on rounding
    options = {"choosers": choosers, "nonzeros": nonzeros, "steps": 12, "learning_rate": 0.03}
    actual = quadratic(tuple(options.items()), similarity, mask)

    def solve(g, real):
        rows = similarity[g, real].astype(np.float64)
        if choosers == "tokens":
            return semi_dual(rows, 1.0, nonzeros, 12, 0.03)
        return semi_dual(rows.T, len(rows) / E, nonzeros, 12, 0.03).T

    np.testing.assert_allclose(actual, of_real_tokens(mask, solve), rtol=1e-3, atol=2e-4)


def test_with_enough_steps_everybody_has_a_share_of_the_quadratic_plan():
    similarity = softmax(random(3, G, S, E, scale=2.0))
    for choosers in ("tokens", "experts"):
        options = {"choosers": choosers, "steps": 1000}
        plan = quadratic(tuple(options.items()), similarity, None)
        np.testing.assert_allclose(plan.sum(axis=2), 1, atol=5e-3)
        np.testing.assert_allclose(plan.sum(axis=1), S / E, atol=5e-3)


def test_the_quadratic_plan_stops_where_nothing_is_missing():
    equal = np.full((1, 6, 3), 1 / 3, np.float32)
    for choosers in ("tokens", "experts"):
        options = {"choosers": choosers, "steps": 1000, "learning_rate": 100.0}
        plan = quadratic(tuple(options.items()), equal, None)
        np.testing.assert_allclose(plan, 1 / 3, rtol=1e-6)


def test_the_quadratic_plan_has_no_gradient():
    similarity = jnp.asarray(softmax(random(4, 1, S, E)))
    gradient_of = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(quadratic_plan(x, choosers="tokens", nonzeros=2)))))
    gradient = gradient_of(similarity)
    assert not gradient.any()


def sinkhorn(kernel, steps):
    """The plan of one group, by scaling the columns and then the rows of a matrix."""
    S, E = kernel.shape
    u, v = np.ones(S), np.ones(E)
    for _ in range(steps):
        v = (S / E) / (kernel.T @ u)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


entropic = compiled(lambda options, logits, mask: entropic_plan(logits, mask, **dict(options)))


@every_mask
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_the_entropic_plan_is_that_of_sinkhorn(mask, steps):
    logits = random(5, G, S, E)
    expected = of_real_tokens(mask, lambda g, real: sinkhorn(np.exp(logits[g, real].astype(np.float64)), steps))
    np.testing.assert_allclose(entropic((("steps", steps),), logits, mask), expected, rtol=2e-5, atol=2e-6)


@every_mask
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_newton_finds_the_optimum_which_few_rounds_of_sinkhorn_may_not(mask, scale):
    logits = random(6, G, S, E, scale=scale)
    expected = of_real_tokens(mask, lambda g, real: sinkhorn(np.exp(logits[g, real].astype(np.float64)), 20000))
    actual = entropic((("solver", "newton"),), logits, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    far = np.abs(entropic((), logits, mask) - expected).max()
    assert (far > 1e-3) == (scale > 1)


def test_wide_logits_have_a_plan():
    """Those that exp does not hold: every token has an expert of its own, but the last two want the same."""
    logits = 1e4 * np.eye(6, 3, dtype=np.float32)[None, [0, 1, 1, 0, 2, 2]]
    for solver in ("sinkhorn", "newton"):
        plan = entropic((("solver", solver),), logits, None)
        np.testing.assert_allclose(plan, logits / 1e4, atol=1e-5)


@pytest.mark.parametrize("solver", ["sinkhorn", "newton"])
def test_the_gradient_of_the_entropic_plan_is_that_of_the_optimum(solver):
    """Against central differences of the converged plan in float64."""
    logits, mask, step = random(7, G, S, E), MASK, 1e-5
    R = random(8, G, S, E)

    def total(logits):
        plan = of_real_tokens(mask, lambda g, real: sinkhorn(np.exp(logits[g, real].astype(np.float64)), 200))
        return float(np.sum(plan * R))

    gradient_of = jax.jit(jax.grad(lambda x, mask: jnp.sum(entropic_plan(x, mask, solver=solver) * R)))
    gradient = jax.device_get(gradient_of(logits, mask))
    assert not gradient[~mask].any()
    for place in [(0, 0, 0), (0, 4, 3), (0, 10, 4), (1, 1, 2), (1, 5, 0)]:
        moved = np.zeros((G, S, E))
        moved[place] = step
        expected = (total(logits + moved) - total(logits - moved)) / (2 * step)
        np.testing.assert_allclose(gradient[place], expected, rtol=1e-3, atol=1e-5)


def test_nonzeros_are_counted_by_group():
    plan = jnp.array([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0] * 3] * 2])
    counts = plan_nonzeros(plan, jnp.array([[True, True], [True, False], [False, False]]))
    assert {name: values.tolist() for name, values in counts.items()} == {
        "tokens_per_expert_min": [0, 0, 0],
        "tokens_per_expert_mean": [1.0, pytest.approx(1 / 3), 0.0],
        "tokens_per_expert_max": [2, 1, 0],
        "experts_per_token_min": [1, 1, 0],
        "experts_per_token_mean": [1.5, 1.0, 0.0],
        "experts_per_token_max": [2, 1, 0],
    }
    assert plan_nonzeros(plan)["experts_per_token_min"].tolist() == [1, 0, 0]
