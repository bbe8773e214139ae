import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine_rows, gather_rows, target
from kernels_pallas.expert_mlp import expert_mlp, tpu
from kernels_pallas.expert_mlp.op import KERNEL
from tests.aot import CHIPS, WIDTHS, compile_for
from tests.kernels_pallas.index_pairs import index_pair
from tests.kernels_pallas.interpreted import no_races
from tests.tolerance import tolerance

CASES = {  # n tokens, k slots each at most, e experts, c slots each, d and f wide
    "primes": (23, 3, 5, 7, 11, 13),
    "one expert": (5, 1, 1, 3, 2, 17),
    "more experts than rows": (3, 2, 13, 1, 5, 7),
}
every_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
every_implementation = pytest.mark.parametrize("implementation", [*KERNEL.available("cpu"), "reference"])
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
every_activation = pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
every_chip = pytest.mark.parametrize("chip", CHIPS)


def random_case(seed, sizes, dtype):
    """The seven arguments, and the gradient of the result; about a third of the slots are empty."""
    n, k, e, c, d, f = sizes
    rng = np.random.default_rng(seed)
    slots, choice = index_pair(seed, n, k, e * c)
    shapes = [((n, d), 1), ((e, d, f), d**-0.5), ((e, f), 1), ((e, f, d), f**-0.5), ((e, d), 1), ((e * c, d), 1)]
    x, *parameters, dout = (jnp.asarray(rng.normal(size=shape) * scale, dtype) for shape, scale in shapes)
    return (x, jnp.asarray(slots), jnp.asarray(choice), *parameters), dout


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(implementation, activation, arguments, dout):
    call = functools.partial(expert_mlp, activation=activation, implementation=implementation)
    out, back = jax.vjp(call, *arguments)
    return out, back(dout)


def activated(activation, z):
    """activation(z) and its derivative."""
    if activation == "relu":
        return np.maximum(z, 0), (z > 0).astype(float)
    if activation == "silu":
        gate = 1 / (1 + np.exp(-z))
        return z * gate, gate * (1 + z * (1 - gate))
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return z * (1 + np.tanh(inner)) / 2, (1 + np.tanh(inner)) / 2 + z * slope / np.cosh(inner) ** 2 / 2


