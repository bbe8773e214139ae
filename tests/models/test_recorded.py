"""The sparse layer and the vision transformer against numbers recorded from the reference implementation.

tests/goldens/README.md says where the files come from. Parameters and noise are recorded, so that nothing is random.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.nn.patches import sincos2d
from jmoe.routing import add_noise, gating
from tests.reference_names import layer_to_ours, to_ours

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
LAYERS = sorted(path.stem for path in GOLDENS.glob("layer_*.npz"))
VITS = sorted(path.stem for path in GOLDENS.glob("vit_*.npz"))


def test_all_recorded_cases_are_here():
    assert len(LAYERS) == 6
    assert len(VITS) == 7


class ReplayGate(nnx.Module):
    """A linear gate that adds recorded noise, if any, instead of drawing its own."""

    def __init__(self, D, num_experts, noisy):
        self.kernel = nnx.Param(jnp.zeros((D, num_experts)))
        self.noisy = noisy  # logits and mask -> Gating; a function, as a parameter would not survive nnx.eval_shape

    def __call__(self, tokens, *, mask=None, key=None):
        return self.noisy(jnp.einsum("GSD,DE->GSE", tokens, self.kernel[...]), mask)


def replay(noise, sigma):
    """What adds one recorded draw of noise, or none."""
    if noise is None:
        return lambda logits, mask: gating(logits, mask=mask)
    return lambda logits, mask: add_noise(logits, jnp.asarray(noise), sigma, mask)


def moe_config(recorded, *, noises, layers=(0,)):
    """The reference's options as ours; noises are given to the gates in the order of construction."""
    router = dict(recorded["router"])
    dispatcher = router.pop("dispatcher", {})
    name = router.pop("name", "NoisyTopExpertsPerItemRouter")
    options = {
        "capacity_factor": dispatcher.get("capacity_factor"),
        "rounding": {"ceil": "up", "round": "nearest"}[dispatcher.get("capacity_ceil_or_round", "ceil")],
        "multiple": dispatcher.get("capacity_multiple_of", 4),
    }
    gate, losses = None, ()
    if name.endswith("SoftRouter"):
        assert router == {"capacity_factor": 1.0}
        ours = jmoe.Soft(slots_per_expert=recorded["group_size"] // recorded["num_experts"])
    else:
        noises = iter(noises)
        noise_std = router.pop("noise_std")

        def gate(D, num_experts, *, rngs):
            return ReplayGate(D, num_experts, replay(next(noises), noise_std / num_experts))

        if name == "NoisyTopItemsPerExpertRouter":
            ours = jmoe.ExpertChoice(**options)
        else:
            ours = jmoe.TopK(k=router["num_selected_experts"], batch_priority=dispatcher["batch_priority"], **options)
            losses = (
                jmoe.Importance(weight=router["importance_loss_weight"]),
                jmoe.Load(weight=router["load_loss_weight"]),
                jmoe.Balance(weight=1.0),  # recorded, but weighs nothing in the reference's total
            )
    return jmoe.MoEConfig(
        num_experts=recorded["num_experts"],
        hidden_dim=recorded.get("mlp_dim"),
        router=ours,
        layers=layers,
        group_size=recorded["group_size"],
        losses=losses,
        gate=gate,
    )


def auxiliary(losses):
    return sum((loss for name, loss in losses.items() if name != "balance"), jnp.zeros(()))


def select(golden, prefix):
    return {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}


def with_parameters(make, parameters):
    """The graph of the module that make(rngs) returns, and its parameters with the given values."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(jnp.shape, parameters) == shapes  # the same names, and the same shapes
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, parameters))
    return graph, state


def assert_gradients_close(ours, recorded, rtol, atol):
    """atol is in units of the largest entry of each array."""
    assert jax.tree.structure(ours) == jax.tree.structure(recorded)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(recorded))

    def check(path, gradient, expected):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A key's bias changes all scores of a query alike: its gradient is zero up to rounding.
        scale = largest if name.endswith("key/bias") else np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=atol * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(check, ours, recorded)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_reference(name):
    golden = np.load(GOLDENS / f"{name}.npz", allow_pickle=False)
    recorded = json.loads(str(golden["config"]))
    config = moe_config(recorded, noises=[golden.get("noise_unit")])
    layer = functools.partial(jmoe.MoEMlp, config, recorded["hidden"])
    graph, parameters = with_parameters(layer, layer_to_ours(select(golden, "params/")))
    cotangent = np.sin(np.arange(golden["outputs"].size, dtype=np.float64)).astype(np.float32)

    def loss(parameters, x):
        output = nnx.merge(graph, parameters)(x)
        return jnp.sum(output.y.reshape(-1) * cotangent) + auxiliary(output.losses), output

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, output), gradients = value_and_grad(parameters, golden["inputs"])
    # The reference of the bfloat16 case rounds tokens before dispatch and outputs, which reach 1.3, before combine;
    # ours does not. One such rounding is up to 2**-8 = 4e-3.
    rounded = name == "layer_topk_k1_bf16"
    rtol, atol = (2e-2, 4e-3) if rounded else (1e-5, 2e-6)
    np.testing.assert_allclose(output.y, golden["outputs"], rtol=rtol, atol=atol)
    # A sum of both signs, which may cancel: compared with the sum of its terms.
    scale = np.abs(golden["outputs"].reshape(-1) * cotangent).sum()
    np.testing.assert_allclose(total, golden["loss"], rtol=0, atol=rtol * scale)
    for ours, theirs in (("importance", "importance_loss"), ("load", "load_loss"), ("balance", "gshard_loss")):
        if f"metrics/{theirs}" in golden:
            weight = next(loss.weight for loss in config.losses if loss.name == ours)
            expected = weight * golden[f"metrics/{theirs}"].mean()
            np.testing.assert_allclose(output.losses[ours], expected, rtol=2e-4, atol=2e-6)
    expected = (layer_to_ours(select(golden, "grads/params/")), golden["grads/inputs"])
    gradients = (nnx.to_pure_dict(gradients[0]), gradients[1])
    assert_gradients_close(gradients, expected, *((3e-2, 2e-2) if rounded else (1e-4, 1e-5)))


def vit_config(recorded, noises):
    model = recorded["model"]
    encoder = dict(model["encoder"])
    position = encoder.get("position_emb", {"name": "learned"})
    moe = None
    if encoder["moe"]["layers"]:
        moe = moe_config(encoder["moe"], noises=noises, layers=tuple(encoder["moe"]["layers"]))
    return ViTConfig(
        patch_size=model["patch_size"][0],
        width=model["hidden_size"],
        depth=encoder["num_layers"],
        hidden_dim=encoder["mlp_dim"],
        num_heads=encoder["num_heads"],
        num_classes=model["num_classes"],
        image_size=(recorded["image_size"],) * 2,
        pool={"gap": "mean"}.get(model["classifier"], model["classifier"]),
        # Fixed positions of another temperature than ours are given as if they were learned.
        positions="learned" if "temperature" in position else position["name"],
        representation_dim=model.get("representation_size"),
        head_bias=model.get("head_bias_init"),
        qk_norm=encoder.get("attention_qk_norm", False),
        moe=moe,
    )


@pytest.mark.parametrize("name", VITS)
def test_vision_transformer_equals_the_reference(name):
    golden = np.load(GOLDENS / f"{name}.npz", allow_pickle=False)
    recorded = json.loads(str(golden["config"]))
    layers = recorded["model"]["encoder"]["moe"]["layers"]
    config = vit_config(recorded, [golden.get(f"noise_unit/encoderblock_{i}") for i in layers])
    ours = to_ours(select(golden, "params/"))
    temperature = recorded["model"]["encoder"].get("position_emb", {}).get("temperature")
    if temperature is not None:
        ours["positions"] = sincos2d(*config.grid, config.width, temperature)[None]
    graph, parameters = with_parameters(functools.partial(VisionTransformer, config), ours)

    def loss(parameters, images):
        output = nnx.merge(graph, parameters)(images)
        labels = golden["labels"]
        log_p = jax.nn.log_softmax(output.logits)
        if recorded["loss"] == "sigmoid_xent":
            log_p, labels = jnp.stack([jax.nn.log_sigmoid(s * output.logits) for s in (1, -1)]), (labels, 1 - labels)
        per_example = -jnp.sum(jnp.asarray(labels) * log_p, axis=-1)
        main = jnp.mean(jnp.sum(per_example.reshape(-1, len(images)), axis=0))
        return main + auxiliary(output.losses), (main, output)

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (main, output)), (gradients, image_gradient) = value_and_grad(parameters, golden["images"])

    # The reference of the soft case rounds tokens to bfloat16 before dispatch, and outputs before combine.
    rounded = "soft" in name
    np.testing.assert_allclose(output.logits, golden["logits"], rtol=1e-4, atol=5e-3 if rounded else 2e-5)
    np.testing.assert_allclose(main, golden["loss/main"], rtol=5e-3 if rounded else 5e-4)
    np.testing.assert_allclose(total, golden["loss/total"], rtol=5e-3 if rounded else 5e-4)
    for loss in config.moe.losses if config.moe else ():
        key = {"balance": "gshard"}.get(loss.name, loss.name)
        blocks = [golden.get(f"metrics/encoderblock_{i}/{key}_loss") for i in layers]
        expected = sum(loss.weight * block.mean() for block in blocks if block is not None)
        np.testing.assert_allclose(output.losses[loss.name], expected, rtol=5e-4, err_msg=loss.name)
    for block, gates in select(golden, "router_gates/encoderblock_").items():
        decision, expected = output.routing[block], jax.jit(config.moe.router)(gates)
        for field in ("token", "expert", "slot"):
            np.testing.assert_array_equal(getattr(decision, field), getattr(expected, field), err_msg=field)
        np.testing.assert_allclose(decision.weight, expected.weight, rtol=1e-4)

    gradients = nnx.to_pure_dict(gradients)
    if temperature is not None:
        del gradients["positions"]
    expected = (to_ours(select(golden, "grads/params/")), golden["grads/images"])
    assert_gradients_close((gradients, image_gradient), expected, *((4e-2, 2e-2) if rounded else (1e-3, 1e-4)))
