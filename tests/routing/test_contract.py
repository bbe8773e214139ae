"""What every router promises, whatever its algorithm: properties over the table of routers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jmoe.routing import ExpertChoice, Mixing, QuadraticPlan, Soft, Switch, TopK, Transport
from tests.routing.routers import (
    ONE_HOT,
    ROUTERS,
    D,
    E,
    G,
    S,
    decide,
    gate,
    kept_places,
    layer,
    logits_shape,
    name,
    random_logits,
    random_tokens,
    route,
    seeds,
    weights_of,
)
from tests.tolerance import tolerance

EVERYONE = np.ones((G, S), bool)
REAL = 7  # of the S tokens, in tests of padding

every_router = pytest.mark.parametrize("router", ROUTERS, ids=name)
every_one_hot_router = pytest.mark.parametrize("router", ONE_HOT, ids=name)
one_router_of_each_class = pytest.mark.parametrize("router", {type(r): r for r in ROUTERS}.values(), ids=name)
batch_invariant_routers = pytest.mark.parametrize("router", [r for r in ROUTERS if r.batch_invariant], ids=name)
routers_with_losses = pytest.mark.parametrize("router", [r for r in ROUTERS if r.losses], ids=name)


def has_sparse_plan(router):
    """Whether a plan decides that is not equal where gates are: at most so many of its entries may be above 0."""
    return isinstance(router, Transport) and router.plan == QuadraticPlan()


def random_mask(seed):
    """[G, S] with REAL tokens in each group, at any place."""
    rng = np.random.default_rng(seed + 2)
    return np.stack([rng.permutation(np.arange(S) < REAL) for _ in range(G)])


def assert_same(actual, expected, **tolerance):
    """Two trees are equal: integers exactly, floats exactly or within tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if tolerance and jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def test_the_table_holds_every_router():
    assert {type(router) for router in ROUTERS} == {TopK, Switch, ExpertChoice, Soft, Transport}
    assert len(set(ROUTERS)) == len(ROUTERS)  # frozen and hashable, hence usable as static arguments


@every_one_hot_router
@given(seed=seeds)
def test_no_slot_is_given_twice(router, seed):
    places = kept_places(layer(router, random_logits(router, seed), random_tokens(seed, G, S, D), EVERYONE).decision)
    slots = [(group, expert, slot) for group, expert, slot, _ in places]
    assert len(slots) == len(set(slots))
    assert slots  # nobody drops everything


@every_one_hot_router
@given(seed=seeds)
def test_a_token_goes_to_an_expert_at_most_once(router, seed):
    routing = layer(router, random_logits(router, seed), random_tokens(seed, G, S, D), EVERYONE).decision
    for token, expert in zip(np.asarray(routing.token), np.asarray(routing.expert), strict=True):
        pairs = list(zip(token.tolist(), expert.tolist(), strict=True))
        assert len(pairs) == len(set(pairs))


@every_one_hot_router
@given(seed=seeds)
def test_everything_is_in_range(router, seed):
    logits = random_logits(router, seed)
    routing = layer(router, logits, random_tokens(seed, G, S, D), random_mask(seed)).decision
    assert (routing.group_size, routing.num_experts) == (S, E)
    assert routing.capacity >= 1
    for values, end in ((routing.token, S), (routing.expert, E)):
        assert values.shape == routing.slot.shape == routing.weight.shape
        assert jnp.issubdtype(values.dtype, jnp.integer)
        assert (values >= 0).all()
        assert (values < end).all()
    assert (routing.slot >= 0).all()  # a dropped one lies past the end: -1 would wrap round
    assert routing.weight.dtype == jnp.float32
    assert (routing.weight >= 0).all()
    assert (routing.weight <= 1).all()
    if routing.choices is not None:  # then assignment s * K + k is the k-th of token s
        assert (np.asarray(routing.token) == np.repeat(np.arange(S), routing.choices)).all()


@given(seed=seeds)
def test_soft_weights_are_shares(seed):
    router = Soft(slots_per_expert=3)
    mixing = layer(router, random_logits(router, seed), random_tokens(seed, G, S, D), EVERYONE).decision
    np.testing.assert_allclose(mixing.dispatch.sum(axis=1), 1, **tolerance(jnp.float32))
    np.testing.assert_allclose(mixing.combine.sum(axis=(2, 3)), 1, **tolerance(jnp.float32))
    assert (mixing.dispatch >= 0).all()
    assert (mixing.combine >= 0).all()


