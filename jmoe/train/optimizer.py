"""Optimizers: gradients -> scaled by name -> clipped -> direction -> decayed -> times learning rate -> frozen by name.

The order is that of the published V-MoE trainer (arXiv:2106.05974). In particular the norm that is clipped counts
frozen parameters too, and weight decay is decoupled from the direction but multiplied by the learning rate.

Parameters are chosen by regular expressions, searched for anywhere in their names, such as `experts/` or `kernel$` in
'blocks/5/moe/experts/kernel'. One that matches no parameter is an error, for it is nearly always a misspelling.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from jmoe.errors import UserError
from jmoe.paths import path_names
from jmoe.train.schedule import Decay, LearningRate, Linear

ByName = tuple[tuple[str, float], ...]  # (regular expression, value); the first that matches a name gives its value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What the optimizers below have in common; they differ in the direction of a step.

    Attributes:
      peak_lr: learning rate at the end of the warm-up.
      warmup_steps: steps over which the rate rises linearly from 0.
      decay: what the rate does after the warm-up.
      weight_decay: a number for all parameters, biases and routers included, or pairs (regular expression, number) of
        which the first that matches counts; parameters that none matches are not decayed.
      clip_norm: largest global L2 norm of the gradients; None does not clip.
      clip_value: largest magnitude of each entry of the gradients, instead of clip_norm; None does not clip.
      gradient_scale: pairs (regular expression, factor) for the gradients, before clipping. Adam and Adafactor divide
        it out again: it changes what is clipped, not the learning rate.
      frozen: regular expression of parameters that stay as they are; None trains all.
      trainable: regular expression of the only parameters that do not, instead of frozen; None trains all.
    """

    peak_lr: float
    warmup_steps: int = 0
    decay: Decay = Linear()  # noqa: RUF009, a frozen dataclass
    weight_decay: float | ByName = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    gradient_scale: ByName = ()
    frozen: str | None = None
    trainable: str | None = None

    def __post_init__(self):
        if not self.peak_lr >= 0:
            raise ValueError(f"{type(self).__name__} wants a peak_lr of at least 0; it got {self.peak_lr}.")
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{type(self).__name__} wants a {name} above 0, or None; it got {value}.")
        for one, other in (("clip_norm", "clip_value"), ("frozen", "trainable")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{type(self).__name__} takes {one} or {other}, not both; it got {getattr(self, one)!r} and "
                    f"{getattr(self, other)!r}. Set one of them to None."
                )

    def learning_rate(self, total_steps: int) -> LearningRate:
        """The rate as a function of the step, in [0, total_steps)."""
        return self.decay(peak_lr=self.peak_lr, warmup_steps=self.warmup_steps, total_steps=total_steps)

    def direction(self) -> optax.GradientTransformation:
        """What turns clipped gradients into a direction, before weight decay and learning rate."""
        raise NotImplementedError

    def _clip(self) -> optax.GradientTransformation:
        if self.clip_norm is not None:
            return optax.clip_by_global_norm(self.clip_norm)
        return optax.identity() if self.clip_value is None else optax.clip(self.clip_value)

    def build(self, params, total_steps: int) -> optax.GradientTransformation:
        """The optimizer as optax has it, for parameters with the names of `params` (of which only those are read).

        Raises:
          UserError: a regular expression matches no parameter, or the schedule does not fit the run.
        """
        names = path_names(params)
        factors = _values(self.gradient_scale, names, option="gradient_scale", otherwise=1.0)
        if isinstance(self.weight_decay, int | float):
            decays = [float(self.weight_decay)] * len(names)
        else:
            decays = _values(self.weight_decay, names, option="weight_decay", otherwise=0.0)
        if self.trainable is None:
            frozen = _values(((self.frozen, 1.0),) if self.frozen else (), names, option="frozen", otherwise=0.0)
        else:
            frozen = _values(((self.trainable, 0.0),), names, option="trainable", otherwise=1.0)
        # All six always, so that the optimizer state keeps its names in a checkpoint when an option is changed.
        return optax.named_chain(
            ("scale", _per_leaf(lambda update, _, factor: factor * update if factor != 1 else update, factors)),
            ("clip", self._clip()),
            ("direction", self.direction()),
            ("decay", _per_leaf(lambda update, param, decay: update + decay * param if decay else update, decays)),
            ("learning_rate", optax.scale_by_learning_rate(self.learning_rate(total_steps))),
            ("freeze", _per_leaf(lambda update, _, frozen: jnp.zeros_like(update) if frozen else update, frozen)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    The options beside these are those of every `Optimizer`.

    Attributes:
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: added to the root of the latter.
      mu_dtype: dtype in which the mean of gradients is kept, such as "bfloat16"; None keeps that of the parameters.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: str | None = None

    def direction(self) -> optax.GradientTransformation:
        """Bias-corrected mean of gradients over the root of the mean of their squares."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=_dtype(self.mu_dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum: trace = gradient + momentum * trace.

    The options beside these are those of every `Optimizer`.

    Attributes:
      momentum: 0 is plain gradient descent.
      mu_dtype: dtype in which the trace is kept, such as "bfloat16"; None keeps that of the parameters.
    """

    momentum: float = 0.9
    mu_dtype: str | None = None

    def direction(self) -> optax.GradientTransformation:
        """The trace, or the gradient without momentum."""
        return (
            optax.trace(self.momentum, accumulator_dtype=_dtype(self.mu_dtype)) if self.momentum else optax.identity()
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor with momentum, as in "Scaling Vision Transformers" (arXiv:2106.04560, section 3.4) and V-MoE 15B.

    The options beside these are those of every `Optimizer`.

    Attributes:
      momentum: of the mean of directions, which is not bias-corrected; 0 is none.
      decay_rate: at step t (from 0) the second moment decays by 1 - (t + 1)^-decay_rate, ...
      max_decay: ... but by no more than this.
      min_dim_size_to_factor: the second moment of a parameter is factored over its two largest axes if both have this
        size. Choose it larger than the number of experts to keep a moment for each expert, as was published.
      eps: added to squared gradients.
      mu_dtype: dtype in which the momentum is kept, such as "bfloat16"; None keeps that of the parameters.
    """

    momentum: float = 0.9
    decay_rate: float = 0.8
    max_decay: float = 0.999
    min_dim_size_to_factor: int = 32
    eps: float = 1e-30
    mu_dtype: str | None = None

    def direction(self) -> optax.GradientTransformation:
        """Mean of the gradients divided by their factored root mean square."""

        def decay_rate(step, exponent):
            return jnp.minimum(self.max_decay, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent)

        rms = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            epsilon=self.eps,
            decay_rate_fn=decay_rate,
        )
        if not self.momentum:
            return rms
        return optax.chain(rms, optax.ema(self.momentum, debias=False, accumulator_dtype=_dtype(self.mu_dtype)))


def _values(pairs: ByName, names: Sequence[str], *, option: str, otherwise: float) -> list[float]:
    """The value of the first regular expression found in each name."""
    values = [otherwise] * len(names)
    for pattern, value in reversed(pairs):  # so that the first is written last
        try:
            found = [i for i, name in enumerate(names) if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"{option} has {pattern!r}, which is not a regular expression: {error}.") from None
        if not found:
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"{option} has {pattern!r}, which matches no parameter. "
                f"The nearest names are {', '.join(map(repr, nearest))}."
            )
        for i in found:
            values[i] = value
    return values


def _per_leaf(function: Callable, values: Sequence[float]) -> optax.GradientTransformation:
    """Applies function(update, parameter, value) to each leaf with its own value."""

    def update(updates, params):
        leaves, treedef = jax.tree.flatten(updates)
        rows = zip(leaves, jax.tree.leaves(params), values, strict=True)
        return treedef.unflatten([function(update, param, value) for update, param, value in rows])

    return optax.stateless(update)


def _dtype(name: str | None) -> jnp.dtype | None:
    """The dtype of that name."""
    try:
        return None if name is None else jnp.dtype(name)
    except TypeError:
        raise UserError(f"mu_dtype={name!r} is not a dtype; use 'bfloat16', 'float32' or None.") from None
