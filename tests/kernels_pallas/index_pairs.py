"""Cases of the pair of index arrays that gather_rows and combine_rows read."""

import numpy as np


def index_pair(seed: int, n: int, k: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Random slots [n, k] and choice [m]: tokens have from 0 to k slots, slots are empty or filled once.

    Indices that name nothing are of every kind: just past the end, far past it, and negative.
    """
    rng = np.random.default_rng(seed)
    nowhere = rng.choice([m, m + 1, 10 * m + 7, -1, -m], size=(n, k)).astype(np.int32)
    nothing = rng.choice([n * k, n * k + 1, 2**30, -1, -n * k], size=m).astype(np.int32)
    slots, choice = nowhere, nothing
    places, targets = rng.permutation(n * k), rng.permutation(m)
    for place, target in list(zip(places, targets, strict=False))[: max(1, 2 * min(n * k, m) // 3)]:
        slots.flat[place], choice[target] = target, place
    return slots, choice


CASES = {  # n tokens, k slots each at most, m slots, d wide
    "primes": (11, 3, 17, 5),
    "one slot per token": (7, 1, 5, 3),
    "more slots per token than are unrolled": (5, 11, 53, 2),
    "one token": (1, 2, 3, 1),
    "more tokens than slots": (13, 2, 3, 2),
}
