"""The sparse layer: gate, router, dispatch, experts, combine."""

import dataclasses
import functools
import logging
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jmoe.dispatch import Implementation, Method, Ragged, combine, dispatch, resolve, rounded, through
from jmoe.nn.exchange import EXCHANGED, ONE_DEVICE, Carrier, Exchange
from jmoe.nn.gate import default_gate
from jmoe.nn.groups import from_groups, group_length, say_once, to_groups
from jmoe.nn.mlp import ExpertInit, ExpertMlp
from jmoe.notation import Array, Bool, Float, PRNGKeyArray
from jmoe.routing import Decision, ExpertChoice, Loss, Router, Routing, Soft, TopK, decide, routing_metrics
from jmoe.routing.members import interleave_members, separate_members

ADDED_SLOTS = 1 / 32  # of those of an expert, at most: more are more work than what they save
TILE_ROWS = 16  # a tile of a TPU's memory has 16 rows of bfloat16, or 8 of float32
MOST_CHUNKS = 4  # each reads and writes the gradient of the experts once more
ROWS_OF_CHUNK = 2048  # of each expert: with fewer, reading its weights takes longer than multiplying by them


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
      exchange_chunks: where experts are on several devices, in how many parts at most the groups of a device go there,
        equal ones of whole groups: one part travels while experts work on another (the pipelining degree of Tutel,
        arXiv:2206.03382). None for as many as are worth it, up to 4, where the devices can
        (`jmoe.parallel.Exchange.overlaps`); 1 for all at once, which it also is while experts have dropout, whose masks
        are drawn for all at once.
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
    exchange_chunks: int | None = None
    members: int = 1
    gate: Callable[..., Any] | None = None

    def __post_init__(self):
        for name in ("num_experts", "hidden_dim", "images_per_group", "group_size", "exchange_chunks", "members"):
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
        exchange: Exchange = ONE_DEVICE,
    ) -> MoEOutput:
        """Applies the layer.

        Args:
          x: [B, T, D] tokens of B images, float32 or bfloat16. In an ensemble B counts copies, and the M copies of
            an image follow each other.
          mask: [B, T], False for padding: never routed, takes no slot, counts in no loss or metric, and comes back
            as zeros.
          key: randomness of training (noise of the gate, dropout); None for evaluation, which has neither.
          exchange: how tokens get to experts on other devices, such as `jmoe.parallel.Exchange(mesh)`.

        Returns:
          a MoEOutput; y has the dtype of x.

        Raises:
          ValueError: the router cannot route such groups (no slot for an expert, say), the groups, or the gate, do
            not fit the members of an ensemble, or the groups cannot be divided among the devices.
        """
        config = self.config
        B, T, _ = x.shape
        gate_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        S = group_length(B, T, group_size=config.group_size, images_per_group=config.images_per_group)
        _check_parts(B, T, S, exchange.parts)
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
        tokens = exchange.split(tokens)
        gating = self.gate(tokens, mask=mask, key=gate_key)
        if gating.members != M:
            raise ValueError(
                f"The gate is for members={gating.members} and MoEConfig has members={M}: {type(self.gate).__name__} "
                "must gate each member by itself, as jmoe.nn.LinearGate(..., members=M) does."
            )
        decision = exchange.per_group(functools.partial(decide, config.router), gating)

        y = self._through_experts(rounded(tokens, config.exchange_dtype), decision, dropout_key, exchange)
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
        self, tokens: Float[Array, "G S D"], decision: Decision, key: PRNGKeyArray | None, exchange: Exchange
    ) -> Float[Array, "G S D"]:
        """Dispatch, experts, combine."""
        config = self.config
        method = resolve("gather" if config.fused else config.method, decision)
        if config.method == "auto":
            name, S = type(config.router).__name__, tokens.shape[1]
            say_once(f"Dispatch 'auto' is {method!r} for {name} in groups of {S} tokens.", logging.INFO)
        if config.fused and not isinstance(decision, Routing):
            raise ValueError("MoEConfig(fused=True) wants a router that sends tokens to slots, not a mixture.")
        experts = self.experts
        chunks = 1 if _drops(config, key) else _chunks(config, decision, exchange)
        if chunks > 1:
            # Cast once, not in every chunk: gradients of chunks are then added up before those of devices, not after.
            graph, parameters = nnx.split(experts)
            dtype = experts.dtype or tokens.dtype
            experts = nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), parameters))
        if config.fused or method == "ragged":  # where experts are kernels, which XLA does not divide among devices
            graph, parameters = nnx.split(experts)
            through = functools.partial(_on_device, config, chunks, graph)
            return exchange.with_experts(through, parameters, ExpertMlp.AXES, tokens, decision, key=key)
        if chunks == 1:
            return _with_slots(config, method, experts, exchange, key, tokens, decision)
        pieces = exchange.per_group(functools.partial(_cut, chunks), tokens, decision, kernels=True)
        outputs = [_with_slots(config, method, experts, exchange, key, *piece) for piece in pieces]
        return exchange.per_group(_joined, *outputs, kernels=True)