def oracle(activation, arguments, dout):
    """The result and the gradients in x, w_in, b_in, w_out and b_out: float64, one slot after the other."""
    (x, _, choice, *parameters), (n, k) = arguments, arguments[1].shape
    x, w_in, b_in, w_out, b_out, dout = (np.asarray(a, np.float64) for a in (x, *parameters, dout))
    out, gradients = np.zeros_like(dout), [np.zeros_like(a) for a in (x, w_in, b_in, w_out, b_out)]
    dx, dw_in, db_in, dw_out, db_out = gradients
    c = len(choice) // len(w_in)
    for i, place in enumerate(np.asarray(choice)):
        expert, filled = i // c, 0 <= place < n * k
        row = x[place // k] if filled else np.zeros(x.shape[1])
        hidden, slope = activated(activation, row @ w_in[expert] + b_in[expert])
        out[i] = hidden @ w_out[expert] + b_out[expert]
        dbefore = (w_out[expert] @ dout[i]) * slope
        dw_out[expert] += np.outer(hidden, dout[i])
        db_out[expert] += dout[i]
        dw_in[expert] += np.outer(row, dbefore)
        db_in[expert] += dbefore
        if filled:
            dx[place // k] += w_in[expert] @ dbefore
    return out, gradients


def assert_agrees(implementation, activation, arguments, dout):
    out, (dx, dslots, dchoice, *dparameters) = values_and_gradients(implementation, activation, arguments, dout)
    expected, gradients = oracle(activation, arguments, dout)
    dtype = arguments[0].dtype
    assert dslots.dtype == dchoice.dtype == jax.dtypes.float0
    for actual, right in zip((out, dx, *dparameters), (expected, *gradients), strict=True):
        assert actual.dtype == dtype
        # bfloat16 rounds what is hidden, and its gradient, before they are summed.
        np.testing.assert_allclose(np.asarray(actual, np.float64), right, **tolerance(dtype, 2 * np.abs(right).max()))


@every_implementation
@every_case
@every_dtype
@every_activation
def test_slots_hold_what_their_experts_make_of_their_tokens(implementation, sizes, dtype, activation):
    assert_agrees(implementation, activation, *random_case(0, sizes, dtype))


def unfused(x, slots, choice, w_in, b_in, w_out, b_out, precision=None):
    rows = gather_rows(x, slots, choice).reshape(w_in.shape[0], -1, x.shape[1])
    hidden = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", rows, w_in, precision=precision) + b_in[:, None])
    out = jnp.einsum("ecf,efd->ecd", hidden, w_out, precision=precision) + b_out[:, None]
    return out.reshape(-1, x.shape[1])


@pytest.mark.parametrize("implementation", [*KERNEL.available("cpu"), None, "reference"])
def test_it_is_what_the_ops_it_fuses_make(implementation):
    arguments, dout = random_case(1, CASES["primes"], jnp.float32)
    expected, back = jax.vjp(unfused, *arguments)
    out, gradients = values_and_gradients(implementation, "gelu", arguments, dout)
    for actual, right in zip((out, *gradients), (expected, *back(dout)), strict=True):
        if actual.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(actual, right, **tolerance(jnp.float32, np.abs(right).max()))


@every_implementation
def test_an_empty_slot_is_a_row_of_zeros_that_gives_its_token_no_gradient(implementation):
    arguments, dout = random_case(0, (2, 1, 2, 1, 3, 5), jnp.float32)
    x, _, _, _, b_in, w_out, b_out = arguments
    arguments = (x, jnp.array([[1], [-1]]), jnp.array([2, 0]), *arguments[3:])  # the only filled slot is of expert 1
    out, (dx, *_) = values_and_gradients(implementation, "relu", arguments, dout)
    nothing = np.maximum(b_in[0], 0) @ np.asarray(w_out[0]) + b_out[0]
    np.testing.assert_allclose(out[0], nothing, **tolerance(jnp.float32))
    assert dx[0].any()
    assert not dx[1].any()


@every_implementation
def test_no_tokens_and_no_slots(implementation):
    for n, c in ((0, 3), (3, 0)):
        arguments, dout = random_case(0, (n or 1, 2, 2, c or 1, 3, 5), jnp.float32)
        x, slots, choice, *parameters = arguments
        arguments = (x[:n], slots[:n], choice[: 2 * c], *parameters)
        out, (dx, _, _, *dparameters) = values_and_gradients(implementation, "gelu", arguments, dout[: 2 * c])
        assert (out.shape, dx.shape) == ((2 * c, 3), (n, 3))
        assert not dx.any()
        assert all(bool(gradient.any()) == (c > 0) for gradient in dparameters[1:])  # of b_in, w_out and b_out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_vmap_gives_the_same(implementation):
    cases = [random_case(seed, CASES["primes"], jnp.float32) for seed in range(2)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *cases)
    call = functools.partial(values_and_gradients, implementation, "silu")
    mapped = jax.vmap(call)(*stacked)
    for i, case in enumerate(cases):
        for actual, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(call(*case)), strict=True):
            if actual.dtype != jax.dtypes.float0:
                np.testing.assert_allclose(actual[i], expected, **tolerance(jnp.float32, np.abs(expected).max()))


# Last tiles that are not full, hidden columns in two or three blocks.
INTERPRETED = {
    "two tiles an expert, an odd number of tokens": ((37, 2, 2, 31, 128, 256), tpu.TileConfig(rows=16, columns=128)),
    "one tile an expert, an odd number of tiles": ((20, 1, 3, 7, 256, 384), None),
}


@pytest.mark.parametrize(("sizes", "config"), INTERPRETED.values(), ids=INTERPRETED)
@every_dtype
def test_the_kernel_for_tpu_agrees_and_has_no_race(monkeypatch, sizes, config, dtype):
    arguments, dout = random_case(0, sizes, dtype)
    if config is not None:
        monkeypatch.setattr(tpu, "choose", lambda *_: config)
    with no_races():
        out = expert_mlp(*arguments, implementation="interpret-tpu")
    expected, _ = oracle("gelu", arguments, dout)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, **tolerance(dtype, np.abs(expected).max()))


def test_the_kernel_for_tpu_goes_through_tiles_on_each_of_two_cores_or_on_one(monkeypatch):
    arguments, dout = random_case(0, (20, 1, 3, 7, 128, 128), jnp.float32)
    expected, _ = oracle("relu", arguments, dout)
    for cores in (1, 3):
        monkeypatch.setattr(target, "chip", lambda cores=cores: target.Chip(cores=cores, vector_memory=target.MIB * 16))
        assert tpu._Grid(3, 7, 128, tpu.TileConfig(rows=16, columns=128)).cores == cores
        with no_races():
            out = expert_mlp(*arguments, activation="relu", implementation="interpret-tpu")
        np.testing.assert_allclose(out, expected, **tolerance(jnp.float32, np.abs(expected).max()))


