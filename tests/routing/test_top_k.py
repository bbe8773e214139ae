import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jmoe.routing import Importance, Load, TopK
from jmoe.routing.top_k import first_free_slots
from tests.routing import oracle
from tests.routing.routers import compiled, kept_places, seeds, weights_of

G, S, E = 2, 13, 5
ORDERS = {
    "vanilla": {},
    "batch priority by max": {"batch_priority": True},
    "batch priority by sum": {"batch_priority": True, "priority": "sum"},
}
route = compiled(lambda router, gates, mask: router(gates, mask=mask))


def random_gates(seed):
    """Multiples of 1/32 (with many ties) or of 1/4096 that sum to 1: their sums are exact in float32."""
    rng = np.random.default_rng(seed)
    parts = 32 if seed % 2 else 4096
    return (rng.multinomial(parts, rng.dirichlet(np.ones(E), size=(G, S))) / parts).astype(np.float32)


def kept_tokens(routing):
    return [token for *_, token in kept_places(routing)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("k", "capacity"), [(1, 2), (2, 4), (3, 1), (E, 3)])
@given(seed=seeds)
def test_slots_are_given_as_by_loops_over_choices_and_tokens(order, k, capacity, seed):
    gates = random_gates(seed)
    mask = np.random.default_rng(seed).uniform(size=(G, S)) < 0.8
    routing = route(TopK(k=k, capacity_factor=None, capacity=capacity, **order), gates, mask)
    kept, wanted = oracle.top_k(gates, k, capacity, mask=mask, **order)
    assert weights_of(routing) == kept
    np.testing.assert_array_equal(np.asarray(routing.expert).reshape(G, S, k), wanted)


def test_batch_priority_keeps_the_more_confident_token():
    gates = jnp.array([[[0.6, 0.4], [0.9, 0.1]]])  # both tokens want expert 0, which has ceil(2 * 1 / 2) = 1 slot
    vanilla = TopK(k=1, capacity_factor=1.0, multiple=1)(gates)
    priority = TopK(k=1, capacity_factor=1.0, multiple=1, batch_priority=True)(gates)
    assert kept_tokens(vanilla) == [0]  # first come, first served
    assert kept_tokens(priority) == [1]  # 0.9 > 0.6


def test_priority_by_sum_prefers_the_token_with_the_better_pair():
    # Token 0 is surer of its best expert (0.6 > 0.5), token 1 of its best two (0.5 + 0.4 > 0.6 + 0.2).
    gates = jnp.array([[[0.6, 0.2, 0.1, 0.1], [0.5, 0.4, 0.05, 0.05]]])
    options = {"k": 2, "capacity_factor": None, "capacity": 1, "batch_priority": True}
    assert kept_tokens(TopK(**options, priority="max")(gates)) == [0, 0]  # experts 0 and 1
    assert kept_tokens(TopK(**options, priority="sum")(gates)) == [1, 1]


def test_first_choices_come_before_all_second_choices():
    # Expert 1 is token 0's second choice and token 1's first: with one slot the first choice of the later token wins.
    gates = jnp.array([[[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]]])
    routing = TopK(k=2, capacity_factor=None, capacity=1)(gates)
    assert kept_places(routing) == [(0, 0, 0, 0), (0, 1, 0, 1), (0, 2, 0, 1)]
    assert routing.slot.tolist() == [[0, 1, 0, 0]]  # token 0's second choice stands second, past the end


def test_a_dropped_choice_does_not_try_another_expert():
    gates = jnp.array([[[0.7, 0.3], [0.8, 0.2], [0.9, 0.1]]])
    routing = TopK(k=1, capacity_factor=None, capacity=1)(gates)
    assert kept_places(routing) == [(0, 0, 0, 0)]  # expert 1 stays empty
    assert routing.token.tolist() == [[0, 1, 2]]  # dropped ones keep token, expert and weight
    assert routing.expert.tolist() == [[0, 0, 0]]
    np.testing.assert_array_equal(routing.weight, gates[..., 0])


def test_takers_are_numbered_choice_by_choice():
    expert = jnp.array([[[0, 1], [1, 0], [0, 2]]])  # 3 tokens, 2 choices
    # First choices 0, 1, 0 take slots 0, 0, 1; then second choices 1, 0, 2 take slots 1, 2, 0.
    assert first_free_slots(expert, jnp.ones((1, 3), bool), 3).tolist() == [[[0, 1], [0, 2], [1, 0]]]
    # Without the first token: 1, 0 take slots 0, 0; then 0, 2 take slots 1, 0. (Its own slots mean nothing.)
    assert first_free_slots(expert, jnp.array([[False, True, True]]), 3)[0, 1:].tolist() == [[0, 1], [0, 0]]


def test_dropless_has_room_for_the_whole_group():
    gates = jnp.zeros((1, 7, 3)).at[..., 1].set(1.0)  # everybody wants expert 1
    routing = TopK(k=2, capacity_factor=None)(gates)
    assert routing.capacity == 7
    assert len(kept_places(routing)) == 14


def test_weights_are_gates_that_are_not_renormalised():
    gates = jnp.array([[[0.5, 0.25, 0.25]]])
    np.testing.assert_array_equal(TopK(k=2)(gates).weight, [[0.5, 0.25]])


