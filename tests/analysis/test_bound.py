"""The bound is checked against programs that were written by hand, and against one whose work is known."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.analysis.bound import CHIPS, Bound, Chip, bound
from jmoe.analysis.hlo import array_elements, executed, parse, size
from tests.aot import compile_for

CHIP = Chip(clock=1000.0, flops=1e6, bandwidth=100.0, memory=1.0)
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_gather (p.1: f32[50,4], p.2: s32[10]) -> f32[10,4] {
  %p.1 = f32[50,4]{1,0} parameter(0)
  %p.2 = s32[10]{0} parameter(1)
  ROOT %gather.1 = f32[10,4]{1,0} gather(%p.1, %p.2), offset_dims={1}
}

%body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %add.1 = f32[8]{0} fusion(%s.1), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"20"}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%s.1, %add.1)
}

%condition (s.2: (s32[], f32[8])) -> pred[] {
  %s.2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%other (q.1: f32[8]) -> f32[8] {
  ROOT %q.1 = f32[8]{0} parameter(0)
}

ENTRY %main (x.1: f32[50,4], i.1: s32[10], t.1: (s32[], f32[8])) -> f32[10,4] {
  %x.1 = f32[50,4]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[10]{0} parameter(1)
  %t.1 = (s32[], f32[8]{0}) parameter(2)
  %dot.1 = f32[10,4]{1,0} fusion(%x.1), kind=kOutput, calls=%other, backend_config={"estimated_cycles":"500"}
  %while.1 = (s32[], f32[8]{0}) while(%t.1), condition=%condition, body=%body, backend_config={COUNT}
  %k.1 = f32[10,4]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{COST}}
  %old.1 = f32[8]{0} fusion(%x.1), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %rows.1 = f32[10,4]{1,0} fusion(%x.1, %i.1), kind=kCustom, calls=%fused_gather
}
"""
COUNT = '{"known_trip_count":{"n":"7"}}'
COST = '{"flops":"3000000","transcendentals":"0","bytes_accessed":"50"}'


def program(count=COUNT, cost=COST):
    return PROGRAM.replace("{COUNT}", count).replace("{COST}", cost)


def test_cycles_loops_kernels_and_gathers_add_up():
    found = bound(program(), CHIP)
    assert found.compiler == pytest.approx((500 + 7 * 20) / 1000)
    assert found.kernels == pytest.approx(3.0)  # 3e6 FLOPs at 1e6 per second are more than 50 bytes at 100
    assert found.others == pytest.approx(2 * 10 * 4 * 4 / 100)  # rows of float32, read and written
    assert found.uncounted == {}
    assert found.seconds == pytest.approx(0.64 + 3.0 + 3.2)


def test_a_kernel_of_few_flops_takes_the_time_of_its_bytes():
    cost = '{"flops":"10","transcendentals":"0","bytes_accessed":"50"}'
    assert bound(program(cost=cost), CHIP).kernels == pytest.approx(0.5)


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    found = bound(program(count="{}"), CHIP)
    assert found.compiler == pytest.approx((500 + 20) / 1000)
    assert found.uncounted == {"while": 1}


def test_a_kernel_that_declares_nothing_is_said():
    found = bound(program().replace('"cost_estimate"', '"nothing"'), CHIP)
    assert (found.kernels, found.uncounted) == (0.0, {"kernel": 1})


def test_operations_are_listed_as_often_as_they_run():
    times = {operation.name: times for operation, times in executed(parse(program()))}
    assert times["add.1"] == 7
    assert times["dot.1"] == 1
    assert "q.1" not in times  # inside a fusion


def test_sizes_are_bytes_and_arrays_are_elements():
    assert size("(bf16[3,5]{1,0:T(8,128)(2,1)}, pred[7]{0}, s32[])") == 30 + 7 + 4
    assert max(array_elements(program())) == 200


@pytest.mark.parametrize("chip", CHIPS)
def test_a_matrix_multiply_takes_no_less_than_the_peak_allows(chip):
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
    compiled = compile_for(chip, lambda a, b: a @ b, x, x)
    found = bound(compiled.as_text(), CHIPS[chip])
    least = 2 * 2048**3 / CHIPS[chip].flops
    assert isinstance(found, Bound)
    assert 0.95 * least < found.seconds < 2 * least
