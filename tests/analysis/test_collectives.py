"""Groups, bytes and least times are worked out by hand; the compiler's own programs are read for small functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.analysis.bound import CHIPS, Chip, bound, matmul_flops, repeated
from jmoe.analysis.collectives import KINDS, axes_of, collectives, groups_of, least_seconds, traffic
from jmoe.analysis.hlo import executed, parse
from jmoe.parallel import topology_devices
from jmoe.parallel.topology import compiling_for

CHIP = Chip(clock=1000.0, flops=1e6, bandwidth=100.0, memory=1.0, ici=40.0, directions=2)  # 10 bytes/s and link
FLAT = tuple((i % 4, i // 4, 0) for i in range(16))  # of a slice of 4x4, row by row


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}", ((3, 2), (1, 0))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),  # the major part of an axis
        ("mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),  # the minor part
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_groups_are_read_in_every_form_in_which_they_are_written(written, groups):
    line = f"  %a = f32[4]{{0}} all-reduce(%b), channel_id=1, replica_groups={written}, to_apply=%add"
    assert groups_of(line, 8) == groups


def test_groups_of_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="Replica groups of unknown form: %a = all-reduce"):
        groups_of("%a = all-reduce(%b), replica_groups=<new>", 8)


def test_axes_are_those_along_which_a_group_differs():
    mesh = {"data": 2, "expert": 3, "model": 4}
    assert axes_of(((0, 4, 8), (12, 16, 20)), mesh) == ("expert",)
    assert axes_of(((0, 1, 2, 3),), mesh) == ("model",)
    assert axes_of(((0, 1), (2, 3)), mesh) == ("model",)  # halves of an axis
    assert axes_of((tuple(range(24)),), mesh) == ("data", "expert", "model")
    assert axes_of(((0,), (1,)), mesh) == ()


PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} all-to-all(%w), channel_id=4, replica_groups=[4,4]<=[16], dimensions={0}
}

%reduce-scatter (r: f32[64]) -> f32[16] {
  %r = f32[64]{0} parameter(0)
  %whole = f32[64]{0} all-reduce(%r), channel_id=5, replica_groups=[4,4]<=[16], to_apply=%add
  %mine = s32[] constant(0)
  ROOT %part = f32[16]{0} dynamic-slice(%whole, %mine), dynamic_slice_sizes={16}
}

%start (s: f32[4]) -> (f32[4], f32[16]) {
  %s = f32[4]{0} parameter(0)
  %gather.1 = f32[16]{0} all-gather(%s), channel_id=6, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  ROOT %begun = (f32[4]{0}, f32[16]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (t: f32[4]) -> f32[16] {
  %t = f32[4]{0} parameter(0)
  ROOT %gather.2 = f32[16]{0} all-gather(%t), channel_id=6, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

%done (d: f32[4]) -> f32[16] {
  %d = f32[4]{0} parameter(0)
  %gather.3 = f32[16]{0} all-gather(%d), channel_id=6, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  ROOT %ended = f32[16]{0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (c: (s32[], f32[16])) -> (s32[], f32[16]) {
  %c = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[16]{0} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sums = f32[16]{0} all-reduce(%v), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), to_apply=%add
  %part.1 = f32[4]{0} dynamic-slice(%sums, %one), dynamic_slice_sizes={4}
  %new = f32[16]{0} concatenate(%part.1, %part.1, %part.1, %part.1), dimensions={0}
  ROOT %again = (s32[], f32[16]{0}) tuple(%next, %new)
}

%condition (e: (s32[], f32[16])) -> pred[] {
  %e = (s32[], f32[16]{0}) parameter(0)
  %j = s32[] get-tuple-element(%e), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: f32[4], y: f32[64], z: f32[8]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %z = f32[8]{0} parameter(2)
  %gs = (f32[4]{0}, f32[16]{0}) fusion(%x), kind=kCustom, calls=%start
  %work = f32[16]{0} fusion(%x), kind=kOutput, calls=%step, backend_config={"estimated_cycles":"100"}
  %gd = f32[16]{0} fusion(%x), kind=kCustom, calls=%done
  %rs = f32[16]{0} fusion(%y), kind=kCustom, calls=%reduce-scatter
  %ps = (f32[8]{0}, f32[8]{0}) collective-permute-start(%z), channel_id=3, source_target_pairs={{0,1},{1,0},{2,2}}
  %more = f32[16]{0} fusion(%x), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"2000"}
  %pd = f32[8]{0} collective-permute-done(%ps)
  %as = ((f32[8]{0}), f32[8]{0}) async-start(%z), calls=%wrapped
  %ad = f32[8]{0} async-done(%as)
  %zero = s32[] constant(2)
  %from = (s32[], f32[16]{0}) tuple(%zero, %gd)
  %loop = (s32[], f32[16]{0}) while(%from), condition=%condition, body=%body
  ROOT %result = f32[16]{0} get-tuple-element(%loop), index=1
}
"""


