"""A dropless sparse layer in PyTorch, as users of MegaBlocks or ScatterMoE compute it: what jmoe is held against.

Assignments are sorted by expert, their rows selected, multiplied by grouped matrices, and added to their tokens by
weight. Parameters are float32 and are cast to the dtype of the tokens for every call, as jmoe does. Both forms of the
product run eagerly: PyTorch's grouped one, and a loop over experts, which must know the sizes on the host.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional

NAMES = ("gate", "w_in", "b_in", "w_out", "b_out")  # [D, E], [E, D, F], [E, F], [E, F, D], [E, D]


def grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows sorted by group, each by the matrix of its group; ends[e] is the row after the last of group e."""
    return torch._grouped_mm(x, w, offs=ends)


def looped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The same, group by group."""
    places = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(places))])


PRODUCTS = {"torch grouped_mm": grouped, "torch loop": looped}


def parameters(arrays: Mapping[str, np.ndarray], device: str) -> dict[str, torch.Tensor]:
    """float32 parameters that take gradients."""
    return {name: torch.tensor(arrays[name], device=device, requires_grad=True) for name in NAMES}


def layer(x: torch.Tensor, p: Mapping[str, torch.Tensor], k: int, product: Callable[..., torch.Tensor]) -> torch.Tensor:
    """From [tokens, D] to the same: every token by the k experts that it gates highest, none dropped."""
    experts = p["gate"].shape[1]
    gates = torch.softmax(x.float() @ p["gate"], dim=-1)
    weights, chosen = torch.topk(gates, k, dim=-1)  # [tokens, k]
    expert, order = torch.sort(chosen.reshape(-1), stable=True)
    token = order // k
    ends = torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
    w_in, b_in, w_out, b_out = (p[name].to(x.dtype) for name in NAMES[1:])
    rows = x.index_select(0, token)
    hidden = functional.gelu(product(rows, w_in, ends) + b_in.index_select(0, expert), approximate="tanh")
    outputs = product(hidden, w_out, ends) + b_out.index_select(0, expert)
    weighted = outputs.float() * weights.reshape(-1)[order, None]
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, token, weighted).to(x.dtype)


def dense(x: torch.Tensor, p: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Expert 0 for every row: the perceptron that all of this is compared with."""
    w_in, b_in, w_out, b_out = (p[name][0].to(x.dtype) for name in NAMES[1:])
    return functional.gelu(x @ w_in + b_in, approximate="tanh") @ w_out + b_out


def gradient_step(
    function: Callable[..., torch.Tensor], x: np.ndarray, p: Mapping[str, torch.Tensor], *, device: str, **options
) -> Callable[[], torch.Tensor]:
    """A function without arguments: value, and the gradient in x and in all parameters, of a sum of squares."""
    tokens = torch.tensor(x, device=device).to(torch.bfloat16).requires_grad_()
    leaves = [tokens, *p.values()]
    call = functools.partial(function, p=p, **options)

    def step():
        result = call(tokens)
        torch.autograd.grad(result.float().square().sum(), leaves, allow_unused=True)
        return result.detach()

    return step
