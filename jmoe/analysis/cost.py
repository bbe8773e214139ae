"""What a vision transformer costs, counted from its options: parameters, and FLOPs of the forward pass.

Two FLOPs per multiply-add of the matrix products; normalisations, softmax and GELU, well under 1 % more, do not count.
Every slot of an expert counts, filled or not.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.dispatch import resolve
from jmoe.models.vit import ViTConfig, moe_of_block
from jmoe.nn.moe import MoEMlp, MoEOutput
from jmoe.routing import Mixing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What all layers of one kind cost together.

    Attributes:
      parameters: how many they have.
      flops: of their forward pass, per image.
    """

    parameters: int
    flops: int | float = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs: the sum of its parts.

    Attributes:
      parts: by name: "patches", "positions" (with the class token), "norms", "attention", "mlp" (the dense ones),
        "gate", "experts" and "head" (with attention pooling and the tanh layer).
      einsum_flops: per image, what one-hot products add that bring tokens to slots and back (method "einsum", no
        other). In a soft router such products are the mixing itself: they are counted in "gate", and here is 0.
    """

    parts: Mapping[str, Part]
    einsum_flops: int | float

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def flops(self) -> int | float:
        """FLOPs of the forward pass, per image; training takes three times as many."""
        return sum(part.flops for part in self.parts.values())

    def __str__(self) -> str:
        """A table, in millions of parameters and GFLOPs per image."""
        rows = dict(self.parts) | {"total": Part(parameters=self.parameters, flops=self.flops)}
        lines = [f"{'':<10}{'M parameters':>14}{'GFLOPs':>10}"]
        lines += [f"{name:<10}{part.parameters / 1e6:14.2f}{part.flops / 1e9:10.2f}" for name, part in rows.items()]
        return "\n".join([*lines, f"and by one-hot dispatch{self.einsum_flops / 1e9:11.2f}"])


def forward_cost(config: ViTConfig, *, batch_size: int | None = None) -> Cost:
    """Counts the parameters and the forward FLOPs of a network.

    Args:
      config: of the network.
      batch_size: images that are computed at once; then slots are those that a group of them really has, rounded up,
        and a last group that is not full counts as well. None counts slots as V-MoE's published numbers do,
        K * capacity_factor per token: in groups of 8 images and with 32 experts, rounding can add a quarter to them.

    Raises:
      ValueError: batch_size is None, but the whole batch is one group; or the router cannot route such groups.
    """
    D, F, T = config.width, config.hidden_dim, config.tokens
    sparse = config.moe_layers
    patch = config.patch_size**2 * config.channels
    # From the first sparse block on, an ensemble computes a copy of every token for each member.
    copies = [config.members if sparse and i >= sparse[0] else 1 for i in range(config.depth)]
    attention = 4 * (D * D + D) + config.qk_norm * 2 * (D // config.num_heads)
    mlp = 2 * D * F + F + D
    dense = [i for i in range(config.depth) if i not in sparse]
    gate, experts, einsum_flops = Part(parameters=0), Part(parameters=0), 0
    if sparse:
        gate, experts, einsum_flops = _sparse_block(config, batch_size)
    parts = {
        "patches": Part(parameters=patch * D + D, flops=2 * math.prod(config.grid) * patch * D),
        "positions": Part(parameters=D * ((config.pool == "token") + T * (config.positions == "learned"))),
        "norms": Part(parameters=2 * D * (2 * config.depth + 1)),
        # Four projections of every token, and products with T keys and T values.
        "attention": Part(parameters=config.depth * attention, flops=sum(copies) * T * (8 * D * D + 4 * T * D)),
        "mlp": Part(parameters=len(dense) * mlp, flops=sum(copies[i] for i in dense) * T * 4 * D * F),
        "gate": Part(parameters=len(sparse) * gate.parameters, flops=len(sparse) * gate.flops),
        "experts": Part(parameters=len(sparse) * experts.parameters, flops=len(sparse) * experts.flops),
        "head": _head(config, attention, mlp),
    }
    return Cost(parts=parts, einsum_flops=len(sparse) * einsum_flops)


def _head(config: ViTConfig, attention: int, mlp: int) -> Part:
    """From normalised tokens to logits; attention and mlp are the parameters of one of each."""
    D, F, T = config.width, config.hidden_dim, config.tokens
    parameters, flops = 0, 0
    if config.pool == "map":  # query and output of one token, keys and values of all
        parameters += D + attention + 2 * D + mlp
        flops += 4 * D * D + T * (4 * D * D + 4 * D) + 4 * D * F
    features = config.representation_dim or D
    for m, n in ((D, config.representation_dim), (features, config.num_classes)):
        if n is not None:
            parameters += m * n + n
            flops += 2 * m * n
    return Part(parameters=parameters, flops=config.members * flops)


def _sparse_block(config: ViTConfig, batch_size: int | None) -> tuple[Part, Part, int | float]:
    """Gate, experts, and FLOPs per image of one-hot dispatch and combine, of one sparse block."""
    moe, D, T = moe_of_block(config), config.width, config.tokens
    B = batch_size or moe.images_per_group
    if moe.group_size is not None and batch_size is None:
        B = moe.group_size // math.gcd(moe.group_size, T)  # the images of the fewest groups that are whole
    if B is None:
        raise ValueError(
            "The whole batch is one group (MoEConfig has neither images_per_group nor group_size), so that the cost "
            "depends on it: give forward_cost a batch_size."
        )
    N = B * config.members

    def compute(x: jax.Array) -> tuple[MoEMlp, MoEOutput]:
        layer = MoEMlp(moe, D, rngs=nnx.Rngs(0))
        return layer, layer(x)

    layer, output = nnx.eval_shape(compute, jax.ShapeDtypeStruct((N, T, D), jnp.float32))
    decision = output.decision
    soft = isinstance(decision, Mixing)
    if soft:
        G, S, E, C = decision.dispatch.shape
        rows = G * E * C / B
    else:
        (G, A), S, E, C = decision.token.shape, decision.group_size, decision.num_experts, decision.capacity
        # Without slots there is a row for every choice.
        rows = G * (A if resolve(moe.method, decision) == "ragged" else E * C) / B
    router = getattr(moe.router, "choice", moe.router)  # by which Transport chooses
    factor = getattr(router, "capacity_factor", None)
    if batch_size is None and factor is not None:
        rows = config.members * T * getattr(router, "k", 1) * factor
    one_hot = 4 * S * rows * D  # two products with a [S, E * C] matrix
    gate, experts = (_count(nnx.state(part, nnx.Param)) for part in (layer.gate, layer.experts))
    # A gate multiplies each of its parameters with each token once; a member's share of them with its own tokens.
    gate_flops = 2 * gate * G * S / N
    return (
        Part(parameters=gate, flops=gate_flops + one_hot if soft else gate_flops),
        Part(parameters=experts, flops=rows * 4 * D * (moe.hidden_dim or 4 * D)),
        0 if soft else one_hot,
    )


def _count(parameters: nnx.State) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(parameters))
