import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.errors import UserError
from jmoe.train.schedule import Constant, Cosine, Linear, Rsqrt

GOLDEN = pathlib.Path(__file__).parent.parent / "goldens" / "optim_schedules.npz"  # its "config" names its origin


def recorded():
    """(id, our decay, its arguments, recorded rates) of every published schedule that we have."""
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for entry in json.loads(str(golden["config"]))["schedules"]:
            old = entry["kwargs"]
            decay = {
                "warmup_linear_decay": lambda k: Linear(end_lr=k["end_value"]),
                "warmup_cosine_decay": lambda k: Cosine(end_lr=k["end_value"]),
                "big_vision_rsqrt": lambda k: Rsqrt(
                    timescale=k["timescale"], cooldown_steps=k.get("cooldown_steps", 0)
                ),
                "constant": lambda k: Constant(),
            }.get(old["schedule"])
            if decay is None:  # polynomial and exponential decay: no published recipe uses them
                continue
            arguments = {
                "peak_lr": old.get("peak_value", old.get("value")),
                "warmup_steps": old.get("warmup_steps", 0),
                "total_steps": old.get("decay_steps", entry["total_steps"]),
            }
            yield entry["id"], decay(old), arguments, golden[f"{entry['id']}/values"]


CASES = list(recorded())


def test_the_table_of_recorded_schedules_is_complete():
    assert [case[0] for case in CASES] == ["s0", "s1", "s4", "s5", "s6", "s7", "s8", "s9"]


@pytest.mark.parametrize(
    ("name", "decay", "arguments", "expected"), CASES, ids=lambda c: c if isinstance(c, str) else ""
)
def test_schedule_is_the_published_one_at_every_step(name, decay, arguments, expected):
    learning_rate = jax.jit(jax.vmap(decay(**arguments)))
    actual = learning_rate(jnp.arange(len(expected)))
    assert actual.dtype == jnp.float32
    # The recorded cool-down goes on below zero after the last step; ours stays there.
    np.testing.assert_allclose(actual, np.maximum(expected, 0), rtol=2e-5, atol=1e-12)


def test_linear_by_hand():
    learning_rate = Linear(end_lr=0.1)(peak_lr=0.5, warmup_steps=2, total_steps=6)
    rates = [float(learning_rate(t)) for t in range(8)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1], rtol=1e-6)


def test_cosine_is_half_way_down_in_the_middle():
    learning_rate = Cosine(end_lr=0.1)(peak_lr=0.5, warmup_steps=3, total_steps=13)
    np.testing.assert_allclose(learning_rate(8), 0.3, rtol=1e-6)


def test_rsqrt_has_fallen_by_sqrt_2_after_the_timescale_and_reaches_zero_at_the_end():
    learning_rate = Rsqrt(timescale=7, cooldown_steps=5)(peak_lr=1.0, warmup_steps=3, total_steps=31)
    np.testing.assert_allclose(learning_rate(3 + 7), 1 / math.sqrt(2), rtol=1e-6)
    before = float(learning_rate(26))
    np.testing.assert_allclose(
        [float(learning_rate(26 + t)) / before for t in range(6)], [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6
    )


@pytest.mark.parametrize("decay", [Linear(), Cosine(), Rsqrt(), Constant()], ids=repr)
def test_every_schedule_warms_up_from_zero_to_the_peak(decay):
    learning_rate = decay(peak_lr=0.3, warmup_steps=3, total_steps=17)
    np.testing.assert_allclose([float(learning_rate(t)) for t in range(4)], [0, 0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize("decay", [Linear(), Cosine(), Rsqrt(), Constant()], ids=repr)
def test_a_warmup_as_long_as_the_run_is_refused(decay):
    with pytest.raises(UserError, match="warmup_steps=10 must be at least 0 and less than the 10 steps of the run"):
        decay(peak_lr=0.3, warmup_steps=10, total_steps=10)


def test_a_cooldown_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="make cooldown_steps at most 7"):
        Rsqrt(cooldown_steps=8)(peak_lr=0.3, warmup_steps=3, total_steps=10)


def test_late_steps_of_a_long_run_keep_their_precision():
    learning_rate = Linear(end_lr=0.0)(peak_lr=1.0, warmup_steps=10_000, total_steps=20_000_000)
    np.testing.assert_allclose(learning_rate(jnp.int32(19_999_990)), 10 / 19_990_000, rtol=1e-6)
