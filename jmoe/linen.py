"""The sparse layer as a Linen module: the same parameters, the same numbers."""

import jax
from flax import linen, nnx
from jax.typing import DTypeLike

from jmoe.nn import moe as nnx_moe
from jmoe.nn.exchange import ONE_DEVICE, Exchange
from jmoe.notation import Array, Bool, Float


class MoEMlp(linen.Module):
    """`jmoe.MoEMlp` for Linen; its parameters have the same names and shapes as those of the NNX module.

    Randomness in training comes from the stream "gating" (noise of the gate, and dropout inside the experts).

    Attributes:
      config: the layer's options.
      dtype: of the experts' computation; that of the tokens if None.
    """

    config: nnx_moe.MoEConfig
    dtype: DTypeLike | None = None

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        exchange: Exchange = ONE_DEVICE,
    ) -> nnx_moe.MoEOutput:
        """Applies the layer; arguments and result as in `jmoe.MoEMlp`, with deterministic=False for training."""
        D = x.shape[-1]

        def make(key):
            return nnx_moe.MoEMlp(self.config, D, dtype=self.dtype, rngs=nnx.Rngs(key))

        graph, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
        # One Linen parameter per child of the module, each a tree of arrays; all are drawn as the module draws them.
        parameters = {
            child: self.param(child, lambda key, child=child: nnx.to_pure_dict(nnx.state(make(key), nnx.Param))[child])
            for child in nnx.to_pure_dict(state)
        }
        nnx.replace_by_pure_dict(state, parameters)
        key = None if deterministic else self.make_rng("gating")
        return nnx.merge(graph, state)(x, mask=mask, key=key, exchange=exchange)
