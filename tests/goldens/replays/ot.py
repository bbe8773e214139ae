"""Routing by optimal transport: plans, assignments, metrics and gradients of the router alone."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.routing import EntropicPlan, ExpertChoice, Gating, QuadraticPlan, TopK, Transport, add_noise
from jmoe.routing.losses import importance_loss, load_loss
from jmoe.routing.transport import plan_nonzeros
from tests.goldens.case import Case
from tests.goldens.replays.parts import capacity_options, expert_choice_metrics, sparse_masks, take, with_prefix

TOKENS, EXPERTS = "TopExpertsPerItemRouter", "TopItemsPerExpertRouter"
COMMON = ("dispatcher", "maxiter", "use_softmax_combine_weights", "noise_std")
OF_TOKENS = (*COMMON, "num_selected_experts", "importance_loss_weight", "load_loss_weight")
OPTIONS = {
    f"SparseProjectionTransport{EXPERTS}": (*COMMON, "adam_lr"),
    f"KSparseProjectionTransport{EXPERTS}": (*COMMON, "adam_lr"),
    f"KSparseProjectionTransport{TOKENS}": (*OF_TOKENS, "adam_lr"),
    f"KLProjectionNoisy{EXPERTS}": COMMON,
    f"KLProjectionNoisy{TOKENS}": (*OF_TOKENS, "use_lbfgs"),
}


def router_of(name: str, options: dict) -> Transport:
    """Ours, for a class of the reference with its options."""
    if name not in OPTIONS:
        raise ValueError(f"there is no router {name!r} here; there are {', '.join(OPTIONS)}")
    take(options, *OPTIONS[name])
    dispatcher, maxiter = options["dispatcher"], options.get("maxiter", 20)
    take(dispatcher, "name", "batch_priority", "capacity_factor", "capacity_ceil_or_round", "capacity_multiple_of",
         "bfloat16")  # fmt: skip
    if dispatcher.get("name", "einsum") != "einsum":
        raise ValueError(f"routers by transport were recorded with the dispatcher 'einsum', not {dispatcher['name']!r}")

    entropic, of_tokens = name.startswith("KL"), name.endswith(TOKENS)
    # The others are given noise_std as well, and do not draw any.
    shared = capacity_options(dispatcher) | {"noise_std": float(options.get("noise_std", 1.0)) if entropic else 0.0}
    if of_tokens:
        k, batch_priority = options.get("num_selected_experts", 1), dispatcher.get("batch_priority", False)
        choice, softmax = TopK(k=k, batch_priority=batch_priority, **shared), "clean_gates"
    else:
        choice, softmax = ExpertChoice(**shared), "gates"

    if not entropic:
        plan = QuadraticPlan(
            sparse=name.startswith("KSparse"), steps=maxiter, learning_rate=float(options.get("adam_lr", 1e-2))
        )
    elif options.get("use_lbfgs", False):
        plan = EntropicPlan(solver="newton", steps=maxiter)
    else:
        plan = EntropicPlan(steps=10 * (maxiter // 10))
    return Transport(
        choice=choice, plan=plan, weights=softmax if options.get("use_softmax_combine_weights", True) else "plan"
    )


def metrics_of(router: Transport, gating: Gating, plan: jax.Array, routing, options: dict) -> dict[str, jax.Array]:
    """One value per group; the reference's bare numbers where it has those."""
    of_tokens, entropic = isinstance(router.choice, TopK), isinstance(router.plan, EntropicPlan)
    if not of_tokens:
        E = routing.num_experts
        chosen = jnp.take_along_axis(plan.reshape(len(plan), -1), routing.token * E + routing.expert, axis=1)
        metrics = expert_choice_metrics(routing, chosen)
    elif entropic:
        metrics = entropic_losses(router.choice.k, gating, options)
    else:
        metrics = {"auxiliary_loss": jnp.zeros(())}
    if isinstance(router.plan, QuadraticPlan) and router.plan.sparse:
        counts = plan_nonzeros(plan)
        counted = {"num_items_per_expert": "tokens_per_expert", "num_experts_per_item": "experts_per_token"}
        for theirs in counted if of_tokens else ["num_items_per_expert"]:
            for statistic, ours in (("min", "min"), ("max", "max"), ("avg", "mean")):
                metrics[f"{theirs}_{statistic}"] = counts[f"{counted[theirs]}_{ours}"]
    return metrics


def entropic_losses(k: int, gating: Gating, options: dict) -> dict[str, jax.Array]:
    """Importance and load, each the number 0 where its weight is, and what they sum to."""
    losses = {"importance_loss": lambda: importance_loss(gating.clean_gates)}
    if gating.sigma > 0:
        losses["load_loss"] = lambda: load_loss(gating.logits, gating.noisy_logits, k, gating.sigma)
    weights = {name: options.get(f"{name}_weight", 0.0) for name in losses}
    metrics = {name: loss() if weights[name] else jnp.zeros(()) for name, loss in losses.items()}
    # An empty sum in Python is an integer.
    return metrics | {"auxiliary_loss": jnp.asarray(sum(weights[n] * metrics[n] for n in losses if weights[n] > 0))}


def replay(case: Case) -> dict[str, np.ndarray]:
    config, options = case.config, case.config["router"]
    router = router_of(config["router_class"], options)
    noise, sigma = None, router.noise_std / config["num_experts"]
    if sigma > 0 and not config["deterministic"]:
        noise = jnp.asarray(case.arrays["noise_unit"])

    @jax.jit
    def run(kernel, inputs):
        def everything(kernel, inputs):
            logits = jnp.einsum("GSD,DE->GSE", inputs, kernel, precision="highest")
            gating = Gating(logits=logits, noisy_logits=logits) if noise is None else add_noise(logits, noise, sigma)
            plan, routing = router.transport(gating), router(gating)
            metrics = metrics_of(router, gating, plan, routing, options)
            found = sparse_masks(routing) | with_prefix("metrics/", metrics)
            found |= {"gates_logits": logits, "transport_plan": plan}
            found |= {"plan_row_sums": jnp.sum(plan, axis=2), "plan_col_sums": jnp.sum(plan, axis=1)}
            if router.weights != "plan":
                found["gates_combine"] = getattr(gating, router.weights)
            if noise is not None:
                found["logits_noise"] = sigma * noise
            combined = found["einsum_combine_weights"]
            return jnp.sum(combined * case.cotangent(combined.shape)) + jnp.mean(metrics["auxiliary_loss"]), found

        gradients, found = jax.grad(everything, argnums=(0, 1), has_aux=True)(kernel, inputs)
        return found | {"grads_total/kernel": gradients[0], "grads_total/inputs": gradients[1]}

    return jax.device_get(run(case.arrays["params/dense/kernel"], case.arrays["inputs"]))
