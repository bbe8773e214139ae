"""Optimizers and schedules: parameters after each step, by the recorded gradients."""

import functools
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmoe.train.optimizer import SGD, Adafactor, AdamW, Optimizer
from jmoe.train.schedule import Constant, Cosine, Decay, Exponential, Linear, Polynomial, Rsqrt
from tests.goldens.case import Case
from tests.goldens.replays.parts import select, take, with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    return schedules(case.config["schedules"]) if "schedules" in case.config else trajectory(case)


def trajectory(case: Case) -> dict[str, np.ndarray]:
    config, params = case.config, jax.tree.map(jnp.asarray, case.group("params"))
    optimizer, total_steps = optimizer_of(config["optimizer"], config["total_steps"], params)
    transformation = optimizer.build(params, total_steps)
    learning_rate = optimizer.learning_rate(total_steps)

    # Means of gradients in bfloat16 are to be rounded wherever the definition says so, not only where they are stored.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def step(grads, state, params):
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norms = {"grads": grads, "updates": updates, "params": params}
        return state, params, {f"global_norm/{name}": optax.tree.norm(tree) for name, tree in norms.items()}

    state, found, rows = transformation.init(params), {}, []
    for t in range(config["steps"]):
        state, params, row = step(select(case.arrays, f"grads/step{t}/"), state, params)
        found |= with_prefix(f"params_after/step{t + 1}/", params)
        rows.append(row | {"learning_rate_used": learning_rate(t)})
    return jax.device_get(found | jax.tree.map(lambda *values: jnp.stack(values), *rows))


def schedules(recorded: Iterable[dict]) -> dict[str, np.ndarray]:
    found = {}
    for entry in recorded:
        decay, peak_lr, warmup_steps, total_steps = schedule_of(entry["kwargs"], entry["total_steps"])
        learning_rate = decay(peak_lr=peak_lr, warmup_steps=warmup_steps, total_steps=total_steps)
        # How many steps were recorded stands nowhere; they go on past the last one, except for a constant.
        steps = 21 if isinstance(decay, Constant) else entry["total_steps"] + 11
        found[f"{entry['id']}/values"] = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)))
    return found


def optimizer_of(options: dict, total_steps: int, names: Iterable[str]) -> tuple[Optimizer, int]:
    """The reference's options as our optimizer of parameters with these names, and the steps of its schedule."""
    options, names = dict(options), list(names)
    name = options.pop("name")
    clip = take(options.pop("gradient_clip", None) or {}, "global_norm", "absolute_value")
    decay, peak_lr, warmup_steps, total_steps = schedule_of(options.pop("learning_rate"), total_steps)
    weight_decay = options.pop("weight_decay", None) or 0.0
    frozen, trainable = (options.pop(f"{kind}_pattern", None) or () for kind in ("frozen", "trainable"))
    common = {
        "peak_lr": peak_lr,
        "warmup_steps": warmup_steps,
        "decay": decay,
        "weight_decay": float(weight_decay) if isinstance(weight_decay, int | float) else matching(weight_decay, names),
        "clip_norm": clip.get("global_norm") or None,
        "clip_value": clip.get("absolute_value") or None,
        "gradient_scale": matching(options.pop("gradient_scale", None) or (), names),
        "frozen": any_of(frozen, names),
        "trainable": any_of(trainable, names),
    }
    if trainable and common["trainable"] is None:
        common["frozen"] = "."
    if name == "adam":
        return AdamW(**take(options, "b1", "b2", "eps", "mu_dtype"), **common), total_steps
    if name == "sgd":
        kwargs = take(options, "momentum", "accumulator_dtype")
        momentum, dtype = kwargs.get("momentum") or 0.0, kwargs.get("accumulator_dtype")
        return SGD(momentum=momentum, mu_dtype=dtype, **common), total_steps
    if name == "big_vision_adafactor":
        kwargs = take(
            options, "decay_rate", "decay_rate_max", "eps", "min_dim_size_to_factor", "momentum", "momentum_dtype"
        )
        ours = {"decay_rate_max": "max_decay", "momentum_dtype": "mu_dtype"}
        kwargs = {ours.get(key, key): value for key, value in kwargs.items()}
        kwargs["momentum"] = kwargs.get("momentum", 0.9) or 0.0
        return Adafactor(**kwargs, **common), total_steps
    raise ValueError(f"there is no optimizer {name!r} here")


def matching(pairs: Iterable, names: list[str]) -> tuple[tuple[str, float], ...]:
    """The pairs whose regular expression is found in a name: ours refuses others, the reference ignores them."""
    return tuple((regex, float(value)) for regex, value in pairs if any(re.search(regex, name) for name in names))


def any_of(patterns: str | Iterable[str], names: list[str]) -> str | None:
    """One regular expression for those found in a name; None for none."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return "|".join(f"(?:{regex})" for regex, _ in matching([(regex, 1) for regex in patterns], names)) or None


def schedule_of(learning_rate: float | dict, total_steps: int) -> tuple[Decay, float, int, int]:
    """Decay, peak rate, steps of warm-up and of the whole schedule."""
    options = (
        {"schedule": "constant", "value": learning_rate} if isinstance(learning_rate, int | float) else learning_rate
    )
    options = dict(options)
    name = options.pop("schedule")
    peak_lr = float(options.pop("value" if name == "constant" else "peak_value"))
    warmup_steps = options.pop("warmup_steps", 0)
    if name not in ("constant", "warmup_exponential_decay"):
        total_steps = options.pop("decay_steps", None) or total_steps
    match name:
        case "constant":
            decay = Constant(**take(options))
        case "warmup_linear_decay":
            decay = Linear(end_lr=float(take(options, "end_value")["end_value"]))
        case "warmup_polynomial_decay":
            kwargs = take(options, "end_value", "power")
            decay = Polynomial(end_lr=float(kwargs["end_value"]), power=float(kwargs["power"]))
        case "warmup_cosine_decay":
            decay = Cosine(end_lr=float(take(options, "end_value").get("end_value", 0.0)))
        case "warmup_exponential_decay":
            kwargs = take(options, "transition_steps", "decay_rate", "transition_begin", "staircase", "end_value")
            decay = Exponential(
                factor=float(kwargs["decay_rate"]),
                steps=kwargs["transition_steps"],
                begin=kwargs.get("transition_begin", 0),
                staircase=kwargs.get("staircase", False),
                end_lr=kwargs.get("end_value"),
            )
        case "big_vision_rsqrt":
            kwargs = take(options, "timescale", "cooldown_steps")
            decay = Rsqrt(
                timescale=kwargs["timescale"], cooldown_steps=kwargs.get("cooldown_steps", 0), stop_at_zero=False
            )
        case _:
            raise ValueError(f"there is no schedule {name!r} here")
    return decay, peak_lr, warmup_steps, total_steps