@every_router
@given(seed=seeds)
def test_a_group_does_not_see_the_others(router, seed):
    logits, tokens = random_logits(router, seed), random_tokens(seed, G, S, D)
    result = layer(router, logits, tokens, EVERYONE)

    logits_other, tokens_other = logits.copy(), tokens.copy()
    logits_other[1], tokens_other[1] = -2 * logits[1], 5.0
    other = layer(router, logits_other, tokens_other, EVERYONE)
    first = lambda result: jax.tree.map(lambda a: a[0], (result.y, result.decision))  # noqa: E731
    assert_same(first(other), first(result))

    swapped = layer(router, logits[::-1], tokens[::-1], EVERYONE)
    assert_same((swapped.y, swapped.decision), jax.tree.map(lambda a: a[::-1], (result.y, result.decision)))
    assert_same(swapped.losses, result.losses, **tolerance(jnp.float32))  # summed in another order
    assert_same(swapped.metrics, result.metrics, **tolerance(jnp.float32))


@every_router
@given(seed=seeds)
def test_what_padding_holds_changes_nothing(router, seed):
    logits, tokens, mask = random_logits(router, seed), random_tokens(seed, G, S, D), random_mask(seed)
    garbage = logits.copy(), tokens.copy()
    garbage[0][~mask], garbage[1][~mask] = 1e4 * random_logits(router, seed + 5)[~mask], 1e9
    clean, dirty = layer(router, logits, tokens, mask), layer(router, *garbage, mask)

    assert_same((dirty.y, dirty.losses, dirty.metrics), (clean.y, clean.losses, clean.metrics))
    if isinstance(clean.decision, Mixing):
        assert_same(dirty.decision, clean.decision)
    else:
        assert kept_places(dirty.decision) == kept_places(clean.decision)


@every_router
@given(seed=seeds)
def test_padding_takes_no_slot_gives_nothing_and_learns_nothing(router, seed):
    logits, tokens, mask = random_logits(router, seed), random_tokens(seed, G, S, D), random_mask(seed)
    result = layer(router, logits, tokens, mask)
    if isinstance(result.decision, Mixing):
        assert not result.decision.dispatch[~mask].any()
        assert not result.decision.combine[~mask].any()
    else:
        assert all(mask[group, token] for group, _, _, token in kept_places(result.decision))
    assert not result.y[~mask].any()
    for gradient in result.gradients:
        assert np.isfinite(gradient).all()
        assert not gradient[~mask].any()
        assert gradient[mask].any()


@every_router
@given(seed=seeds)
def test_a_padded_group_is_the_group_without_padding(router, seed):
    logits, mask = random_logits(router, seed), random_mask(seed)
    decision = route(with_slots(router, 2, S), logits, mask)
    expected = route(with_slots(router, 2, REAL), logits[mask].reshape(G, REAL, *logits.shape[2:]))
    if isinstance(decision, Mixing):
        for mixed, alone in ((decision.dispatch, expected.dispatch), (decision.combine, expected.combine)):
            np.testing.assert_allclose(mixed[mask], alone.reshape(G * REAL, E, -1), **tolerance(jnp.float32))
    else:
        rank = np.cumsum(mask, axis=1) - 1  # of each real token among the real ones
        renamed = {(*place, int(rank[place[0], token])): w for (*place, token), w in weights_of(decision).items()}
        assert renamed == pytest.approx(weights_of(expected), rel=1e-5)


def with_slots(router, C, tokens):
    """The router with C slots per expert for that many tokens, where it has a capacity at all."""
    if isinstance(router, TopK) and not router.batch_invariant:
        return dataclasses.replace(router, capacity_factor=None, capacity=C)
    if isinstance(router, Switch | ExpertChoice):
        return dataclasses.replace(router, capacity_factor=(C - 0.25) * E / tokens)
    if isinstance(router, Transport):
        return dataclasses.replace(router, choice=with_slots(router.choice, C, tokens))
    return router


@one_router_of_each_class
def test_without_a_mask_every_token_is_real(router):
    logits = random_logits(router, 3)
    assert_same(route(router, logits), route(router, logits, EVERYONE), **tolerance(jnp.float32))


@batch_invariant_routers
@given(seed=seeds)
def test_a_batch_invariant_router_ignores_the_rest_of_the_group(router, seed):
    logits, tokens = random_logits(router, seed), random_tokens(seed, G, S, D)
    expected = layer(router, logits, tokens, EVERYONE)
    logits[:, 1:], tokens[:, 1:] = random_logits(router, seed + 3)[:, 1:] * 4, -tokens[:, 1:]
    actual = layer(router, logits, tokens, EVERYONE)
    np.testing.assert_allclose(actual.y[:, 0], expected.y[:, 0], **tolerance(jnp.float32))


