import pytest

from jmoe.analysis.hlo import executed, parse, trip_count

LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=4

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[8]{0} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %copied = s32[] copy(%i)
  %next = s32[] add(%copied, %one)
  %kept = s32[] copy(%next)
  %twice = f32[8]{0} add(%v, %v)
  ROOT %again = (s32[], f32[8]{0}) tuple(%kept, %twice)
}

%condition (e: (s32[], f32[8])) -> pred[] {
  %e = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%e), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %two = s32[] constant(2)
  %first = s32[] copy(%two)
  %from = (s32[], f32[8]{0}) tuple(%first, %x)
  %loop = (s32[], f32[8]{0}) while(%from), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def turns(text):
    program = parse(text)
    return trip_count(program, program.computations["main"]["loop"])


def test_a_loop_that_counts_up_to_a_constant_shows_how_often_it_runs():
    assert turns(LOOP) == 5
    assert turns(LOOP.replace("add(%copied, %one)", "add(%one, %copied)")) == 5
    assert turns(LOOP.replace("constant(7)", "constant(1)")) == 0
    assert {o.name: times for o, times in executed(parse(LOOP))}["twice"] == 5


def test_what_the_compiler_says_comes_first():
    said = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert turns(LOOP.replace("body=%body", said)) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constant(1)", "constant(2)"),  # by twos
        ("direction=LT", "direction=NE"),
        ("add(%copied, %one)", "multiply(%copied, %one)"),
        ("add(%copied, %one)", "add(%copied, %copied)"),
        ("%limit = s32[] constant(7)", "%limit = s32[] get-tuple-element(%e), index=0"),  # a limit that is computed
        ("%two = s32[] constant(2)", "%two = s32[] partition-id()"),
    ],
)
def test_another_loop_does_not(old, new):
    assert old in LOOP
    assert turns(LOOP.replace(old, new)) is None
    listed = [(o.opcode, times) for o, times in executed(parse(LOOP.replace(old, new)))]
    assert ("while", 1) in listed


def test_operations_know_their_computation_and_operands():
    program = parse(LOOP)
    (again,) = [operation for operation in program.computations["body"].values() if operation.is_root]
    assert [operand.name for operand in program.operands(again)] == ["kept", "twice"]
    assert program.partitions == 4
