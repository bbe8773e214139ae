"""How fast the sparse layer is and how much memory it takes, beside simpler layers: here, or compiled for a TPU."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.analysis.bound import CHIPS, Bound, bound
from jmoe.dispatch import Implementation, Method
from jmoe.nn.groups import from_groups, group_length, to_groups
from jmoe.nn.mlp import ExpertMlp, Mlp
from jmoe.nn.moe import MoEConfig, MoEMlp
from jmoe.notation import Array, Float
from jmoe.routing import Routing, TopK, decide
from kernels_pallas import cases
from kernels_pallas.cases import IMAGES_PER_GROUP, Case
from kernels_pallas.timing import Work, compiled_times, default_dtype, medians, ratio

# The small one is timed with more images, and with as many slots as tokens.
CASES = cases.CASES | {"S/32": dataclasses.replace(cases.CASES["S/32"], images=32, capacity_factor=0.5)}

Contender = Literal[Method, "published"]  # a method of dispatch, or `published_einsum`
BY_MASKS = ("einsum", "published")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """How long layers take, forward and backward; medians over paired runs.

    Attributes:
      case: the size.
      dtype: of tokens and computation.
      rows: how many rows the experts have, which is how many slots there are: E * G * C.
      runs: how often each was timed.
      seconds: by name: "dense" is one MLP over that many rows, "batched" the experts alone with their rows given, and
        the others whole layers by method of dispatch, such as "gather", or "gather-xla" for a named implementation.
      ratios: each of them to "dense"; medians of the ratios of runs that followed each other.
      between: likewise "einsum/gather" and "gather/batched", and so for every method that is none of one-hot masks.
    """

    case: Case
    dtype: str
    rows: int
    runs: int
    seconds: Mapping[str, float]
    ratios: Mapping[str, float]
    between: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """What compiled layers need beside their arguments and results, forward and backward.

    Attributes:
      case: the size.
      dtype: of tokens and computation.
      rows: as in LayerTimes.
      temp_bytes: by name as in LayerTimes, always with "einsum".
      ratios: each of them to "einsum".
    """

    case: Case
    dtype: str
    rows: int
    temp_bytes: Mapping[str, int]
    ratios: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBounds:
    """What the compiler for a TPU chip says of layers, forward and backward. Nothing was run.

    Attributes:
      case: the size.
      chip: the generation.
      dtype: of tokens and computation; parameters are float32.
      rows: as in LayerTimes.
      bounds: by name as in LayerTimes, the least time that one chip needs.
      temp_bytes: likewise, the memory beside arguments and results.
      ratios: of the bounds to that of "dense".
      between: as in LayerTimes.
    """

    case: Case
    chip: str
    dtype: str
    rows: int
    bounds: Mapping[str, Bound]
    temp_bytes: Mapping[str, int]
    ratios: Mapping[str, float]
    between: Mapping[str, float]


def time_layer(
    case: Case,
    methods: Sequence[Contender] = ("gather", "einsum"),
    runs: int = 20,
    *,
    implementations: Sequence[Implementation | None] = (None,),
    dtype: str | None = None,
) -> LayerTimes:
    """Times value and gradient of the layer by each method, in turn with a dense MLP and the experts alone.

    Args:
      case: the layer and its batch.
      methods: of dispatch, or "published".
      runs: timed runs of each, after one that compiles and one that warms up.
      implementations: of the methods that have them, as in `MoEConfig`.
      dtype: of tokens and computation; None for float32 on CPU, bfloat16 elsewhere.

    Raises:
      NotImplementedError: a named implementation cannot run here; it says why.
    """
    contest = _Contest(case, methods, implementations, dtype or default_dtype())
    times = compiled_times(contest.works(contest.arguments()), runs=runs)
    return LayerTimes(
        case=case,
        dtype=contest.dtype,
        rows=contest.rows,
        runs=runs,
        seconds=medians(times),
        ratios={name: ratio(times, name, "dense") for name in times if name != "dense"},
        between={f"{name}/{other}": ratio(times, name, other) for name, other in contest.pairs()},
    )


def layer_bounds(
    case: Case,
    methods: Sequence[Contender] = ("gather", "einsum"),
    *,
    chip: str,
    compile_for: Callable[..., jax.stages.Compiled],
    implementations: Sequence[Implementation | None] = (None,),
    dtype: str = "bfloat16",
) -> LayerBounds:
    """Compiles what `time_layer` times for one TPU chip, and reads off how long it takes at least.

    Args:
      case: the layer and its batch.
      methods: of dispatch, or "published".
      chip: "v4", "v5e", "v5p" or "v6e".
      compile_for: `jmoe.parallel.compile_for_chip`, called as compile_for(chip, function, *shapes).
      implementations: of the methods that have them, as in `MoEConfig`.
      dtype: of tokens and computation.
    """
    contest = _Contest(case, methods, implementations, dtype)
    bounds, temp_bytes = {}, {}
    for name, (function, shapes) in contest.works(jax.eval_shape(contest.arguments)).items():
        compiled = compile_for(chip, function, *shapes)
        bounds[name] = bound(compiled.as_text() or "", CHIPS[chip])
        temp_bytes[name] = _temp_bytes(compiled)
    seconds = {name: one.seconds for name, one in bounds.items()}
    return LayerBounds(
        case=case,
        chip=chip,
        dtype=dtype,
        rows=contest.rows,
        bounds=bounds,
        temp_bytes=temp_bytes,
        ratios={name: value / seconds["dense"] for name, value in seconds.items() if name != "dense"},
        between={f"{name}/{other}": seconds[name] / seconds[other] for name, other in contest.pairs()},
    )


def layer_memory(
    case: Case,
    methods: Sequence[Contender] = ("gather", "einsum"),
    *,
    implementations: Sequence[Implementation | None] = (None,),
    dtype: str | None = None,
) -> LayerMemory:
    """Asks the compiler for the temporary memory of what `time_layer` times, and runs nothing.

    Args:
      case: the layer and its batch.
      methods: of dispatch, or "published"; "einsum" is compiled as well.
      implementations: of the methods that have them, as in `MoEConfig`.
      dtype: of tokens and computation; None for float32 on CPU, bfloat16 elsewhere.

    Raises:
      NotImplementedError: a named implementation cannot run here; it says why.
    """
    methods = [*methods, *(() if "einsum" in methods else ("einsum",))]
    contest = _Contest(case, methods, implementations, dtype or default_dtype())
    temp_bytes = {}
    for name, (function, arguments) in contest.works(jax.eval_shape(contest.arguments)).items():
        temp_bytes[name] = _temp_bytes(jax.jit(function).lower(*arguments).compile())
    return LayerMemory(
        case=case,
        dtype=contest.dtype,
        rows=contest.rows,
        temp_bytes=temp_bytes,
        ratios={name: size / temp_bytes["einsum"] for name, size in temp_bytes.items() if name != "einsum"},
    )


def published_einsum(layer: MoEMlp, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The layer as google-research/vmoe formulates dispatch and combine: a baseline, for token choice without padding.

    It computes what method "einsum" does. That one multiplies one-hot matrices of experts and of slots, for a token may
    name an expert twice, and dispatches in float32, by a mask that may hold any weights. Here a token names an expert
    once, so that the mask is a comparison, of booleans, and it dispatches in the dtype of the tokens.
    """
    B, T, _ = x.shape
    tokens, _ = to_groups(x, None, group_length(B, T, group_size=None, images_per_group=layer.config.images_per_group))
    gating = layer.gate(tokens)
    routing = decide(layer.config.router, gating)
    assert isinstance(routing, Routing)
    assert routing.choices is not None  # tokens choose
    G, S, E, C, K = *gating.gates.shape, routing.capacity, routing.choices
    chosen = jax.nn.one_hot(routing.expert.reshape(G, S, K), E, dtype=jnp.bool_)
    slot = jnp.max(jnp.where(chosen, routing.slot.reshape(G, S, K, 1), -1), axis=2)  # [G, S, E], -1 for none
    mask = jax.nn.one_hot(slot, C, dtype=jnp.bool_)  # [G, S, E, C]
    weights = jnp.einsum("GSE,GSEC->GSEC", gating.gates, mask)
    rows = jnp.einsum("GSEC,GSD->GECD", mask, tokens).swapaxes(0, 1)
    outputs = layer.experts(rows.reshape(E, G * C, -1)).reshape(rows.shape).swapaxes(0, 1)
    return from_groups(jnp.einsum("GSEC,GECD->GSD", weights, outputs), B, T).astype(x.dtype)


