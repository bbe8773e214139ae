import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routing import Balance, Switch, TopK
from tests.routing.routers import kept_places


def test_it_is_token_choice_of_one_expert():
    gates = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 13)), jnp.float32)
    for batch_priority in (False, True):
        actual = Switch(batch_priority=batch_priority)(gates)
        top_1 = TopK(k=1, capacity_factor=None, capacity=4, batch_priority=batch_priority)  # ceil(13 * 1.25 / 5)
        expected = top_1(gates)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)  # same capacity, same K
        assert kept_places(actual) == kept_places(expected)
        np.testing.assert_array_equal(actual.weight, expected.weight)


def test_published_options_are_the_default():
    assert Switch() == Switch(capacity_factor=1.25, jitter=0.01, batch_priority=False, noise_std=0.0)
    assert Switch().losses == (Balance(weight=0.01, scope="group", choices="first"),)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity_factor": 0.0}, r"^Switch wants a capacity_factor above 0; it got 0\.0\.$"),
        ({"jitter": 1.0}, r"^Switch wants a jitter from 0 to below 1; it got 1\.0\.$"),
        ({"jitter": -0.1}, r"^Switch wants a jitter from 0 to below 1; it got -0\.1\.$"),
        ({"noise_std": -1.0}, r"^Switch wants a noise_std of at least 0; it got -1\.0\.$"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Switch(**options)
