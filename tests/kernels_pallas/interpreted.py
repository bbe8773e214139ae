"""Kernels for TPU run step by step, and what the interpreter's race detector found."""

import contextlib

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # there is no public way to ask for races
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def no_races():
    """Fails if, in a kernel interpreted in the block, two accesses to one buffer were not ordered by a semaphore."""
    kernels = []
    detector = interpret_pallas_call.RaceDetectionState

    def recorded(*args, **kwargs):
        kernels.append(detector(*args, **kwargs))
        return kernels[-1]

    jax.effects_barrier()  # programs run in the background: none may be under way when the state is reset
    pltpu.reset_tpu_interpret_mode_state()
    interpret_pallas_call.RaceDetectionState = recorded
    try:
        yield
        jax.effects_barrier()
    finally:
        interpret_pallas_call.RaceDetectionState = detector
        pltpu.reset_tpu_interpret_mode_state()
    assert kernels, "no kernel was interpreted"
    races = sum(kernel.races_found for kernel in kernels)
    assert not races, f"{races} of {len(kernels)} interpreted kernels have a race"