def test_every_exchange_is_listed_once_with_its_bytes_and_how_often_it_runs():
    found = {one.name: (one.kind, one.bytes, one.times) for one in collectives(parse(PROGRAM))}
    assert found == {
        "gather.1": ("all-gather", 64, 1),  # three fusions are one exchange; 4 chips with 4 numbers of 4 bytes
        "whole": ("reduce-scatter", 256, 1),  # an all-reduce of which each chip keeps its part
        "ps": ("collective-permute", 32, 1),
        "inner": ("all-to-all", 32, 1),
        "sums": ("all-reduce", 64, 3),  # from 2 to below 5
    }
    between = {one.name: [o.name for o in one.between] for one in collectives(parse(PROGRAM))}
    assert between == {"gather.1": ["work"], "whole": [], "ps": ["more"], "inner": [], "sums": []}


def test_what_a_chip_must_send_goes_by_kind_and_size_of_the_group():
    sent = {one.name: one.sent for one in collectives(parse(PROGRAM))}
    assert sent == {"gather.1": 48, "whole": 192, "ps": 32, "inner": 24, "sums": 96}


def test_what_the_program_does_meanwhile_is_not_waited_for():
    found = bound(PROGRAM, CHIP, mesh={"data": 4, "expert": 4})
    rows = {(row.kind, *row.axes): row for row in found.traffic}
    assert rows["all-gather", "data"].seconds == pytest.approx(48 / 40)
    assert rows["all-gather", "data"].exposed == pytest.approx(48 / 40 - 100 / 1000)
    assert rows["collective-permute", "expert"].exposed == 0.0  # 0.8 s behind 2 s of work
    assert rows["all-reduce", "data"].exposed == pytest.approx(3 * 96 / 40)
    assert (rows["all-reduce", "data"].count, rows["all-reduce", "data"].bytes) == (3, 192)
    assert found.collectives == pytest.approx(1.1 + 192 / 40 + 24 / 40 + 3 * 96 / 40)
    assert found.seconds == pytest.approx(found.compiler + found.collectives)
    assert found.uncounted == {}


def only(kind, groups, bytes_=1600):
    pairs = kind == "collective-permute"
    written = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    where = f"source_target_pairs={written}" if pairs else f"replica_groups={written}"
    n = 1 if kind != "all-gather" else len(groups[0])
    program = f"""HloModule m, num_partitions=16

ENTRY %main (x: u8[{bytes_ // n}]) -> u8[{bytes_}] {{
  %x = u8[{bytes_ // n}]{{0}} parameter(0)
  ROOT %c = u8[{bytes_}]{{0}} {kind}(%x), {where}
}}
"""
    (found,) = collectives(parse(program))
    assert found.bytes == bytes_
    return found


ROWS = tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4))
ALL = (tuple(range(16)),)


@pytest.mark.parametrize(
    ("kind", "groups", "seconds"),
    [
        # Half of what 8 chips send crosses the middle, over 4 links of 10 bytes/s: nothing wraps.
        ("all-to-all", ALL, 8 * 1600 / 2 / 40),
        # Within a row, two chips send half of 1600 bytes over one link.
        ("all-to-all", ROWS, 2 * 1600 / 2 / 10),
        # What the other three have must reach the chip at the end of each row, over one link; the reverse is as long.
        ("all-gather", ROWS, 1600 * 3 / 4 / 10),
        ("reduce-scatter", ROWS, 1600 * 3 / 4 / 10),
        # All links together: the slice has 48, each counted at both of its ends.
        ("all-reduce", ALL, 2 * 15 / 16 * 1600 * 16 / (48 * 10)),
        ("all-reduce", ROWS, 1600 / 10),
        # One chip sends all to the next over its two links at most; where all of a column do, over one each.
        ("collective-permute", ((0, 1),), 1600 / 20),
        ("collective-permute", ((0, 1), (4, 5), (8, 9), (12, 13)), 1600 / 10),
    ],
)
def test_the_least_time_is_that_of_the_narrowest_place(kind, groups, seconds):
    assert least_seconds(only(kind, groups), CHIP, FLAT) == pytest.approx(seconds)


def test_a_slice_that_wraps_around_has_twice_the_links_across():
    ring = tuple((i, 0, 0) for i in range(16))
    wrapping = tuple((i % 16, i // 16, 0) for i in range(256))
    one = only("all-to-all", ALL)
    assert least_seconds(one, CHIP, ring) == pytest.approx(8 * 1600 / 2 / 20)
    row = tuple(tuple(range(i, i + 16)) for i in range(0, 256, 16))
    assert least_seconds(only("all-to-all", row), CHIP, wrapping) == pytest.approx(8 * 1600 / 2 / 20)
    assert CHIPS["v5p"].wraps((4, 4, 8)) == (True, True, True)
    assert CHIPS["v5p"].wraps((2, 2, 4)) == (False, False, False)


def test_without_coordinates_a_chip_sends_over_all_its_links():
    assert least_seconds(only("all-to-all", ROWS), CHIP) == pytest.approx(1600 * 3 / 4 / 40)
    assert least_seconds(only("all-to-all", ROWS), Chip(clock=1.0, flops=1.0, bandwidth=1.0, memory=1.0)) == 0.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "collective-broadcast"])
