"""Gates: from tokens to logits, in float32 whatever the tokens are."""

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.notation import Array, Bool, Float, PRNGKeyArray
from jmoe.routing import Gating, Router, Soft, Switch, gating
from jmoe.routing.members import separate_members


class LinearGate(nnx.Module):
    """One logit per expert, linear in the token and without bias (V-MoE, eq. 2), with noise or jitter in training.

    In an ensemble of M members (E3, arXiv:2110.03360, section 4) each member has a kernel for its own E / M experts,
    and reads its own copy of every token.
    """

    def __init__(
        self,
        D: int,
        num_experts: int,
        *,
        noise_std: float = 1.0,
        jitter: float = 0.0,
        members: int = 1,
        rngs: nnx.Rngs,
    ):
        """Makes the kernel [D, E], or [D, M, E / M] for an ensemble, drawn LeCun-normal.

        Args:
          D: model width.
          num_experts: E.
          noise_std: of the normal noise added to the logits in training, in units of 1 / E (of a member's E / M).
          jitter: in training the tokens are multiplied by uniform draws from [1 - jitter, 1 + jitter].
          members: M, 1 for no ensemble; divides E.
          rngs: its stream "params" is used.
        """
        experts = num_experts // members
        shape = (D, experts) if members == 1 else (D, members, experts)
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=tuple(range(1, len(shape))))
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.sigma = noise_std / experts
        self.jitter = jitter
        self.members = members

    def __call__(
        self,
        tokens: Float[Array, "G S D"],
        *,
        mask: Bool[Array, "G S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Gating:
        """Gates groups of tokens; without a key there is neither noise nor jitter.

        In a group of an ensemble, the M copies of a token follow each other.
        """
        tokens = tokens.astype(jnp.float32)
        if key is not None and self.jitter > 0:
            key, jitter_key = jax.random.split(key)
            tokens *= jax.random.uniform(jitter_key, tokens.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        if self.members == 1:
            logits = jnp.einsum("GSD,DE->GSE", tokens, self.kernel[...], precision="highest")
            return gating(logits, sigma=self.sigma, key=key, mask=mask)
        M = self.members
        copies = separate_members(tokens, M)  # [G * M, S / M, D]
        by_member = copies.reshape(-1, M, *copies.shape[1:])
        logits = jnp.einsum("GMND,DME->GMNE", by_member, self.kernel[...], precision="highest")
        mask = None if mask is None else separate_members(mask, M)
        return gating(logits.reshape(*copies.shape[:2], -1), sigma=self.sigma, key=key, mask=mask, members=M)


class SlotGate(nnx.Module):
    """One logit per slot of every expert: a scaled cosine of token and slot (Soft MoE, 2308.00951, section 2.3)."""

    def __init__(self, D: int, num_experts: int, *, slots_per_expert: int, noise_std: float = 0.0, rngs: nnx.Rngs):
        """Makes mu [D, E, P], drawn with variance 1 / (D * E), and the scalar scale, 1.

        Args:
          D: model width.
          num_experts: E.
          slots_per_expert: P.
          noise_std: of the normal noise added to the logits in training.
          rngs: its stream "params" is used.
        """
        shape = (D, num_experts, slots_per_expert)
        # As published, the fan-in counts D * E. Scale does not change the logits, but how fast mu turns.
        self.mu = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self.sigma = noise_std

    def __call__(
        self,
        tokens: Float[Array, "G S D"],
        *,
        mask: Bool[Array, "G S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Gating:
        """Gates groups of tokens; without a key there is no noise. The logits are [G, S, E, P]."""
        tokens, mu = unit(tokens.astype(jnp.float32), axis=-1), unit(self.mu[...], axis=0)
        logits = self.scale[...] * jnp.einsum("GSD,DEP->GSEP", tokens, mu, precision="highest")
        return gating(logits, sigma=self.sigma, key=key, mask=mask)


def unit(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Scales vectors along axis to length 1; 1e-6 under the root keeps zeros finite."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + 1e-6)


def default_gate(router: Router, D: int, num_experts: int, *, members: int = 1, rngs: nnx.Rngs) -> nnx.Module:
    """The gate that was published with a router; linear with the router's noise for one of your own."""
    if isinstance(router, Soft):
        options = {"slots_per_expert": router.slots_per_expert, "noise_std": router.noise_std}
        return SlotGate(D, num_experts, **options, rngs=rngs)
    jitter = router.jitter if isinstance(router, Switch) else 0.0
    return LinearGate(D, num_experts, noise_std=router.noise_std, jitter=jitter, members=members, rngs=rngs)
