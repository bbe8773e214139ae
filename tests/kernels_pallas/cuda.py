"""Programs lowered for an NVIDIA GPU that is not there: what is traced and handed to the Triton compiler is real."""

import contextlib
import re
import warnings

import jax

TRITON = "__gpu$xla.gpu.triton"  # the call in a lowered program that holds a kernel


def lowered_for_cuda(function, *shapes) -> str:
    """The StableHLO of a function lowered for CUDA; shapes are jax.ShapeDtypeStructs."""
    with _a_gpu(), warnings.catch_warnings():
        # JAX 0.12 announces that Pallas' Triton backend will leave it some day.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> list[str]:
    """The names of the Triton kernels that a lowered program calls."""
    return [name for line in text.splitlines() if TRITON in line for name in re.findall(r'\bname = "(\w+)"', line)]


def _a_gpu():
    """From JAX 0.11 a kernel must know for which GPU it is; JAX 0.10 assumes one."""
    try:
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
        axis_types = (jax.sharding.AxisType.Explicit,)
        mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis_types, abstract_device=device)
    except (AttributeError, TypeError):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)
