"""The field's letters, as every annotation, einsum and shape comment of jmoe uses them.

    B  images                    H, W  patch grid (or pixels, where images are meant)
    T  tokens per image          D     model width            F  expert hidden width
    G  groups                    S     tokens per group (G * S = B * T, with padding)
    E  experts                   K     experts per token
    C  slots per expert and group (capacity)
    A  assignments per group (S * K, or E * C when experts choose)
    P  slots per expert of a soft router (its C)
    M  members of an efficient ensemble
    N  rows of a flat array: all tokens, or all slots of one expert

A capital letter as a local variable is one of these, straight from a shape: `G, S, E = gates.shape`. Kernels keep the
matrix multiply's own lower-case m, k and n, in which k is the contracted axis.
"""

from jaxtyping import Array, Bool, Float, Float32, Int, Key, PRNGKeyArray, Shaped, UInt8

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Key", "PRNGKeyArray", "Shaped", "UInt8"]
