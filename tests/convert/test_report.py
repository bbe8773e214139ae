from jmoe import MoEConfig, TopK
from jmoe.convert.api import Parameter
from jmoe.convert.report import brief, table
from jmoe.models.vit import ViTConfig


def parameter(name, shape, dtype="float32", source=None):
    return Parameter(name=name, source=source or name, shape=shape, dtype=dtype)


PARAMETERS = [
    parameter("cls", (1, 1, 6)),
    *(parameter(f"blocks/{i}/norm_1/bias", (6,), source=f"Encoder/{i}/bias") for i in (10, 2, 1)),
    parameter("blocks/3/norm_1/bias", (7,)),
    parameter("blocks/4/norm_1/bias", (6,), "bfloat16"),
]


def test_arrays_that_differ_in_the_block_alone_share_a_line():
    assert table(PARAMETERS).splitlines() == [
        "blocks/{1,2,10}/norm_1/bias  (6,)       float32",
        "blocks/3/norm_1/bias         (7,)       float32",
        "blocks/4/norm_1/bias         (6,)       bfloat16",
        "cls                          (1, 1, 6)  float32",
        "6 arrays, 37 parameters, 0.0 MB in float32",
    ]


def test_everything_has_a_line_of_its_own_with_its_name_in_the_file():
    assert table(PARAMETERS, everything=True).splitlines()[:4] == [
        "blocks/1/norm_1/bias   (6,)       float32   Encoder/1/bias",
        "blocks/2/norm_1/bias   (6,)       float32   Encoder/2/bias",
        "blocks/3/norm_1/bias   (7,)       float32",
        "blocks/4/norm_1/bias   (6,)       bfloat16",
    ]


def test_a_configuration_is_shown_without_its_defaults():
    config = ViTConfig(
        patch_size=2, width=8, depth=2, hidden_dim=9, num_heads=2, moe=MoEConfig(router=TopK(k=1), layers=(1,))
    )
    assert brief(config) == (
        "ViTConfig(patch_size=2, width=8, depth=2, hidden_dim=9, num_heads=2, "
        "moe=MoEConfig(router=TopK(k=1), layers=(1,)))"
    )
    assert brief(TopK()) == "TopK()"
