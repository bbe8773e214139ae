"""Learning-rate schedules: a linear warm-up from zero, then a decay that is one of the dataclasses below.

A decay is called with what the optimizer knows, and returns a function of the step, as optax has them:

    Cosine(end_lr=1e-5)(peak_lr=3e-3, warmup_steps=500, total_steps=10_000)(step)  # -> learning rate, float32

Steps count from 0: step t of a run of `total_steps` uses the rate at t, so the very first one is 0 if there is a
warm-up. `total_steps` includes the warm-up.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmoe.errors import UserError

LearningRate = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak rate from the end of the warm-up on."""

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        return _with_warmup(lambda t: peak_lr, peak_lr, warmup_steps, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to `end_lr` at the last step.

    Attributes:
      end_lr: the rate at `total_steps` and after; 1e-5 in every recipe of V-MoE (arXiv:2106.05974).
    """

    end_lr: float = 1e-5

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        def decay(t):
            return self.end_lr + (peak_lr - self.end_lr) * _left(t, total_steps - warmup_steps)

        return _with_warmup(decay, peak_lr, warmup_steps, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial:
    """From the peak to `end_lr` at the last step by a power of the share of steps still to come; `Linear` is power 1.

    Attributes:
      end_lr: the rate at `total_steps` and after.
      power: above 1 the rate falls fast at first, below 1 at the end.
    """

    end_lr: float = 1e-5
    power: float = 2.0

    def __post_init__(self):
        if not self.power > 0:
            raise ValueError(f"Polynomial wants a power above 0; it got {self.power}.")

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        def decay(t):
            return self.end_lr + (peak_lr - self.end_lr) * _left(t, total_steps - warmup_steps) ** self.power

        return _with_warmup(decay, peak_lr, warmup_steps, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential:
    """The peak times factor^(t / steps), t steps after the warm-up, whatever the length of the run.

    Attributes:
      factor: what `steps` steps multiply the rate by.
      steps: see above.
      begin: steps after the warm-up in which the rate stays at the peak; t counts from there.
      staircase: whether t / steps is rounded down, so that the rate falls once in so many steps.
      end_lr: a bound of the rate, from below if it falls (factor < 1) and from above if it rises; None for no bound.
    """

    factor: float = 0.5
    steps: int = 10_000
    begin: int = 0
    staircase: bool = False
    end_lr: float | None = None

    def __post_init__(self):
        if not self.factor > 0 or self.steps < 1 or self.begin < 0:
            raise ValueError(
                f"Exponential wants a factor above 0, steps of at least 1 and begin of at least 0; it got "
                f"{self.factor}, {self.steps} and {self.begin}."
            )

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        def decay(t):
            exponent = jnp.maximum(t - self.begin, 0) / self.steps
            rate = peak_lr * self.factor ** (jnp.floor(exponent) if self.staircase else exponent)
            if self.end_lr is None:
                return rate
            return jnp.maximum(rate, self.end_lr) if self.factor < 1 else jnp.minimum(rate, self.end_lr)

        return _with_warmup(decay, peak_lr, warmup_steps, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to `end_lr` at the last step.

    Attributes:
      end_lr: the rate at `total_steps` and after; 1e-5 in the fine-tuning recipes of V-MoE (arXiv:2106.05974).
    """

    end_lr: float = 1e-5

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        def decay(t):
            cosine = 0.5 * (1 - jnp.cos(jnp.pi * _left(t, total_steps - warmup_steps)))
            return self.end_lr + (peak_lr - self.end_lr) * cosine

        return _with_warmup(decay, peak_lr, warmup_steps, total_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rsqrt:
    """The peak divided by sqrt(1 + t / timescale), t steps after the warm-up, and a linear cool-down to zero.

    The schedule of "Scaling Vision Transformers" (arXiv:2106.04560, section 3.5) and of Soft MoE (arXiv:2308.00951).

    Attributes:
      timescale: steps after which the rate has fallen to 1/sqrt(2) of the peak.
      cooldown_steps: over that many last steps the rate goes to zero in a straight line, from where it was.
      stop_at_zero: whether it stays there after the last step. The reference goes on down the line to negative rates,
        on which no published number depends, as a run ends at zero; False does that too.
    """

    timescale: int = 10_000
    cooldown_steps: int = 0
    stop_at_zero: bool = True

    def __call__(self, *, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
        if self.timescale < 1 or not 0 <= self.cooldown_steps <= total_steps - warmup_steps:
            raise UserError(
                f"Rsqrt needs timescale >= 1 and a cool-down that fits after the warm-up, but timescale="
                f"{self.timescale} and cooldown_steps={self.cooldown_steps} for {total_steps} steps with "
                f"warmup_steps={warmup_steps}; make cooldown_steps at most {max(total_steps - warmup_steps, 0)}."
            )
        cooldown_start = (
            total_steps - warmup_steps - self.cooldown_steps
        )  # counted from the end of the warm-up, as t is

        def decay(t):
            if not self.cooldown_steps:
                return peak_lr / jnp.sqrt(1 + t / self.timescale)
            rate = peak_lr / jnp.sqrt(1 + jnp.minimum(t, cooldown_start) / self.timescale)
            left = jnp.minimum((total_steps - warmup_steps - t) / self.cooldown_steps, 1)
            return rate * (jnp.maximum(left, 0) if self.stop_at_zero else left)

        return _with_warmup(decay, peak_lr, warmup_steps, total_steps)


Decay = Linear | Polynomial | Cosine | Rsqrt | Exponential | Constant


def _left(t: jax.Array, steps: int) -> jax.Array:
    """The fraction of the decay still to come after t of its steps; not 1 - t/steps, which is coarse near the end."""
    return jnp.maximum(steps - t, 0) / steps


def _with_warmup(decay: Callable, peak_lr: float, warmup_steps: int, total_steps: int) -> LearningRate:
    """Puts peak_lr * step / warmup_steps before decay(steps since the warm-up)."""
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} must be at least 0 and less than the {total_steps} steps of the run; "
            "warm up over fewer steps (optimizer.warmup_steps) or train for longer."
        )

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warmup = peak_lr * step / max(warmup_steps, 1)
        # The decay is not defined before its start (a square root of a negative number), hence the maximum.
        after = decay(jnp.maximum(step - warmup_steps, 0))
        return jnp.where(step < warmup_steps, warmup, after).astype(jnp.float32)

    return learning_rate
