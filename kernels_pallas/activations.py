"""The activations that ops can apply to what they write."""

import functools
from typing import Literal

import jax

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # tanh form, as published with ViT
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    None: lambda x: x,
}
