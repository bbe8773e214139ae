"""Rows of tokens gathered into expert slots."""

from kernels_pallas.gather_rows.op import gather_rows as gather_rows
