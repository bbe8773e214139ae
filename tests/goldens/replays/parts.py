"""What several replays share: the reference's options and layouts in terms of ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.dispatch import einsum
from jmoe.nn.gate import LinearGate, SlotGate
from jmoe.nn.moe import MoEConfig
from jmoe.routing import Decision, ExpertChoice, Gating, Routing, Soft, TopK, add_noise
from jmoe.routing.capacity import expert_capacity
from jmoe.routing.losses import balance_loss, importance_loss, load_loss
from jmoe.routing.metrics import kept_per_token, similarity
from tests.goldens.case import Case

ROUNDING = {"ceil": "up", "round": "nearest"}


def take(options: dict, *known: str) -> dict:
    """The options that are known; what else is set, and is not None, is an error."""
    unknown = {name: value for name, value in options.items() if name not in known and value is not None}
    if unknown:
        raise ValueError(f"options that no replay knows: {unknown}")
    return {name: options[name] for name in known if name in options}


def capacity_options(options: dict) -> dict:
    """Those of TopK and ExpertChoice; a number of slots instead of a factor is TopK's alone."""
    if options.get("capacity_factor") is None and options.get("capacity"):
        return {"capacity_factor": None, "capacity": options["capacity"]}
    return {
        "capacity_factor": options["capacity_factor"],
        "rounding": ROUNDING[options.get("capacity_ceil_or_round", "ceil")],
        "multiple": options.get("capacity_multiple_of", 4) or 1,
    }


