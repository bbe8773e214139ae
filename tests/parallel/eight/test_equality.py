"""The same losses and gradients on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import Balance, ExpertChoice, Importance, Load, MoEConfig, MoEMlp, Soft, Switch, TopK, Transport
from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.nn.ensemble import task_loss
from jmoe.parallel import Exchange, Mesh, build, shardings
from jmoe.paths import path_names

MESHES = {
    "data 8": Mesh(data=8),
    "expert 8": Mesh(expert=8),
    "data 2 expert 4": Mesh(data=2, expert=4),
    "data 2 expert 2 model 2": Mesh(data=2, expert=2, model=2),
    "fsdp 8": Mesh(fsdp=8, expert=1),
}
LOW = {"capacity_factor": 0.6, "multiple": 1}  # so that something is dropped
LAYERS = {
    "top-k": MoEConfig(num_experts=8, router=TopK(k=2, **LOW)),
    "batch priority": MoEConfig(num_experts=8, router=TopK(k=2, batch_priority=True, **LOW)),
    "expert choice": MoEConfig(num_experts=8, router=ExpertChoice(capacity_factor=1.5)),
    "soft": MoEConfig(num_experts=8, router=Soft(slots_per_expert=2), images_per_group=1),
    "dropless": MoEConfig(num_experts=8, router=TopK(k=2, capacity_factor=None)),
    "dropless rows": MoEConfig(num_experts=8, router=TopK(k=2, capacity_factor=None), method="ragged"),
}
MORE = {  # on one mesh
    "rows that are dropped": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), method="ragged"),
    "einsum": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), method="einsum"),
    "fused": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), fused=True),
    "expert dropout": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), dropout=0.3),
    "own dropout": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), dropout=0.3, expert_init="independent"),
    "exchange in bfloat16": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), exchange_dtype="bfloat16"),
    "rows in bfloat16": MoEConfig(num_experts=8, router=TopK(k=2), method="ragged", exchange_dtype="bfloat16"),
    "mixtures beside tokens in bfloat16": MoEConfig(
        num_experts=8, router=Soft(slots_per_expert=2), images_per_group=1, exchange_dtype="bfloat16"
    ),
    "global losses": MoEConfig(
        num_experts=8,
        router=TopK(k=2, **LOW),
        losses=(Importance(scope="global"), Load(scope="global"), Balance(scope="global")),
    ),
    "switch": MoEConfig(num_experts=8, router=Switch(jitter=0.1)),
    "transport": MoEConfig(num_experts=8, router=Transport()),
    "ensemble": MoEConfig(num_experts=8, router=TopK(k=1, **LOW), members=2),
}
B = 32


def network(moe: MoEConfig, **options) -> ViTConfig:
    moe = dataclasses.replace(moe, layers=(1,), images_per_group=moe.images_per_group and min(moe.images_per_group, 4))
    small = {"patch_size": 2, "width": 24, "depth": 2, "hidden_dim": 40, "num_heads": 2, "num_classes": 6}
    return ViTConfig(**small, image_size=(4, 6), channels=1, moe=moe, head_zero=False, **options)


def loss_and_gradient(config: ViTConfig, mesh: Mesh | None):
    """The loss, its auxiliary parts, and the gradient by name, of one batch; as NumPy arrays."""
    graph, params = nnx.split(VisionTransformer(config, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(1), (B, *config.image_size, config.channels))
    labels = jax.nn.one_hot(jnp.arange(B) % config.num_classes, config.num_classes)

    def loss(params, images, labels, exchange):
        options = {} if exchange is None else {"exchange": exchange}
        output = nnx.merge(graph, params)(images, key=jax.random.key(2), **options)
        labels = jnp.repeat(labels, config.members, axis=0)
        task = jnp.mean(task_loss(output.logits, labels, "softmax"))
        return task + sum(output.losses.values()), {"task": task, **output.losses, **output.metrics}

    if mesh is None:
        step = jax.jit(jax.value_and_grad(functools.partial(loss, exchange=None), has_aux=True))
        (total, parts), gradient = step(params, images, labels)
    else:
        devices = build(mesh, num_experts=config.moe.num_experts)
        params = jax.device_put(params, shardings(params, devices))
        with jax.set_mesh(devices):
            step = jax.jit(jax.value_and_grad(functools.partial(loss, exchange=Exchange(devices)), has_aux=True))
            (total, parts), gradient = step(params, images, labels)
    names = path_names(gradient)
    by_name = dict(zip(names, map(np.asarray, jax.tree.leaves(gradient)), strict=True))
    return float(total), jax.tree.map(np.asarray, parts), by_name


@functools.cache
def alone(config: ViTConfig):
    return loss_and_gradient(config, None)


def check_same(config: ViTConfig, mesh: Mesh, tolerance: float = 1e-5):
    loss, parts, gradient = loss_and_gradient(config, mesh)
    wanted, wanted_parts, wanted_gradient = alone(config)
    np.testing.assert_allclose(loss, wanted, rtol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, wanted_parts)
    assert gradient.keys() == wanted_gradient.keys()
    for name, expected in wanted_gradient.items():
        error = np.linalg.norm(gradient[name] - expected)
        # A key's bias moves all logits of a query alike: its gradient is nothing but rounding.
        scale = np.linalg.norm(expected) if "key/bias" not in name else 1.0
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"
        assert scale > 0, name


QUICK = {("data 2 expert 2 model 2", "batch priority"), ("expert 8", "dropless rows"), ("fsdp 8", "soft")}
CELLS = [
    pytest.param(mesh, layer, marks=() if (mesh, layer) in QUICK else pytest.mark.slow)
    for mesh in MESHES
    for layer in LAYERS
]


@pytest.mark.parametrize(("mesh", "layer"), CELLS)
def test_losses_and_gradients_are_those_of_one_device(mesh, layer):
    check_same(network(LAYERS[layer]), MESHES[mesh])


IN_CHUNKS = {"images_per_group": 1, "exchange_chunks": 4}  # of the 8 groups that each device has
CHUNKS = {
    "with slots": MoEConfig(num_experts=8, router=TopK(k=2, batch_priority=True, **LOW), **IN_CHUNKS),
    "einsum": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), method="einsum", **IN_CHUNKS),
    "without slots": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), method="ragged", **IN_CHUNKS),
    "fused": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), fused=True, **IN_CHUNKS),
    "soft": MoEConfig(num_experts=8, router=Soft(slots_per_expert=2), **IN_CHUNKS),
    "expert choice": MoEConfig(num_experts=8, router=ExpertChoice(capacity_factor=1.5), **IN_CHUNKS),
    "dropout": MoEConfig(num_experts=8, router=TopK(k=2, **LOW), dropout=0.3, **IN_CHUNKS),
}


@pytest.mark.parametrize("layer", ["with slots", pytest.param("fused", marks=pytest.mark.slow)])
def test_slots_that_are_added_change_nothing(layer, monkeypatch):
    monkeypatch.setattr("jmoe.nn.moe.ADDED_SLOTS", 100.0)
    moe = dataclasses.replace(CHUNKS[layer], images_per_group=4, exchange_chunks=1)
    check_same(network(moe), Mesh(data=2, expert=2, model=2))


def test_parts_of_the_hidden_units_drop_theirs_independently():
    """Of rows without slots, whose masks are drawn on each device."""
    devices = build(Mesh(data=4, model=2), num_experts=1)
    config = MoEConfig(num_experts=1, router=TopK(k=1, capacity_factor=None), method="ragged", dropout=0.5)
    layer = MoEMlp(dataclasses.replace(config, hidden_dim=64, images_per_group=1), 8, rngs=nnx.Rngs(0))
    # A hidden unit is 1 or dropped, and its output is its number in binary.
    w_out = jnp.zeros((1, 64, 8)).at[0, jnp.array([0, 32]), jnp.array([0, 1])].set(1.0)
    layer.experts.w_in[...], layer.experts.b_in[...] = jnp.zeros((1, 8, 64)), jnp.full((1, 64), 10.0)
    layer.experts.w_out[...], layer.experts.b_out[...] = w_out, jnp.zeros((1, 8))
    with jax.set_mesh(devices):
        x = jax.device_put(jnp.ones((8, 500, 8)), jax.NamedSharding(devices, jax.P(("data", "fsdp", "expert"))))
        y = jax.jit(lambda x: layer(x, key=jax.random.key(0), exchange=Exchange(devices)).y)(x)
    both = np.asarray((y[..., 0] != 0) & (y[..., 1] != 0)).mean()
    assert abs(both - 0.5**4) < 0.02  # two hidden units and two outputs; 0.5^3 if the units were dropped together


@pytest.mark.parametrize(
    "layer", [pytest.param(name, marks=() if name == "with slots" else pytest.mark.slow) for name in CHUNKS]
)
def test_groups_that_go_to_experts_in_chunks_compute_the_same(layer):
    check_same(network(CHUNKS[layer]), Mesh(data=2, expert=2, model=2))


@pytest.mark.parametrize(
    "layer", [pytest.param(name, marks=() if name == "expert dropout" else pytest.mark.slow) for name in MORE]
)
def test_every_option_of_the_layer_computes_the_same(layer):
    # What is a rounding error apart can be rounded to bfloat16 the other way: 2^-9 of one entry of many.
    check_same(network(MORE[layer]), Mesh(data=2, expert=2, model=2), 2e-3 if "bfloat16" in layer else 1e-5)