def test_renormalised_weights_sum_to_one_dropped_choices_included():
    gates = jnp.array([[[0.5, 0.25, 0.25], [0.5, 0.125, 0.375]]])
    routing = TopK(k=2, capacity_factor=None, capacity=1, renormalize=True)(gates)
    np.testing.assert_allclose(routing.weight, [[2 / 3, 1 / 3, 4 / 7, 3 / 7]], rtol=1e-6)
    assert kept_places(routing) == [(0, 0, 0, 0), (0, 1, 0, 0), (0, 2, 0, 1)]  # token 1's first choice is dropped


def test_confidence_is_that_of_the_gates_before_they_are_renormalised():
    gates = jnp.array([[[0.6, 0.4], [0.9, 0.1]]])
    options = {"k": 1, "capacity_factor": None, "capacity": 1, "batch_priority": True}
    assert kept_tokens(TopK(**options, renormalize=True)(gates)) == [1]  # though both weights are 1


def test_with_one_expert_per_token_renormalised_weights_teach_the_gate_nothing():
    gates = jnp.array([[[0.5, 0.2, 0.3]]])
    gradient = jax.grad(lambda gates: jnp.sum(3 * TopK(k=1, renormalize=True)(gates).weight))(gates)
    np.testing.assert_allclose(gradient, np.zeros((1, 1, 3)), atol=1e-6)


def test_the_gradient_of_a_weight_goes_to_its_gate_alone():
    gates = jnp.array([[[0.5, 0.2, 0.3]]])
    gradient = jax.grad(lambda gates: jnp.sum(TopK(k=2)(gates).weight @ jnp.array([3.0, 7.0])))(gates)
    np.testing.assert_array_equal(gradient, [[[3.0, 0.0, 7.0]]])


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({}, 400, 108),  # V-MoE S/32 in training: ceil(400 * 2 * 1.05 / 8) = 105, up to a multiple of 4
        ({"capacity_factor": 4.0}, 400, 400),
        ({"capacity_factor": 1.5}, 1160, 436),
        ({}, 1576, 416),
        ({"multiple": 1}, 400, 105),
        ({"multiple": 1, "capacity_factor": 1.001}, 400, 101),  # 100.1 rounded up
        ({"multiple": 1, "capacity_factor": 1.001, "rounding": "nearest"}, 400, 100),
        ({"k": 1, "multiple": 8}, 400, 56),  # 52.5, 53
        ({"capacity_factor": None, "capacity": 17}, 400, 17),
        ({"capacity_factor": None}, 400, 400),
    ],
)
def test_capacity_follows_from_its_options(options, tokens, expected):
    shape = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
    assert jax.eval_shape(TopK(**options), shape).capacity == expected


def test_published_options_are_the_default():
    router = TopK()
    assert dataclasses.asdict(router) == {
        "k": 2,
        "capacity_factor": 1.05,
        "capacity": None,
        "rounding": "up",
        "multiple": 4,
        "batch_priority": False,
        "priority": "max",
        "noise_std": 1.0,
        "renormalize": False,
    }
    assert router.losses == (Importance(weight=0.005), Load(weight=0.005))


def test_weights_may_be_read_elsewhere_than_choices():
    gates = jnp.array([[[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]]])
    weights = jnp.array([[[0.1, 0.3, 0.6], [0.5, 0.0, 0.2]]])
    for renormalize, expected in ((False, [0.1, 0.3, 0.2, 0.0]), (True, [0.25, 0.75, 1.0, 0.0])):
        routing = TopK(k=2, batch_priority=True, renormalize=renormalize)(gates, weights=weights)
        assert routing.expert.tolist() == [[0, 1, 2, 1]]
        assert routing.slot.tolist() == [[0, 1, 0, 0]]  # the second token is surer: 0.7 is above 0.6
        np.testing.assert_allclose(routing.weight, [expected], rtol=1e-6)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"^TopK has k=3, but there are only 2 experts\. Choose k from 1 to 2\.$"):
        TopK(k=3)(jnp.ones((1, 4, 2)))


def test_a_capacity_without_a_slot_is_refused():
    router = TopK(k=1, capacity_factor=0.1, rounding="nearest")
    with pytest.raises(ValueError, match=r"^capacity_factor=0\.1 gives each of the 8 experts 0\.2 slots for 16 assign"):
        router(jnp.ones((1, 16, 8)))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, r"^TopK wants k of at least 1 expert per token; it got 0\.$"),
        ({"priority": "mean"}, r"^TopK wants priority 'max' or 'sum'; it got 'mean'\.$"),
        ({"noise_std": -1.0}, r"^TopK wants a noise_std of at least 0; it got -1\.0\.$"),
        ({"noise_std": float("nan")}, r"^TopK wants a noise_std of at least 0; it got nan\.$"),
        ({"capacity_factor": 0.0}, r"^TopK wants a capacity_factor above 0; it got 0\.0\.$"),
        ({"capacity_factor": float("inf")}, r"^TopK wants a capacity_factor above 0; it got inf\.$"),
        (
            {"capacity_factor": None, "capacity": 0},
            r"^TopK wants a capacity of at least 1 slot per expert; it got 0\.$",
        ),
        (
            {"capacity": 3},
            r"^TopK takes capacity_factor or capacity, not both; it got 1\.05 and 3\. "
            r"Set capacity_factor=None to give the number of slots\.$",
        ),
        ({"rounding": "down"}, r"^TopK wants rounding 'up' or 'nearest'; it got 'down'\.$"),
        ({"multiple": 0}, r"^TopK wants a multiple of at least 1; it got 0\.$"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TopK(**options)
