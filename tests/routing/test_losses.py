import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jmoe.routing import Balance, ExpertChoice, Gating, Importance, Load, Mixing, TopK, ZLoss
from jmoe.routing.losses import squared_variation
from tests.routing.routers import compiled
from tests.tolerance import tolerance

G, S, E, K = 3, 7, 5, 2
SIGMA = 0.2  # = 1 / E
WEIGHT = 0.7
LOSSES = {  # each with its formula for one group of real tokens, in float64
    "importance": (Importance(weight=WEIGHT), lambda clean, noisy: variation(softmax(clean).sum(axis=0))),
    "load": (Load(weight=WEIGHT), lambda clean, noisy: variation(load(clean, noisy, K))),
    "balance, first choices": (Balance(weight=WEIGHT), lambda clean, noisy: balance(noisy, 1)),
    "balance, all choices": (Balance(weight=WEIGHT, choices="all"), lambda clean, noisy: balance(noisy, K)),
    "z": (ZLoss(weight=WEIGHT), lambda clean, noisy: np.mean(np.log(np.exp(clean).sum(axis=-1)) ** 2)),
}

every_loss = pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)
every_scope = pytest.mark.parametrize("scope", ["group", "global"])
every_mask = pytest.mark.parametrize("padding", ["no padding", "some padding", "a group of padding"])


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def variation(values):
    return np.var(values) / np.mean(values) ** 2


def load(clean, noisy, k):
    """The probability of each expert to stay among the K best, averaged over tokens."""
    total = np.zeros(E)
    for s in range(len(clean)):
        threshold = sorted(noisy[s])[-k]
        for e in range(E):
            total[e] += 1 - norm.cdf((threshold - clean[s, e]) / SIGMA)
    return total / len(clean)


def balance(noisy, k):
    gates = softmax(noisy)
    fraction = np.zeros(E)
    for token in gates:
        for e in np.argsort(-token)[:k]:
            fraction[e] += 1 / (k * len(gates))
    return E * np.sum(fraction * gates.mean(axis=0))


def oracle(formula, scope, clean, noisy, mask):
    """The mean of a formula over groups that have real tokens, or of all real tokens at once."""
    if scope == "global":
        clean, noisy, mask = (a.reshape(1, -1, *a.shape[2:]) for a in (clean, noisy, mask))
    return WEIGHT * np.mean([formula(clean[g][mask[g]], noisy[g][mask[g]]) for g in range(len(mask)) if mask[g].any()])


@compiled
def value_and_gradient(loss, clean, noise, mask):
    def total(clean):
        gating = Gating(logits=clean, noisy_logits=clean + SIGMA * noise, mask=mask, sigma=SIGMA)
        return loss(gating, TopK(k=K)(gating.gates, mask=mask))

    return jax.value_and_grad(total)(clean)


def random_case(padding):
    """Logits and noise whose K-th and next largest are well apart: formulae with a threshold are smooth there."""
    rng = np.random.default_rng(0)
    clean = rng.permuted(np.broadcast_to(np.linspace(-1, 1, E), (G, S, E)), axis=-1)
    clean, noise = clean + rng.uniform(-0.05, 0.05, (G, S, E)), rng.uniform(-0.5, 0.5, (G, S, E))
    mask = np.ones((G, S), bool)
    if padding != "no padding":
        mask = rng.permuted(np.arange(S) < np.array([[3], [5], [7]]), axis=1)
    if padding == "a group of padding":
        mask[1] = False
    return clean.astype(np.float32), noise.astype(np.float32), mask


