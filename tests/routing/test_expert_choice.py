import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jmoe.routing import ExpertChoice
from tests.routing import oracle
from tests.routing.routers import compiled, kept_places, seeds, weights_of

G, S, E = 2, 13, 5
route = compiled(lambda router, gates, mask: router(gates, mask=mask))


@given(seed=seeds)
def test_each_expert_takes_the_tokens_it_gates_highest(seed):
    rng = np.random.default_rng(seed)
    gates = (rng.integers(0, 9, size=(G, S, E)) / 8).astype(np.float32)  # with ties
    mask = rng.uniform(size=(G, S)) < rng.uniform()  # sometimes fewer real tokens than slots
    routing = route(ExpertChoice(capacity_factor=1.5), gates, mask)
    assert routing.capacity == 4  # 13 * 1.5 / 5 = 3.9
    assert weights_of(routing) == oracle.expert_choice(gates, 4, mask)


def test_a_token_may_be_taken_by_many_experts_or_none():
    gates = jnp.array([[[0.9, 0.8], [0.1, 0.2]]])
    routing = ExpertChoice(capacity_factor=1.0)(gates)  # 1 slot each
    assert kept_places(routing) == [(0, 0, 0, 0), (0, 1, 0, 0)]  # token 1 gets none


def test_the_gradient_of_a_weight_goes_to_its_gate_alone():
    gates = jnp.array([[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]])  # expert 0 takes token 0, expert 1 token 1
    factors = jnp.array([[3.0, 7.0]])
    gradient = jax.grad(lambda gates: jnp.sum(factors * ExpertChoice(capacity_factor=0.5)(gates).weight))(gates)
    np.testing.assert_array_equal(gradient, [[[3.0, 0.0], [0.0, 7.0], [0.0, 0.0]]])


def test_renormalised_weights_of_a_token_sum_to_one_over_the_experts_that_took_it():
    gates = jnp.array([[[0.6, 0.2, 0.2], [0.1, 0.6, 0.3], [0.1, 0.5, 0.4]]])
    # Two slots each: experts 0, 1 and 2 take tokens 0 and 1, 1 and 2, 2 and 1. (Of 0.1 and 0.1 the earlier token.)
    router = ExpertChoice(capacity_factor=2.0, renormalize=True)
    np.testing.assert_allclose(router(gates).weight, [[1, 0.1, 0.6, 5 / 9, 4 / 9, 0.3]], rtol=1e-6)
    mask = jnp.array([[True, False, True]])  # then experts 0, 1 and 2 take tokens 0 and 2, 2 and 0, 2 and 0
    weights = weights_of(router(gates, mask=mask))
    assert weights == pytest.approx(
        {
            (0, 0, 0, 0): 0.6,
            (0, 0, 1, 2): 0.1,
            (0, 1, 0, 2): 0.5,
            (0, 1, 1, 0): 0.2,
            (0, 2, 0, 2): 0.4,
            (0, 2, 1, 0): 0.2,
        }
    )


def test_a_token_whose_gates_are_all_zero_keeps_finite_weights():
    gates = jnp.zeros((1, 3, 2))
    assert not ExpertChoice(capacity_factor=1.0, renormalize=True)(gates).weight.any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 12),  # 23 * 2 / 4 = 11.5
        ({"rounding": "nearest"}, 12),  # ties to even
        ({"capacity_factor": 1.0, "rounding": "nearest"}, 6),  # 5.75
        ({"capacity_factor": 0.9, "rounding": "nearest"}, 5),  # 5.175
        ({"capacity_factor": 1.0, "multiple": 4}, 8),
        ({"capacity_factor": 4.0}, 23),  # every expert takes everything
    ],
)
def test_capacity_follows_from_its_options(options, expected):
    shape = jax.ShapeDtypeStruct((1, 23, 4), jnp.float32)
    assert jax.eval_shape(ExpertChoice(**options), shape).capacity == expected


def test_weights_may_be_read_elsewhere_than_choices():
    gates = jnp.array([[[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.8, 0.2]]])
    weights = jnp.array([[[0.1, 0.3], [0.5, 0.0], [0.2, 0.6], [0.7, 0.4]]])
    mask = jnp.array([[True, False, True, True]])
    for renormalize, expected in ((False, [0.7, 0.1, 0.6, 0.3]), (True, [1.0, 0.25, 1.0, 0.75])):
        routing = ExpertChoice(capacity_factor=1.0, renormalize=renormalize)(gates, mask=mask, weights=weights)
        assert routing.token.tolist() == [[3, 0, 2, 0]]
        np.testing.assert_allclose(routing.weight, [expected], rtol=1e-6)


def test_more_slots_than_tokens_are_refused():
    with pytest.raises(ValueError, match="gives each expert 10") as error:
        ExpertChoice(capacity_factor=5.0)(jnp.ones((1, 8, 4)))
    assert str(error.value) == (
        "ExpertChoice gives each expert 10 of a group's 8 tokens (capacity_factor=5.0, 4 experts, multiple=1). "
        "Choose capacity_factor <= 4, the number of experts, or larger groups."
    )


def test_no_slot_is_refused():
    with pytest.raises(ValueError, match="rounds to 0; it must be at least 1"):
        ExpertChoice(capacity_factor=0.1, rounding="nearest")(jnp.ones((1, 8, 4)))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity_factor": -1.0}, r"^ExpertChoice wants a capacity_factor above 0; it got -1\.0\.$"),
        ({"multiple": 0}, r"^ExpertChoice wants a multiple of at least 1; it got 0\.$"),
        ({"noise_std": -1.0}, r"^ExpertChoice wants a noise_std of at least 0; it got -1\.0\.$"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExpertChoice(**options)
