"""Dispatch and combination recorded from google-research/vmoe (tests/goldens/README.md), replayed by gathers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.dispatch import combine, dispatch
from jmoe.routing import Mixing, Routing, TopK

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
SPARSE = sorted(path.stem for path in GOLDENS.glob("dispatch_*.npz"))
SOFT = sorted(path.stem for path in GOLDENS.glob("softmoe_*.npz"))


def test_all_recordings_are_here():
    assert (len(SPARSE), len(SOFT)) == (6, 4)


def load(name):
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as golden:
        return json.loads(str(golden["config"])), {key: golden[key] for key in golden.files if key != "config"}


def to_slots(buffer, G, C):
    """[E, G * C, ...], the published layout, to our [G, E, C, D]; trailing axes become one."""
    E = buffer.shape[0]
    g = np.arange(G)
    if G % E == 0:  # the layout after its exchange between E devices
        h = G // E
        start = (g % h * E + g // h) * C
    else:
        start = g * C
    rows = start[:, None] + np.arange(C)  # [G, C]
    return buffer[:, rows].reshape(E, G, C, -1).swapaxes(0, 1)


def from_slots(slots, shape):
    """The inverse of to_slots, for the gradient."""
    G, _, C, _ = slots.shape
    where = to_slots(np.arange(np.prod(shape)).reshape(shape), G, C)
    buffer = np.zeros(np.prod(shape), np.float32)
    buffer[where] = slots
    return buffer.reshape(shape)


def cotangent(shape):
    return np.sin(np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)


def decision_of(config, golden):
    """The router's, except for "dense", where every expert takes the whole group in its order."""
    G, S, E = golden["gates"].shape
    gates = jnp.asarray(golden["gates"])
    if config["dispatcher"] == "dense":
        token, expert = (np.broadcast_to(a.ravel(), (G, S * E)) for a in np.indices((S, E)))
        token, expert = jnp.asarray(token), jnp.asarray(expert)
        fields = {"token": token, "expert": expert, "slot": token, "weight": gates.reshape(G, S * E)}
        return Routing(**fields, group_size=S, num_experts=E, capacity=S, choices=E)
    k, factor = config["num_selected_experts"], config["capacity_factor"]
    return TopK(k=k, capacity_factor=factor, batch_priority=config["batch_priority"])(gates)


@pytest.mark.parametrize("name", SPARSE)
def test_slots_tokens_and_gradients(name):
    config, golden = load(name)
    decision = decision_of(config, golden)
    G, S, _ = golden["gates"].shape
    C = config["capacity"]
    assert decision.capacity == C
    dtype = jnp.bfloat16 if config["bfloat16"] else jnp.float32
    data = jnp.asarray(golden["data"].reshape(G, S, -1), dtype)
    outputs = jnp.asarray(to_slots(golden["expert_outputs"], G, C), dtype)

    @jax.jit
    def run(data, outputs):
        slots, slots_back = jax.vjp(lambda x: dispatch(x, decision), data)
        # What is recorded was rounded once, before, and then summed in float32: hence outputs as float32.
        y, y_back = jax.vjp(lambda y: combine(y, decision), outputs.astype(jnp.float32))
        R = to_slots(cotangent(golden["dispatched"].shape), G, C)
        dx = slots_back(jnp.asarray(R, slots.dtype))
        dy = y_back(jnp.asarray(cotangent(y.shape)))
        return slots, y, dx[0], dy[0]

    slots, y, dx, dy = (np.asarray(a, np.float32) for a in run(data, outputs))
    bounds = {"rtol": 1e-2, "atol": 2e-2} if config["bfloat16"] else {"rtol": 1e-5, "atol": 2e-6}
    np.testing.assert_array_equal(slots, to_slots(golden["dispatched"], G, C))  # rows are copied
    np.testing.assert_allclose(y, golden["combined"].reshape(y.shape), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(dx, golden["grads/data"].reshape(dx.shape), **bounds)
    np.testing.assert_allclose(from_slots(dy, golden["expert_outputs"].shape), golden["grads/expert_outputs"], **bounds)


@pytest.mark.parametrize("name", SOFT)
def test_soft_mixtures(name):
    _, golden = load(name)
    G, _, _, C = golden["dispatch_weights"].shape
    mixing = Mixing(dispatch=jnp.asarray(golden["dispatch_weights"]), combine=jnp.asarray(golden["combine_weights"]))

    def rounded(array):  # the published code rounds what it moves to bfloat16, and sums in float32
        return jnp.asarray(array, jnp.bfloat16).astype(jnp.float32)

    slots = dispatch(rounded(golden["inputs"]), mixing)
    np.testing.assert_allclose(slots, to_slots(golden["dispatched"], G, C), rtol=1e-4, atol=1e-5)
    y = combine(rounded(to_slots(golden["expert_outputs"], G, C)), mixing)
    np.testing.assert_allclose(y, golden["combined"], rtol=1e-4, atol=1e-5)
