"""Self-attention and attention pooling."""

from typing import Any

from flax import linen, nnx

from jmoe.nn.mlp import Mlp
from jmoe.notation import Array, Float

MANY_TOKENS = 256  # 224 pixels in patches of 16 are 197


def attention(D: int, num_heads: int, *, qk_norm: bool = False, dtype=None, rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    """Multi-head attention of width D, Xavier-uniform, optionally with layer-normalised queries and keys (2302.05442).

    Args:
      D: model width.
      num_heads: H, a divisor of D.
      qk_norm: whether queries and keys are normalised.
      dtype: of the computation, that of the tokens if None; also of the logits of more than MANY_TOKENS tokens, which
        for fewer are float32.
      rngs: its stream "params" is used.

    Raises:
      ValueError: num_heads does not divide D.
    """
    if D % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the model width {D}.")
    return nnx.MultiHeadAttention(
        num_heads,
        D,
        attention_fn=_attend,
        dtype=dtype,
        kernel_init=nnx.initializers.xavier_uniform(),
        normalize_qk=qk_norm,
        decode=False,
        keep_rngs=False,
        rngs=rngs,
    )


def _attend(
    query: Float[Array, "B Q H d"], key: Float[Array, "B T H d"], value: Float[Array, "B T H d"], **options: Any
) -> Float[Array, "B Q H d"]:
    """Attention by one of the two functions that Flax has for it.

    That of NNX has logits in float32. Of many tokens they would be most of a step's memory, and moving them most of its
    time: there it is that of Linen, which has them in the dtype of the computation, if it can do what is asked for.
    """
    more = options.get("is_causal") or options.get("module") is not None or options.get("dropout_rate")
    if key.shape[1] <= MANY_TOKENS or more:
        return nnx.dot_product_attention(query, key, value, **options)
    own = {name: options[name] for name in ("mask", "deterministic", "dtype", "precision")}
    return linen.dot_product_attention(query, key, value, **own)


class AttentionPool(nnx.Module):
    """One learned query attends to all tokens, followed by an MLP (the "MAP" head of Scaling ViT, 2106.04560)."""

    def __init__(self, D: int, num_heads: int, hidden_dim: int, *, qk_norm: bool = False, dtype=None, rngs: nnx.Rngs):
        """Makes the probe [1, 1, D], attention, layer normalisation and MLP."""
        self.probe = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (1, 1, D)))
        self.attention = attention(D, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(D, hidden_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Pools the tokens of each image."""
        B, _, D = x.shape
        probe = self.probe[...].astype(x.dtype)
        pooled = self.attention(probe.repeat(B, axis=0), x, deterministic=True).reshape(B, D)
        return pooled + self.mlp(self.norm(pooled))
