import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.nn.block import Block
from jmoe.nn.moe import MoEConfig
from jmoe.routing import TopK
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

B, T, D, F, HEADS = 2, 5, 6, 7, 3
SPARSE = MoEConfig(num_experts=4, hidden_dim=F, router=TopK(k=1, capacity_factor=0.5, multiple=1), images_per_group=1)


def make(**options):
    return drawn(functools.partial(Block, D, HEADS, F, **options))


@nnx.jit
def apply(block, x, mask=None, key=None):
    return block(x, mask=mask, key=key)


def test_a_dense_block_adds_attention_and_then_the_perceptron():
    block, x = make(), normal(B, T, D)
    y, sparse = apply(block, x)
    assert sparse is None
    middle = x + block.attention(block.norm_1(x), deterministic=True)
    np.testing.assert_allclose(y, middle + block.mlp(block.norm_2(middle)), **tolerance(jnp.float32, 10))


def test_a_dropped_token_keeps_its_residual_stream():
    block, x = make(moe=SPARSE), normal(B, T, D)
    y, sparse = apply(block, x)
    middle = x + block.attention(block.norm_1(x), deterministic=True)
    np.testing.assert_allclose(y, middle + sparse.y, **tolerance(jnp.float32, 10))
    dropped = np.asarray(sparse.decision.slot >= sparse.decision.capacity).reshape(B, T)
    assert dropped.any()
    assert not dropped.all()
    np.testing.assert_allclose(y[dropped], middle[dropped], **tolerance(jnp.float32, 10))


def test_dropout_is_on_only_with_a_key():
    block, x = make(dropout=0.5), normal(B, T, D)
    np.testing.assert_array_equal(apply(block, x)[0], apply(make(), x)[0])
    first, same, other = (apply(block, x, key=jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other, atol=1e-2)


def test_the_mask_reaches_the_sparse_layer():
    mask = jnp.arange(B)[:, None] == jnp.zeros((1, T), jnp.int32)  # the first image is real
    block, x = make(moe=dataclasses.replace(SPARSE, images_per_group=B)), normal(B, T, D)
    y, sparse = apply(block, x, mask)
    assert not np.asarray(sparse.y[1]).any()
    np.testing.assert_allclose(y[0], apply(block, x.at[1].set(3.0), mask)[0][0], **tolerance(jnp.float32, 10))
