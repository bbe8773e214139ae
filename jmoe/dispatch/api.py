"""The two public functions: tokens to expert slots, and back."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jmoe.dispatch import einsum, gather, ragged
from jmoe.dispatch.ragged import Ragged
from jmoe.notation import Array, Float
from jmoe.routing.decision import Decision, Mixing, Routing

Method = Literal["auto", "einsum", "gather", "ragged"]
Implementation = Literal["pallas", "xla"]


def dispatch(
    x: Float[Array, "G S D"],
    decision: Decision,
    method: Method = "gather",
    *,
    implementation: Implementation | None = None,
) -> Array | Ragged:
    """Moves tokens to the slots of their experts.

    Args:
      x: [G, S, D] tokens, any float dtype.
      decision: a Routing, or a Mixing (for which there is only "einsum", and "gather" and "auto" mean it).
      method: "gather" (rows copied by index), "einsum" (one-hot masks, the definition), "ragged" (sorted by expert,
        no slots), or "auto".
      implementation: of the row ops of "gather" and "ragged": "pallas", "xla", or None for the fastest on the platform
        that it is compiled for.

    Returns:
      [G, E, C, D] in the dtype of x, empty slots zero; or a Ragged for "ragged".
      All methods agree in values and gradients; einsum accumulates in float32.

    Raises:
      ValueError: x does not have the groups of the decision, the method is unknown, or it is "ragged" for a Mixing.
      NotImplementedError: the named implementation cannot do this here.
    """
    G, S, _ = x.shape
    groups, tokens = _groups(decision)
    if (groups, tokens) != (G, S):
        raise ValueError(f"dispatch got x with {G} groups of {S} tokens; the decision is of {groups} of {tokens}.")
    module, options = _module(method, decision, implementation)
    return module.dispatch(x, decision, **options)


def combine(
    y: Array, decision: Decision, method: Method = "gather", *, implementation: Implementation | None = None
) -> Float[Array, "G S D"]:
    """Brings the experts' outputs back to the tokens, summed by combine weight in float32.

    Args:
      y: [G, E, C, D] what the experts made of `dispatch(x, decision, method)`; [N, D] rows for "ragged".
      decision: the decision that dispatched.
      method: the method that dispatched.
      implementation: as for `dispatch`.

    Returns:
      [G, S, D] in the dtype of y; zero for a token whose assignments were all dropped.

    Raises:
      ValueError: the method is unknown, or it is "ragged" for a Mixing.
      NotImplementedError: the named implementation cannot do this here.
    """
    module, options = _module(method, decision, implementation)
    return module.combine(y, decision, **options)


def rounded(x: Float[Array, "..."], dtype: str | None) -> Float[Array, "..."]:
    """Rounds what is about to move to values that dtype can hold; it stays in the dtype of x.

    Published models move tokens as bfloat16, and sum in float32. The gradient is rounded as well.

    Args:
      x: tokens before `dispatch`, or outputs of experts before `combine`.
      dtype: such as "bfloat16"; None for no rounding.
    """
    if dtype is None:
        return x
    # Not a cast to and fro: XLA may leave out a pair of those.
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def resolve(method: Method, decision: Decision) -> Literal["einsum", "gather", "ragged"]:
    """The method that runs: "auto" resolved, and a Mixing always by einsum.

    Raises:
      ValueError: the method is unknown, or it is "ragged" for a Mixing.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"There is no dispatch method {method!r}; use one of {', '.join(map(repr, get_args(Method)))}."
        )
    if isinstance(decision, Mixing):
        if method == "ragged":
            raise ValueError("A soft router mixes tokens in fixed slots, which 'ragged' does not have; use 'einsum'.")
        return "einsum"
    return auto_method(decision) if method == "auto" else method


def auto_method(routing: Routing, platform: str | None = None) -> Literal["gather", "ragged"]:
    """What "auto" means: "gather", but "ragged" where every expert has room for the whole group and it is no CPU.

    Room for the whole group makes E / K times as many slots as are used. On CPU that was still three times faster than
    XLA's ragged product (8 experts, K = 2, S/32 size, value and gradient), which there multiplies by every expert.

    Args:
      routing: the decision.
      platform: "cpu", "gpu" or "tpu"; that of JAX's default device if None.
    """
    dropless = routing.capacity >= routing.group_size and routing.choices is not None
    return "ragged" if dropless and (platform or jax.default_backend()) != "cpu" else "gather"


def _groups(decision: Decision) -> tuple[int, int]:
    if isinstance(decision, Mixing):
        return decision.dispatch.shape[0], decision.dispatch.shape[1]
    return decision.token.shape[0], decision.group_size


def _module(method: Method, decision: Decision, implementation: Implementation | None):
    """The module of a method, and what else its functions take."""
    if (name := resolve(method, decision)) != "einsum":
        return {"gather": gather, "ragged": ragged}[name], {"implementation": implementation}
    if implementation not in (None, "xla"):
        what = "A soft router mixes" if isinstance(decision, Mixing) else "Method 'einsum' moves"
        raise NotImplementedError(
            f"{what} tokens by matrix multiplies; {implementation!r} is an implementation of 'gather' and 'ragged'."
        )
    return einsum, {}
