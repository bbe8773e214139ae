"""Standalone ops of sparse layers, usable without jmoe: each is a folder with its reference beside the fast forms."""

from kernels_pallas.combine_rows import combine_rows as combine_rows
from kernels_pallas.gather_rows import gather_rows as gather_rows
from kernels_pallas.grouped_matmul import grouped_matmul as grouped_matmul

OPS = ("gather_rows", "combine_rows", "grouped_matmul")


def implementations(platform: str | None = None) -> dict[str, tuple[str, ...]]:
    """The implementations of each op on a platform, the one taken by default first.

    Args:
      platform: of JAX, such as "cpu", "tpu" or "cuda"; that of the default device if None.
    """
    import jax

    from kernels_pallas import rows
    from kernels_pallas.grouped_matmul import op as matmul

    if platform is None:
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    available = (rows.available, rows.available, matmul.available)
    return {op: (*find(platform), "reference") for op, find in zip(OPS, available, strict=True)}
