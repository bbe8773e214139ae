"""Checkpoint files of the reference, read."""

import numpy as np

from jmoe.convert.names import flatten
from jmoe.convert.vmoe_format import read
from tests.goldens.case import Case


def replay(case: Case) -> dict[str, np.ndarray]:
    """Every array of the checkpoint; bfloat16, which NumPy does not know, as bits."""
    results = {}
    for name, array in flatten(read(case.folder / case.name)).items():
        if array.dtype.name == "bfloat16":
            results[f"bfloat16_bits/{name}"] = array.view(np.uint16)
        else:
            results[f"arrays/{name}"] = array
    return results