def _with_slots(
    config: MoEConfig,
    method: Method,
    experts: ExpertMlp,
    exchange: Exchange,
    key: PRNGKeyArray | None,
    tokens: Float[Array, "G S D"],
    decision: Decision,
) -> Float[Array, "G S D"]:
    """Dispatch, experts and combine with slots, of the groups of all devices."""
    moved = None if exchange.expert_parts == 1 else _moved_as(config, experts, tokens)

    def slotted(decision: Decision) -> Decision:
        return decision if _drops(config, key) else _whole_tiles(decision, exchange)

    def to_slots(tokens: Array, decision: Decision) -> Array:
        return _slots(tokens, slotted(decision), method, config.implementation)

    def to_tokens(outputs: Array, decision: Decision) -> Array:
        decision = slotted(decision)
        return combine(_by_group(outputs, decision), decision, method, implementation=config.implementation)

    slots = exchange.per_group(to_slots, tokens, decision, out_axes=1, kernels=True)  # [E, G * C, D]
    # Copies of tokens are rounded already, and experts round what they get to their dtype; mixtures are not to be.
    exact = isinstance(decision, Routing) or config.exchange_dtype is None
    slots = _named(exchange.to_experts(_as(moved if exact else None, slots)), exchange).astype(slots.dtype)
    outputs = rounded(experts(slots, key=key), config.exchange_dtype)
    outputs = _named(exchange.to_tokens(_as(moved, outputs)), exchange).astype(outputs.dtype)
    return exchange.per_group(to_tokens, outputs, decision, in_axes=(1, 0), kernels=True)


def _on_device(
    config: MoEConfig,
    chunks: int,
    graph: nnx.GraphDef,
    parameters: nnx.State,
    carrier: Carrier,
    tokens: Float[Array, "G S D"],
    decision: Routing,
    key: PRNGKeyArray | None,
) -> Float[Array, "G S D"]:
    """Dispatch, experts that are kernels, and combine, on one device."""
    experts, through = nnx.merge(graph, parameters), _fused if config.fused else _without_slots
    return _joined(*(through(config, experts, carrier, key, *piece) for piece in _cut(chunks, tokens, decision)))


def _cut(chunks: int, *trees: Any) -> list[Any]:
    """The groups of a device, axis 0 of all leaves, in equal parts.

    What overlaps is left to the compiler: parts do not depend on each other, so that one can travel while the experts
    work on another, if the compiler does not wait for an exchange (`Exchange.compiler_options`).
    """
    length = jax.tree.leaves(trees)[0].shape[0] // chunks
    return [jax.tree.map(lambda x: x[i * length : (i + 1) * length], trees) for i in range(chunks)]  # noqa: B023


def _joined(*outputs: Float[Array, "g S D"]) -> Float[Array, "G S D"]:
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def _without_slots(
    config: MoEConfig,
    experts: ExpertMlp,
    carrier: Carrier,
    key: PRNGKeyArray | None,
    tokens: Float[Array, "G S D"],
    decision: Routing,
) -> Float[Array, "G S D"]:
    """Dispatch, experts and combine without slots, on one device."""
    implementation = config.implementation
    sorted_rows = dispatch(tokens, decision, "ragged", implementation=implementation)
    assert isinstance(sorted_rows, Ragged)
    # From one device to another go all its rows at most, or as many as the experts there have slots for its groups.
    slots = decision.num_experts // carrier.expert_parts * decision.token.shape[0] * decision.capacity
    limit = min(sorted_rows.rows.shape[0], slots)
    moved = _moved_as(config, experts, tokens)
    rows, sizes, back = carrier.rows_to_experts(_as(moved, sorted_rows.rows), sorted_rows.group_sizes, limit)
    rows = carrier.to_parts(_named(rows, carrier).astype(tokens.dtype))
    if key is not None:  # what parts of the hidden units drop is independent, but they are to drop the same outputs
        hidden_key, output_key = jax.random.split(key)
        keys = carrier.key_of_part(hidden_key), output_key
    else:
        keys = None
    outputs = carrier.sum_parts(experts.ragged(rows, sizes, keys=keys, implementation=implementation))
    outputs = _named(back(_as(moved, rounded(outputs, config.exchange_dtype))), carrier).astype(outputs.dtype)
    return combine(outputs, decision, "ragged", implementation=implementation)


