"""How equal is equal, as one function of dtype."""

import jax.numpy as jnp


def tolerance(dtype, scale: float = 1.0) -> dict[str, float]:
    """The rtol and atol for np.testing.assert_allclose of values that were computed in different orders.

    Args:
      dtype: float32, or bfloat16 for values that were rounded to it once or twice.
      scale: the largest magnitude that was summed, such as max(abs(gradient)); atol is relative to it.
    """
    rtol, atol = {"float32": (1e-5, 2e-6), "bfloat16": (2**-7, 2**-8)}[jnp.dtype(dtype).name]
    return {"rtol": rtol, "atol": atol * max(float(scale), 1.0)}
