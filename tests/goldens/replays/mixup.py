"""Mixup by recorded weights."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.train.mixup import mix_with_next
from tests.goldens.case import Case
from tests.goldens.replays.parts import with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    weights = jnp.sort(case.arrays["dirichlet_sample"], axis=-1, descending=True)  # the largest is an image's own
    mixed = {name: mix_with_next(jnp.asarray(case.arrays[name]), weights) for name in ("images", "labels")}
    return jax.device_get(with_prefix("mixed_", mixed))
