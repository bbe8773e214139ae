"""The vision transformer, dense and sparse (V-MoE, arXiv:2106.05974; ViT, arXiv:2010.11929)."""

import dataclasses
import math
import re
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.nn.attention import AttentionPool
from jmoe.nn.block import Block
from jmoe.nn.ensemble import repeat_members
from jmoe.nn.exchange import EXCHANGED, ONE_DEVICE, Exchange
from jmoe.nn.mlp import drop
from jmoe.nn.moe import MoEConfig
from jmoe.nn.patches import PatchEmbedding, patch_grid, sincos2d
from jmoe.notation import Array, Bool, Float, PRNGKeyArray
from jmoe.routing import Decision

Pool = Literal["token", "mean", "map", "first"]
Positions = Literal["learned", "sincos2d", "none"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer; `variant` gives the published ones by name.

    Attributes:
      patch_size: pixels of a side of a patch.
      width: D.
      depth: blocks.
      hidden_dim: F, hidden width of the dense MLPs.
      num_heads: attention heads; divides width.
      num_classes: logits; None for a model without a head, whose logits are the features.
      image_size: (height, width) in pixels.
      channels: of an image.
      pool: how tokens become one vector: a class "token" of their own, the "mean", attention ("map"), or the "first".
      positions: "learned" (the class token has one, too), fixed "sincos2d" (it has none), or "none".
      position_std: standard deviation of learned positions at the start; 0.02 as published.
      position_temperature: of sincos2d, whose lowest frequency is 1 / temperature per patch; 10,000 as published.
      representation_dim: width of a tanh layer before the head (pre-logits); None for no such layer.
      head_bias: initial bias of the head; None for -log(num_classes), as published.
      head_zero: whether the head's kernel starts at zero, as published, or LeCun-normal.
      dropout: rate in the dense blocks and after the positions; the experts' own is in moe.
      qk_norm: layer-normalised queries and keys.
      moe: the sparse blocks; None for a dense model.
      remat: whether to recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters and routing are float32.
    """

    patch_size: int
    width: int
    depth: int
    hidden_dim: int
    num_heads: int
    num_classes: int | None = 1000
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    pool: Pool = "token"
    positions: Positions = "learned"
    position_std: float = 0.02
    position_temperature: float = 10_000.0
    representation_dim: int | None = None
    head_bias: float | None = None
    head_zero: bool = True
    dropout: float = 0.0
    qk_norm: bool = False
    moe: MoEConfig | None = None
    remat: bool = False
    dtype: DType = "float32"

    def __post_init__(self):
        for name in ("patch_size", "width", "depth", "hidden_dim", "num_heads", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"ViTConfig wants {name} of at least 1; it got {getattr(self, name)}.")
        for name, choices in (("pool", Pool), ("positions", Positions), ("dtype", DType)):
            if getattr(self, name) not in typing.get_args(choices):
                known = ", ".join(map(repr, typing.get_args(choices)))
                raise ValueError(f"ViTConfig wants {name} to be one of {known}; it got {getattr(self, name)!r}.")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}.")
        if not self.position_temperature > 1:
            raise ValueError(f"ViTConfig wants a position_temperature above 1; it got {self.position_temperature}.")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"ViTConfig wants num_classes of at least 1, or None; it got {self.num_classes}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ViTConfig wants a dropout rate from 0 to below 1; it got {self.dropout}.")
        patch_grid(self.image_size, self.patch_size)
        self.moe_layers  # noqa: B018  # raises where the placement makes no sense

    @property
    def grid(self) -> tuple[int, int]:
        """H, W: the patches of an image."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def tokens(self) -> int:
        """T: tokens per image, the class token included."""
        return math.prod(self.grid) + (self.pool == "token")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The sparse blocks, counted from 0."""
        return () if self.moe is None else place(self.moe.layers, self.depth)

    @property
    def members(self) -> int:
        """M of an efficient ensemble; 1 for a single network."""
        return 1 if self.moe is None else self.moe.members


def place(layers: str | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Returns the blocks that are sparse, of 0 to depth - 1.

    Args:
      layers: "last-n" (the last n of blocks 1, 3, 5, ...; V-MoE, section 3.1), "every-n" (n-1, 2n-1, ...), or the
        blocks themselves.
      depth: number of blocks.

    Raises:
      ValueError: there are no such blocks.
    """
    if not isinstance(layers, str):
        wrong = [i for i in layers if not 0 <= i < depth]
        if wrong or not layers:
            raise ValueError(f"layers={tuple(layers)} must name blocks from 0 to {depth - 1}, at least one.")
        return tuple(sorted(set(layers)))
    match = re.fullmatch(r"(last|every)-([1-9]\d*)", layers)
    if match is None:
        raise ValueError(
            f"layers={layers!r} must be 'last-n', 'every-n' or a tuple of blocks, such as 'last-2' or (5, 7)."
        )
    n, odd = int(match[2]), tuple(range(1, depth, 2))
    chosen = tuple(range(n - 1, depth, n)) if match[1] == "every" else odd[-n:]
    if not chosen or (match[1] == "last" and len(chosen) < n):
        raise ValueError(f"layers={layers!r} asks for blocks that {depth} blocks do not have ({len(odd)} are odd).")
    return chosen


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a vision transformer computed.

    For an ensemble of M members, B of the arrays counts copies: M rows for each image, one after the other.

    Attributes:
      logits: [B, num_classes] float32; the features where there is no head. See jmoe.nn.ensemble for what the members
        say together.
      features: [B, D] (or [B, representation_dim]) what the head reads, for few-shot evaluation.
      losses: the weighted auxiliary losses by name, each summed over the sparse blocks.
      metrics: the metrics of each sparse block, by the number of the block.
      routing: the decision of each sparse block, by the number of the block.
    """

    logits: Float[Array, "B num_classes"]
    features: Float[Array, "B D"]
    losses: dict[str, Float[Array, ""]]
    metrics: dict[str, dict[str, Array]]
    routing: dict[str, Decision]


class VisionTransformer(nnx.Module):
    """Patches, positions, blocks, and a head; the MLPs of config.moe_layers are sparse.

    The members of an ensemble share all blocks before the first sparse one, where every image is copied M times (E3,
    arXiv:2110.03360), and differ after it by their experts.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        """Makes the parameters in float32; the stream "params" of rngs is used."""
        D, dtype = config.width, jnp.dtype(config.dtype)
        self.patches = PatchEmbedding(config.patch_size, config.channels, D, dtype=dtype, rngs=rngs)
        if config.pool == "token":
            self.cls = nnx.Param(jnp.zeros((1, 1, D), jnp.float32))
        if config.positions == "learned":
            draw = jax.random.normal(rngs.params(), (1, config.tokens, D), jnp.float32)
            self.positions = nnx.Param(config.position_std * draw)
        self.blocks = nnx.List(
            Block(
                D,
                config.num_heads,
                config.hidden_dim,
                moe=moe_of_block(config) if i in config.moe_layers else None,
                dropout=config.dropout,
                qk_norm=config.qk_norm,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(config.depth)
        )
        self.norm = nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        if config.pool == "map":
            self.pool = AttentionPool(
                D, config.num_heads, config.hidden_dim, qk_norm=config.qk_norm, dtype=dtype, rngs=rngs
            )
        features = D
        if config.representation_dim is not None:
            features = config.representation_dim
            self.pre_logits = nnx.Linear(D, features, dtype=dtype, rngs=rngs)
        if config.num_classes is not None:
            bias = -math.log(config.num_classes) if config.head_bias is None else config.head_bias
            zero, lecun = nnx.initializers.zeros_init(), nnx.initializers.lecun_normal()
            self.head = nnx.Linear(
                features,
                config.num_classes,
                kernel_init=zero if config.head_zero else lecun,
                bias_init=nnx.initializers.constant(bias),
                dtype=jnp.float32,
                rngs=rngs,
            )
        self.config = config

    def __call__(
        self,
        images: Float[Array, "B Y X channels"],
        *,
        mask: Bool[Array, " B"] | None = None,
        key: PRNGKeyArray | None = None,
        exchange: Exchange = ONE_DEVICE,
    ) -> Output:
        """Classifies images.

        Args:
          images: [B, Y, X, channels], of config.image_size, scaled as in training (from -1 to 1 in our experiments).
          mask: [B], False for images that fill up a batch: they take no expert's slot and count in no loss or metric.
          key: randomness of training (noise of the gates, dropout); None for evaluation, which has neither.
          exchange: how tokens get to experts on other devices, such as `jmoe.parallel.Exchange(mesh)`.

        Returns:
          an Output.

        Raises:
          ValueError: the images are not of the model's size.
        """
        config = self.config
        if images.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(
                f"The model takes images of {(*config.image_size, config.channels)} (height, width, channels); it got "
                f"{images.shape[1:]}. Resize them, or set image_size and channels in ViTConfig."
            )
        keys = [None] * (config.depth + 1) if key is None else list(jax.random.split(key, config.depth + 1))
        x = exchange.split(self._tokens(exchange.split(images)))
        x = drop(x, config.dropout, keys[-1])
        token_mask = None if mask is None else jnp.broadcast_to(mask[:, None], x.shape[:2])

        losses: dict[str, Array] = {}
        metrics, routing = {}, {}

        def apply(block: Block, x: Array, mask: Array | None, key: PRNGKeyArray | None):
            return block(x, mask=mask, key=key, exchange=exchange)

        if config.remat:  # but nothing is sent twice
            apply = nnx.remat(apply, policy=jax.checkpoint_policies.save_only_these_names(EXCHANGED))
        for i, block in enumerate(self.blocks):
            if config.members > 1 and i == config.moe_layers[0]:
                x = repeat_members(x, config.members)
                token_mask = None if token_mask is None else repeat_members(token_mask, config.members)
            x, sparse = apply(block, x, token_mask, keys[i])
            x = exchange.split(x)
            if sparse is not None:
                for name, loss in sparse.losses.items():
                    losses[name] = losses.get(name, 0.0) + loss
                metrics[str(i)], routing[str(i)] = sparse.metrics, sparse.decision

        features = self._pool(self.norm(x))
        if config.representation_dim is not None:
            features = jnp.tanh(self.pre_logits(features))
        logits = features if config.num_classes is None else self.head(features)
        return Output(
            logits=logits.astype(jnp.float32), features=features, losses=losses, metrics=metrics, routing=routing
        )

    def _tokens(self, images: Float[Array, "B Y X channels"]) -> Float[Array, "B T D"]:
        """Embeds the patches, adds positions and the class token."""
        config = self.config
        x = self.patches(images)
        B, H, W, D = x.shape
        x = x.reshape(B, H * W, D)
        if config.positions == "sincos2d":
            x += sincos2d(H, W, D, config.position_temperature)[None].astype(x.dtype)
        if config.pool == "token":
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (B, 1, D))
            x = jnp.concatenate([cls, x], axis=1)
        if config.positions == "learned":
            x += self.positions[...].astype(x.dtype)
        return x

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Makes one vector of an image's tokens."""
        if self.config.pool == "map":
            return self.pool(x)
        return jnp.mean(x, axis=1) if self.config.pool == "mean" else x[:, 0]


def moe_of_block(config: ViTConfig) -> MoEConfig:
    """The options of a sparse block: those of config.moe, with the dense blocks' hidden width where it names none."""
    assert config.moe is not None
    return dataclasses.replace(config.moe, hidden_dim=config.moe.hidden_dim or config.hidden_dim)


# Published sizes: width, depth, hidden_dim, num_heads.
_SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
}
_FAMILIES = {
    "vmoe": _SIZES | {"S": (512, 8, 2048, 8), "15B": (1408, 48, 6400, 16)},
    "softmoe": _SIZES,
}


