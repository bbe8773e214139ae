import dataclasses
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe import ExpertChoice, Importance, MoEConfig, Soft, Switch, TopK, ZLoss
from jmoe.data import TFDS, DataConfig, Digits, ImageFolder, InceptionCrop, RandomFlip, Shift
from jmoe.errors import UserError
from jmoe.models.vit import variant
from jmoe.train.config_json import differences, from_json, to_json
from jmoe.train.optimizer import SGD, AdamW
from jmoe.train.schedule import Cosine, Linear, Rsqrt

HERE = __name__


@dataclasses.dataclass(frozen=True)
class Leaf:
    rate: float = 0.5
    name: str | None = None
    layers: tuple[int, ...] | str = "every-2"
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    derived: int = dataclasses.field(default=7, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    leaf: Leaf
    branches: tuple["Tree | Leaf", ...] = ()
    sizes: list[int] = dataclasses.field(default_factory=list)
    folder: pathlib.Path = pathlib.Path(".")
    anything: object = None

    def __post_init__(self):
        if len(self.branches) > 3:
            raise ValueError(f"A tree has at most 3 branches, not {len(self.branches)}.")


leaves = st.builds(
    Leaf,
    rate=st.floats(allow_nan=False),
    name=st.none() | st.text(),
    layers=st.sampled_from(["every-2", "last-2"]) | st.lists(st.integers()).map(tuple),
    extra=st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), st.floats(allow_nan=False)),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2).map(tuple) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
trees = st.recursive(
    st.builds(Tree, leaf=leaves),
    lambda inner: st.builds(
        Tree,
        leaf=leaves,
        branches=st.lists(inner | leaves, max_size=3).map(tuple),
        sizes=st.lists(st.integers()),
        folder=st.sampled_from([pathlib.Path("runs/a"), pathlib.Path("/x y")]),
        anything=anything,
    ),
    max_leaves=5,
)


@given(tree=trees)
def test_a_configuration_survives_json(tree):
    text = json.dumps(to_json(tree), allow_nan=False)  # strict JSON
    assert from_json(json.loads(text), modules=[HERE]) == tree


@given(a=trees, b=trees)
def test_only_different_configurations_have_differences(a, b):
    assert differences(to_json(a), to_json(a)) == []
    assert differences(to_json(a), to_json(b)) or to_json(a) == to_json(b)


@given(
    k=st.integers(1, 4),
    factor=st.floats(0.1, 4),
    router=st.sampled_from([TopK, Switch, ExpertChoice, Soft]),
    losses=st.sampled_from([None, (), (ZLoss(), Importance())]),
    layers=st.sampled_from(["every-2", "last-2", (1, 3)]),
    source=st.sampled_from([Digits(), TFDS("mnist"), ImageFolder("images", train="a")]),
    augment=st.sampled_from([(), (Shift(), RandomFlip()), (InceptionCrop(32),)]),
    image_size=st.sampled_from([None, 32, (32, 48)]),
    optimizer=st.sampled_from([AdamW, SGD]),
    decay=st.sampled_from([Linear(), Cosine(end_lr=0.0), Rsqrt()]),
    weight_decay=st.sampled_from([0.1, (("kernel", 0.1),)]),
)
def test_every_configuration_of_jmoe_survives_json(
    k, factor, router, losses, layers, source, augment, image_size, optimizer, decay, weight_decay
):
    options = {TopK: {"k": k, "capacity_factor": factor}, ExpertChoice: {"capacity_factor": factor}}
    moe = MoEConfig(num_experts=4, router=router(**options.get(router, {})), losses=losses, layers=layers)
    for config in (
        variant("S/16", moe=moe),
        DataConfig(source, batch_size=k, augment=augment, image_size=image_size),
        optimizer(peak_lr=factor, decay=decay, weight_decay=weight_decay),
    ):
        assert from_json(json.loads(json.dumps(to_json(config), allow_nan=False))) == config


def test_the_class_is_saved_by_its_module_and_name():
    assert to_json(Leaf()) == {
        "$type": f"{HERE}:Leaf",
        "rate": 0.5,
        "name": None,
        "layers": "every-2",
        "extra": {},
    }


def test_numbers_that_json_lacks_are_kept():
    leaf = from_json(to_json(Leaf(rate=math.nan)), modules=[HERE])
    assert math.isnan(leaf.rate)
    assert to_json(Leaf(rate=-math.inf))["rate"] == {"$float": "-inf"}