@pytest.mark.slow
@every_dtype
@every_activation
def test_gradients_beside_the_kernel_for_tpu(dtype, activation):
    assert_agrees("interpret-tpu", activation, *random_case(2, (37, 3, 4, 19, 128, 256), dtype))


def shapes(n, e, c, d, f, dtype, k=2):
    index = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n, k), (e * c,))]
    x, *parameters = (jax.ShapeDtypeStruct(s, dtype) for s in ((n, d), (e, d, f), (e, f), (e, f, d), (e, d)))
    return x, *index, *parameters


def hidden_width(d):
    return 6144 if d == 1408 else 4 * d  # as published


pallas = functools.partial(expert_mlp, implementation="pallas")


@every_chip
@pytest.mark.parametrize(("d", "dtype"), [(768, jnp.bfloat16), (1408, jnp.float32)], ids=str)
def test_the_kernel_compiles_for_every_chip(chip, d, dtype):
    compiled = compile_for(chip, pallas, *shapes(301, 2, 136, d, hidden_width(d), dtype))
    assert "jmoe_expert_mlp" in compiled.as_text()


@pytest.mark.slow
@every_chip
@pytest.mark.parametrize("d", WIDTHS)
@every_dtype
def test_the_kernel_compiles_at_the_published_widths_with_any_capacity(chip, d, dtype):
    for c in (136, 416, 1212):  # H/14 with 32 experts, B/16, B/16 at 384 px
        compiled = compile_for(chip, pallas, *shapes(301, 2, c, d, hidden_width(d), dtype))
        assert "jmoe_expert_mlp" in compiled.as_text()


@pytest.mark.slow
@every_dtype
def test_the_kernel_compiles_where_the_chip_is_not_known(dtype, monkeypatch):
    monkeypatch.setattr(target, "device_kind", lambda platform: None)
    for d, c in ((768, 1212), (1280, 548), (1408, 136)):
        compile_for("v4", pallas, *shapes(301, 2, c, d, hidden_width(d), dtype))


def test_nothing_hidden_is_an_array_in_inference():
    n, e, c, d, f = 301, 4, 136, 256, 1024

    def elements(function):
        text = compile_for("v5e", function, *shapes(n, e, c, d, f, jnp.bfloat16)).as_text()
        made = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text)
        return {math.prod(map(int, shape.split(","))) for shape in made}

    assert e * c * f in elements(unfused)  # so that it would be found below
    assert e * c * d in elements(expert_mlp)  # the result
    assert e * c * f not in elements(expert_mlp)


def test_the_cost_of_the_kernel_is_declared():
    n, e, c, d, f = 302, 2, 144, 512, 2048
    cost = compile_for("v5e", pallas, *shapes(n, e, c, d, f, jnp.bfloat16)).cost_analysis()
    products, weights = 4 * e * c * d * f, 2 * e * (2 * d * f + f + d)
    rows = e * c * d * (4 + 2)  # pairs of rows are read, and rows written
    assert products <= cost["flops"] < 1.01 * products
    assert weights + rows <= cost["bytes accessed"] < 1.02 * (weights + rows)
    assert cost["transcendentals"] == e * c * f


@pytest.mark.parametrize(
    ("c", "d", "f", "size", "rows", "columns"),
    [
        (416, 768, 3072, 2, 416, 512),  # B/16: all rows of an expert
        (136, 1280, 5120, 2, 144, 512),  # H/14 with 32 experts: filled up to what bfloat16 packs
        (1212, 768, 3072, 2, 608, 512),  # B/16 at 384 px: two tiles
        (416, 1408, 6144, 4, 208, 256),
        (100, 128, 384, 4, 112, 128),  # what divides f
    ],
)
def test_tiles_are_as_few_as_the_smallest_chip_holds(c, d, f, size, rows, columns):
    assert tpu.choose(c, d, f, size) == tpu.TileConfig(rows=rows, columns=columns)


def stacked(mlp, x, slots, choice, weights, layers):
    for parameters in layers:
        y = mlp(x, slots, choice, *parameters)
        x = x + combine_rows(y, slots, weights, choice, implementation="xla")
    return jnp.sum(x.astype(jnp.float32) ** 2)


def gradient_of_stack(mlp, depth, n, e, c, d, f, dtype, compile_it):
    x, slots, choice, *parameters = shapes(n, e, c, d, f, dtype)
    weights = jax.ShapeDtypeStruct(slots.shape, jnp.float32)
    gradient = jax.grad(functools.partial(stacked, mlp), argnums=(0, 4))
    return compile_it(gradient, x, slots, choice, weights, (tuple(parameters),) * depth)


