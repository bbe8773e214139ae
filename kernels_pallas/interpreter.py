"""Kernels run step by step on any machine, by Pallas' interpreters."""

from jax.experimental.pallas import tpu as pltpu


def interpreter(platform: str):
    """What `interpret` of pallas_call takes: for TPU kernels the one that knows copies, semaphores and races."""
    if platform == "tpu":
        return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    return True
