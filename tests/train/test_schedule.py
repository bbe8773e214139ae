import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.errors import UserError
from jmoe.train.schedule import Constant, Cosine, Exponential, Linear, Polynomial, Rsqrt

DECAYS = [Linear(), Polynomial(), Cosine(), Rsqrt(), Exponential(), Constant()]


def test_linear_by_hand():
    learning_rate = Linear(end_lr=0.1)(peak_lr=0.5, warmup_steps=2, total_steps=6)
    rates = [float(learning_rate(t)) for t in range(8)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1], rtol=1e-6)


def test_polynomial_by_hand():
    learning_rate = Polynomial(end_lr=0.1, power=2.0)(peak_lr=0.5, warmup_steps=2, total_steps=6)
    left = np.array([1, 0.75, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose([float(learning_rate(t)) for t in range(2, 8)], 0.1 + 0.4 * left**2, rtol=1e-6)


def test_exponential_by_hand():
    decay = Exponential(factor=0.25, steps=2, begin=3, end_lr=0.1)
    learning_rate = decay(peak_lr=0.8, warmup_steps=1, total_steps=7)
    rates = [0, 0.8, 0.8, 0.8, 0.8, 0.4, 0.2, 0.1, 0.1]  # 0.1 is the bound
    np.testing.assert_allclose([float(learning_rate(t)) for t in range(9)], rates, rtol=1e-6)
    stairs = dataclasses.replace(decay, staircase=True, factor=2.0, end_lr=1.2)
    learning_rate = stairs(peak_lr=0.4, warmup_steps=1, total_steps=7)
    rates = [0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.8, 0.8, 1.2]
    np.testing.assert_allclose([float(learning_rate(t)) for t in range(9)], rates, rtol=1e-6)


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


def test_after_its_cooldown_rsqrt_stays_at_zero_or_goes_on_as_published():
    options = {"peak_lr": 1.0, "warmup_steps": 3, "total_steps": 31}
    stays, goes_on = (Rsqrt(timescale=7, cooldown_steps=5, stop_at_zero=stop)(**options) for stop in (True, False))
    assert [float(stays(t)) for t in (31, 36)] == [0, 0]
    np.testing.assert_allclose(goes_on(36), -stays(26), rtol=1e-6)
    np.testing.assert_allclose(goes_on(29), stays(29), rtol=1e-6)


@pytest.mark.parametrize("decay", DECAYS, ids=repr)
def test_every_schedule_warms_up_from_zero_to_the_peak(decay):
    learning_rate = decay(peak_lr=0.3, warmup_steps=3, total_steps=17)
    np.testing.assert_allclose([float(learning_rate(t)) for t in range(4)], [0, 0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize("decay", DECAYS, ids=repr)
def test_a_warmup_as_long_as_the_run_is_refused(decay):
    with pytest.raises(UserError, match="warmup_steps=10 must be at least 0 and less than the 10 steps of the run"):
        decay(peak_lr=0.3, warmup_steps=10, total_steps=10)


def test_a_cooldown_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="make cooldown_steps at most 7"):
        Rsqrt(cooldown_steps=8)(peak_lr=0.3, warmup_steps=3, total_steps=10)


@pytest.mark.parametrize(
    ("decay", "options", "message"),
    [
        (Polynomial, {"power": 0.0}, "Polynomial wants a power above 0; it got 0.0."),
        (
            Exponential,
            {"factor": -0.5},
            "Exponential wants a factor above 0, steps of at least 1 and begin of at least 0; it got -0.5, 10000 and",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(decay, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        decay(**options)


def test_late_steps_of_a_long_run_keep_their_precision():
    learning_rate = Linear(end_lr=0.0)(peak_lr=1.0, warmup_steps=10_000, total_steps=20_000_000)
    np.testing.assert_allclose(learning_rate(jnp.int32(19_999_990)), 10 / 19_990_000, rtol=1e-6)
