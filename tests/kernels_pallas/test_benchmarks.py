import dataclasses
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from jmoe.routing import expert_capacity
from kernels_pallas import timing
from kernels_pallas.cases import CASES, Case

TINY = Case(name="tiny", width=11, hidden_dim=13, tokens=7, images=3, num_experts=5, k=2, capacity_factor=0.9)
BOUNDS = {"gather_rows": "copy", "combine_rows": "copy", "grouped_matmul": "dense", "expert_mlp": "dense"}


def benchmark(op, *args, **options):
    return importlib.import_module(f"kernels_pallas.{op}.benchmark").benchmark(*args, **options)


@pytest.mark.parametrize("op", kernels_pallas.OPS)
def test_every_op_is_timed_beside_a_bound(op):
    times = benchmark(op, TINY, runs=2)
    assert (times.op, times.case, times.dtype, times.runs) == (op, TINY, "float32", 2)
    assert (times.bound, times.default, times.left_out) == (BOUNDS[op], "xla", {})
    for part in ("forward", "both"):
        assert times.seconds[part].keys() == {BOUNDS[op], "xla"}
        assert times.ratios[part].keys() == {"xla"}
        assert min(*times.seconds[part].values(), *times.ratios[part].values()) > 0


def test_what_is_named_is_timed_in_the_dtype_that_is_named():
    times = benchmark("combine_rows", TINY, ["reference", "xla"], runs=1, dtype="bfloat16")
    assert times.dtype == "bfloat16"
    assert list(times.ratios["both"]) == ["reference", "xla"]


@pytest.mark.parametrize("op", kernels_pallas.OPS)
def test_a_named_implementation_that_cannot_run_here_is_an_error(op):
    with pytest.raises(NotImplementedError, match="cannot run as 'pallas'"):
        benchmark(op, TINY, ["pallas"], runs=1)
    with pytest.raises(NotImplementedError, match=f"{op} has no implementation 'palas'"):
        benchmark(op, TINY, ["palas"], runs=1)


def test_without_names_an_implementation_that_refuses_the_arguments_is_left_out(monkeypatch):
    here = dict.fromkeys(kernels_pallas.OPS, ("pallas", "xla", "reference"))
    monkeypatch.setattr(kernels_pallas, "implementations", lambda: here)
    times = benchmark("gather_rows", TINY, runs=1)
    assert times.ratios["forward"].keys() == {"xla"}
    assert times.default == "xla"
    assert times.left_out.keys() == {"pallas"}
    assert "Pallas kernels are for TPU and CUDA devices." in times.left_out["pallas"]


@pytest.mark.parametrize(
    ("case", "groups", "group_size"),
    [(TINY, 1, 21), (dataclasses.replace(TINY, images=16, num_experts=3, k=3, capacity_factor=0.5), 2, 56)],
)
def test_rows_are_those_of_a_router_whose_experts_have_a_capacity(case, groups, group_size):
    rows, C = case.rows, case.capacity
    G, S, E, K = case.groups, case.group_size, case.num_experts, case.k
    n, m = G * S, E * G * C
    assert groups == G
    assert group_size == S
    assert rows.slots.shape == (n, K)
    assert rows.choice.shape == (m,)
    for place, slot in enumerate(rows.slots.flat):  # the two say the same
        assert slot == m or rows.choice[slot] == place
    for slot, place in enumerate(rows.choice):
        assert place == n * K or rows.slots.flat[place] == slot
    owners = [[slot // (G * C) for slot in token if slot < m] for token in rows.slots]
    assert all(len(set(experts)) == len(experts) for experts in owners)  # a token goes to an expert once
    filled = (rows.choice < n * K).reshape(E, G, C)
    assert (np.diff(filled.astype(int), axis=-1) <= 0).all()  # slots are taken from the first on
    for expert, group in itertools.product(range(E), range(G)):
        taken = rows.choice.reshape(E, G, C)[expert, group][: filled[expert, group].sum()]
        assert ((taken // K) // S == group).all()  # by tokens of the group
        order = [(place % K, place // K) for place in taken]
        assert order == sorted(order)  # first choices first, and then in the order of tokens
    assert filled.sum(axis=(1, 2)).tolist() == rows.group_sizes.tolist()
    assert rows.filled == filled.sum() == sum(map(len, owners))
    assert rows.served == sum(bool(experts) for experts in owners)
    dropped = n * K - rows.filled
    assert dropped > 0  # these capacities are too small for all
    assert filled.all(axis=-1).any()  # and nothing is dropped where there is room


def test_every_choice_of_expert_is_as_likely():
    case = Case(name="large", width=1, hidden_dim=1, tokens=1000, num_experts=5, capacity_factor=2.0)
    assert case.rows.filled == 16_000
    np.testing.assert_allclose(case.rows.group_sizes / 16_000, 1 / 5, atol=0.01)  # three standard deviations


def test_capacities_are_those_of_the_layer():
    for case, E, K in itertools.product(CASES.values(), (8, 32), (1, 2)):
        case = dataclasses.replace(case, num_experts=E, k=K)
        assert case.capacity == expert_capacity(case.group_size * K, E, 1.05)
    assert CASES["B/16"].capacity == 416  # 1576 tokens in a group, as published


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": 0}, "A case wants tokens of at least 1; it got 0."),
        ({"k": 6}, "A token cannot choose k=6 of num_experts=5 experts."),
        ({"capacity_factor": 0.0}, "A case wants a capacity_factor above 0; it got 0.0."),
        (
            {"images": 12},
            "Images are routed in groups of 8, which do not divide 12 images; use fewer than 8, or a multiple.",
        ),
    ],
)
def test_a_case_that_makes_no_sense_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        dataclasses.replace(TINY, **options)


def test_functions_are_timed_in_turn_after_two_calls_of_each():
    called = []
    functions = {name: lambda name=name: called.append(name) or jnp.zeros(()) for name in "ab"}
    times = timing.paired_times(functions, runs=3, calls=2)
    assert "".join(called) == "aabb" + 3 * "aabb"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_pairs_and_not_of_each_alone():
    times = {"a": [1.0, 8.0, 3.0], "b": [2.0, 4.0, 9.0]}
    assert timing.ratio(times, "a", "b") == 0.5  # of 1/2, 8/4, 3/9; the ratio of medians would be 3/4
    assert timing.medians(times) == {"a": 3.0, "b": 4.0}


def test_the_work_with_gradients_is_that_of_value_and_gradients():
    def function(x, y, z):
        return x * jnp.sin(y) + z

    x, y, z, dout = jnp.array([2.0, 3.0]), jnp.array([0.5, 0.7]), jnp.array([1, 2]), jnp.array([1.0, 10.0])
    work, arguments = timing.with_gradients(function, (x, y), (z,), dout)
    result, (dx, dy) = jax.jit(work)(*arguments)
    np.testing.assert_allclose(result, function(x, y, z))
    np.testing.assert_allclose(dx, dout * np.sin(y), rtol=1e-6)
    np.testing.assert_allclose(dy, dout * x * np.cos(y), rtol=1e-6)


def test_a_copy_reads_half_of_the_rows_and_writes_the_other_half():
    work, (x,) = timing.copy_work(7, 3, jnp.bfloat16)
    assert x.shape == work(x).shape == (4, 3)
    assert work(x).dtype == jnp.bfloat16
