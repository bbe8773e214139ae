"""V-MoE and its training once more, from the paper's definitions and as plainly as can be (arXiv:2106.05974).

An independent program to compare the real one with: it shares no code with it and uses of JAX only arrays and
derivatives. All experts process all tokens; ranks and slots are found by counting. Nothing here is random: noise is an
argument.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is not to be seen from the shapes of the parameters."""

    patch: int
    depth: int
    sparse: tuple[int, ...]  # the blocks with experts
    k: int
    capacity_factor: float
    batch_priority: bool
    images_per_group: int
    importance_weight: float
    load_weight: float
    loss: str  # "softmax" or "sigmoid"
    steps: int
    peak_lr: float
    end_lr: float
    warmup_steps: int
    clip_norm: float
    decayed: str  # regular expression of the names of parameters that decay
    weight_decay: float


def train(run, params, batches):
    """Trains, and returns for each step what was computed in it, as a list of dicts of numbers.

    Args:
      run: the options.
      params: {name: array}.
      batches: for each step a dict of "image" [B, Y, X, channels] from 0 to 255, "label" [B], "noise" {block: standard
        normal [G, S, E]} and "mix" (the weights of an image and of its successor, or None for no mixup).
    """
    with jax.numpy_rank_promotion("allow"):
        step = jax.jit(lambda t, state, batch: one_step(run, t, state, batch))
        zeros = {name: jnp.zeros_like(p) for name, p in params.items()}
        state, rows = (params, zeros, zeros), []
        for t, batch in enumerate(batches):
            state, row = step(t, state, batch)
            rows.append({name: float(value) for name, value in row.items()})
    return rows


def one_step(run, t, state, batch):
    """Adam with decoupled weight decay, on clipped gradients."""
    params, mean, square = state
    (_, row), grads = jax.value_and_grad(lambda p: total_loss(run, p, batch), has_aux=True)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values()))
    grads = {name: g * jnp.where(norm > run.clip_norm, run.clip_norm / norm, 1.0) for name, g in grads.items()}
    mean = {name: 0.9 * mean[name] + 0.1 * g for name, g in grads.items()}
    square = {name: 0.999 * square[name] + 0.001 * g**2 for name, g in grads.items()}
    rate, new = learning_rate(run, t), {}
    for name, p in params.items():
        update = mean[name] / (1 - 0.9 ** (t + 1)) / (jnp.sqrt(square[name] / (1 - 0.999 ** (t + 1))) + 1e-8)
        if re.search(run.decayed, name):
            update += run.weight_decay * p
        new[name] = p - rate * update
    return (new, mean, square), row | {"gradient_norm": norm, "learning_rate": rate}


def learning_rate(run, t):
    """Up from 0, and down to end_lr in a straight line."""
    left = (run.steps - t) / (run.steps - run.warmup_steps)
    return jnp.where(
        t < run.warmup_steps, run.peak_lr * t / run.warmup_steps, run.end_lr + (run.peak_lr - run.end_lr) * left
    )


def total_loss(run, params, batch):
    """The loss of the task and of the routers, and the numbers to compare."""
    images = batch["image"] / 127.5 - 1.0
    labels = jnp.eye(len(params["head/bias"]))[batch["label"]]
    if batch["mix"] is not None:
        own, other = batch["mix"]
        images, labels = (own * x + other * jnp.concatenate([x[1:], x[:1]]) for x in (images, labels))
    logits, routers = network(run, params, images, batch["noise"])
    if run.loss == "softmax":
        per_image = -jnp.sum(labels * (logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))), axis=-1)
    else:
        per_image = jnp.sum(labels * jnp.log1p(jnp.exp(-logits)) + (1 - labels) * jnp.log1p(jnp.exp(logits)), axis=-1)
    row = {"loss/task": jnp.mean(per_image)}
    row["loss/importance"] = run.importance_weight * sum(router["importance"] for router in routers.values())
    row["loss/load"] = run.load_weight * sum(router["load"] for router in routers.values())
    total = sum(row.values())
    row |= {"loss": total, "margin": jnp.min(jnp.stack([router["margin"] for router in routers.values()]))}
    row |= {f"block_{i}/dropped_assignments": router["dropped"] for i, router in routers.items()}
    return total, row


