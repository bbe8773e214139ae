"""Standalone ops of sparse layers, usable without jmoe: each is a folder with its reference beside the fast form."""

from kernels_pallas.combine_rows import combine_rows as combine_rows
from kernels_pallas.gather_rows import gather_rows as gather_rows
from kernels_pallas.grouped_matmul import grouped_matmul as grouped_matmul

OPS = ("gather_rows", "combine_rows", "grouped_matmul")


def implementations() -> dict[str, tuple[str, ...]]:
    """The implementations of each op that can run here, the one taken by default first."""
    from kernels_pallas.combine_rows import op as combine
    from kernels_pallas.gather_rows import op as gather
    from kernels_pallas.grouped_matmul import op as matmul

    return {name: tuple(module.IMPLEMENTATIONS) for name, module in zip(OPS, (gather, combine, matmul), strict=True)}
