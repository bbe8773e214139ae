"""Efficient ensembles: the router of several members, the order of their tokens, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.routing import decide
from jmoe.routing.members import interleave_members, separate_members
from tests.goldens.case import Case
from tests.goldens.replays.networks import layer_results
from tests.goldens.replays.parts import choices, sparse_masks, sparse_part, with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    config = case.config
    if "seq_len" in config:
        part = sparse_part(config, [case.arrays.get("noise_unit")], config["deterministic"])
        return jax.device_get(layer_results(part, case.group("params"), case.arrays["inputs"], case))

    weights = ("importance_loss_weight", "load_loss_weight", "gshard_loss_weight")
    moe = {
        "num_experts": config["num_experts"],
        "ensemble_size": config["ensemble_size"],
        "group_size": config["group_size"],
        "router": {
            "num_selected_experts": config["num_selected_experts"],
            "noise_std": config["noise_std"],
            "dispatcher": {
                name: config[name]
                for name in ("batch_priority", "capacity_factor", "capacity_ceil_or_round", "capacity_multiple_of")
                if name in config
            },
        }
        | {name: config[name] for name in weights if name in config},
    }
    part = sparse_part(moe, [case.arrays.get("noise_unit")], config["deterministic"])
    inputs = jnp.asarray(case.arrays["inputs"])

    @jax.jit
    def run(kernel):
        def total(kernel):
            gate = part.config.gate(inputs.shape[-1], config["num_experts"], rngs=nnx.Rngs(0))
            gate.kernel[...] = kernel.reshape(gate.kernel.shape)
            gating = gate(inputs)
            routing = decide(part.config.router, gating)
            found = sparse_masks(routing) | choices(routing) | {"gates_softmax": gating.group_gates}
            metrics = part.metrics(gating, routing, None)
            if gating.sigma > 0:
                found["logits_noise"] = gating.sigma * case.arrays["noise_unit"]
            combined = found["einsum_combine_weights"]
            loss = jnp.sum(combined * case.cotangent(combined.shape)) + jnp.mean(metrics["auxiliary_loss"])
            return loss, found | with_prefix("metrics/", metrics)

        gradient, found = jax.grad(total, has_aux=True)(kernel)
        return found | {"grads_total/kernel": gradient}

    found = run(jnp.asarray(case.arrays["params/dense/kernel"]))
    copies, M = jnp.asarray(case.arrays["reshape/inputs"]), config["ensemble_size"]
    groups = interleave_members(copies, M)
    np.testing.assert_array_equal(separate_members(groups, M), copies)
    found["reshape/to_groups"] = groups.reshape(-1, config["reshape_group_size"], copies.shape[-1])
    return jax.device_get(found)
