"""What a router decides, as data: which token goes where, with which weight."""

import dataclasses
import typing

import jax

from jmoe.notation import Array, Float, Int


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Which token goes to which slot of which expert, as A assignments per group.

    A dropped assignment keeps its token and expert and has slot >= capacity: past the end, where a scatter can drop
    it and a gather fill. It is never -1, because a negative index wraps round to the last slot. Nobody's claim to a
    slot depends on the order of the list: the slot says it, 0 for the first in the router's priority.

    Attributes:
      token: [G, A] in [0, group_size).
      expert: [G, A] in [0, num_experts). A token goes to an expert at most once.
      slot: [G, A] in [0, capacity), or >= capacity if dropped. No slot of an expert is given twice.
      weight: [G, A] float32, the combine weight; the only field that carries gradient.
      group_size: S, tokens per group.
      num_experts: E.
      capacity: C, slots per expert and group.
      choices: K, if the list is sorted by token with K assignments each, so that A = S * K and assignment s * K + k
        is the k-th of token s; None for any other list. Dispatch is faster where it is given.
    """

    token: Int[Array, "G A"]
    expert: Int[Array, "G A"]
    slot: Int[Array, "G A"]
    weight: Float[Array, "G A"]
    group_size: int = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    choices: int | None = dataclasses.field(default=None, metadata={"static": True})


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """A soft decision: every slot is a mixture of tokens, every token a mixture of slot outputs.

    Attributes:
      dispatch: [G, S, E, C] float32, the weight of each token in each slot.
      combine: [G, S, E, C] float32, the weight of each slot in each token.
    """

    dispatch: Float[Array, "G S E C"]
    combine: Float[Array, "G S E C"]


Decision = Routing | Mixing
