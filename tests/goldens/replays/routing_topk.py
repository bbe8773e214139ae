"""Token choice: assignments, losses and gradients of the router alone; and the table of capacities."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.routing import Gating, TopK, add_noise, expert_capacity
from tests.goldens.case import Case
from tests.goldens.replays.parts import (
    ROUNDING,
    auxiliary_loss,
    capacity_options,
    choices,
    noise_of,
    sparse_masks,
    token_choice_losses,
    with_prefix,
    with_values_of,
)


def replay(case: Case) -> dict[str, np.ndarray]:
    if "num_tokens" in case.arrays:
        return {"capacity": np.array([capacity(*row) for row in zip(*table(case), strict=True)], np.int32)}
    config, K = case.config, case.config["num_selected_experts"]
    router = TopK(k=K, batch_priority=config["batch_priority"], **capacity_options(config))
    noise, noise_std = noise_of(case)
    sigma = noise_std / config["num_experts"]
    given = case.arrays.get("gates_softmax")

    def everything(kernel, inputs):
        logits = jnp.einsum("GSD,DE->GSE", inputs, kernel, precision="highest")
        gating = Gating(logits=logits, noisy_logits=logits) if noise is None else add_noise(logits, noise, sigma)
        gates = gating.gates if given is None else with_values_of(gating.gates, jnp.asarray(given))
        routing = router(gates)
        found = sparse_masks(routing) | choices(routing)
        found |= {"gates_logits": logits, "gates_softmax_clean": gating.clean_gates}
        if given is None:
            found["gates_softmax"] = gates
        if noise is not None:
            found |= {"logits_noise": sigma * noise, "gates_logits_noisy": gating.noisy_logits}
        losses = token_choice_losses(gating, K)
        losses["auxiliary_loss"] = auxiliary_loss(losses, config)
        combined = found["einsum_combine_weights"]
        scalars = {f"grads_mean_{name}": jnp.mean(loss) for name, loss in losses.items()}
        output = jnp.sum(combined * case.cotangent(combined.shape))
        scalars["grads_total"] = output + scalars["grads_mean_auxiliary_loss"]
        return scalars, found | with_prefix("metrics/", losses)

    @jax.jit
    def run(kernel, inputs):
        scalars, back, found = jax.vjp(everything, kernel, inputs, has_aux=True)
        for name in scalars:
            one = {other: jnp.float32(other == name) for other in scalars}
            found[f"{name}/kernel"], gradient = back(one)
            if name == "grads_total":
                found[f"{name}/inputs"] = gradient
        return found

    return jax.device_get(run(case.arrays["params/dense/kernel"], case.arrays["inputs"]))


def table(case: Case) -> list[np.ndarray]:
    return [case.arrays[name] for name in ("num_tokens", "num_experts", "capacity_factor", "is_round", "multiple_of")]


def capacity(tokens, experts, factor, is_round, multiple) -> int:
    """-1 for an error; the number of tokens is that of assignments already."""
    rounding = ROUNDING["round" if is_round else "ceil"]
    try:
        return expert_capacity(int(tokens), int(experts), float(factor), rounding, int(multiple) or 1)
    except ValueError:
        return -1
