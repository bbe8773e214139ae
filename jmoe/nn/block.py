"""One block of the encoder: attention, then a dense or a sparse MLP, each behind a layer normalisation."""

import jax
from flax import nnx

from jmoe.nn.attention import attention
from jmoe.nn.exchange import ONE_DEVICE, Exchange
from jmoe.nn.mlp import Mlp, drop
from jmoe.nn.moe import MoEConfig, MoEMlp, MoEOutput
from jmoe.notation import Array, Bool, Float, PRNGKeyArray


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is sparse where moe is given (V-MoE, figure 2)."""

    def __init__(
        self,
        D: int,
        num_heads: int,
        hidden_dim: int,
        *,
        moe: MoEConfig | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters; the arguments are fields of ViTConfig."""
        self.norm_1 = nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        self.attention = attention(D, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        if moe is None:
            self.mlp = Mlp(D, hidden_dim, dropout=dropout, dtype=dtype, rngs=rngs)
        else:
            self.moe = MoEMlp(moe, D, dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        exchange: Exchange = ONE_DEVICE,
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None]:
        """Applies the block; the second result is None for a dense one. The exchange is that of the sparse layer."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        x += drop(self.attention(self.norm_1(x), deterministic=True), self.dropout, attention_key)
        if not hasattr(self, "moe"):
            return x + self.mlp(self.norm_2(x), key=mlp_key), None
        output = self.moe(self.norm_2(x), mask=mask, key=mlp_key, exchange=exchange)
        return x + output.y, output
