import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routing import Soft
from tests.tolerance import tolerance


@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_a_softmax_over_tokens_and_one_over_slots(padded):
    G, S, E, P = 2, 5, 3, 2
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(G, S, E, P)).astype(np.float32)
    mask = rng.permuted(np.broadcast_to(np.arange(S) < 3, (G, S)), axis=1) if padded else np.ones((G, S), bool)
    mixing = Soft(slots_per_expert=P)(jnp.asarray(logits), mask=jnp.asarray(mask) if padded else None)

    exp = np.exp(logits.astype(np.float64))
    dispatch, combine = np.zeros((G, S, E, P)), np.zeros((G, S, E, P))
    for g, s, e, p in itertools.product(range(G), range(S), range(E), range(P)):
        if mask[g, s]:
            dispatch[g, s, e, p] = exp[g, s, e, p] / sum(exp[g, t, e, p] for t in range(S) if mask[g, t])
            combine[g, s, e, p] = exp[g, s, e, p] / exp[g, s].sum()
    np.testing.assert_allclose(mixing.dispatch, dispatch, **tolerance(jnp.float32))
    np.testing.assert_allclose(mixing.combine, combine, **tolerance(jnp.float32))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"slots_per_expert": 0}, r"^Soft wants slots_per_expert of at least 1; it got 0\.$"),
        ({"noise_std": -1.0}, r"^Soft wants a noise_std of at least 0; it got -1\.0\.$"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Soft(**options)
