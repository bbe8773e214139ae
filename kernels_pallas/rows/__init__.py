"""What dispatch and combine are made of, forward and backward: rows read by index, weighted, summed, multiplied.

    dispatch                gather_sum(tokens, the slot's token)
    its gradient            gather_sum(gradients of slots, the token's slots)
    combine                 gather_sum(slots, the token's slots, combine weights)
    its gradient            gather_dot(gradients of tokens, the slot's token, its weight, slots)

An index outside the array reads nothing and counts as a row of zeros.
"""

from jaxtyping import Array, Float, Int

from kernels_pallas.per_platform import PerPlatform
from kernels_pallas.rows import xla

KERNELS = {"tpu": "kernels_pallas.rows.tpu", "gpu": "kernels_pallas.rows.gpu"}
# The kernels for TPU are the default there: what they read and write is less by the compiler's count (README.md). Those
# for GPU have not run on one yet (benchmarks/gpu.py does it), so XLA's gathers are the default there.
PREFERRED = ("tpu",)

_gather_sum = PerPlatform(
    "gather_sum",
    title="gather_sum (of gather_rows and combine_rows)",
    xla=xla.gather_sum,
    kernels=KERNELS,
    preferred=PREFERRED,
)
_gather_dot = PerPlatform(
    "gather_dot",
    title="gather_dot (the gradient of combine_rows)",
    xla=xla.gather_dot,
    kernels=KERNELS,
    preferred=PREFERRED,
)
KERNEL = _gather_sum


def gather_sum(
    x: Float[Array, "n d"],
    index: Int[Array, "m k"],
    weights: Float[Array, "m k"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """out[i] = sum_j weights[i, j] * x[index[i, j]], summed in float32, in the dtype of x; weights None means 1."""
    arrays = (x, index) if weights is None else (x, index, weights)
    return _gather_sum(*arrays, implementation=implementation)[0]


def gather_dot(
    x: Float[Array, "n d"],
    index: Int[Array, " m"],
    weights: Float[Array, " m"],
    other: Float[Array, "m d"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """weights[i] * x[index[i]], in the dtype of x, and the product of x[index[i]] with other[i], in float32."""
    scaled, products = _gather_dot(x, index, weights, other, implementation=implementation)
    return scaled, products
