"""Expert choice: assignments, metrics and gradients of the router alone."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.routing import ExpertChoice, Gating, add_noise
from tests.goldens.case import Case
from tests.goldens.replays.parts import (
    capacity_options,
    expert_choice_metrics,
    noise_of,
    sparse_masks,
    with_prefix,
    with_values_of,
)


def replay(case: Case) -> dict[str, np.ndarray]:
    config = case.config
    router = ExpertChoice(**capacity_options(config))
    noise, noise_std = noise_of(case)
    sigma = noise_std / config["num_experts"]
    given = case.arrays.get("gates_softmax")

    @jax.jit
    def run(kernel, inputs):
        def everything(kernel, inputs):
            logits = jnp.einsum("GSD,DE->GSE", inputs, kernel, precision="highest")
            gating = Gating(logits=logits, noisy_logits=logits) if noise is None else add_noise(logits, noise, sigma)
            gates = gating.gates if given is None else with_values_of(gating.gates, jnp.asarray(given))
            routing = router(gates)
            found = sparse_masks(routing) | with_prefix("metrics/", expert_choice_metrics(routing))
            found["token_index_per_expert_slot"] = routing.token.reshape(len(inputs), routing.num_experts, -1)
            found["gates_logits"] = logits
            if given is None:
                found["gates_softmax"] = gates
            if noise is not None:
                found["logits_noise"] = sigma * noise
            combined = found["einsum_combine_weights"]
            return jnp.sum(combined * case.cotangent(combined.shape)), found

        gradients, found = jax.grad(everything, argnums=(0, 1), has_aux=True)(kernel, inputs)
        return found | {"grads_total/kernel": gradients[0], "grads_total/inputs": gradients[1]}

    return jax.device_get(run(case.arrays["params/dense/kernel"], case.arrays["inputs"]))