@every_router
def test_a_router_that_is_not_batch_invariant_says_so(router):
    """The last token wants expert 0; its result depends on whether the others want it more, unless declared."""
    tokens = random_tokens(0, G, S, D)
    elsewhere = np.zeros(logits_shape(router), np.float32)
    elsewhere[:, :, 4] = 3.0
    elsewhere[:, -1, 4], elsewhere[:, -1, 0] = 0.0, 2.0
    crowd = elsewhere.copy()
    crowd[:, :-1, 4], crowd[:, :-1, 0] = 0.0, 3.0
    alone, crowded = layer(router, elsewhere, tokens, EVERYONE), layer(router, crowd, tokens, EVERYONE)
    assert np.allclose(alone.y[:, -1], crowded.y[:, -1], rtol=1e-3) == router.batch_invariant


@every_router
def test_vmap_gives_the_same(router):
    logits = np.stack([random_logits(router, seed) for seed in range(3)])
    mask = np.stack([random_mask(seed) for seed in range(3)])
    mapped = jax.jit(jax.vmap(lambda *arguments: decide(router, gate(router, *arguments))))(logits, mask)
    alone = [route(router, *arguments) for arguments in zip(logits, mask, strict=True)]
    assert_same(mapped, jax.tree.map(lambda *a: np.stack(a), *alone), **tolerance(jnp.float32))


@one_router_of_each_class
def test_the_decision_is_the_same_without_jit(router):
    logits, mask = jnp.asarray(random_logits(router, 1)), jnp.asarray(random_mask(1))
    assert_same(decide(router, gate(router, logits, mask)), route(router, logits, mask), **tolerance(jnp.float32))


def equal(shape):
    """Every gate is equal."""
    return np.zeros(shape)


def nobody(shape):
    """Nobody wants the last expert."""
    logits = np.random.default_rng(0).normal(size=shape)
    logits[:, :, -1] = -1e4
    return logits


def everybody(shape):
    """Everybody wants expert 0, and only that."""
    logits = np.zeros(shape)
    logits[:, :, 0] = 1e4
    return logits


@every_router
@pytest.mark.parametrize("case", [equal, nobody, everybody], ids=lambda case: case.__doc__)
@pytest.mark.parametrize("padding", ["none", "a whole group"])
def test_extreme_gates_give_finite_values_and_gradients(router, case, padding):
    mask = EVERYONE.copy()
    if padding == "a whole group":
        mask[1] = False
    logits = case(logits_shape(router)).astype(np.float32)
    result = layer(router, logits, random_tokens(0, G, S, D), mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert not result.y[~mask].any()


@every_router
def test_a_batch_of_padding_alone_costs_nothing(router):
    result = layer(router, random_logits(router, 0), random_tokens(0, G, S, D), np.zeros((G, S), bool))
    for leaf in jax.tree.leaves((result.y, result.losses, result.metrics, result.gradients)):
        assert not leaf.any()


@routers_with_losses
def test_two_experts_give_finite_losses_and_gradients(router):
    """The published load loss has a gradient of NaN where both experts are equally loaded, as they are with K = E."""
    if getattr(router, "k", 1) > 2:
        router = dataclasses.replace(router, k=2)

    @jax.jit
    @jax.value_and_grad
    def total(logits):
        gating = gate(router, logits)
        decision = decide(router, gating)
        return sum(loss(gating, decision) for loss in router.losses)

    logits = random_logits(router, 0, experts=2)
    for case in (logits, np.zeros_like(logits)):
        assert all(np.isfinite(leaf).all() for leaf in total(case))


@pytest.mark.parametrize("router", [r for r in ONE_HOT if not has_sparse_plan(r)], ids=name)
def test_equal_gates_go_by_token_then_by_expert(router):
    result = layer(router, np.zeros((G, S, E), np.float32), random_tokens(0, G, S, D), EVERYONE)
    C = result.decision.capacity
    router = getattr(router, "choice", router)
    if isinstance(router, ExpertChoice):  # every expert takes the first C tokens
        expected = [(g, e, c, c) for g in range(G) for e in range(E) for c in range(C)]
    else:  # every token wants experts 0..K-1, of which each has room for the first C tokens
        K = getattr(router, "k", 1)
        expected = [(g, e, c, c) for g in range(G) for e in range(K) for c in range(min(C, S))]
    assert kept_places(result.decision) == sorted(expected)
