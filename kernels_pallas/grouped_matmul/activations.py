"""The activations that a grouped matrix multiply can apply to what it writes."""

import functools

import jax

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # tanh form, as published with ViT
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    None: lambda x: x,
}
