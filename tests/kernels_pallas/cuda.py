"""Programs lowered for an NVIDIA GPU that is not there: what is traced and handed to the Triton compiler is real."""

import contextlib
import warnings

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect

TRITON = "__gpu$xla.gpu.triton"  # the call in a lowered program that holds a kernel


def triton_kernels(function, *shapes) -> list[str]:
    """The names of the kernels that a function calls when it is lowered for CUDA; shapes are jax.ShapeDtypeStructs.

    Each has been parsed, which checks every operation of it. Lowering alone does not: it writes invalid kernels, too.
    """
    with _a_gpu(), warnings.catch_warnings():
        # JAX 0.12 announces that Pallas' Triton backend will leave it some day.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        program = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).compiler_ir()
    assert program is not None
    names = []
    for operation in _operations(program.operation):
        attributes = operation.attributes
        if "call_target_name" in attributes and ir.StringAttr(attributes["call_target_name"]).value == TRITON:
            call = ir.DictAttr(attributes["mhlo.backend_config"])
            context = mlir.make_ir_context()
            dialect.register_dialect(context)
            with context:
                ir.Module.parse(ir.StringAttr(call["ir"]).value_bytes)
            names.append(ir.StringAttr(call["name"]).value)
    return names


def _a_gpu():
    """From JAX 0.11 a kernel must know for which GPU it is; JAX 0.10 assumes one."""
    try:
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis_types, abstract_device=device)
    except (AttributeError, TypeError):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def _operations(operation):
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner
                yield from _operations(inner.operation)
