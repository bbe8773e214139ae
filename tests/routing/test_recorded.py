"""Decisions, losses and gradients recorded from google-research/vmoe (tests/goldens/README.md), replayed."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routing import Balance, ExpertChoice, Gating, Importance, Load, Soft, TopK, add_noise
from jmoe.routing.metrics import gate_confidence, kept_per_token
from tests.routing.routers import compiled, weights_of

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
TOP_K = sorted(path.stem for path in GOLDENS.glob("routing_topk_*.npz") if "capacity_table" not in path.stem)
EXPERT_CHOICE = sorted(path.stem for path in GOLDENS.glob("routing_expert_choice_*.npz"))
SOFT = sorted(path.stem for path in GOLDENS.glob("softmoe_*.npz"))

# As stated with the recorded numbers, for float32 summed in another order.
VALUE, LOSS = {"rtol": 1e-5, "atol": 2e-6}, {"rtol": 2e-4, "atol": 2e-6}


def test_all_recordings_are_here():
    assert (len(TOP_K), len(EXPERT_CHOICE), len(SOFT)) == (33, 5, 4)


def load(name):
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as golden:
        return json.loads(str(golden["config"])), {key: golden[key] for key in golden.files if key != "config"}


def capacity_options(config):
    return {
        "capacity_factor": config["capacity_factor"],
        "rounding": {"ceil": "up", "round": "nearest"}[config["capacity_ceil_or_round"]],
        "multiple": config["capacity_multiple_of"] or 1,
        "noise_std": config["noise_std"],
    }


def gate(inputs, kernel, noise, sigma):
    logits = jnp.einsum("GSD,DE->GSE", inputs, kernel, precision="highest")
    return Gating(logits=logits, noisy_logits=logits) if noise is None else add_noise(logits, noise, sigma)


def recorded_noise(config, golden):
    """The draws and their standard deviation; None where the published code takes its deterministic branch."""
    noisy = not config["deterministic"] and config["noise_std"] > 0
    return (jnp.asarray(golden["noise_unit"]), config["noise_std"] / config["num_experts"]) if noisy else (None, 0.0)


def cotangent(shape):
    """sin(0, 1, 2, ...) in the shape of the output."""
    return np.sin(np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)


def assert_gradient(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


decide = compiled(lambda router, gates: router(gates))


def assert_masks(routing, golden):
    """The decision is the recorded one, written as [G, S, E, C] masks."""
    dispatch, combine = (np.zeros(golden["einsum_combine_weights"].shape, np.float32) for _ in range(2))
    for (group, expert, slot, token), weight in weights_of(routing).items():
        dispatch[group, token, expert, slot], combine[group, token, expert, slot] = 1, weight
    np.testing.assert_array_equal(dispatch, golden["einsum_dispatch_weights"])
    np.testing.assert_array_equal(combine, golden["einsum_combine_weights"])


def weight_cotangent(routing, golden):
    """The cotangent of `routing.weight` if that of the [G, S, E, C] combine weights is R."""
    R = cotangent(golden["einsum_combine_weights"].shape)
    token, expert, slot = (np.asarray(a) for a in (routing.token, routing.expert, routing.slot))
    kept = slot < routing.capacity
    return np.where(kept, R[np.arange(len(R))[:, None], token, expert, np.where(kept, slot, 0)], 0.0)


@pytest.mark.parametrize("name", TOP_K)
def test_token_choice(name):
    config, golden = load(name)
    K = config["num_selected_experts"]
    router = TopK(k=K, batch_priority=config["batch_priority"], **capacity_options(config))
    routing = decide(router, golden["gates_softmax"])
    assert routing.capacity == config["capacity"]
    expert_slot = np.stack([routing.expert, routing.slot], axis=-1).reshape(golden["indices_expert_slot"].shape)
    np.testing.assert_array_equal(expert_slot, golden["indices_expert_slot"])
    np.testing.assert_array_equal(routing.weight.reshape(expert_slot.shape[:-1]), golden["indices_combine_weights"])
    assert_masks(routing, golden)

    noise, sigma = recorded_noise(config, golden)
    R = weight_cotangent(routing, golden)
    gates, terms, gradients = weights_and_losses((K, sigma), golden["inputs"], golden["params/dense/kernel"], noise, R)
    for key, value in gates.items():
        np.testing.assert_allclose(value, golden[key], **VALUE)
    auxiliary, auxiliary_gradients = 0.0, [0.0, 0.0]
    for term in ("importance_loss", "load_loss", "gshard_loss"):
        assert (f"metrics/{term}" in golden) == (term in terms)
        if term in terms:
            np.testing.assert_allclose(terms[term], golden[f"metrics/{term}"].mean(), **LOSS)
            assert_gradient(gradients[term][1], golden[f"grads_mean_{term}/kernel"])
            weight = config[f"{term}_weight"]
            auxiliary += weight * terms[term]
            auxiliary_gradients = [a + weight * g for a, g in zip(auxiliary_gradients, gradients[term], strict=True)]
    np.testing.assert_allclose(auxiliary, golden["metrics/auxiliary_loss"].mean(), **LOSS)
    assert_gradient(auxiliary_gradients[1], golden["grads_mean_auxiliary_loss/kernel"])
    assert_gradient(auxiliary_gradients[0] + gradients["weights"][0], golden["grads_total/inputs"])
    assert_gradient(auxiliary_gradients[1] + gradients["weights"][1], golden["grads_total/kernel"])


@compiled
def weights_and_losses(options, inputs, kernel, noise, R):
    """The gates, the mean of each loss over groups, and its gradients with respect to inputs and kernel.

    Weights depend neither on the capacity nor on the order of tokens, so that few compiled functions serve all files.
    """
    k, sigma = options

    def terms(inputs, kernel):
        gating = gate(inputs, kernel, noise, sigma)
        decision = TopK(k=k, capacity_factor=None)(gating.gates)
        named = {
            "weights": jnp.sum(decision.weight * R),
            "importance_loss": Importance(weight=1.0)(gating, decision),
            "gshard_loss": Balance(weight=1.0)(gating, decision),
        }
        if noise is not None:
            named["load_loss"] = Load(weight=1.0)(gating, decision)
        return named, gating

    values, back, gating = jax.vjp(terms, inputs, kernel, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, values)
    gates = {"gates_logits": gating.logits, "gates_softmax_clean": gating.clean_gates, "gates_softmax": gating.gates}
    return gates, values, {name: back(zeros | {name: jnp.ones(())}) for name in values}


@pytest.mark.parametrize("name", EXPERT_CHOICE)
def test_expert_choice(name):
    config, golden = load(name)
    router = ExpertChoice(**capacity_options(config))
    noise, sigma = recorded_noise(config, golden)
    routing = decide(router, golden["gates_softmax"])
    assert routing.capacity == config["capacity"]
    expected = golden["token_index_per_expert_slot"]
    np.testing.assert_array_equal(routing.token.reshape(expected.shape), expected)
    assert_masks(routing, golden)
    per_token = np.asarray(kept_per_token(routing))
    np.testing.assert_array_equal(per_token.min(axis=1), golden["metrics/num_experts_per_item_min"])
    np.testing.assert_array_equal(per_token.max(axis=1), golden["metrics/num_experts_per_item_max"])
    np.testing.assert_allclose(routing.weight.min(axis=1), golden["metrics/min_selected_gate"], **VALUE)
    np.testing.assert_allclose(routing.weight.max(axis=1), golden["metrics/max_selected_gate"], **VALUE)

    gates, *gradients = gates_and_gradients(
        (router, sigma), golden["inputs"], golden["params/dense/kernel"], noise, weight_cotangent(routing, golden)
    )
    np.testing.assert_allclose(gates, golden["gates_softmax"], **VALUE)
    if not config["ties"]:  # which of equal gates moves with the inputs depends on their last bit
        assert_gradient(gradients[0], golden["grads_total/inputs"])
        assert_gradient(gradients[1], golden["grads_total/kernel"])


@compiled
def gates_and_gradients(options, inputs, kernel, noise, R):
    """The gates, and the gradients of the weights against R with respect to inputs and kernel."""
    router, sigma = options

    def total(inputs, kernel):
        gates = gate(inputs, kernel, noise, sigma).gates
        return jnp.sum(router(gates).weight * R), gates

    gradients, gates = jax.grad(total, argnums=(0, 1), has_aux=True)(inputs, kernel)
    return gates, *gradients


@pytest.mark.parametrize("name", SOFT)
def test_soft_mixing(name):
    config, golden = load(name)
    x, mu = golden["inputs"].astype(np.float64), golden["params/mu"].astype(np.float64)
    x /= np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)
    mu /= np.sqrt(np.sum(mu**2, axis=0, keepdims=True) + 1e-6)
    logits = jnp.asarray(golden["params/scale"] * np.einsum("GSD,DEP->GSEP", x, mu), jnp.float32)
    gating = Gating(logits=logits, noisy_logits=logits)
    if "noise_unit" in golden:
        gating = add_noise(logits, jnp.asarray(golden["noise_unit"]), config["noise_std"])
    mixing = Soft(slots_per_expert=config["slots_per_expert"])(gating.noisy_logits)
    np.testing.assert_allclose(mixing.dispatch, golden["dispatch_weights"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixing.combine, golden["combine_weights"], rtol=1e-4, atol=1e-5)
    confidence = gate_confidence(mixing.combine.reshape(*mixing.combine.shape[:2], -1))
    np.testing.assert_allclose(confidence, golden["metrics/combine_weights_max_mean"], rtol=1e-4)
