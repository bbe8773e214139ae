"""Token choice as loops over groups, choices and tokens: slow, and short enough to be believed by reading."""

import numpy as np


def top_k(gates, k, capacity, batch_priority=False, priority="max", mask=None):
    """The places {(group, expert, slot, token): weight} of what is kept, and the [G, S, K] experts that were wanted."""
    G, S, E = gates.shape
    kept, wanted = {}, np.zeros((G, S, k), int)
    for g in range(G):
        for s in range(S):
            wanted[g, s] = sorted(range(E), key=lambda e: (-gates[g, s, e], e))[:k]
        order = list(range(S))
        if batch_priority:
            best = {s: [gates[g, s, e] for e in wanted[g, s]] for s in order}
            confidence = {s: best[s][0] if priority == "max" else sum(best[s]) for s in order}
            order.sort(key=lambda s: (-confidence[s], s))
        takers = [0] * E
        for choice in range(k):
            for s in order:
                if mask is not None and not mask[g, s]:
                    continue
                e = int(wanted[g, s, choice])
                if takers[e] < capacity:
                    kept[g, e, takers[e], s] = float(gates[g, s, e])
                takers[e] += 1
    return kept, wanted


def expert_choice(gates, capacity, mask=None):
    """The places {(group, expert, slot, token): weight}."""
    G, S, E = gates.shape
    kept = {}
    for g in range(G):
        real = [s for s in range(S) if mask is None or mask[g, s]]
        for e in range(E):
            best = sorted(real, key=lambda s: (-gates[g, s, e], s))[:capacity]
            kept |= {(g, e, slot, s): float(gates[g, s, e]) for slot, s in enumerate(best)}
    return kept
