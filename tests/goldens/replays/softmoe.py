"""The soft router: weights, metrics, mixtures, and the layer around it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.dispatch import combine, dispatch, rounded
from jmoe.nn.gate import unit
from jmoe.routing import decide
from tests.goldens.case import Case
from tests.goldens.replays.networks import layer_results
from tests.goldens.replays.parts import from_slots, soft_metrics, sparse_part, to_slots, with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    config, inputs = case.config, jnp.asarray(case.arrays["inputs"])
    moe = {
        "num_experts": config["num_experts"],
        "group_size": config["group_size"],
        "mlp_dim": config["mlp_dim"],
        "router": {
            "name": "SoftRouter",
            "num_slots": config["num_slots_arg"],
            "capacity_factor": 1.0 if config["capacity_factor"] is None else config["capacity_factor"],
            "noise_std": config["noise_std"],
            "compute_similarity_metrics": config["compute_similarity_metrics"],
        },
    }
    part = sparse_part(moe, [case.arrays.get("noise_unit")], config["deterministic"])
    layer = layer_results(part, case.group("layer_params"), inputs, case)
    found = {"layer_outputs": layer["outputs"]} | {k: v for k, v in layer.items() if k.startswith("grads/")}

    E, P = config["num_experts"], part.config.router.slots_per_expert
    gate = part.config.gate(inputs.shape[-1], E, rngs=nnx.Rngs(0))
    gate.mu[...], gate.scale[...] = case.arrays["params/mu"], case.arrays["params/scale"]
    gating = gate(jnp.asarray(inputs))
    mixing = decide(part.config.router, gating)
    G, _, D = inputs.shape
    outputs = to_slots(jnp.asarray(case.arrays["expert_outputs"]), G, P)
    dtype = part.config.exchange_dtype
    found |= {
        "mu_unit": unit(gate.mu[...], axis=0),
        "dispatch_weights": mixing.dispatch,
        "combine_weights": mixing.combine,
        "dispatched": from_slots(dispatch(rounded(inputs, dtype), mixing, "einsum"), (E, G * P, D)),
        "combined": combine(rounded(outputs, dtype), mixing, "einsum"),
    }
    found |= with_prefix("metrics/", soft_metrics(mixing, gate.mu[...], config["compute_similarity_metrics"]))
    if gating.sigma > 0:
        found["logits_noise"] = gating.sigma * case.arrays["noise_unit"]
    return jax.device_get(found)
