import jax
import jax.numpy as jnp
import pytest

from jmoe.analysis.activations import activations
from jmoe.analysis.hlo import parse, stored
from tests.aot import compile_for

FORWARD, BACKWARD = 'metadata={op_name="jit(step)/jvp()/f"}', 'metadata={op_name="jit(step)/transpose(jvp())/f"}'
# Its backward pass begins at "cotangent". Before it are made, and read after it:
#   hidden, 4 KiB: of two results, where the other is not read again
#   evicted, 2 KiB: a copy from vector memory that begins before and ends after
#   gathered and sent, 1 KiB each: what an exchange brings and what it reads until its end, which begins before
# Not counted are what is given (w), what lies in vector memory (fast), what was read for the last time before (spent),
# and what is made later.
STEP = f"""HloModule jit_step, is_scheduled=true

ENTRY %main (w: f32[1024], x: f32[1024]) -> f32[1024] {{
  %w = f32[1024]{{0:T(1024)}} parameter(0)
  %x = f32[1024]{{0:T(1024)}} parameter(1)
  %spent = f32[4096]{{0:T(1024)}} fusion(%w), {FORWARD}
  %two = (f32[1024]{{0:T(1024)}}, f32[8192]{{0:T(1024)}}) fusion(%w, %spent), {FORWARD}
  %hidden = f32[1024]{{0:T(1024)}} get-tuple-element(%two), index=0
  %other = f32[8192]{{0:T(1024)}} get-tuple-element(%two), index=1
  %seen = f32[1024]{{0:T(1024)}} bitcast(%hidden)
  %fast = f32[512]{{0:T(512)S(1)}} fusion(%other), {FORWARD}
  %evict = (f32[512]{{0:T(512)}}, f32[512]{{0:T(512)S(1)}}, u32[]) copy-start(%fast)
  %sent = f32[256]{{0:T(256)}} fusion(%x), {FORWARD}
  %gather = (f32[256]{{0:T(256)}}, f32[256]{{0:T(256)}}) all-to-all-start(%sent)
  %loss = f32[] fusion(%other, %fast), {FORWARD}
  %cotangent = f32[2048]{{0:T(1024)}} fusion(%w), {BACKWARD}
  %evicted = f32[512]{{0:T(512)}} copy-done(%evict)
  %gathered = f32[256]{{0:T(256)}} all-to-all-done(%gather)
  %pair = (f32[1024]{{0:T(1024)}}, f32[512]{{0:T(512)}}) tuple(%seen, %evicted)
  %kept = (f32[1024]{{0:T(1024)}}, f32[512]{{0:T(512)}}) opt-barrier(%pair)
  %again = f32[1024]{{0:T(1024)}} get-tuple-element(%kept), index=0
  ROOT %gradient = f32[1024]{{0:T(1024)}} fusion(%again, %cotangent, %gathered, %w), {BACKWARD}
}}
"""
KIB = 1024


def test_what_is_made_before_the_backward_pass_and_read_after_it_is_counted():
    assert activations(parse(STEP)) == 4 * KIB + 2 * KIB + KIB + KIB


def test_what_is_read_for_the_last_time_before_is_not():
    nobody_reads = STEP.replace("fusion(%again, %cotangent", "fusion(%w, %cotangent")
    assert activations(parse(nobody_reads)) == 8 * KIB  # the tuple still shows it
    assert activations(parse(nobody_reads.replace("tuple(%seen, %evicted)", "tuple(%w, %evicted)"))) == 4 * KIB


def test_a_few_operations_that_a_scheduler_moved_do_not_move_the_boundary():
    early = f"  %early = f32[8]{{0:T(128)}} fusion(%w), {BACKWARD}\n"
    late = f"  %late = f32[8]{{0:T(128)}} fusion(%w), {FORWARD}\n"
    moved = STEP.replace("  %spent", early + "  %spent").replace("  %evicted =", late + "  %evicted =")
    moved = moved.replace("  ROOT", f"  %more = f32[8]{{0:T(128)}} fusion(%w), {BACKWARD}\n  ROOT")
    assert activations(parse(moved)) == activations(parse(STEP))


def test_a_program_without_a_backward_pass_keeps_nothing():
    assert activations(parse(STEP.replace("transpose(jvp())", "jvp()"))) == 0
    assert activations(parse(STEP.replace("jvp()", ""))) == 0


def test_in_a_loop_it_is_what_each_turn_keeps():
    head, body = STEP.split("\n\n")
    body = body.replace("ENTRY %main", "%body")
    loop = """ENTRY %main (w: f32[1024]) -> f32[1024] {
  %w = f32[1024]{0:T(1024)} parameter(0)
  ROOT %loop = f32[1024]{0:T(1024)} while(%w), condition=%until, body=%body
}
"""
    assert activations(parse(f"{head}\n\n{body}\n{loop}")) == 8 * KIB


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]", 12),
        ("f32[3,5]{0,1}", 60),  # no tiles
        ("bf16[32,50,8,64]{3,1,2,0:T(8,128)(2,1)}", 2 * 32 * 8 * 56 * 128),  # 64 fastest, then 50
        ("f32[5,130]{1,0:T(8,128)}", 4 * 8 * 256),
        ("u8[100]{0:T(1024)(128)(4,1)}", 1024),
        ("f32[4,8]{1,0:T(4,128)S(1)}", 0),  # vector memory
        ("f32[4,8]{1,0:T(4,128)S(0)}", 4 * 4 * 128),
        ("(f32[128]{0:T(128)}, u32[]{:T(128)S(6)}, s32[128]{0:T(128)})", 2 * 512),
    ],
)
def test_arrays_take_whole_tiles(shape, size):
    assert stored(shape) == size


@pytest.mark.parametrize(("again", "kept"), [(False, 5), (True, 2)])
def test_a_compiled_gradient_keeps_what_can_be_worked_out_by_hand(again, kept):
    """Six tanh(x @ w): the inputs of the last five, and with pairs computed again those of the last two pairs."""

    def pair(x, w):
        return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])

    def loss(w, x):
        for i in range(0, 6, 2):
            x = (jax.checkpoint(pair) if again else pair)(x, w[i : i + 2])
        return jnp.sum(x**2)

    # Whole tiles, whichever axis is the fastest; too large for vector memory, beside which the weights are nothing.
    rows, width = 120_320, 256
    weights, x = jax.ShapeDtypeStruct((6, width, width), jnp.float32), jax.ShapeDtypeStruct((rows, width), jnp.float32)
    compiled = compile_for("v5e", jax.grad(loss), weights, x)
    counted = activations(parse(compiled.as_text())) / (4 * rows * width)
    assert counted == pytest.approx(kept, rel=0.02)
    assert counted * 4 * rows * width <= compiled.memory_analysis().temp_size_in_bytes