@pytest.mark.parametrize("groups", [ROWS, ALL], ids=["rows", "all"])
def test_knowing_the_links_never_makes_an_exchange_faster(kind, groups):
    groups = ((0, 5), (5, 0)) if kind == "collective-permute" else groups
    one = only(kind, groups)
    assert least_seconds(one, CHIP, FLAT) >= least_seconds(one, CHIP) > 0


def program_for(topology, shape, function, *arrays):
    devices = topology_devices(topology)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), ("data", "expert"))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in arrays]
    with compiling_for(mesh):
        compiled = jax.jit(lambda *a: function(mesh, *a)).lower(*shapes).compile()
    program = parse(compiled.as_text())
    chip = CHIPS[topology.partition(":")[0]]
    rows = traffic(collectives(program), chip, dict(mesh.shape), [d.coords for d in mesh.devices.flat])
    return compiled, program, {(row.kind, *row.axes): row for row in rows}


def exchange(mesh, x, w):
    def local(x, w):
        x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        x = jax.lax.psum(x @ jax.lax.all_gather(w, "data", tiled=True), "data")
        return jax.lax.psum_scatter(x, "expert", tiled=True)

    both = P(("data", "expert"))
    return jax.shard_map(local, mesh=mesh, in_specs=(both, P("data")), out_specs=both, check_vma=False)(x, w)


@pytest.mark.parametrize(("topology", "shape"), [("v5e:2x2", (2, 2)), ("v5e:4x4", (2, 8)), ("v5p:2x2x2", (4, 2))])
def test_the_compiler_sends_what_the_program_says(topology, shape):
    data, expert = shape
    rows, D = 64 * expert, 256
    _, program, found = program_for(
        topology,
        shape,
        exchange,
        ((data * expert * rows, D), P(("data", "expert"))),
        ((D, D), P("data")),
    )
    assert program.partitions == data * expert
    assert found["all-to-all", "expert"].bytes == 2 * rows * D
    assert found["all-to-all", "expert"].sent == 2 * rows * D * (expert - 1) / expert
    assert found["all-gather", "data"].bytes == 2 * D * D
    # The sum over data may be taken before or after the parts along expert are dealt out, or both at once.
    reduced = [row for (kind, *_), row in found.items() if kind in ("all-reduce", "reduce-scatter")]
    assert {axis for row in reduced for axis in row.axes} == {"data", "expert"}
    assert all(row.bytes >= 2 * rows * D / expert for row in reduced)


def test_what_loops_do_is_added_to_what_the_compiler_counts_once():
    def tiled(mesh, x, w):
        x = exchange(mesh, x, w)
        return jnp.concatenate([x, x])

    def thrice(mesh, x, w):
        return jax.lax.scan(lambda x, _: (tiled(mesh, x, w), None), x, None, 3)[0]

    arrays = ((512, 256), P(("data", "expert"))), ((256, 256), P("data"))
    once, _, single = program_for("v5e:2x2", (2, 2), tiled, *arrays)
    compiled, program, found = program_for("v5e:2x2", (2, 2), thrice, *arrays)
    matmul = 2 * 128 * 256 * 256
    assert once.cost_analysis()["flops"] == pytest.approx(matmul, rel=0.01)
    assert compiled.cost_analysis()["flops"] == pytest.approx(matmul, rel=0.01)  # the body of the loop once
    assert repeated(program).flops == 2 * matmul
    assert repeated(program).bytes > 2 * 2 * 256 * 256
    assert found["all-to-all", "expert"].bytes == 3 * single["all-to-all", "expert"].bytes


def test_flops_of_loops_are_those_that_the_compiler_counts():
    """Batched products and strided windows are convolutions with padding and dilation, of which few pairs meet."""

    def work(mesh, x, w):
        batched = jnp.einsum("bij,bjk->bik", x, w)
        image = jax.lax.conv_general_dilated(
            batched[..., None],
            w[0][:9, :5].reshape(3, 3, 1, 5),
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return batched, image

    arrays = ((8, 128, 96), P()), ((8, 96, 160), P())
    compiled, program, _ = program_for("v5e:2x2", (2, 2), work, *arrays)
    ours = sum(matmul_flops(operation, program) for operation, _ in executed(program))
    assert ours >= 2 * 8 * 128 * 96 * 160
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)
