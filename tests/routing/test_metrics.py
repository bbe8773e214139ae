import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routing import ExpertChoice, Gating, Mixing, Soft, TopK, metrics, routing_metrics
from tests.routing.routers import compiled, name
from tests.tolerance import tolerance

G, S, E = 2, 7, 5
ROUTERS = (TopK(k=2, capacity_factor=0.5, multiple=1), TopK(k=3, capacity_factor=None), ExpertChoice())


def random_gating(mask):
    logits = jnp.asarray(2 * np.random.default_rng(0).normal(size=(G, S, E)), jnp.float32)
    return Gating(logits=logits, noisy_logits=logits + jnp.sin(9 * logits), mask=mask, sigma=1.0)


def random_mask():
    return np.random.default_rng(1).permuted(np.broadcast_to(np.arange(S) < [[4], [6]], (G, S)), axis=1)


@compiled
def measure(router, gating):
    routing = router(gating.gates, mask=gating.mask)
    return routing, routing_metrics(gating, routing)


@pytest.mark.parametrize("router", ROUTERS, ids=name)
@pytest.mark.parametrize("padded", [False, True])
def test_counts_are_those_of_loops_over_assignments(router, padded):
    mask = random_mask() if padded else np.ones((G, S), bool)
    gating = random_gating(jnp.asarray(mask) if padded else None)
    routing, measured = measure(router, gating)

    wanted, dropped, slots = np.zeros(E), 0, np.zeros((G, S), int)
    for g in range(G):
        for token, expert, slot in zip(
            *(np.asarray(a)[g] for a in (routing.token, routing.expert, routing.slot)), strict=True
        ):
            if mask[g, token]:
                wanted[expert] += 1
                dropped += slot >= routing.capacity
                slots[g, token] += slot < routing.capacity
    load = wanted / wanted.sum()
    gates = np.asarray(gating.gates, np.float64)
    expected = {
        "dropped_tokens": np.mean(slots[mask] == 0),
        "dropped_assignments": dropped / wanted.sum(),
        "expert_load": load,
        "load_variation": load.std() / load.mean(),
        "entropy": np.mean([-(gates[g][mask[g]] * np.log(gates[g][mask[g]])).sum(-1).mean() for g in range(G)]),
        "confidence": np.mean([gates[g][mask[g]].max(axis=-1).mean() for g in range(G)]),
    }
    assert measured.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(measured[key], value, **tolerance(jnp.float32), err_msg=key)
    np.testing.assert_array_equal(np.asarray(metrics.kept_per_token(routing))[mask], slots[mask])


def test_a_soft_router_drops_nothing_and_spreads_its_weight():
    combine = np.array([[[[0.5, 0.25], [0.25, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]], np.float32)  # [1, S=2, E=2, C=2]
    mixing = Mixing(dispatch=jnp.asarray(combine), combine=jnp.asarray(combine))
    measured = routing_metrics(Gating(logits=mixing.combine, noisy_logits=mixing.combine), mixing)
    assert measured["dropped_tokens"] == measured["dropped_assignments"] == 0
    np.testing.assert_allclose(measured["expert_load"], [1.75 / 2, 0.25 / 2])
    assert measured["load_variation"] == pytest.approx(0.75)  # 7/8 and 1/8: std 3/8, mean 1/2
    # Token 0: -(log(1/2) / 2 + 2 * log(1/4) / 4) = 1.5 log 2; token 1 is sure: 0.
    assert measured["entropy"] == pytest.approx(0.75 * np.log(2))
    assert measured["confidence"] == pytest.approx((0.5 + 1.0) / 2)


def test_padding_of_a_soft_router_counts_nothing():
    mask = jnp.array([[True, True, False]])
    logits = jnp.zeros((1, 3, 2, 1)).at[0, 2].set(9.0)
    gating = Gating(logits=logits, noisy_logits=logits, mask=mask)
    measured = routing_metrics(gating, Soft()(logits, mask=mask))
    np.testing.assert_allclose(measured["expert_load"], [0.5, 0.5], **tolerance(jnp.float32))
    assert measured["entropy"] == pytest.approx(np.log(2))
    assert measured["confidence"] == pytest.approx(0.5)


def test_a_gate_that_knows_nothing_has_the_entropy_of_its_experts():
    gates = jnp.full((1, 3, E), 1 / E)
    assert metrics.gate_entropy(gates) == pytest.approx(np.log(E))
    assert metrics.gate_confidence(gates) == pytest.approx(1 / E)


def test_a_gate_that_is_sure_has_no_entropy():
    assert metrics.gate_entropy(jax.nn.one_hot(jnp.zeros((1, 3), int), E)) == 0  # 0 log 0 = 0


def test_metrics_carry_no_gradient():
    gating = random_gating(None)

    def total(logits):
        gating = Gating(logits=logits, noisy_logits=logits)
        return sum(jnp.sum(value) for value in routing_metrics(gating, TopK()(gating.gates)).values())

    np.testing.assert_array_equal(jax.grad(total)(gating.logits), 0)


def test_padding_alone_measures_zero():
    gating = random_gating(jnp.zeros((G, S), bool))
    for value in routing_metrics(gating, TopK()(gating.gates, mask=gating.mask)).values():
        np.testing.assert_array_equal(value, 0)
