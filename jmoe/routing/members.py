"""The two orders in which the members of an efficient ensemble come: each for itself, or token by token."""

from jmoe.notation import Array, Shaped


def interleave_members(x: Shaped[Array, "N T ..."], members: int) -> Shaped[Array, "B L ..."]:
    """Brings the copies of each token together: rows (image 0 member 0, image 0 member 1, ...) of T tokens become
    images of T * M tokens, of which M that follow each other are copies of one (E3, arXiv:2110.03360).
    """
    N, T = x.shape[:2]
    return x.reshape(-1, members, T, *x.shape[2:]).swapaxes(1, 2).reshape(N // members, T * members, *x.shape[2:])


def separate_members(x: Shaped[Array, "B L ..."], members: int) -> Shaped[Array, "N T ..."]:
    """Undoes `interleave_members`."""
    B, L = x.shape[:2]
    return x.reshape(B, -1, members, *x.shape[2:]).swapaxes(1, 2).reshape(B * members, L // members, *x.shape[2:])