def _fused(
    config: MoEConfig,
    experts: ExpertMlp,
    carrier: Carrier,
    key: PRNGKeyArray | None,
    tokens: Float[Array, "G S D"],
    decision: Routing,
) -> Float[Array, "G S D"]:
    """Dispatch, fused experts and combine, on one device; what came from another has been gathered there."""
    del key  # without dropout
    implementation = config.implementation

    def apply(x: Array, slots: Array, choice: Array) -> Array:
        outputs = carrier.sum_parts(experts.fused(carrier.to_parts(x), slots, choice, implementation=implementation))
        return rounded(outputs, config.exchange_dtype)

    if carrier.expert_parts == 1:
        return through(tokens, decision, apply, implementation)
    tiled = _whole_tiles(decision, carrier)
    slots = _slots(tokens, tiled, "gather", implementation)
    moved = _moved_as(config, experts, tokens)
    slots = _named(carrier.slots_to_experts(_as(moved, slots)), carrier).astype(tokens.dtype)
    E, N, D = slots.shape
    same = jnp.arange(E * N)  # every slot has the row of its own
    outputs = apply(slots.reshape(E * N, D), same[:, None], same).reshape(E, N, -1)
    outputs = _named(carrier.slots_to_tokens(_as(moved, outputs)), carrier).astype(outputs.dtype)
    return combine(_by_group(outputs, tiled), tiled, "gather", implementation=implementation)


def _slots(
    tokens: Float[Array, "G S D"], decision: Decision, method: Method, implementation: Implementation | None
) -> Float[Array, "E N D"]:
    """Dispatches to slots, those of an expert in all groups one after the other."""
    slots = dispatch(tokens, decision, method, implementation=implementation)
    assert not isinstance(slots, Ragged)
    G, E, C, D = slots.shape
    return slots.swapaxes(0, 1).reshape(E, G * C, D)


def _by_group(outputs: Float[Array, "E N D"], decision: Decision) -> Float[Array, "G E C D"]:
    """Slots in the order of `_slots`, by group again."""
    E, _, D = outputs.shape
    return outputs.reshape(E, -1, _slots_of(decision)[1], D).swapaxes(0, 1)


def _drops(config: MoEConfig, key: PRNGKeyArray | None) -> bool:
    """Whether masks of dropout are drawn; for all slots together, and no others, such that they are one device's."""
    return config.dropout > 0 and key is not None


def _chunks(config: MoEConfig, decision: Decision, exchange: Exchange) -> int:
    """In how many parts the groups of a device go to experts on others."""
    if exchange.expert_parts == 1:
        return 1
    groups, rows = _slots_of(decision)
    if isinstance(decision, Routing):  # the slots of dropless layers are mostly empty
        rows = min(rows, math.ceil(decision.token.shape[1] / decision.num_experts))
    groups //= exchange.parts
    most = 1
    if config.exchange_chunks is not None:
        most = config.exchange_chunks
    elif exchange.overlaps:
        most = min(MOST_CHUNKS, exchange.expert_parts * groups * rows // ROWS_OF_CHUNK)
    return max((n for n in range(1, min(most, groups) + 1) if groups % n == 0), default=1)


def _whole_tiles(decision: Decision, carrier: Carrier | Exchange) -> Decision:
    """The decision with so many more slots, all empty, that those of an expert fill whole tiles of a TPU's memory.

    Otherwise blocks of slots, which are exchanged, do not lie as products of matrices want them, and rows are moved by
    themselves. There is nothing to gain on one device, nor where it takes many slots; and how many slots are mixed is
    for the router to say.
    """
    if carrier.expert_parts == 1 or not isinstance(decision, Routing):
        return decision
    groups, C = decision.token.shape[0], decision.capacity
    tiled = next(slots for slots in range(C, C + TILE_ROWS) if groups * slots % TILE_ROWS == 0)
    if tiled - C > ADDED_SLOTS * C:
        return decision
    return dataclasses.replace(decision, slot=jnp.where(decision.slot < C, decision.slot, tiled), capacity=tiled)


def _slots_of(decision: Decision) -> tuple[int, int]:
    """Groups, and slots of an expert in each."""
    if isinstance(decision, Routing):
        return decision.token.shape[0], decision.capacity
    return decision.combine.shape[0], decision.combine.shape[3]


def _named(x: Float[Array, "..."], carrier: Carrier | Exchange) -> Float[Array, "..."]:
    return x if carrier.expert_parts == 1 else checkpoint_name(x, EXCHANGED)


def _as(dtype: Any, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x if dtype is None else x.astype(dtype)


def _moved_as(config: MoEConfig, experts: ExpertMlp, tokens: Float[Array, "..."]) -> Any:
    """The dtype in which tokens travel: what they are rounded to, or that of the experts if it takes less space."""
    if config.exchange_dtype is not None or experts.dtype is None:
        return config.exchange_dtype
    return experts.dtype if jnp.dtype(experts.dtype).itemsize < tokens.dtype.itemsize else None


def _check_parts(B: int, T: int, S: int, parts: int) -> None:
    """Raises ValueError unless whole groups can be divided among so many devices."""
    if parts == 1 or (B * T) % (S * parts) == 0:
        return
    multiple = math.lcm(S * parts, T) // T
    raise ValueError(
        f"The groups of {B} images of {T} tokens, {S} tokens each, cannot be divided among {parts} devices: there are "
        f"{B * T / S:.4g}. Use a multiple of {multiple} images, smaller groups, or a mesh that divides images less."
    )


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