def network(run, params, images, noise):
    """Logits, and by sparse block what its router did."""

    def p(name):
        return params[name]

    def layer_norm(x, name):
        mean, var = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-6) * p(f"{name}/scale") + p(f"{name}/bias")

    B, Y, X, _ = images.shape
    patches = [
        images[:, y : y + run.patch, x : x + run.patch].reshape(B, -1)
        for y in range(0, Y, run.patch)
        for x in range(0, X, run.patch)
    ]
    D = p("cls").shape[-1]
    tokens = jnp.stack(patches, axis=1) @ p("patches/kernel").reshape(-1, D) + p("patches/bias")
    tokens = jnp.concatenate([jnp.tile(p("cls"), (B, 1, 1)), tokens], axis=1) + p("positions")

    routers = {}
    for i in range(run.depth):
        block = f"blocks/{i}"
        tokens += attention(layer_norm(tokens, f"{block}/norm_1"), params, f"{block}/attention")
        x = layer_norm(tokens, f"{block}/norm_2")
        if i in run.sparse:
            y, routers[i] = sparse_layer(run, x, params, f"{block}/moe", noise[i])
        else:
            y = perceptron(x, *(p(f"{block}/mlp/{name}") for name in ("w_in", "b_in", "w_out", "b_out")))
        tokens += y

    features = jnp.tanh(layer_norm(tokens, "norm")[:, 0] @ p("pre_logits/kernel") + p("pre_logits/bias"))
    return features @ p("head/kernel") + p("head/bias"), routers


def attention(x, params, name):
    """Of every token to all of its image, in each head."""
    q, k, v = (
        jnp.einsum("BTD,Dhd->BhTd", x, params[f"{name}/{part}/kernel"]) + params[f"{name}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    scores = jnp.exp(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
    mixed = scores / jnp.sum(scores, axis=-1, keepdims=True) @ v
    return jnp.einsum("BhTd,hdD->BTD", mixed, params[f"{name}/out/kernel"]) + params[f"{name}/out/bias"]


def perceptron(x, w_in, b_in, w_out, b_out):
    """With the tanh form of GELU."""
    h = x @ w_in + b_in
    h = 0.5 * h * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ w_out + b_out


def sparse_layer(run, x, params, name, noise):
    """Every expert on all tokens, weighted by 0 where it was not chosen or had no slot; routed group by group."""
    B, T, D = x.shape
    tokens = x.reshape(-1, run.images_per_group * T, D)
    logits = tokens @ params[f"{name}/gate/kernel"]
    weights, router = jax.vmap(lambda logits, noise: route(run, logits, noise))(logits, noise)
    y = jnp.zeros_like(tokens)
    for e in range(logits.shape[-1]):
        expert = (params[f"{name}/experts/{part}"][e] for part in ("w_in", "b_in", "w_out", "b_out"))
        y += weights[:, :, e, None] * perceptron(tokens, *expert)
    router |= {key: jnp.mean(router[key]) for key in ("importance", "load", "dropped")}
    return y.reshape(B, T, D), router


def route(run, logits, noise):
    """The weight [S, E] of each expert for each token of one group, the losses of the group, and how clear it was."""
    S, E = logits.shape
    sigma = 1 / E
    noisy = logits + sigma * noise
    gates = jnp.exp(noisy) / jnp.sum(jnp.exp(noisy), axis=-1, keepdims=True)
    capacity = math.ceil(math.ceil(S * run.k * run.capacity_factor / E) / 4) * 4

    rank = places(gates)  # 0 for a token's first choice
    chosen = [rank == k for k in range(run.k)]  # [S, E] each
    order = places(jnp.max(gates, axis=-1)[None])[0] if run.batch_priority else jnp.arange(S)
    # A taker's turn: all first choices in this order, then all second choices. Its slot is the number before it.
    turns = jnp.where(rank < run.k, rank * S + order[:, None], run.k * S)
    slot = jnp.sum(turns[None] < turns[:, None], axis=1)  # over the other tokens of an expert
    kept = (rank < run.k) & (slot < capacity)

    threshold = jnp.sum(jnp.where(chosen[-1], noisy, 0.0), axis=-1, keepdims=True)
    above = 0.5 - 0.5 * jax.lax.erf((threshold - logits) / sigma / math.sqrt(2))
    clean = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    gaps = [jnp.min(-jnp.diff(jnp.sort(gates, axis=-1)[:, ::-1])[:, : run.k])]
    if run.batch_priority:
        gaps.append(jnp.min(jnp.diff(jnp.sort(jnp.max(gates, axis=-1)))))
    return jnp.where(kept, gates, 0.0), {
        "importance": variation(jnp.sum(clean, axis=0)),
        "load": variation(jnp.mean(above, axis=0)),
        "dropped": 1 - jnp.sum(kept) / (S * run.k),
        "margin": jnp.min(jnp.stack(gaps)),
    }


def places(values):
    """How many of a row come before each of its values: the larger ones, and equal ones to the left."""
    one, other = values[:, :, None], values[:, None]
    earlier = jnp.arange(values.shape[1])[None] < jnp.arange(values.shape[1])[:, None]
    return jnp.sum((other > one) | ((other == one) & earlier), axis=-1)


def variation(values):
    """Squared coefficient of variation."""
    return (jnp.std(values) / jnp.mean(values)) ** 2
