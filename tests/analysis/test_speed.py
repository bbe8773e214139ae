import pytest

from jmoe.analysis.speed import CASES, time_layer


@pytest.mark.slow
def test_the_sparse_layer_costs_little_more_than_a_dense_one():
    times = time_layer(CASES["S/32"], ("gather", "einsum"), runs=20)
    print(times)
    assert times.ratios["gather"] <= 1.35
    assert times.ratios["gather"] < times.ratios["einsum"]
