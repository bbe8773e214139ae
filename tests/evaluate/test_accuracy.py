import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import MoEConfig, TopK
from jmoe.evaluate import evaluate
from jmoe.models import vit

IMAGES = 13


@pytest.fixture(scope="module")
def model():
    config = vit.ViTConfig(
        patch_size=4,
        width=8,
        depth=2,
        hidden_dim=12,
        num_heads=2,
        num_classes=3,
        image_size=(8, 8),
        channels=1,
        head_zero=False,
        # Dropless: then an image's result cannot depend on the batch that it is in.
        moe=MoEConfig(num_experts=3, router=TopK(k=2, capacity_factor=None), images_per_group=2),
    )
    return vit.VisionTransformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 8, 8, 1), np.uint8), rng.integers(0, 3, IMAGES).astype(np.int32)


def batches(images, labels, size):
    """Cuts into batches; the last is filled with garbage that is masked."""
    for start in range(0, IMAGES, size):
        image, label = images[start : start + size], labels[start : start + size]
        missing = size - len(image)
        yield {
            "image": np.concatenate([image, np.full((missing, 8, 8, 1), 77, np.uint8)]),
            "label": np.concatenate([label, np.zeros(missing, np.int32)]),
            "mask": np.arange(size) < len(image),
        }


def test_each_image_counts_once_whatever_the_batch_size(model, data):
    images, labels = data
    logits = np.asarray(model(jnp.asarray(images, jnp.float32) / 127.5 - 1).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for size in (4, 5, 13):
        result = evaluate(model, batches(images, labels, size), "softmax")
        assert result.images == IMAGES
        assert result.accuracy == pytest.approx((logits.argmax(-1) == labels).mean())
        assert result.loss == pytest.approx(-log_p[np.arange(IMAGES), labels].mean(), rel=1e-5)
        assert result.dropped_tokens == 0
        np.testing.assert_allclose(sum(result.expert_load["1"]), 1, rtol=1e-5)


def test_garbage_in_masked_images_changes_nothing(model, data):
    images, labels = data
    one = list(batches(images, labels, 8))
    other = [dict(batch) for batch in one]
    other[-1] = {**other[-1], "image": np.where(other[-1]["mask"][:, None, None, None], other[-1]["image"], 200)}
    other[-1]["image"] = other[-1]["image"].astype(np.uint8)
    assert evaluate(model, one, "softmax") == evaluate(model, other, "softmax")


def test_an_ensemble_is_judged_by_the_mean_of_its_members(model, data):
    images, labels = data
    moe = dataclasses.replace(model.config.moe, num_experts=4, router=TopK(k=1, capacity_factor=None), members=2)
    both = vit.VisionTransformer(dataclasses.replace(model.config, moe=moe), rngs=nnx.Rngs(1))
    kernel = both.blocks[1].moe.experts.w_out
    kernel[...] = 4 * jax.random.normal(jax.random.key(0), kernel.shape)  # members that disagree
    logits = np.asarray(both(jnp.asarray(images, jnp.float32) / 127.5 - 1).logits, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = p.reshape(IMAGES, 2, 3).mean(axis=1)
    result = evaluate(both, batches(images, labels, 5))
    assert result.images == IMAGES
    assert result.accuracy == pytest.approx((p.argmax(-1) == labels).mean())
    assert result.loss == pytest.approx(-np.log(p[np.arange(IMAGES), labels]).mean(), rel=1e-4)


def test_no_image_is_an_error(model):
    with pytest.raises(ValueError, match="There is no image to evaluate on"):
        evaluate(model, [])


def test_results_are_plain_data(model, data):
    result = evaluate(model, batches(*data, 13), "softmax").to_json()
    assert all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(result))
