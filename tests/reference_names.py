"""The parameter names of the reference implementation, google-research/vmoe, in terms of ours."""

import re

# First match wins; every name of the reference matches exactly one, in full.
_RULES = [
    (r"embedding/(\w+)", r"patches/\1"),
    (r"cls", r"cls"),
    (r"Encoder/posembed_input/pos_embedding", r"positions"),
    (r"Encoder/encoder_norm/(\w+)", r"norm/\1"),
    (r"Encoder/encoderblock_(\d+)/LayerNorm_0/(\w+)", r"blocks/\1/norm_1/\2"),
    (r"Encoder/encoderblock_(\d+)/LayerNorm_1/(\w+)", r"blocks/\1/norm_2/\2"),
    (r"Encoder/encoderblock_(\d+)/SelfAttention/(\w+/\w+)", r"blocks/\1/attention/\2"),
    (r"Encoder/encoderblock_(\d+)/Mlp/(Dense_\d/\w+)", r"blocks/\1/mlp/\2"),
    (r"Encoder/encoderblock_(\d+)/Moe/(.*)", r"blocks/\1/moe/\2"),
    (r"MapHead/probe", r"pool/probe"),
    (r"MapHead/LayerNorm/(\w+)", r"pool/norm/\1"),
    (r"MapHead/MultiHeadDotProductAttention/(\w+/\w+)", r"pool/attention/\1"),
    (r"MapHead/Mlp/(Dense_\d/\w+)", r"pool/mlp/\1"),
    (r"((?:pre_logits|head)/\w+)", r"\1"),
]
# Then these, inside the sparse layer and the perceptrons.
_PARTS = [
    (r"Router/dense/kernel$", "gate/kernel"),
    (r"Router/(mu|scale)$", r"gate/\1"),
    (r"\bMlp/(?=Dense)", "experts/"),
    (r"Dense_0/kernel$", "w_in"),
    (r"Dense_0/bias$", "b_in"),
    (r"Dense_1/kernel$", "w_out"),
    (r"Dense_1/bias$", "b_out"),
]


def our_name(reference_name):
    """Ours for the name of a parameter of the reference's network, both with "/" between the parts."""
    for pattern, ours in _RULES:
        if re.fullmatch(pattern, reference_name):
            return _inside(re.sub(pattern, ours, reference_name))
    raise KeyError(reference_name)


def to_ours(flat, name=our_name):
    """Nests a flat {reference name: array} under our names; numbers, which index the blocks, become int."""
    nested = {}
    for reference_name, array in flat.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in name(reference_name).split("/"))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        assert leaf not in node, reference_name
        node[leaf] = array
    return nested


def layer_to_ours(flat):
    """The same for the parameters of a single sparse layer."""
    return to_ours(flat, _inside)


def _inside(name):
    for pattern, ours in _PARTS:
        name = re.sub(pattern, ours, name)
    return name
