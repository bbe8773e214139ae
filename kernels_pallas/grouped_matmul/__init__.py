"""Rows sorted by group, each multiplied by its group's matrix."""

from kernels_pallas.grouped_matmul.op import grouped_matmul as grouped_matmul
