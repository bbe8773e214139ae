"""Tokens to slots and back, in the order of the reference's buffers, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.dispatch import combine, dispatch, einsum, rounded
from jmoe.routing import Routing, TopK
from tests.goldens.case import Case
from tests.goldens.replays.parts import capacity_options, from_slots, to_slots

METHODS = {"einsum": "einsum", "indices": "gather", "dense": "gather"}


def replay(case: Case) -> dict[str, np.ndarray]:
    config, gates = case.config, case.arrays["gates"]
    dtype = "bfloat16" if config["bfloat16"] else None
    G, S, E = gates.shape
    decision = dense(gates) if config["dispatcher"] == "dense" else router(config)(jnp.asarray(gates))
    C, method = decision.capacity, METHODS[config["dispatcher"]]
    data, outputs = case.arrays["data"], case.arrays["expert_outputs"]

    @jax.jit
    def run(data, outputs):
        def dispatched(data):
            slots = dispatch(rounded(data.reshape(G, S, -1), dtype), decision, method)
            return from_slots(slots, (E, G * C, *data.shape[2:]))

        def combined(outputs):
            y = combine(rounded(to_slots(outputs, G, C), dtype), decision, method)
            return y.reshape(G, S, *outputs.shape[2:])

        found = {"dispatched": dispatched(data), "combined": combined(outputs)}
        cotangents = {name: case.cotangent(array.shape) for name, array in found.items()}
        found["grads/data"] = jax.grad(lambda x: jnp.sum(dispatched(x) * cotangents["dispatched"]))(data)
        found["grads/expert_outputs"] = jax.grad(lambda y: jnp.sum(combined(y) * cotangents["combined"]))(outputs)
        return found

    found = run(data, outputs)
    if config["dispatcher"] == "dense":
        found["combine_weights"] = gates
    elif config["dispatcher"] == "einsum":
        mask, found["combine_weights"] = einsum.masks(decision)
        found["dispatch_weights"] = mask.astype(jnp.uint8)
    else:
        shape = (G, S, decision.choices)
        found["indices_expert_slot"] = jnp.stack([decision.expert, decision.slot], axis=-1).reshape(*shape, 2)
        found["combine_weights"] = decision.weight.reshape(shape)
    return jax.device_get(found)


def router(config: dict) -> TopK:
    options = {"k": config["num_selected_experts"], "batch_priority": config["batch_priority"]}
    return TopK(**options, **capacity_options(config))


def dense(gates: np.ndarray) -> Routing:
    """Every expert takes the whole group in its order."""
    G, S, E = gates.shape
    token, expert = (jnp.asarray(np.broadcast_to(a.ravel(), (G, S * E))) for a in np.indices((S, E)))
    return Routing(
        token=token,
        expert=expert,
        slot=token,
        weight=jnp.asarray(gates.reshape(G, S * E)),
        group_size=S,
        num_experts=E,
        capacity=S,
        choices=E,
    )
