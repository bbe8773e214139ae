import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.dispatch.index import assignments_by_token, by_token, invert, reorder
from jmoe.routing import Routing


def listed(token, num_experts, group_size):
    """A Routing of which only the tokens matter."""
    token = jnp.asarray(token)
    return Routing(
        token=token,
        expert=jnp.zeros_like(token),
        slot=jnp.zeros_like(token),
        weight=jnp.arange(token.size, dtype=jnp.float32).reshape(token.shape),
        group_size=group_size,
        num_experts=num_experts,
        capacity=1,
    )


def test_assignments_are_listed_by_token_in_the_order_of_the_list():
    routing = listed([[2, 0, 2], [1, 1, 0]], num_experts=2, group_size=3)
    # Flat assignments 0..5; tokens 0, 1, 2 of group 0 are in {1}, {}, {0, 2}, of group 1 in {5}, {3, 4}, {}; 6 is none.
    expected = [[1, 6], [6, 6], [0, 2], [5, 6], [3, 4], [6, 6]]
    assert assignments_by_token(routing).tolist() == expected


def test_positions_and_weights_follow_and_the_inverse_names_them():
    routing = listed([[2, 0, 2], [1, 1, 0]], num_experts=2, group_size=3)
    position = jnp.array([[4, 0, 1], [6, 2, 3]])  # of 6; that of assignment 3 is none
    slots, weights, choice = by_token(position, 6, routing)
    assert slots.tolist() == [[0, 6], [6, 6], [4, 1], [3, 6], [6, 2], [6, 6]]
    assert weights.tolist() == [[1, 0], [0, 0], [0, 2], [5, 0], [3, 4], [0, 0]]
    # Position 0 is named by slots.flat[0], 1 by [5], 2 by [9], 3 by [6], 4 by [4], and 5 by none of the 12.
    assert choice.tolist() == [0, 5, 9, 6, 4, 12]


def test_inverting_a_permutation():
    permutation = jnp.asarray(np.random.default_rng(0).permutation(17))
    np.testing.assert_array_equal(permutation[invert(permutation, 17)], np.arange(17))


@pytest.mark.parametrize("jit", [False, True])
def test_reordering_and_its_gradient(jit):
    values, index = jnp.array([10.0, 20.0, 30.0]), jnp.array([[2, 3], [0, 7]])  # 3 and 7 are past the end

    def weighed(values):
        return jnp.sum(reorder(values, index) * jnp.array([[1.0, 2.0], [3.0, 4.0]]))

    value, gradient = (jax.jit if jit else lambda f: f)(jax.value_and_grad(weighed))(values)
    assert value == 1 * 30 + 3 * 10
    assert gradient.tolist() == [3.0, 0.0, 1.0]