class _Contest:
    """The layers of a case, as functions of their parameters and tokens."""

    def __init__(
        self,
        case: Case,
        methods: Sequence[Contender],
        implementations: Sequence[Implementation | None],
        dtype: str,
    ):
        self.case, self.dtype = case, dtype
        self.layers: dict[str, tuple[Contender, Implementation | None]] = {}
        for method in methods:
            for implementation in implementations if method not in BY_MASKS else (None,):
                name = method if implementation is None else f"{method}-{implementation}"
                self.layers[name] = (method, implementation)
        decision = jax.eval_shape(lambda: self._layer()(self._tokens()).decision)
        assert isinstance(decision, Routing)
        self.rows = decision.num_experts * decision.token.shape[0] * decision.capacity

    def pairs(self) -> list[tuple[str, str]]:
        """What is compared: methods of one-hot masks with all others, and those with the experts alone."""
        ours = [name for name, (method, _) in self.layers.items() if method not in BY_MASKS]
        masks = [name for name in self.layers if name in BY_MASKS]
        return [(mask, name) for mask in masks for name in ours] + [(name, "batched") for name in ours]

    def arguments(self) -> dict[str, Any]:
        """Parameters and rows by name. All layers have the same, so that there need be only one set of them."""
        D, E = self.case.width, self.case.num_experts
        rows = jax.random.normal(jax.random.key(1), (self.rows, D), self.dtype)
        layer = self._layer()
        return {
            "layer": jax.tree.leaves(nnx.state(layer)),
            "experts": jax.tree.leaves(nnx.state(layer.experts)),
            "dense": jax.tree.leaves(nnx.state(self._dense())),
            "tokens": self._tokens(),
            "rows": rows,
            "batched": rows.reshape(E, self.rows // E, D),
        }

    def works(self, arguments: Mapping[str, Any]) -> dict[str, Work]:
        """Value and gradient of every layer; arguments may be shapes."""

        def work(make: Callable[[], nnx.Module], parameters: str, x: str, call: Callable[[Any, Array], Array]) -> Work:
            return _gradient(make, call), (arguments[parameters], arguments[x])

        works = {"dense": work(self._dense, "dense", "rows", lambda mlp, x: mlp(x))}
        for name, (method, implementation) in self.layers.items():
            if method == "published":
                works[name] = work(self._layer, "layer", "tokens", published_einsum)
            else:
                make = functools.partial(self._layer, method, implementation)
                works[name] = work(make, "layer", "tokens", lambda layer, x: layer(x).y)
        return works | {"batched": work(self._experts, "experts", "batched", lambda experts, x: experts(x))}

    def _layer(self, method: Method = "gather", implementation: Implementation | None = None) -> MoEMlp:
        case = self.case
        config = MoEConfig(
            num_experts=case.num_experts,
            hidden_dim=case.hidden_dim,
            router=TopK(k=case.k, capacity_factor=case.capacity_factor),
            method=method,
            implementation=implementation,
            images_per_group=min(IMAGES_PER_GROUP, case.images),
        )
        return MoEMlp(config, case.width, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(0))

    def _experts(self) -> ExpertMlp:
        return self._layer().experts

    def _dense(self) -> Mlp:
        return Mlp(self.case.width, self.case.hidden_dim, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(0))

    def _tokens(self) -> Array:
        return jax.random.normal(jax.random.key(0), (self.case.images, self.case.tokens, self.case.width), self.dtype)


def _temp_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None  # every backend that is supported has one
    return int(analysis.temp_size_in_bytes)


def _gradient(make: Callable[[], nnx.Module], call: Callable[[Any, Array], Array]) -> Callable[..., Any]:
    """A function of a module's parameters and x that computes the value and gradient, in both, of what it makes of x.

    Parameters are a plain list: taking a module apart for every call would take a part of the time.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    structure = jax.tree.structure(state)

    def function(parameters: list[Array], x: Array) -> Any:
        def loss(arguments: tuple[list[Array], Array]) -> Array:
            parameters, x = arguments
            module = nnx.merge(graph, jax.tree.unflatten(structure, parameters))
            # A sum of squares, so that the gradient that comes in is an array like any other.
            return jnp.sum(jnp.square(call(module, x)).astype(jnp.float32))

        return jax.value_and_grad(loss)((parameters, x))

    return function