def test_gradients_of_four_layers_keep_nothing_hidden():
    n, e, c, d, f = 96, 4, 48, 32, 512
    hidden = e * c * f * 4

    def temporaries(mlp):
        compiled = gradient_of_stack(mlp, 4, n, e, c, d, f, jnp.float32, lambda g, *a: jax.jit(g).lower(*a).compile())
        return compiled.memory_analysis().temp_size_in_bytes

    ours, kept = temporaries(functools.partial(expert_mlp, implementation="xla")), temporaries(unfused)
    assert kept > 4 * hidden  # one of each layer at least
    assert ours < 2 * hidden


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", None])
def test_what_a_gradient_computes_again_is_not_merged_with_the_forward_pass(implementation):
    sizes = (1576, 8, 416, 256, 4096, jnp.bfloat16)
    hidden = 8 * 416 * 4096 * 2
    mlp = functools.partial(expert_mlp, implementation=implementation)
    compiled = gradient_of_stack(mlp, 4, *sizes, functools.partial(compile_for, "v5e"))
    kept = gradient_of_stack(unfused, 4, *sizes, functools.partial(compile_for, "v5e"))
    assert kept.memory_analysis().temp_size_in_bytes > 2 * hidden
    assert compiled.memory_analysis().temp_size_in_bytes < hidden


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"b_out": jnp.ones((2, 5))},
            ValueError,
            r"expert_mlp wants x \[n, d\], w_in \[e, d, f\], b_in \[e, f\], w_out \[e, f, d\] and b_out \[e, d\]; "
            r"it got \(3, 7\), \(2, 7, 5\), \(2, 5\), \(2, 5, 7\) and \(2, 5\)\.",
        ),
        ({"w_in": jnp.ones((7, 5))}, ValueError, r"it got \(3, 7\), \(7, 5\), \(2, 5\), \(2, 5, 7\) and \(2, 7\)\."),
        (
            {"choice": jnp.zeros(5, jnp.int32)},
            ValueError,
            r"expert_mlp wants the same number of slots for each expert; it got 5 slots for 2 experts\.",
        ),
        ({"slots": jnp.zeros((3, 2))}, ValueError, r"expert_mlp wants integers in slots; it got float32\."),
        (
            {"b_in": jnp.ones((2, 5), jnp.bfloat16)},
            ValueError,
            r"expert_mlp wants parameters of the dtype of x, float32; it got float32, bfloat16, float32, float32\.",
        ),
        (
            {"activation": "tanh"},
            ValueError,
            r"expert_mlp has no activation 'tanh'; use one of 'gelu', 'relu', 'silu'\.",
        ),
        ({"activation": None}, ValueError, r"expert_mlp has no activation None; use one of 'gelu', 'relu', 'silu'\."),
        (
            {"implementation": "cuda"},
            NotImplementedError,
            r"expert_mlp has no implementation 'cuda'; use one of 'pallas', 'xla', 'reference', or None\.",
        ),
        (
            {"implementation": "pallas"},
            NotImplementedError,
            r"cannot run as 'pallas': The TPU kernel takes widths that are multiples of 128, not d=7 and f=5\.",
        ),
        ({"implementation": "interpret-gpu"}, NotImplementedError, r"expert_mlp: There is no kernel for gpu\."),
    ],
)
def test_what_does_not_fit_is_refused(change, error, sentence):
    arguments = {
        "x": jnp.ones((3, 7)),
        "slots": jnp.zeros((3, 2), jnp.int32),
        "choice": jnp.zeros(4, jnp.int32),
        "w_in": jnp.ones((2, 7, 5)),
        "b_in": jnp.ones((2, 5)),
        "w_out": jnp.ones((2, 5, 7)),
        "b_out": jnp.ones((2, 7)),
    }
    with pytest.raises(error, match=sentence):
        expert_mlp(**arguments | change)


@pytest.mark.parametrize(
    ("sizes", "dtype", "sentence"),
    [
        ((3, 2, 4, 128, 128), jnp.float16, "The TPU kernel takes float32 and bfloat16, not float16."),
        ((3, 2, 4, 96, 128), jnp.float32, "The TPU kernel takes widths that are multiples of 128, not d=96 and f=128."),
        (
            (0, 2, 4, 128, 128),
            jnp.float32,
            "The TPU kernel wants at least one row to read and one to write, not 0 and 8.",
        ),
        (
            (3, 2, 4, 128 * 128, 128),
            jnp.float32,
            "Vector memory does not hold the smallest tile of the TPU kernel at d=16384.",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_said(sizes, dtype, sentence):
    x, _, choice, *parameters = shapes(*sizes, dtype)
    assert tpu.refusal(x, choice, *parameters, activation="gelu") == sentence
