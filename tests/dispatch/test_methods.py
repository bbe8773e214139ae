"""All methods of dispatch are one function, over the table of routers."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.dispatch import combine, dispatch
from jmoe.routing import ExpertChoice, Mixing, Routing, Soft, TopK
from kernels_pallas import grouped_matmul
from tests.routing.routers import (
    ROUTERS,
    D,
    E,
    G,
    S,
    compiled,
    decide,
    gate,
    name,
    random_logits,
    random_tokens,
    route,
)
from tests.tolerance import tolerance

F = 7  # what experts make of D
ONE_OF_EACH_KIND = (TopK(k=2, capacity_factor=0.5, multiple=1), ExpertChoice(), Soft(slots_per_expert=3))

every_router = pytest.mark.parametrize("router", ROUTERS, ids=name)
one_router_of_each_kind = pytest.mark.parametrize("router", ONE_OF_EACH_KIND, ids=name)


def methods_for(router):
    return ("einsum", "gather", "auto") if isinstance(router, Soft) else ("einsum", "gather", "ragged")


def sparse_layer(method, router, logits, tokens, experts, mask):
    """The smallest layer of experts: linear, one matrix each."""
    decision = decide(router, gate(router, logits, mask))
    slots = dispatch(tokens, decision, method)
    if method == "ragged":
        y = grouped_matmul(slots.rows, experts, slots.group_sizes)
    else:
        product = jnp.einsum("GECD,EDF->GECF", slots.astype(jnp.float32), experts.astype(jnp.float32))
        y = product.astype(tokens.dtype)
    return combine(y, decision, method)


def value_and_gradients(method, router, logits, tokens, experts, mask):
    """What comes out, and the gradient of its sum of sines for logits, tokens and experts."""

    def total(*inputs):
        y = sparse_layer(method, router, *inputs, mask)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradients, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(logits, tokens, experts)
    return y, *gradients


def every_method(router, *arguments):
    return {method: value_and_gradients(method, router, *arguments) for method in methods_for(router)}


all_methods = compiled(every_method)


def random_case(router, seed=0, dtype=jnp.float32):
    mask = np.random.default_rng(seed).permuted(np.broadcast_to(np.arange(S) < [[S], [7]], (G, S)), axis=1)
    tokens, experts = (jnp.asarray(random_tokens(seed, *shape), dtype) for shape in ((G, S, D), (E, D, F)))
    return jnp.asarray(random_logits(router, seed)), tokens, experts, jnp.asarray(mask)


def assert_all_agree(results, dtype):
    expected = results.pop("einsum")
    for method, actual in results.items():
        for what, a, b in zip(("y", "logits", "tokens", "experts"), actual, expected, strict=True):
            assert a.dtype == b.dtype
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, **tolerance(dtype, np.abs(b).max()), err_msg=f"{method}: {what}")
            assert b.any()  # nothing agrees by being zero


@every_router
def test_methods_agree_in_values_and_gradients(router):
    assert_all_agree(all_methods(router, *random_case(router)), jnp.float32)


@one_router_of_each_kind
def test_methods_agree_in_bfloat16(router):
    results = all_methods(router, *random_case(router, dtype=jnp.bfloat16))
    assert results["einsum"][0].dtype == jnp.bfloat16
    assert_all_agree(results, jnp.bfloat16)


@every_router
def test_the_definition_is_that_of_loops(router):
    logits, tokens, experts, mask = random_case(router)
    expected = loops(route(router, logits, mask), np.asarray(tokens, np.float64), np.asarray(experts, np.float64))
    y, *_ = all_methods(router, logits, tokens, experts, mask)["einsum"]
    np.testing.assert_allclose(y, expected, **tolerance(jnp.float32, np.abs(expected).max()))


def loops(decision, tokens, experts):
    """What `sparse_layer` computes, one assignment at a time."""
    y = np.zeros((G, S, F))
    if isinstance(decision, Mixing):
        for g, e, c in itertools.product(range(G), range(E), range(decision.dispatch.shape[3])):
            mixture = sum(decision.dispatch[g, s, e, c] * tokens[g, s] for s in range(S))
            for s in range(S):
                y[g, s] += decision.combine[g, s, e, c] * (mixture @ experts[e])
        return y
    for g, a in np.ndindex(*decision.token.shape):
        if decision.slot[g, a] < decision.capacity:
            s, e = decision.token[g, a], decision.expert[g, a]
            y[g, s] += decision.weight[g, a] * (tokens[g, s] @ experts[e])
    return y


@one_router_of_each_kind
def test_equal_gates_are_broken_alike_by_all_methods(router):
    _, tokens, experts, mask = random_case(router)
    logits = jnp.zeros_like(random_case(router)[0])
    results = all_methods(router, logits, tokens, experts, mask)
    for method in methods_for(router):
        np.testing.assert_allclose(results[method][0], results["einsum"][0], **tolerance(jnp.float32))


@one_router_of_each_kind
def test_vmap_gives_the_same(router):
    cases = [random_case(router, seed) for seed in range(2)]
    stacked = [jnp.stack(arrays) for arrays in zip(*cases, strict=True)]
    mapped = compiled(lambda router, *arrays: jax.vmap(functools.partial(every_method, router))(*arrays))(
        router, *stacked
    )
    alone = [all_methods(router, *case) for case in cases]
    for actual, *expected in zip(*map(jax.tree.leaves, (mapped, *alone)), strict=True):
        expected = np.stack(expected)
        np.testing.assert_allclose(actual, expected, **tolerance(jnp.float32, np.abs(expected).max()))


@pytest.mark.parametrize("method", ["einsum", "gather", "ragged"])
def test_nothing_needs_jit(method):
    router = TopK(k=2, capacity_factor=0.5, multiple=1)
    case = random_case(router)
    np.testing.assert_allclose(
        sparse_layer(method, router, *case), all_methods(router, *case)["einsum"][0], **tolerance(jnp.float32, 5.0)
    )


def routing_by_hand():
    """One group of 4 tokens, 2 experts with 2 slots.

    Token 0 goes to expert 0 (slot 0) and expert 1 (slot 1), token 1 to expert 1 (slot 0), token 2 was dropped
    and token 3 never chosen; slot 1 of expert 0 is empty.
    """
    return Routing(
        token=jnp.array([[0, 1, 2, 0]]),
        expert=jnp.array([[0, 1, 1, 1]]),
        slot=jnp.array([[0, 0, 2, 1]]),
        weight=jnp.array([[0.5, 0.25, 0.9, 2.0]]),
        group_size=4,
        num_experts=2,
        capacity=2,
    )


@pytest.mark.parametrize("method", ["einsum", "gather"])
def test_a_case_by_hand(method):
    routing = routing_by_hand()
    x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    np.testing.assert_array_equal(dispatch(x, routing, method), [[[[1.0], [0.0]], [[2.0], [1.0]]]])
    y = jnp.array([[[[10.0], [99.0]], [[20.0], [30.0]]]])
    # Token 0: 0.5 * 10 + 2 * 30; token 1: 0.25 * 20.
    np.testing.assert_array_equal(combine(y, routing, method), [[[65.0], [5.0], [0.0], [0.0]]])


def test_a_case_by_hand_without_slots():
    routing = routing_by_hand()
    x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    ragged = dispatch(x, routing, "ragged")
    assert ragged.group_sizes.tolist() == [1, 2]
    # Rows of expert 0: token 0; of expert 1 in the order of the list: tokens 1, 0; the dropped one has no row.
    np.testing.assert_array_equal(ragged.rows, [[1.0], [2.0], [1.0], [0.0]])
    y = jnp.array([[10.0], [20.0], [30.0], [99.0]])
    np.testing.assert_array_equal(combine(y, routing, "ragged"), [[[65.0], [5.0], [0.0], [0.0]]])


class TestProgram:
    """What the program of the fast method holds, in a case whose sizes tell its arrays apart."""

    ROUTERS = (TopK(k=2, capacity_factor=1.1, multiple=1), ExpertChoice(capacity_factor=1.3))
    G, S, E, D = 2, 97, 7, 11

    def lowered(self, method, router):
        shapes = ((self.G, self.S, self.E), (self.G, self.S, self.D), (self.E, self.D, self.D))
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = functools.partial(value_and_gradients, method, router)
        return jax.jit(lambda *inputs: run(*inputs, None)).lower(*arguments)

    def scattered_shapes(self, method, router):
        """The operand of each scatter, as in "434xi32". Read before compilation: on CPU loops replace scatters."""
        text = self.lowered(method, router).as_text()
        return [
            re.search(r":\s*\(tensor<([^>]*)>", text[match.start() :]).group(1)
            for match in re.finditer(r"stablehlo\.scatter", text)
        ]

    def largest_array(self, method, router):
        """The elements of the largest array in the optimised program."""
        text = self.lowered(method, router).compile().as_text()
        shapes = re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]+)\]", text)
        return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)

    @pytest.mark.parametrize("method", ["gather", "ragged"])
    @pytest.mark.parametrize("router", ROUTERS, ids=name)
    def test_rows_are_never_scattered(self, method, router):
        rows = [shape for shape in self.scattered_shapes(method, router) if str(self.D) in shape.split("x")]
        assert rows == []

    def test_only_integers_are_scattered_where_tokens_choose(self):
        scattered = self.scattered_shapes("gather", self.ROUTERS[0])
        assert scattered  # the inverse index; this shows as well that the text is read rightly
        assert {shape.split("x")[-1] for shape in scattered} == {"i32"}

    def test_plain_indexing_would_scatter_rows(self):
        def plain(x, index):
            return jnp.sum(jnp.sin(x[index]))

        shapes = jax.ShapeDtypeStruct((97, 11), jnp.float32), jax.ShapeDtypeStruct((106,), jnp.int32)
        assert "stablehlo.scatter" in jax.jit(jax.grad(plain)).lower(*shapes).as_text()

    @pytest.mark.parametrize(
        ("router", "method"), [(ROUTERS[0], "gather"), (ROUTERS[1], "gather"), (ROUTERS[1], "einsum")]
    )
    def test_only_einsum_has_an_array_with_an_element_for_every_token_and_slot(self, router, method):
        C = jax.eval_shape(router, jax.ShapeDtypeStruct((self.G, self.S, self.E), jnp.float32)).capacity
        masks = self.G * self.S * self.E * C
        assert (self.largest_array(method, router) >= masks / 2) == (method == "einsum")
