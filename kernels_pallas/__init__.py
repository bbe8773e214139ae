"""Standalone ops of sparse layers, usable without jmoe: each is a folder with its reference beside the fast forms."""

from kernels_pallas.combine_rows import combine_rows as combine_rows
from kernels_pallas.expert_mlp import expert_mlp as expert_mlp
from kernels_pallas.gather_rows import gather_rows as gather_rows
from kernels_pallas.grouped_matmul import grouped_matmul as grouped_matmul

OPS = ("gather_rows", "combine_rows", "grouped_matmul", "expert_mlp")


def implementations(platform: str | None = None) -> dict[str, tuple[str, ...]]:
    """The implementations of each op on a platform, the one taken by default first.

    Args:
      platform: of JAX, such as "cpu", "tpu" or "cuda"; that of the default device if None.
    """
    return {op: (*kernel.available(platform or _platform()), "reference") for op, kernel in _kernels().items()}


def obstacles(platform: str | None = None) -> dict[str, str | None]:
    """Why the kernel of each op cannot run on a platform, whatever its arguments; None where it can.

    Args:
      platform: of JAX, such as "cpu", "tpu" or "cuda"; that of the default device if None.
    """
    return {op: kernel.unavailable(platform or _platform()) for op, kernel in _kernels().items()}


def _kernels():
    from kernels_pallas import rows
    from kernels_pallas.expert_mlp import op as mlp
    from kernels_pallas.grouped_matmul import op as matmul

    return dict(zip(OPS, (rows.KERNEL, rows.KERNEL, matmul.KERNEL, mlp.KERNEL), strict=True))


def _platform() -> str:
    import jax

    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend
