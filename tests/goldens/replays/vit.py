"""Whole vision transformers: logits, losses, metrics and the gradient of every parameter."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.nn.attention import AttentionPool
from jmoe.nn.ensemble import prediction_loss, predictions, repeat_members, task_loss
from tests.goldens.case import Case
from tests.goldens.replays.networks import apply_recorded, flat, to_ours, with_parameters
from tests.goldens.replays.parts import SparsePart, sparse_part, take, with_prefix

POOLS = {"token": "token", "gap": "mean", "map": "map", "0": "first"}
LOSS = re.compile(r"(ensemble_)?(softmax|sigmoid)_xent")


def replay(case: Case) -> dict[str, np.ndarray]:
    config = case.config
    labels = None if (given := case.arrays.get("labels")) is None else jnp.asarray(given)
    model, part = vit_config(config["model"], config["image_size"], config["deterministic"], case.group("noise_unit"))
    params = case.group("params")
    graph, state = with_parameters(network_of(config["model"], model), to_ours(params))

    def forward(state, images):
        logits, blocks, gatings = apply_recorded(nnx.merge(graph, state), part, images)
        found: dict = {"logits": logits}
        auxiliary = jnp.zeros((), jnp.int32)  # the number 0 for a dense network
        for (block, metrics), gating in zip(blocks.items(), gatings, strict=True):
            found |= with_prefix(f"metrics/{block}/", metrics)
            auxiliary += metrics["auxiliary_loss"]
            if gating.logits.ndim == 3:
                found[f"router_gates/{block}"] = gating.group_gates
        found["metrics/auxiliary_loss"] = auxiliary
        if model.num_classes is None:
            found["loss/main"] = feature_loss(config["total_loss"], logits, case)
        else:
            found |= losses(config["loss"], model.members, logits, labels)
        found["loss/auxiliary"] = jnp.mean(auxiliary)
        found["loss/total"] = found["loss/main"] + found["loss/auxiliary"]
        return found["loss/total"], found

    images = jnp.asarray(case.arrays["images"])
    (of_parameters, of_images), found = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))(state, images)
    gradients = flat(nnx.to_pure_dict(of_parameters), params, to_ours)
    found |= with_prefix("grads/params/", gradients) | {"grads/images": of_images}
    if case.diagnostics:
        eager = nnx.merge(graph, state)(images).logits
        found["jit_vs_eager_max_abs_diff_logits"] = jnp.max(jnp.abs(found["logits"] - eager))
    return jax.device_get(found)


def network_of(model: dict, config: ViTConfig) -> Callable[..., VisionTransformer]:
    """What makes the network: of an ensemble with normalised queries and keys, the head alone normalises them."""

    def make(*, rngs: nnx.Rngs) -> VisionTransformer:
        network = VisionTransformer(config, rngs=rngs)
        if config.pool == "map" and model["encoder"].get("attention_qk_norm"):
            network.pool = AttentionPool(config.width, config.num_heads, config.hidden_dim, qk_norm=True, rngs=rngs)
        return network

    return make


def losses(name: str, members: int, logits, labels) -> dict:
    """The recorded losses of a classifier, by the name of its loss."""
    match = LOSS.fullmatch(name)
    if match is None:
        raise ValueError(f"there is no loss {name!r} here")
    members = members if match[1] else 1
    training = task_loss(logits, repeat_members(labels, members), match[2])
    return {
        "loss/train_per_example": training,
        "loss/eval_per_example": prediction_loss(logits, labels, members, match[2]),
        "predicted_label": predictions(logits, members, match[2]),
        "loss/main": jnp.mean(training),
    }


def feature_loss(formula: str, features, case: Case):
    """What is differentiated where there are no classes, as the config spells it."""
    weighed = features * case.cotangent(features.shape)
    reduction = {"sum(": jnp.sum, "mean": jnp.mean}.get(formula.strip()[:4])
    if reduction is None:
        raise ValueError(f"there is no loss {formula!r} here")
    return reduction(weighed if "sin" in formula.split("+")[0] else features)


def vit_config(
    model: dict, image_size: int, deterministic: bool, noises: dict[str, np.ndarray]
) -> tuple[ViTConfig, SparsePart | None]:
    """The reference's options of a network as ours."""
    model = dict(model)
    encoder, ensemble = dict(model.pop("encoder")), model.pop("name", "").endswith("Ensemble")
    take(model, "num_classes", "patch_size", "hidden_size", "classifier", "representation_size", "head_bias_init",
         "head_kernel_zero_init")  # fmt: skip
    moe = dict(encoder.pop("moe", None) or {})
    position = dict(encoder.pop("position_emb", None) or {"name": "learned"})
    qk_norm = encoder.pop("attention_qk_norm", False)
    take(encoder, "num_layers", "mlp_dim", "num_heads", "dropout_rate", "attention_dropout_rate")
    if encoder.get("dropout_rate") or encoder.get("attention_dropout_rate"):
        raise ValueError("dropout draws random numbers, which are not recorded")
    if ensemble:  # its encoder knows neither
        position, qk_norm = {"name": "learned"}, False
    part, layers = None, tuple(sorted(set(moe.get("layers") or ())))
    if layers:
        recorded = [noises.get(f"encoderblock_{i}") for i in layers]
        part = sparse_part(moe, recorded, deterministic, layers)
    patch, other = model["patch_size"]
    if patch != other:
        raise ValueError(f"patches of {patch} by {other} pixels are not square")
    config = ViTConfig(
        patch_size=patch,
        width=model["hidden_size"],
        depth=encoder["num_layers"],
        hidden_dim=encoder["mlp_dim"],
        num_heads=encoder["num_heads"],
        num_classes=model["num_classes"] or None,
        image_size=(image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        pool=POOLS[str(model.get("classifier", "token"))],
        positions=position["name"],
        position_temperature=float(position.get("temperature") or 10_000.0),
        representation_dim=model.get("representation_size"),
        head_bias=model.get("head_bias_init"),
        head_zero=model.get("head_kernel_zero_init", True),
        qk_norm=qk_norm,
        moe=None if part is None else part.config,
    )
    return config, part
