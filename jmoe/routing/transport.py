"""Transport plans: how much of each token goes to each expert, if every expert is to get the same amount.

A plan [G, S, E] is not negative. Its rows, one per token, sum to 1 and its columns, one per expert, to S / E: one of
the two exactly, the other as nearly as a solver's steps reach. Of all such plans, similarity and a regulariser pick one
(Liu, Puigcerver and Blondel 2022, arXiv:2209.15466, sections 2 and 3): with a quadratic regulariser it has zeros, with
the entropy it has none. Padding has no mass: its rows are zero, and experts share the real tokens alone.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, Int

Choosers = Literal["tokens", "experts"]
Solver = Literal["sinkhorn", "newton"]


def project_on_simplex(x: Float[Array, "... n"], nonzeros: int | None = None) -> Float[Array, "... n"]:
    """The nearest vector of probabilities along the last axis, with at most so many nonzeros.

    Those are where x is largest, of equal entries the first (arXiv:2209.15466, section 4). An entry of -inf gets
    nothing, and if all are -inf the result is zero.
    """
    n = x.shape[-1]
    k = n if nonzeros is None else min(nonzeros, n)
    top, _ = jax.lax.top_k(x, k)  # in decreasing order
    largest = jnp.maximum(top[..., :1], jnp.finfo(x.dtype).min)
    # What is more than 1 below the largest gets nothing anyway; so clipped, -inf does not reach the sums.
    sums = jnp.cumsum(jnp.maximum(top - largest, -2.0), axis=-1)
    # The r largest entries, all moved by the same amount, sum to 1; the support is the r that lifts them least.
    r = 1 + jax.lax.broadcasted_iota(x.dtype, sums.shape, sums.ndim - 1)
    lift = jnp.min((1 - sums) / r, axis=-1, keepdims=True)
    projected = jnp.maximum(x - largest + lift, 0)
    if k == n:
        return projected
    # By rank, not by comparing with the last of top: a compiler that computes x twice may do so with other last bits.
    rank = jnp.argsort(jnp.argsort(x, axis=-1, descending=True, stable=True), axis=-1)
    return jnp.where(rank < k, projected, 0)


def quadratic_plan(
    similarity: Float[Array, "G S E"],
    mask: Bool[Array, "G S"] | None = None,
    *,
    choosers: Choosers,
    nonzeros: int | None = None,
    steps: int = 20,
    learning_rate: float = 1e-2,
) -> Float[Array, "G S E"]:
    """The plan of least squared norm, by Adam on the semi-dual (arXiv:2209.15466, section 3; Blondel et al. 2018).

    Every chooser divides its share by a projection on the simplex, so that the sums of choosers are exact; Adam moves
    one price per chosen one until their sums fit as well, or the steps are over. With few steps, as published, the
    result is not the optimum but the state reached. It stops early where the norm of what is missing is at most 1e-3.

    A note on rounding: the first step of Adam is as long as the learning rate, however little is missing. Without a
    limit of nonzeros, a softmax so even that its plan has no zeros is its own optimum; what is missing there is
    rounding alone, which the one step that is taken makes noise of that length. So it is in the published code.

    Args:
      similarity: [G, S, E] float32; the softmax of the logits as published.
      mask: [G, S], False for padding.
      choosers: whose sums are exact and whose nonzeros are limited: "tokens" or "experts".
      nonzeros: at most so many per chooser (K for tokens, C for experts); None for no limit, in which case the
        quadratic regulariser alone makes zeros.
      steps: of Adam.
      learning_rate: of Adam, whose other options are the usual ones (0.9, 0.999, 1e-8).

    Returns:
      [G, S, E], without gradient: the published solver has none.
    """
    per_token, per_expert = _marginals(similarity, mask)
    similarity = jax.lax.stop_gradient(_without_padding(similarity, mask))
    solve = jax.vmap(functools.partial(_semi_dual, nonzeros=nonzeros, steps=steps, learning_rate=learning_rate))
    if choosers == "tokens":
        return solve(similarity, per_token, per_expert)
    return solve(similarity.swapaxes(1, 2), per_expert, per_token).swapaxes(1, 2)


def _semi_dual(
    similarity: Float[Array, "n m"],
    share: Float[Array, " n"],
    wanted: Float[Array, " m"],
    *,
    nonzeros: int | None,
    steps: int,
    learning_rate: float,
) -> Float[Array, "n m"]:
    """The plan of one group: n choosers divide their shares among m, who want so much each; 0 for no part in it."""
    scale = jnp.where(share > 0, share, 1.0)[:, None]

    def divide(price: Float[Array, " m"]) -> Float[Array, "n m"]:
        value = jnp.where(wanted > 0, price, -jnp.inf)[None, :] + similarity
        return share[:, None] * project_on_simplex(value / scale, nonzeros)

    def unfinished(state):
        step, missing, *_ = state
        return (step < steps) & (missing > 1e-3)

    def adam(state):
        step, _, price, mean, square = state
        excess = jnp.sum(divide(price), axis=0) - wanted
        mean, square = 0.9 * mean + 0.1 * excess, 0.999 * square + 0.001 * jnp.square(excess)
        time = (step + 1).astype(price.dtype)
        unbiased = mean / (1 - 0.9**time), square / (1 - 0.999**time)
        price -= learning_rate * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8)
        return step + 1, jnp.linalg.norm(excess), price, mean, square

    zeros = jnp.zeros_like(wanted)
    start = (jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, wanted.dtype), zeros, zeros, zeros)
    return divide(jax.lax.while_loop(unfinished, adam, start)[2])


def entropic_plan(
    logits: Float[Array, "G S E"],
    mask: Bool[Array, "G S"] | None = None,
    *,
    steps: int = 20,
    solver: Solver = "sinkhorn",
) -> Float[Array, "G S E"]:
    """The plan of largest entropy, exp(logits) scaled by rows and columns (Cuturi 2013, arXiv:1306.0895).

    The gradient is that of the optimum, by the implicit function theorem, as published; no step is differentiated.

    Args:
      logits: [G, S, E] float32.
      mask: [G, S], False for padding.
      steps: rounds of "sinkhorn", which scale the columns and then the rows, so that rows are exact. After 0 rounds,
        which the published code does where it is asked for less than 10, this is no plan but exp(logits). At most so
        many of "newton".
      solver: "sinkhorn"; or "newton", which follows every round by a step of Newton's method where that helps, and
        stops as soon as columns are right to 1e-5. Few steps do then for the optimum, at a cost of E^3 each.

    Returns:
      [G, S, E], differentiable in logits.
    """
    per_token, per_expert = _marginals(logits, mask)
    plan = jax.vmap(functools.partial(_entropic, steps=steps, solver=solver))
    return plan(_without_padding(logits, mask), per_token, per_expert)


def _entropic(
    logits: Float[Array, "S E"],
    per_token: Float[Array, " S"],
    per_expert: Float[Array, " E"],
    *,
    steps: int,
    solver: Solver,
) -> Float[Array, "S E"]:
    """The plan of one group."""
    E = len(per_expert)
    real = (per_token > 0) | ~jnp.any(per_token > 0)  # while it is computed, a group of padding alone has a plan, too
    share = jnp.where(per_expert > 0, per_expert, 1.0)
    fixed = jax.lax.stop_gradient(logits)
    # Rows are those of a softmax but for the quirk of 0 rounds.
    mass = per_token * jnp.exp(jax.nn.logsumexp(fixed, axis=1)) if steps == 0 else per_token

    def plan(logits: Float[Array, "S E"], column: Float[Array, " E"]) -> Float[Array, "S E"]:
        return mass[:, None] * jax.nn.softmax(logits + column[None, :], axis=1)

    def sinkhorn(row: Float[Array, " S"]) -> tuple[Float[Array, " S"], Float[Array, " E"]]:
        """The logarithms of the scales of rows and columns after one more round."""
        column = jnp.log(share) - jax.nn.logsumexp(fixed + row[:, None], axis=0, where=real[:, None])
        return -jax.nn.logsumexp(fixed + column[None, :], axis=1), column

    def excess(column: Float[Array, " E"], logits: Float[Array, "S E"] = fixed) -> Float[Array, " E"]:
        return jnp.sum(plan(logits, column), axis=0) - share

    def newton(column: Float[Array, " E"], logits: Float[Array, "S E"] = fixed) -> Float[Array, " E"]:
        """The step of Newton's method away from the column scales, towards those without excess."""
        gates = jax.nn.softmax(fixed + column[None, :], axis=1)
        diagonal = jnp.diag(jnp.sum(mass[:, None] * gates, axis=0))
        slope = diagonal - jnp.einsum("S,SE,SF->EF", mass, gates, gates, precision="highest")
        # Scaling all columns alike changes nothing: the slope is singular, which these two take from it.
        slope += jnp.mean(share) * (1 / E + 1e-6 * jnp.eye(E))
        return jnp.linalg.solve(slope, excess(column, logits))

    def unfinished(state):
        step, worst, *_ = state
        return (step < steps) & (worst > 1e-5)

    def round_of_newton(state):
        step, _, row, _ = state
        _, column = sinkhorn(row)
        further = column - newton(column)
        column = jnp.where(jnp.linalg.norm(excess(further)) < jnp.linalg.norm(excess(column)), further, column)
        worst = jnp.max(jnp.abs(excess(column)) / share)
        return step + 1, worst, -jax.nn.logsumexp(fixed + column[None, :], axis=1), column

    start = jnp.zeros_like(per_token), jnp.zeros_like(per_expert)
    if solver == "sinkhorn":
        _, column = jax.lax.fori_loop(0, steps, lambda _, scales: sinkhorn(scales[0]), start)
    else:
        begin = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, logits.dtype)
        *_, column = jax.lax.while_loop(unfinished, round_of_newton, (*begin, *start))
    step = newton(column, logits)  # its value is left out, its derivative is that of the optimum
    return plan(logits, column - (step - jax.lax.stop_gradient(step)))


