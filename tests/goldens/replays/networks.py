"""Modules of ours with the parameters of recorded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.convert.names import our_name
from jmoe.models.vit import VisionTransformer
from jmoe.nn.moe import MoEConfig, MoEMlp
from jmoe.routing import Gating
from tests.goldens.case import Case
from tests.goldens.replays.parts import Recorder, SparsePart, replace_losses, with_prefix

LAYER = "Encoder/encoderblock_0/Moe/", "blocks/0/moe/"  # a sparse layer as a part of a network, there and here


def to_ours(arrays: dict, there: str = "", here: str = "") -> dict:
    """Nests {name in the reference: array} under our names; numbers, which index the blocks, become int."""
    nested: dict = {}
    for name, array in arrays.items():
        ours = our_name(there + name)
        if ours is None:
            raise ValueError(f"the parameter {name!r} has no name of ours")
        *parents, leaf = (int(p) if p.isdigit() else p for p in ours.removeprefix(here).split("/"))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        alone = leaf == "kernel" and parents[-1] == "gate" and np.ndim(array) == 3 and np.shape(array)[1] == 1
        node[leaf] = array[:, 0] if alone else array  # an ensemble of one is no ensemble of ours
    return nested


def layer_to_ours(arrays: dict) -> dict:
    """The same for the parameters of a single sparse layer."""
    return to_ours(arrays, *LAYER)


def with_parameters(make, parameters: dict):
    """The graph of the module that make(rngs=...) returns, and its parameters with the given values."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    given = jax.tree.map(jnp.shape, parameters)
    if given != shapes:
        raise ValueError(f"the parameters are not those of the network: {given} instead of {shapes}")
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, parameters))
    return graph, state


def flat(tree: dict, params: dict[str, np.ndarray], to_ours) -> dict[str, np.ndarray]:
    """A tree under our names as a flat one under the reference's, in the names and shapes of its parameters."""
    found = {}
    for name, array in params.items():
        (path, _), *rest = jax.tree_util.tree_leaves_with_path(to_ours({name: 0}))
        assert not rest
        leaf = tree
        for key in path:
            leaf = leaf[key.key]
        found[name] = leaf.reshape(array.shape)
    return found


def apply_recorded(
    network: VisionTransformer, part: SparsePart | None, images: jax.Array
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]], list[Gating]]:
    """The logits, the metrics of each sparse block as recorded, by "encoderblock_i", and what its gate said."""
    recorder, layers = Recorder(), network.config.moe_layers
    for i in layers:
        network.blocks[i].moe.config = replace_losses(network.blocks[i].moe.config, recorder)
    logits = network(images).logits
    metrics = {}
    for i, (gating, decision) in zip(layers, recorder.seen, strict=True):
        assert part is not None
        mu = getattr(network.blocks[i].moe.gate, "mu", None)
        metrics[f"encoderblock_{i}"] = part.metrics(gating, decision, None if mu is None else mu[...])
    return logits, metrics, [gating for gating, _ in recorder.seen]


def layer_results(
    part: SparsePart, params: dict[str, np.ndarray], inputs: np.ndarray, case: Case
) -> dict[str, np.ndarray]:
    """outputs, metrics/*, loss and grads/* of one sparse layer.

    The loss is sum(outputs * cotangent) + mean(auxiliary loss).
    """
    graph, state = with_parameters(functools.partial(_make, part.config, inputs.shape[-1]), layer_to_ours(params))

    @jax.jit
    def run(state, inputs):
        def total(state, inputs):
            recorder = Recorder()
            layer = nnx.merge(graph, state)
            layer.config = replace_losses(part.config, recorder)
            y = layer(inputs).y
            mu = getattr(layer.gate, "mu", None)
            metrics = part.metrics(*recorder.seen[0], None if mu is None else mu[...])
            loss = jnp.sum(y * case.cotangent(y.shape)) + jnp.mean(metrics["auxiliary_loss"])
            return loss, {"outputs": y, "loss": loss} | with_prefix("metrics/", metrics)

        return jax.grad(total, argnums=(0, 1), has_aux=True)(state, inputs)

    (of_parameters, of_inputs), found = run(state, inputs)
    gradients = flat(nnx.to_pure_dict(of_parameters), params, layer_to_ours)
    return found | with_prefix("grads/params/", gradients) | {"grads/inputs": of_inputs}


def _make(config: MoEConfig, D: int, *, rngs: nnx.Rngs) -> MoEMlp:
    return MoEMlp(config, D, rngs=rngs)
