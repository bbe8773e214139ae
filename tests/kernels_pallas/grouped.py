"""grouped_matmul in float64, by loops over rows."""

import numpy as np


def gelu(z):
    """The tanh form and its derivative."""
    u, du = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3), np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1 + np.tanh(u)), 0.5 * (1 + np.tanh(u)) + 0.5 * z * (1 - np.tanh(u) ** 2) * du


def silu(z):
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


ACTIVATIONS = {
    None: lambda z: (z, np.ones_like(z)),
    "relu": lambda z: (np.maximum(z, 0), (z > 0).astype(float)),
    "gelu": gelu,
    "silu": silu,
}


def expected(x, w, sizes, dout, index=None, bias=None, activation=None):
    """The result, and the gradients for x, w and bias; index [m] are the rows of x that are multiplied."""
    x, w, dout = (np.asarray(a, np.float64) for a in (x, w, dout))
    bias = np.zeros((w.shape[0], w.shape[2])) if bias is None else np.asarray(bias, np.float64)
    m = dout.shape[0]
    index = np.arange(m) if index is None else np.asarray(index)
    out, dx, dw, dbias = np.zeros((m, w.shape[2])), np.zeros_like(x), np.zeros_like(w), np.zeros_like(bias)
    owners = [group for group, size in enumerate(sizes) for _ in range(size)]
    for row, group in enumerate(owners[:m]):
        inside = 0 <= index[row] < x.shape[0]
        source = x[index[row]] if inside else np.zeros(x.shape[1])
        out[row], slope = ACTIVATIONS[activation](source @ w[group] + bias[group])
        before = dout[row] * slope
        dw[group] += np.outer(source, before)
        dbias[group] += before
        if inside:
            dx[index[row]] += w[group] @ before
    return out, dx, dw, dbias