@pytest.mark.parametrize("value", [len, np.zeros(3), {1: 2}, {"$type": "x"}, {1, 2}, np.float32, b"x", Leaf], ids=repr)
def test_what_is_no_data_is_refused_by_name(value):
    tree = Tree(leaf=Leaf(), branches=(Tree(leaf=Leaf(), anything=value),))
    with pytest.raises(UserError) as error:
        to_json(tree)
    assert str(error.value) == (
        f"branches.0.anything is {value!r}, which cannot be saved as JSON. A configuration holds numbers, text, paths, "
        "tuples, dictionaries with text keys, and dataclasses of these."
    )


def test_only_a_dataclass_is_a_configuration():
    with pytest.raises(UserError, match=r"A configuration is a dataclass, not 3\."):
        to_json(3)


def test_options_that_a_file_does_not_mention_have_their_defaults():
    assert from_json({"$type": f"{HERE}:Leaf", "name": "x"}, modules=[HERE]) == Leaf(name="x")


@pytest.mark.parametrize(
    ("leaf", "sentence"),
    [
        (
            {"$type": f"{HERE}:Leaf", "rat": 1},
            "Leaf has no option 'rat' (from the saved configuration at leaf). Did you mean 'rate'? "
            "Its options are: rate, name, layers, extra.",
        ),
        (
            {"$type": f"{HERE}:Leaf", "rate": "x"},
            "Leaf.rate must be a number, not the text 'x' (from the saved configuration at leaf).",
        ),
        (
            {"$type": f"{HERE}:Leave"},
            f"'{HERE}:Leave' is not a configuration class of jmoe or of a loaded experiment "
            "(from the saved configuration at leaf).",
        ),
        (
            {"$type": f"{HERE}:Tree"},
            "Tree.leaf must be a Leaf(...), not Tree() (from the saved configuration).",
        ),
    ],
)
def test_a_damaged_file_is_explained(leaf, sentence):
    with pytest.raises(UserError) as error:
        from_json({"$type": f"{HERE}:Tree", "leaf": leaf}, modules=[HERE])
    assert str(error.value) == sentence


def test_a_missing_option_is_named():
    with pytest.raises(UserError) as error:
        from_json({"$type": f"{HERE}:Tree"}, modules=[HERE])
    assert str(error.value) == "Tree needs a value for 'leaf' (from the saved configuration)."


def test_what_the_class_refuses_says_where_it_was_saved():
    data = to_json(Tree(leaf=Leaf()))
    with pytest.raises(UserError, match=r"at most 3 branches, not 4\. \(from the saved configuration\)"):
        from_json(data | {"branches": [to_json(Leaf())] * 4}, modules=[HERE])


@pytest.mark.parametrize("data", [[], 3, None, {}, {"rate": 1}])
def test_data_without_a_class_is_refused(data):
    with pytest.raises(UserError, match=r'must be a JSON object with a "\$type"'):
        from_json(data)


@pytest.mark.parametrize(
    "name",
    [
        f"{HERE}:Leaf",  # a module that was not allowed
        "os:system",
        "jmoe.errors:UserError",  # no dataclass
        "jmoe.train.config_json:Draft",  # a dataclass, but of another module
        "jmoe.no_such_file:Leaf",
        "jmoe_experiment.none_of_that_name:Leaf",
        "jmoe",
        ":",
        3,
        None,
        ["jmoe"],
    ],
    ids=repr,
)
def test_no_other_class_is_built(name):
    with pytest.raises(UserError, match="is not a configuration class of jmoe or of a loaded experiment"):
        from_json({"$type": name})


def test_a_module_is_never_imported_because_a_file_names_it():
    assert "this" not in sys.modules
    with pytest.raises(UserError):
        from_json({"$type": "this:Zen"}, modules=["this"])
    assert "this" not in sys.modules


def test_differences_name_the_path_and_both_values():
    a = Tree(leaf=Leaf(rate=1.0), branches=(Leaf(), Leaf()), anything={"x": True}, sizes=[1])
    b = Tree(leaf=Leaf(rate=1.5, name="n"), branches=(Leaf(), Tree(leaf=Leaf())), anything={"x": 1, "y": 2}, sizes=[])
    assert differences(to_json(a), to_json(b)) == [
        "leaf.rate: 1.0 -> 1.5",
        "leaf.name: None -> 'n'",
        "branches.1: Leaf(rate=0.5, name=None, layers='every-2', extra={}) -> "
        "Tree(leaf=Leaf(rate=0.5, name=None, layers='every-2', extra={}), branches=(), sizes=(), folder='.', "
        "anything=None)",
        "sizes: (1,) -> ()",
        "anything.x: True -> 1",
        "anything.y: (absent) -> 2",
    ]


def test_differences_show_infinities_as_one_writes_them():
    assert differences(to_json(Leaf(rate=math.inf)), to_json(Leaf())) == ["rate: inf -> 0.5"]
    assert differences(to_json(Leaf(rate=math.inf)), to_json(Leaf(rate=-math.inf))) == ["rate: inf -> -inf"]
