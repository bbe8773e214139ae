"""One sparse layer: outputs, metrics and all gradients."""

import jax
import numpy as np

from tests.goldens.case import Case
from tests.goldens.replays.networks import layer_results
from tests.goldens.replays.parts import sparse_part


def replay(case: Case) -> dict[str, np.ndarray]:
    config = case.config
    part = sparse_part(config, [case.arrays.get("noise_unit")], config["deterministic"])
    return jax.device_get(layer_results(part, case.group("params"), case.arrays["inputs"], case))
