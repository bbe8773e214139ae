"""How fast the sparse layer is on the machine at hand, as ratios to a dense MLP of equal FLOPs."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.dispatch import Method
from jmoe.nn.mlp import Mlp
from jmoe.nn.moe import MoEConfig, MoEMlp
from jmoe.routing import TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A sparse layer and the batch it is timed on.

    Attributes:
      name: of the network it is taken from.
      width: D.
      hidden_dim: F.
      tokens: T, per image.
      images: B.
      num_experts: E.
      k: K.
      capacity_factor: slots over choices; k * capacity_factor = 1 gives as many slots as tokens.
      dtype: of tokens and computation.
    """

    name: str
    width: int
    hidden_dim: int
    tokens: int
    images: int
    num_experts: int = 8
    k: int = 2
    capacity_factor: float = 1.05
    dtype: str = "float32"


CASES = {
    case.name: case
    for case in (
        LayerCase(name="S/32", width=512, hidden_dim=2048, tokens=50, images=32, capacity_factor=0.5),
        LayerCase(name="B/16", width=768, hidden_dim=3072, tokens=197, images=8),
        LayerCase(name="B/16-384", width=768, hidden_dim=3072, tokens=577, images=4),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Medians over paired runs, forward and backward.

    Attributes:
      case: what was timed.
      dense_seconds: of one MLP over B * T * k * capacity_factor rows: the slots, before C is rounded up.
      ratios: of each method to the dense MLP; medians of the ratios of runs that followed each other.
      runs: how many of each.
    """

    case: LayerCase
    dense_seconds: float
    ratios: Mapping[str, float]
    runs: int


def time_layer(case: LayerCase, methods: tuple[Method, ...] = ("gather", "einsum"), runs: int = 20) -> LayerTimes:
    """Times value and gradient of the layer by each method, in turn with the dense MLP.

    Args:
      case: the layer and its batch.
      methods: of dispatch.
      runs: timed runs of each, after one that compiles and one that warms up.
    """
    D, dtype = case.width, jnp.dtype(case.dtype)
    router = TopK(k=case.k, capacity_factor=case.capacity_factor)
    configs = {
        method: MoEConfig(
            num_experts=case.num_experts,
            hidden_dim=case.hidden_dim,
            router=router,
            method=method,
            images_per_group=min(8, case.images),
        )
        for method in methods
    }
    x = jax.random.normal(jax.random.key(0), (case.images, case.tokens, D), dtype)
    layers = {method: MoEMlp(config, D, dtype=dtype, rngs=nnx.Rngs(0)) for method, config in configs.items()}
    slots = round(case.images * case.tokens * case.k * case.capacity_factor)
    rows = jax.random.normal(jax.random.key(1), (slots, D), dtype)

    functions = {"dense": _gradient(Mlp(D, case.hidden_dim, dtype=dtype, rngs=nnx.Rngs(0)), rows, lambda y: y)}
    functions |= {method: _gradient(layer, x, lambda output: output.y) for method, layer in layers.items()}
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return LayerTimes(
        case=case,
        dense_seconds=statistics.median(times["dense"]),
        ratios={
            method: statistics.median(t / dense for t, dense in zip(times[method], times["dense"], strict=True))
            for method in methods
        },
        runs=runs,
    )


def _gradient(module: nnx.Module, x: jax.Array, output: Callable[[Any], jax.Array]) -> Callable[[], Any]:
    """A function without arguments that computes value and gradient of a module, and waits for them."""
    graph, state = nnx.split(module)

    @jax.jit
    @jax.value_and_grad
    def compiled(arguments: tuple[Any, jax.Array]) -> jax.Array:
        state, x = arguments
        # A sum of squares, so that the gradient that comes in is an array like any other.
        return jnp.sum(jnp.square(output(nnx.merge(graph, state)(x)).astype(jnp.float32)))

    return lambda: jax.block_until_ready(compiled((state, x)))