def variant(
    name: str,
    *,
    family: Literal["vmoe", "softmoe"] = "vmoe",
    num_classes: int | None = 1000,
    image_size: tuple[int, int] = (224, 224),
    moe: MoEConfig | None = None,
    **options,
) -> ViTConfig:
    """Returns a published configuration by its name, such as "B/16": a size and the pixels of a patch.

    The two families share all sizes but S. "vmoe" is that of V-MoE and ViT: class token, learned positions, a tanh
    layer before the head; its S has 8 blocks of width 512. "softmoe" is that of the Soft MoE paper: mean of tokens,
    fixed sincos2d positions, normalised queries and keys; its S is the usual one, 12 blocks of width 384.

    Args:
      name: "Ti", "S", "B", "L", "H", "g" or (vmoe only) "15B", a slash, and the patch size.
      family: "vmoe" or "softmoe".
      num_classes: logits, or None for no head.
      image_size: (height, width) in pixels.
      moe: the sparse blocks; None for the dense model.
      **options: any other field of ViTConfig.

    Raises:
      ValueError: there is no such variant, or the options do not fit together.
    """
    sizes = _FAMILIES.get(family)
    if sizes is None:
        raise ValueError(f"There is no family {family!r}; use one of {', '.join(map(repr, _FAMILIES))}.")
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", name)
    if match is None or match[1] not in sizes:
        known = ", ".join(sizes)
        raise ValueError(f"There is no variant {name!r} in family {family!r}; use {known} with a patch, as 'B/16'.")
    width, depth, hidden_dim, num_heads = sizes[match[1]]
    if family == "vmoe":
        # The published parameter count of the 15B model leaves no room for the tanh layer.
        representation = None if match[1] == "15B" or num_classes is None else width
        options = {"pool": "token", "positions": "learned", "representation_dim": representation} | options
    else:
        options = {"pool": "mean", "positions": "sincos2d", "qk_norm": True} | options
    return ViTConfig(
        patch_size=int(match[2]),
        width=width,
        depth=depth,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_classes=num_classes,
        image_size=image_size,
        moe=moe,
        **options,
    )