@every_loss
@every_scope
@every_mask
def test_values_and_gradients_are_those_of_the_formula(loss, formula, scope, padding):
    clean, noise, mask = random_case(padding)
    value, gradient = value_and_gradient(type(loss)(**vars(loss) | {"scope": scope}), clean, noise, mask)

    def total(clean):
        return oracle(formula, scope, clean, clean + SIGMA * noise.astype(np.float64), mask)

    np.testing.assert_allclose(value, total(clean.astype(np.float64)), rtol=1e-5)
    step = 1e-5
    expected = np.zeros((G, S, E))
    for place in np.ndindex(G, S, E):
        bump = np.zeros((G, S, E))
        bump[place] = step
        expected[place] = (total(clean + bump) - total(clean - bump)) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert not gradient[~mask].any()


@every_loss
def test_no_mask_means_no_padding(loss, formula):
    clean, noise, mask = random_case("no padding")
    for actual, expected in zip(
        value_and_gradient(loss, clean, noise, None), value_and_gradient(loss, clean, noise, mask), strict=True
    ):
        np.testing.assert_allclose(actual, expected, **tolerance(jnp.float32))


@pytest.mark.parametrize("loss", [Importance(), Load()], ids=["importance", "load"])
def test_a_uniform_gate_varies_nothing_and_has_no_gradient(loss):
    # Where all experts are equal, the derivative of a standard deviation does not exist; that of its square is 0.
    value, gradient = value_and_gradient(loss, np.zeros((G, S, E), np.float32), np.zeros((G, S, E)), None)
    assert abs(value) < 1e-12
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_balance_is_one_for_a_uniform_load():
    # Token s wants expert s mod E alone: f = P = 1/E, and E * sum(1/E^2) = 1.
    logits = 100.0 * jax.nn.one_hot(jnp.arange(2 * E) % E, E)[None]
    gating = Gating(logits=logits, noisy_logits=logits)
    assert Balance(weight=1.0)(gating, TopK(k=1)(gating.gates)) == pytest.approx(1)


def test_balance_is_the_number_of_experts_when_all_want_one():
    logits = jnp.zeros((G, S, E)).at[..., 3].set(100.0)  # f = P = 1 for expert 3
    gating = Gating(logits=logits, noisy_logits=logits)
    assert Balance(weight=1.0)(gating, TopK(k=1)(gating.gates)) == pytest.approx(E)


def test_load_is_zero_without_noise():
    logits = jnp.asarray(random_case("no padding")[0])
    gating = Gating(logits=logits, noisy_logits=logits)
    assert Load()(gating, TopK()(gating.gates)) == 0


def test_a_global_scope_forgives_groups_that_differ():
    # Group 0 wants expert 0, group 1 expert 1: each is uneven, the batch is not.
    logits = 100.0 * jax.nn.one_hot(jnp.array([[0] * S, [1] * S]), 2)
    gating = Gating(logits=logits, noisy_logits=logits)
    decision = TopK(k=1)(gating.gates)
    assert Importance(weight=1.0)(gating, decision) == pytest.approx(1)  # (1, 0): mean 1/2, std 1/2
    assert Importance(weight=1.0, scope="global")(gating, decision) == 0


def test_squared_variation_of_nothing_is_zero():
    value, gradient = jax.value_and_grad(squared_variation)(jnp.zeros(E))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_published_weights_are_the_default():
    assert (Importance().weight, Load().weight, Balance().weight, ZLoss().weight) == (0.005, 0.005, 0.01, 0.001)
    assert [loss().name for loss in (Importance, Load, Balance, ZLoss)] == ["importance", "load", "balance", "z"]


def test_losses_of_choosing_tokens_refuse_other_routers():
    logits = jnp.zeros((G, S, E))
    gating = Gating(logits=logits, noisy_logits=logits, sigma=SIGMA)
    for decision in (ExpertChoice()(gating.gates), Mixing(dispatch=logits[..., None], combine=logits[..., None])):
        with pytest.raises(
            ValueError, match=r"^The load loss is defined for routers in which every token chooses K experts\.$"
        ):
            Load()(gating, decision)
        with pytest.raises(
            ValueError, match=r"^Balance\(choices='all'\) is defined for routers in which tokens choose\.$"
        ):
            Balance(choices="all")(gating, decision)