def plan_nonzeros(
    plan: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None
) -> dict[str, Int[Array, " G"] | Float[Array, " G"]]:
    """Counts the nonzeros of plans, in each group.

    Returns:
      "tokens_per_expert_min", "tokens_per_expert_mean", "tokens_per_expert_max", and the same for
      "experts_per_token", of which padding is none. A group of padding alone has zeros.
    """
    used = plan != 0
    mask = jnp.ones(plan.shape[:2], bool) if mask is None else mask
    tokens, experts = jnp.sum(used, axis=1), jnp.sum(used, axis=2)  # [G, E], [G, S]
    real = jnp.sum(mask, axis=1)
    fewest = jnp.min(experts, axis=1, initial=plan.shape[2], where=mask)
    return {
        "tokens_per_expert_min": jnp.min(tokens, axis=1),
        "tokens_per_expert_mean": jnp.mean(tokens, axis=1, dtype=plan.dtype),
        "tokens_per_expert_max": jnp.max(tokens, axis=1),
        "experts_per_token_min": jnp.where(real > 0, fewest, 0),
        "experts_per_token_mean": jnp.sum(experts, axis=1).astype(plan.dtype) / jnp.maximum(real, 1),
        "experts_per_token_max": jnp.max(experts, axis=1),
    }


def _marginals(
    similarity: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None
) -> tuple[Float[Array, "G S"], Float[Array, "G E"]]:
    """What the rows and the columns of a plan should sum to."""
    G, S, E = similarity.shape
    per_token = jnp.ones((G, S), similarity.dtype) if mask is None else mask.astype(similarity.dtype)
    return per_token, jnp.broadcast_to(jnp.sum(per_token, axis=1, keepdims=True) / E, (G, E))


def _without_padding(similarity: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None) -> Float[Array, "G S E"]:
    """Zeros in the place of padding, whose values may be anything."""
    return similarity if mask is None else jnp.where(mask[..., None], similarity, 0.0)