def select(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def with_prefix(prefix: str, arrays: dict) -> dict:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


@jax.custom_jvp
def with_values_of(value: jax.Array, exact: jax.Array) -> jax.Array:
    """The exact values, with the derivative of value: for gates whose last bit decides and is not reproducible."""
    del value
    return exact


@with_values_of.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


# Decisions and what is recorded of them


def sparse_masks(routing: Routing) -> dict[str, jax.Array]:
    """A decision as [G, S, E, C] masks."""
    dispatch, combine = einsum.masks(routing)
    return {"einsum_combine_weights": combine, "einsum_dispatch_weights": dispatch.astype(jnp.uint8)}


def choices(routing: Routing) -> dict[str, jax.Array]:
    """A decision of tokens as [G, S, K] indices; slots of dropped choices are counted on past the capacity."""
    shape = (len(routing.token), routing.group_size, routing.choices)
    expert_slot = jnp.stack([routing.expert, routing.slot], axis=-1).reshape(*shape, 2)
    return {"indices_expert_slot": expert_slot, "indices_combine_weights": routing.weight.reshape(shape)}


def token_choice_losses(gating: Gating, k: int) -> dict[str, jax.Array]:
    """The losses of each group (and member), without weights; the load only where there is noise."""
    _, first = jax.lax.top_k(jax.lax.stop_gradient(gating.gates), 1)
    losses = {
        "importance_loss": importance_loss(gating.clean_gates, gating.mask),
        # The reference's is E times the mean over experts, E^2 * mean(f * P): the same.
        "gshard_loss": balance_loss(gating.gates, first, gating.mask),
    }
    if gating.sigma > 0:
        losses["load_loss"] = load_loss(gating.logits, gating.noisy_logits, k, gating.sigma, gating.mask)
    return losses


def auxiliary_loss(losses: dict[str, jax.Array], options: dict, **defaults: float) -> jax.Array:
    """The weighted sum of each group; options name the weights."""
    total = jnp.zeros_like(losses["importance_loss"])
    for name, loss in losses.items():
        weight = options.get(f"{name}_weight", defaults.get(name, 0.0))
        if weight > 0:
            total += weight * loss
    return total


def expert_choice_metrics(routing: Routing, values: jax.Array | None = None) -> dict[str, jax.Array]:
    """How often tokens were taken, and by which gates, in each group; values of the selected pairs, [G, A]."""
    counts, values = kept_per_token(routing), routing.weight if values is None else values
    E = routing.num_experts
    at_least = sorted({2**i for i in range(E.bit_length())} | {E})
    ratios = {
        f"ratio_processed_items_by_at_least_{t}_experts": jnp.mean(counts >= t, axis=1, dtype=jnp.float32)
        for t in at_least
        if t <= E
    }
    return ratios | {
        "num_experts_per_item_min": jnp.min(counts, axis=1),
        "num_experts_per_item_max": jnp.max(counts, axis=1),
        "min_selected_gate": jnp.min(values, axis=1),
        "max_selected_gate": jnp.max(values, axis=1),
        "auxiliary_loss": jnp.zeros(()),
    }


def soft_metrics(mixing, mu: jax.Array, similarities: bool = True) -> dict[str, jax.Array]:
    """Of a decision of a soft router and its slots mu [D, E, P]."""
    G, S, E, P = mixing.combine.shape
    combine, dispatch = mixing.combine.reshape(G, S, E * P), mixing.dispatch.reshape(G, S, E * P)
    metrics = {
        "auxiliary_loss": jnp.zeros(()),
        "combine_weights_min_mean": jnp.mean(jnp.min(combine, axis=2)),
        "combine_weights_max_mean": jnp.mean(jnp.max(combine, axis=2)),
        "dispatch_weights_min_mean": jnp.mean(jnp.min(dispatch, axis=1)),
        "dispatch_weights_max_mean": jnp.mean(jnp.max(dispatch, axis=1)),
    }
    if similarities:
        vectors = {
            "combine_weights": combine,
            "dispatch_weights": dispatch.swapaxes(1, 2),
            "mu": mu.reshape(1, len(mu), -1).swapaxes(1, 2),
        }
        for name, rows in vectors.items():
            metrics |= with_prefix(f"{name}_similarity_", similarity(rows))
    return metrics


# The order of slots in the reference's buffers


def to_slots(buffer, G: int, C: int):
    """[E, G * C, ...], the published layout, to our [G, E, C, D]; trailing axes become one."""
    E = buffer.shape[0]
    rows = _rows(G, E, C)
    return buffer[:, rows].reshape(E, G, C, -1).swapaxes(0, 1)


def from_slots(slots, shape: tuple[int, ...]):
    """The inverse of to_slots: our [G, E, C, D] in the published layout and shape."""
    G, E, C, _ = slots.shape
    order = np.argsort(_rows(G, E, C), axis=None)
    return slots.swapaxes(0, 1).reshape(E, G * C, -1)[:, order].reshape(shape)


def _rows(G: int, E: int, C: int) -> np.ndarray:
    """[G, C]: where the slots of a group are in the second axis of a buffer."""
    g = np.arange(G)
    if G % E == 0:  # the layout after its exchange between E devices
        h = G // E
        start = (g % h * E + g // h) * C
    else:
        start = g * C
    return start[:, None] + np.arange(C)


# Layers with recorded noise


class RecordedNoise:
    """Makes the gates of a network, and has each add the noise that was recorded for it.

    Called as MoEConfig.gate is, in the order of the blocks; noises None for blocks without.
    """

    def __init__(self, router, members: int, noises: list[np.ndarray | None]):
        self.router, self.members, self.noises = router, members, list(noises)
        self.made = 0

    def __call__(self, D: int, num_experts: int, *, rngs):
        noise = self.noises[self.made % len(self.noises)]
        self.made += 1
        if isinstance(self.router, Soft):
            gate = NoisySlotGate(D, num_experts, slots_per_expert=self.router.slots_per_expert, rngs=rngs)
            gate.sigma = self.router.noise_std
        else:
            gate = NoisyLinearGate(D, num_experts, noise_std=self.router.noise_std, members=self.members, rngs=rngs)
        gate.noise = Hidden(noise)
        return gate


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """Keeps an array from being a part of the module's state."""

    array: np.ndarray | None


def _add_recorded(gate, gating: Gating) -> Gating:
    if gate.noise.array is None:
        return gating
    noise = jnp.asarray(gate.noise.array).reshape(gating.logits.shape)
    return add_noise(gating.logits, noise, gate.sigma, gating.mask, gating.members)


class NoisyLinearGate(LinearGate):
    def __call__(self, tokens, *, mask=None, key=None) -> Gating:
        return _add_recorded(self, super().__call__(tokens, mask=mask))


class NoisySlotGate(SlotGate):
    def __call__(self, tokens, *, mask=None, key=None) -> Gating:
        return _add_recorded(self, super().__call__(tokens, mask=mask))


class Recorder:
    """A loss that is 0, and keeps what it is shown: the gating and the decision of each sparse layer, in order."""

    name = "recorder"

    def __init__(self):
        self.seen: list[tuple[Gating, Decision]] = []

    def __call__(self, gating: Gating, decision: Decision) -> jax.Array:
        self.seen.append((gating, decision))
        return jnp.zeros((), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePart:
    """The sparse layer(s) of a recorded network: our config, and how to write their metrics as recorded."""

    config: MoEConfig
    options: dict  # of the reference's router
    ensemble: bool  # of the reference, be it of one member

    def metrics(self, gating: Gating, decision: Decision, mu: jax.Array | None) -> dict[str, jax.Array]:
        """One value per group (and member), or scalars, as the reference's router reports them."""
        router, M = self.config.router, self.config.members
        if isinstance(router, Soft):
            return soft_metrics(decision, mu, self.options.get("compute_similarity_metrics", True))
        if isinstance(router, ExpertChoice):
            return expert_choice_metrics(decision)
        losses = token_choice_losses(gating, router.k)
        weights = {"importance_loss": 1.0, "load_loss": 1.0}
        if any(self.options.get(f"{name}_weight", weights.get(name, 0.0)) > 0 for name in losses):
            losses["auxiliary_loss"] = auxiliary_loss(losses, self.options, **weights)
        else:  # the reference's is the number 0
            return losses | {"auxiliary_loss": jnp.zeros((), jnp.int32)}
        return {name: loss.reshape(-1, M) if self.ensemble else loss for name, loss in losses.items()}


def sparse_part(
    moe: dict, noises: list[np.ndarray | None], deterministic: bool, layers: tuple[int, ...] = (0,)
) -> SparsePart:
    """The reference's options of its sparse blocks as ours.

    Args:
      moe: num_experts, group_size, router, and for a layer of its own mlp_dim; ensemble_size.
      noises: recorded for each block, in order.
      deterministic: of the network; the router may say otherwise.
      layers: which blocks are sparse.
    """
    if moe.get("dropout_rate"):
        raise ValueError("dropout draws random numbers, which are not recorded")
    options = dict(moe["router"])
    dispatcher = options.pop("dispatcher", None) or {}
    take(dispatcher, "name", "batch_priority", "capacity_factor", "capacity_ceil_or_round", "capacity_multiple_of",
         "bfloat16", "partition_spec", "capacity")  # fmt: skip
    name = options.pop("name", "NoisyTopExpertsPerItemRouter").split(".")[-1]
    deterministic = options.pop("deterministic", deterministic)
    E, M = moe["num_experts"], moe.get("ensemble_size") or 1
    method = {"einsum": "einsum", "indices": "gather", "dense": "gather"}[dispatcher.get("name", "einsum")]
    exchange = "bfloat16" if dispatcher.get("bfloat16", False) else None
    if name == "SoftRouter":
        take(options, "capacity_factor", "num_slots", "noise_std", "compute_similarity_metrics")
        slots = options.get("num_slots")
        if slots is None:
            slots = expert_capacity(moe["group_size"], E, options.get("capacity_factor", 1.0), "nearest", 1)
        router = Soft(slots_per_expert=slots, noise_std=float(options.get("noise_std", 0.0)))
        exchange = "bfloat16"  # whatever the options say
    elif name == "NoisyTopItemsPerExpertRouter":
        take(options, "noise_std")
        router = ExpertChoice(noise_std=float(options.get("noise_std", 1.0)), **capacity_options(dispatcher))
    elif name in ("NoisyTopExpertsPerItemRouter", "NoisyTopExpertsPerItemEnsembleRouter"):
        take(options, "num_selected_experts", "noise_std", "importance_loss_weight", "load_loss_weight",
             "gshard_loss_weight", "ensemble_size")  # fmt: skip
        dense = dispatcher.get("name") == "dense"
        router = TopK(
            k=E if dense else options.get("num_selected_experts", 1),
            batch_priority=dispatcher.get("batch_priority", False),
            noise_std=float(options.get("noise_std", 1.0)),
            **({"capacity_factor": None} if dense else capacity_options(dispatcher)),
        )
    else:
        raise ValueError(f"there is no router {name!r} here")
    if deterministic or router.noise_std == 0:
        noises = [None] * len(noises)
    elif any(noise is None for noise in noises):
        raise ValueError("the noise of a layer that is not deterministic is missing")
    config = MoEConfig(
        num_experts=E,
        hidden_dim=moe.get("mlp_dim"),
        router=router,
        layers=layers,
        group_size=moe["group_size"],
        losses=(),
        method=method,
        exchange_dtype=exchange,
        members=M,
    )
    config = dataclasses.replace(config, gate=RecordedNoise(router, M, noises))
    return SparsePart(config=config, options=options, ensemble=bool(moe.get("ensemble_size")))


def replace_losses(config: MoEConfig, recorder: Recorder) -> MoEConfig:
    return dataclasses.replace(config, losses=(recorder,))


def noise_of(case: Case) -> tuple[jax.Array | None, float]:
    """The draws and noise_std of a case of a router alone; None where the reference takes its deterministic branch."""
    noisy = not case.config["deterministic"] and case.config["noise_std"] > 0
    return (jnp.asarray(case.arrays["noise_unit"]), case.config["noise_std"]) if noisy else (None, 0.0)
