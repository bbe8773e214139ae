"""The sparse layer: gate, router, dispatch, experts, combine."""

import dataclasses
import logging
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
from flax import nnx

from jmoe.dispatch import Implementation, Method, Ragged, combine, dispatch, resolve, rounded, through
from jmoe.nn.gate import default_gate
from jmoe.nn.groups import from_groups, group_length, say_once, to_groups
from jmoe.nn.mlp import ExpertInit, ExpertMlp
from jmoe.notation import Array, Bool, Float, PRNGKeyArray
from jmoe.routing import Decision, ExpertChoice, Loss, Router, Routing, Soft, TopK, decide, routing_metrics
from jmoe.routing.members import interleave_members, separate_members


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A sparse layer, or all sparse layers of a transformer.

    Attributes:
      num_experts: E.
      hidden_dim: F, hidden width of each expert; None for that of the transformer's dense blocks, or 4 * D.
      router: TopK, Switch, ExpertChoice, Soft, or your own.
      layers: the blocks of a transformer that are sparse, counted from 0: "last-n" (the last n odd ones, as V-MoE
        places them), "every-n" (n-1, 2n-1, ...), or a tuple of indices. A layer on its own does not read it.
      images_per_group: images that are routed together; 8 as published. A layer that is given fewer routes those.
      group_size: tokens that are routed together, instead of whole images.
      dropout: rate inside the experts.
      expert_init: "identical" as published, or "independent".
      losses: auxiliary losses with their weights; None for those published with the router.
      method: how tokens move: "gather", "einsum", "ragged", or "auto".
      implementation: of the ops of "gather" and "ragged": "pallas" (kernels for TPU and GPU), "xla", or None for the
        fastest on the platform that the layer is compiled for, which is logged. A named one that cannot is an error.
      fused: experts gather their tokens by themselves, and neither those nor the hidden activation [E, C, F] are
        written to memory on the way (kernel for TPU; elsewhere XLA holds what is hidden while it runs). Training
        computes it again. For method "gather" and experts without dropout.
      exchange_dtype: "bfloat16" rounds tokens on their way to the experts and back, as published; None leaves them as
        they are. Combine weights and sums are float32 either way.
      members: M of an efficient ensemble (E3, arXiv:2110.03360): each member has E / M experts of its own and sees its
        own copy of every image. It wants a router in which tokens choose. 1 for no ensemble.
      gate: makes the gate, called as gate(D, num_experts, rngs=rngs), with noise or jitter of its own; None for the
        one published with the router. An experiment needs a frozen dataclass, which can be saved with the run. That of
        an ensemble must say in its `Gating` how many members it has gated.
    """

    num_experts: int = 8
    hidden_dim: int | None = None
    router: Router = TopK()
    layers: str | tuple[int, ...] = "every-2"
    images_per_group: int | None = 8
    group_size: int | None = None
    dropout: float = 0.0
    expert_init: ExpertInit = "identical"
    losses: tuple[Loss, ...] | None = None
    method: Method = "auto"
    implementation: Implementation | None = None
    fused: bool = False
    exchange_dtype: Literal["bfloat16"] | None = None
    members: int = 1
    gate: Callable[..., Any] | None = None

    def __post_init__(self):
        for name in ("num_experts", "hidden_dim", "images_per_group", "group_size", "members"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"MoEConfig wants {name} of at least 1; it got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"MoEConfig wants a dropout rate from 0 to below 1; it got {self.dropout}.")
        if self.expert_init not in typing.get_args(ExpertInit):
            raise ValueError(f"MoEConfig wants expert_init 'identical' or 'independent'; it got {self.expert_init!r}.")
        if self.method not in typing.get_args(Method):
            raise ValueError(f"MoEConfig wants method 'auto', 'einsum', 'gather' or 'ragged'; it got {self.method!r}.")
        if self.implementation not in (None, *typing.get_args(Implementation)):
            raise ValueError(f"MoEConfig wants implementation 'pallas', 'xla' or None; it got {self.implementation!r}.")
        if self.implementation == "pallas" and self.method == "einsum":
            raise ValueError(
                "MoEConfig(implementation='pallas') is for methods 'gather' and 'ragged'; it got method 'einsum'."
            )
        if self.fused and (self.method not in ("auto", "gather") or self.dropout):
            raise ValueError(
                f"MoEConfig(fused=True) is for method 'gather' (or 'auto') and experts without dropout; it got method "
                f"{self.method!r} and dropout={self.dropout}."
            )
        if self.fused and isinstance(self.router, Soft):
            raise ValueError("MoEConfig(fused=True) wants a router that sends tokens to slots; Soft mixes them.")
        if self.exchange_dtype not in (None, "bfloat16"):
            raise ValueError(f"MoEConfig wants exchange_dtype 'bfloat16' or None; it got {self.exchange_dtype!r}.")
        if not isinstance(self.router, Router):
            raise ValueError(
                f"MoEConfig wants a router with noise_std, losses, batch_invariant and a call, as jmoe.routing.Router "
                f"lists them; {type(self.router).__name__} lacks one. See the README on adding a router."
            )
        if self.num_experts % self.members:
            raise ValueError(
                f"An ensemble of members={self.members} wants as many experts for each: num_experts={self.num_experts} "
                f"is not a multiple of {self.members}."
            )
        by_gates = getattr(self.router, "takes", "gates") == "gates"  # see `decide`
        if self.members > 1 and (isinstance(self.router, ExpertChoice) or not by_gates):
            raise ValueError(
                "An ensemble wants a router in which every token chooses among the experts of its member, such as "
                f"TopK; it got {type(self.router).__name__}."
            )
        experts = self.num_experts // self.members
        if isinstance(self.router, TopK) and self.router.k > experts:
            each = "" if self.members == 1 else f", {experts} for each of members={self.members}"
            raise ValueError(
                f"TopK has k={self.router.k}, but there are only num_experts={self.num_experts}{each}. "
                f"Choose k from 1 to {experts}."
            )


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """What a sparse layer computed.

    Attributes:
      y: [B, T, D], zero for a token that got no slot (add it to the residual stream).
      decision: where each token of each group went: a Routing, or a Mixing for a soft router.
      losses: the weighted auxiliary losses, scalars by name; add their sum to the task's loss.
      metrics: shares dropped, expert load, entropy and confidence of the gate; see `routing_metrics`.
    """

    y: Float[Array, "B T D"]
    decision: Decision
    losses: dict[str, Float[Array, ""]]
    metrics: dict[str, Array]


class MoEMlp(nnx.Module):
    """Sparse MLP: every token is processed by the experts its router chose, and their outputs summed by weight.

    Equation 1 of V-MoE (arXiv:2106.05974), with any router. It has no residual connection and no normalisation.
    """

    def __init__(self, config: MoEConfig, D: int, *, dtype=None, rngs: nnx.Rngs):
        """Makes the gate and the experts, all in float32.

        Args:
          config: the layer's options.
          D: model width.
          dtype: of the experts' computation, such as jnp.bfloat16; that of the tokens if None. Routing is in float32.
          rngs: its stream "params" is used.
        """
        E = config.num_experts
        self.gate = (config.gate or _default(config))(D, E, rngs=rngs)
        self.experts = ExpertMlp(
            E,
            D,
            config.hidden_dim or 4 * D,
            dropout=config.dropout,
            init=config.expert_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> MoEOutput:
        """Applies the layer.

        Args:
          x: [B, T, D] tokens of B images, float32 or bfloat16. In an ensemble B counts copies, and the M copies of
            an image follow each other.
          mask: [B, T], False for padding: never routed, takes no slot, counts in no loss or metric, and comes back
            as zeros.
          key: randomness of training (noise of the gate, dropout); None for evaluation, which has neither.

        Returns:
          a MoEOutput; y has the dtype of x.

        Raises:
          ValueError: the router cannot route such groups (no slot for an expert, say), or the groups, or the gate, do
            not fit the members of an ensemble.
        """
        config = self.config
        B, T, _ = x.shape
        gate_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        S = group_length(B, T, group_size=config.group_size, images_per_group=config.images_per_group)
        M = config.members
        if M > 1:
            if B % M or S % M:
                raise ValueError(
                    f"An ensemble of {M} members wants {M} copies of every image, and whole tokens in a group: it got "
                    f"{B} images and groups of {S} tokens, which must be multiples of {M}. Groups of images_per_group="
                    f"{M}, or a multiple of it, are."
                )
            x, mask = interleave_members(x, M), None if mask is None else interleave_members(mask, M)
        tokens, mask = to_groups(x, mask, S)  # [G, S, D]
        gating = self.gate(tokens, mask=mask, key=gate_key)
        if gating.members != M:
            raise ValueError(
                f"The gate is for members={gating.members} and MoEConfig has members={M}: {type(self.gate).__name__} "
                "must gate each member by itself, as jmoe.nn.LinearGate(..., members=M) does."
            )
        decision = decide(config.router, gating)

        y = self._through_experts(rounded(tokens, config.exchange_dtype), decision, dropout_key)
        y = from_groups(y, B // M, T * M)
        y = (y if M == 1 else separate_members(y, M)).astype(x.dtype)

        losses = config.router.losses if config.losses is None else config.losses
        return MoEOutput(
            y=y,
            decision=decision,
            losses=_by_name((loss.name, loss(gating, decision)) for loss in losses),
            metrics=routing_metrics(gating, decision),
        )

    def _through_experts(
        self, tokens: Float[Array, "G S D"], decision: Decision, key: PRNGKeyArray | None
    ) -> Float[Array, "G S D"]:
        """Dispatch, experts, combine."""
        config = self.config
        implementation = config.implementation
        method = resolve("gather" if config.fused else config.method, decision)
        if config.method == "auto":
            name, S = type(config.router).__name__, tokens.shape[1]
            say_once(f"Dispatch 'auto' is {method!r} for {name} in groups of {S} tokens.", logging.INFO)
        if config.fused:
            if not isinstance(decision, Routing):
                raise ValueError("MoEConfig(fused=True) wants a router that sends tokens to slots, not a mixture.")

            def experts(x: Array, slots: Array, choice: Array) -> Array:
                outputs = self.experts.fused(x, slots, choice, implementation=implementation)
                return rounded(outputs, config.exchange_dtype)

            return through(tokens, decision, experts, implementation)
        slots = dispatch(tokens, decision, method, implementation=implementation)
        if isinstance(slots, Ragged):
            outputs = self.experts.ragged(slots.rows, slots.group_sizes, key=key, implementation=implementation)
        else:
            slots = slots.swapaxes(0, 1)  # [E, G, C, D]
            E, G, C, D = slots.shape
            outputs = self.experts(slots.reshape(E, G * C, D), key=key).reshape(E, G, C, D).swapaxes(0, 1)
        return combine(rounded(outputs, config.exchange_dtype), decision, method, implementation=implementation)


def _by_name(losses: Iterable[tuple[str, Array]]) -> dict[str, Array]:
    """Losses of one name, such as one of each scope, are added."""
    total: dict[str, Array] = {}
    for name, loss in losses:
        total[name] = total.get(name, 0.0) + loss
    return total


def _default(config: MoEConfig) -> Callable[..., nnx.Module]:
    return lambda D, num_experts, *, rngs: default_gate(
        config.router, D, num_experts, members=config.members, rngs=rngs
    )
