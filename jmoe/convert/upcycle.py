"""Sparse upcycling: a sparse model that begins as a dense one (Komatsuzaki et al. 2022, arXiv:2212.05055).

In the chosen blocks every expert is a copy of the dense MLP, the gate is new, and everything else is as it was.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from jmoe.convert.infer import parameter_shapes
from jmoe.convert.names import first_of, flatten, listed
from jmoe.convert.transforms import expand_tile
from jmoe.errors import UserError
from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.nn import MoEConfig
from jmoe.routing import ExpertChoice

# As published for vision.
PUBLISHED = MoEConfig(num_experts=32, layers="every-2", router=ExpertChoice(capacity_factor=2.0, renormalize=True))
GATE_STD = 0.02
_GATE = re.compile(r"\bblocks/\d+/moe/gate/")


def upcycle_params(
    dense: Mapping[str, np.ndarray], config: ViTConfig, *, gate_std: float = GATE_STD, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns the parameters of a sparse model that begins as a dense one.

    All experts being alike, a token's result is that of the dense MLP times the sum of its combine weights. It is the
    dense one where that sum is 1 (`TopK` and `ExpertChoice` with renormalize=True) and the token finds a slot.

    Args:
      dense: parameters of the dense model by name.
      config: the sparse model.
      gate_std: standard deviation of the kernels of the gates; those of a soft router start as they always do.
      seed: of the gates.

    Raises:
      UserError: the parameters are not those of the model without its experts, which the sentence names; or the gates
        cannot be drawn so.
    """
    if not gate_std > 0:
        raise UserError(
            f"The gates want a standard deviation above 0, or nothing tells experts apart; it is {gate_std}."
        )
    if seed < 0:
        raise UserError(f"The seed of the gates must be at least 0; it is {seed}.")
    params = upcycle_arrays(dense, parameter_shapes(config))
    draw = np.random.default_rng(seed)
    for name, gate in sorted(_drawn_gates(config, seed).items()):
        kernel = name.endswith("/kernel")
        params[name] = np.float32(gate_std) * draw.normal(size=gate.shape).astype(np.float32) if kernel else gate
    return params


def upcycle_arrays(dense: Mapping[str, np.ndarray], sparse: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Copies arrays of a dense model, or of its optimizer's state, to those of the sparse one; gates are zero.

    Args:
      dense: arrays by name, such as "blocks/1/mlp/w_in" or "direction/mu/blocks/1/mlp/w_in".
      sparse: the shapes that are wanted by name, such as "direction/mu/blocks/1/moe/experts/w_in".

    Raises:
      UserError: names or shapes do not fit; the sentence names them.
    """
    origins = {name: name.replace("/moe/experts/", "/mlp/") for name in sparse if not _GATE.search(name)}
    problems = []
    if missing := [origin for origin in origins.values() if origin not in dense]:
        problems.append(f"it lacks {listed(missing)}")
    if unmatched := sorted(dense.keys() - origins.values()):
        problems.append(f"the sparse model has no place for {listed(unmatched)}")
    result, different = {}, []
    for name, shape in sparse.items():
        origin = origins.get(name)
        if origin is None:
            result[name] = np.zeros(shape, np.float32)
        elif origin in dense:
            array = dense[origin]
            copied = expand_tile(array, 0, shape[0]) if origin != name and array.shape != shape else array
            result[name] = copied
            if copied.shape != shape:
                different.append(f"{origin!r} is {array.shape} there and would be {shape} at {name!r}")
    if problems := problems + first_of(different):
        raise UserError(f"The dense model cannot be made sparse like this: {'; '.join(problems)}.")
    return result


def _drawn_gates(config: ViTConfig, seed: int) -> dict[str, np.ndarray]:
    """The gates as a new model has them; compiled, because then nothing else of the model is drawn."""

    def gates() -> dict[str, jax.Array]:
        model = VisionTransformer(config, rngs=nnx.Rngs(params=seed))
        params = flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return {name: array for name, array in params.items() if _GATE.search(name)}

    return {name: np.asarray(gate) for name, gate in jax.jit(gates)().items()}
