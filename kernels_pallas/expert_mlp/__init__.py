"""Tokens gathered into expert slots and processed there, without a dispatched array or a hidden one."""

from kernels_pallas.expert_mlp.op import expert_mlp as expert_mlp
