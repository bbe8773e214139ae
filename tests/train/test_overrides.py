import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jmoe
import jmoe.data
from jmoe.errors import UserError
from jmoe.train.overrides import apply_overrides, public_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    k: int = 1
    capacity_factor: float = 1.05
    batch_priority: bool = False

    def __call__(self, gates):
        return gates


@dataclasses.dataclass(frozen=True)
class Switch:
    jitter: float = 0.01
    inner: TopK | None = None

    def __call__(self, gates):
        return gates


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    num_experts: int
    layers: tuple[int, ...] | Literal["every-2", "last-2"] = "every-2"
    router: Callable[[Any], Any] = TopK()

    def __post_init__(self):
        k = getattr(self.router, "k", 1)
        if k > self.num_experts:
            raise ValueError(f"{k=} experts per token is more than {self.num_experts=}. Choose a smaller k.")


@dataclasses.dataclass(frozen=True)
class Shift:
    pixels: int = 1


@dataclasses.dataclass(frozen=True)
class Flip:
    pass


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "digits"
    augment: tuple[Shift | Flip, ...] = (Shift(), Flip())
    splits: dict[str, str] = dataclasses.field(default_factory=lambda: {"train": "train[:90%]", "test": "test"})
    crop: tuple[int, float] = (8, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "S/32"
    width: int = 64
    dropout: float = 0.0
    moe: MoE | None = None
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    model: Model = Model(moe=MoE(num_experts=8))
    data: Data = Data()
    loss: Literal["softmax", "sigmoid"] = "softmax"
    epochs: float | None = 100
    steps: int | None = None
    clip: float | None = None
    note: Any = None
    kind: str | None = None

    def __post_init__(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("Give either epochs or steps.")


NAMES = {cls.__name__: cls for cls in (TopK, Switch, MoE, Shift, Flip, Model)}


def edit(*sets, config=None):
    return apply_overrides(config or Train(), sets, NAMES)


def sentence(*sets, config=None):
    with pytest.raises(UserError) as error:
        edit(*sets, config=config)
    return str(error.value)


def test_an_edit_changes_its_option_and_nothing_else():
    config = Train()
    edited = edit("model.moe.router.capacity_factor=0.25", config=config)
    assert edited == dataclasses.replace(config, model=Model(moe=MoE(num_experts=8, router=TopK(capacity_factor=0.25))))
    assert edited.data is config.data  # what no path touches is not built anew
    assert config == Train()


def test_without_edits_the_configuration_comes_back():
    config = Train()
    assert apply_overrides(config, []) is config


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("model.width=10_000", "model.width", 10000),
        ("model.width=1e3", "model.width", 1000),
        ("model.width = 3 ", "model.width", 3),
        ("model.dropout=1", "model.dropout", 1.0),
        ("model.dropout=1e-3", "model.dropout", 0.001),
        ("model.dropout=-.5", "model.dropout", -0.5),
        ("clip=inf", "clip", math.inf),
        ("clip=-inf", "clip", -math.inf),
        ("clip=None", "clip", None),
        ("clip=none", "clip", None),
        ("model.remat=true", "model.remat", True),
        ("model.remat=False", "model.remat", False),
        ("loss=sigmoid", "loss", "sigmoid"),
        ("loss='sigmoid'", "loss", "sigmoid"),
        ("model.name=B/16", "model.name", "B/16"),
        ("model.name=16", "model.name", "16"),
        ("model.name=None", "model.name", "None"),
        ("model.name=a=b", "model.name", "a=b"),
        ("model.name=Other(3)", "model.name", "Other(3)"),
        ("model.name=", "model.name", ""),
        ('model.name="with spaces"', "model.name", "with spaces"),
        ("kind=16", "kind", "16"),
        ("kind=none", "kind", None),
        ("data.source=gs://bucket/a b", "data.source", "gs://bucket/a b"),
        ("data.splits.train=train[:50%]", "data.splits", {"train": "train[:50%]", "test": "test"}),
        ("data.splits={'train': 'all'}", "data.splits", {"train": "all"}),
        ("data.augment.0.pixels=2", "data.augment", (Shift(2), Flip())),
        ("data.augment.1=Shift(pixels=3)", "data.augment", (Shift(), Shift(3))),
        ("data.augment=(Flip(), Shift(2))", "data.augment", (Flip(), Shift(2))),
        ("data.augment=[Flip()]", "data.augment", (Flip(),)),
        ("data.augment=()", "data.augment", ()),
        ("data.crop.0=9", "data.crop", (9, 1.0)),
        ("data.crop.1=2", "data.crop", (8, 2.0)),
        ("model.moe.layers=5,7", "model.moe.layers", (5, 7)),
        ("model.moe.layers=[5]", "model.moe.layers", (5,)),
        ("model.moe.layers=last-2", "model.moe.layers", "last-2"),
        ("model.moe=None", "model.moe", None),
        ("model.moe.router=Switch(jitter=0)", "model.moe.router", Switch(jitter=0.0)),
        ("model.moe.router=Switch()", "model.moe.router", Switch()),
        ("model.moe.router=jmoe.Switch(0.5, inner=TopK(k=2))", "model.moe.router", Switch(0.5, TopK(k=2))),
        ("note=some words", "note", "some words"),
        ("note=('a', -2, [true])", "note", ("a", -2, [True])),
        (r"note='\d'", "note", r"\d"),
    ],
)
def test_a_value_is_read_as_one_writes_it(text, path, value):
    edited = edit(text)
    for name in path.split("."):
        edited = getattr(edited, name)
    assert edited == value
    assert type(edited) is type(value)


@given(value=st.integers() | st.floats(allow_nan=False) | st.text() | st.booleans() | st.none() | st.tuples(st.text()))
def test_every_literal_can_be_set(value):
    assert edit(f"note={value!r}").note == value


@given(text=st.text())
def test_text_that_is_no_literal_is_either_taken_or_refused_in_a_sentence(text):
    try:
        name = edit(f"model.name={text}").model.name
    except UserError as error:
        name = str(error)
    assert isinstance(name, str)


def test_the_order_of_edits_of_one_class_does_not_matter():
    for sets in (["epochs=None", "steps=10"], ["steps=10", "epochs=None"]):
        assert edit(*sets).steps == 10
    assert edit("model.moe.router.k=16", "model.moe.num_experts=32").model.moe.router.k == 16


def test_a_later_edit_wins_and_can_go_into_an_earlier_one():
    edited = edit(
        "model.moe=None", "model.moe=MoE(num_experts=2)", "model.moe.router=Switch()", "model.moe.router.jitter=1.5"
    )
    assert edited.model.moe == MoE(num_experts=2, router=Switch(1.5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model.moe.router.capacity=2",
            "TopK has no option 'capacity' (from --set model.moe.router.capacity=2). Did you mean 'capacity_factor'? "
            "Its options are: k, capacity_factor, batch_priority.",
        ),
        (
            "model.zzz=2",
            "Model has no option 'zzz' (from --set model.zzz=2). Its options are: name, width, dropout, moe, remat.",
        ),
        ("data.augment.1.x=2", "Flip has no option 'x' (from --set data.augment.1.x=2). Its options are: none."),
        (
            "data.augment.2.pixels=2",
            "data.augment has entries 0 to 1, and '2' is none of them (from --set data.augment.2.pixels=2).",
        ),
        (
            "data.augment.-1=Flip()",
            "data.augment has entries 0 to 1, and '-1' is none of them (from --set data.augment.-1=Flip()).",
        ),
        (
            "data.splits.trian=all",
            "data.splits has no entry 'trian' (from --set data.splits.trian=all). Did you mean 'train'? "
            "Its entries are: train, test.",
        ),
        (
            "model.width.x=2",
            "model.width is 64, which has no option 'x' or any other (from --set model.width.x=2).",
        ),
        ("model.width=a", "Model.width must be an integer, not the text 'a' (from --set model.width=a)."),
        ("model.width=1.5", "Model.width must be an integer, not 1.5 (from --set model.width=1.5)."),
        ("model.width=true", "Model.width must be an integer, not True (from --set model.width=true)."),
        ("model.remat=1", "Model.remat must be true or false, not 1 (from --set model.remat=1)."),
        ("epochs=many", "Train.epochs must be a number or None, not the text 'many' (from --set epochs=many)."),
        (
            "loss=sigmiod",
            "Train.loss must be 'softmax' or 'sigmoid', not the text 'sigmiod' (from --set loss=sigmiod). "
            "Did you mean 'sigmoid'?",
        ),
        (
            "model.moe.layers=every-3",
            "MoE.layers must be tuple[int, ...] or 'every-2' or 'last-2', not the text 'every-3' "
            "(from --set model.moe.layers=every-3). Did you mean 'every-2'?",
        ),
        ("data.crop.0=x", "data.crop.0 must be an integer, not the text 'x' (from --set data.crop.0=x)."),
        ("data.crop=(1,)", "Data.crop must be tuple[int, float], not (1,) (from --set data.crop=(1,))."),
        (
            "model.moe=Switch(0.5)",
            "Model.moe must be a MoE(...) or None, not Switch(jitter=0.5) (from --set model.moe=Switch(0.5)).",
        ),
        (
            "model.moe.router=Switch(jitter='x')",
            "Switch.jitter must be a number, not the text 'x' (from --set model.moe.router=Switch(jitter='x')).",
        ),
        (
            "model.moe.router=Switch(jiter=1)",
            "Switch has no option 'jiter' (from --set model.moe.router=Switch(jiter=1)). Did you mean 'jitter'? "
            "Its options are: jitter, inner.",
        ),
        (
            "model.moe.router=Swich()",
            "There is no configuration class 'Swich' (from --set model.moe.router=Swich()). Did you mean 'Switch'? "
            "What fits here: Switch, TopK.",
        ),
        (
            "data.augment=(Flop(),)",
            "There is no configuration class 'Flop' (from --set data.augment=(Flop(),)). Did you mean 'Flip'? "
            "What fits here: Flip, Shift.",
        ),
        (
            "note=exit()",
            "There is no configuration class 'exit' (from --set note=exit()). "
            "What fits here: Flip, MoE, Model, Shift, Switch, TopK.",
        ),
        (
            "model.moe.router=Switch",
            "Switch is a class; write it with its options, as Switch(...) (from --set model.moe.router=Switch).",
        ),
        (
            "model.moe.router=TopK(2)",
            "TopK takes 0 options without a name, not 1 (from --set model.moe.router=TopK(2)). "
            "Its options are: k, capacity_factor, batch_priority.",
        ),
        (
            "model.moe.router=Switch(1, jitter=1)",
            "Switch takes each option once, as Switch(option=value) (from --set model.moe.router=Switch(1, jitter=1)).",
        ),
        (
            "model.moe.router=Switch(**{})",
            "Switch takes each option once, as Switch(option=value) (from --set model.moe.router=Switch(**{})).",
        ),
        (
            "model.moe.router=Switch(jitter=2*3)",
            "'2 * 3' is no number, text, tuple or configuration (from --set model.moe.router=Switch(jitter=2*3)). "
            "Put quotes around text.",
        ),
        (
            "note=(B/16, 3)",
            "'B / 16' is no number, text, tuple or configuration (from --set note=(B/16, 3)). Put quotes around text.",
        ),
        (
            "note={a: 3}",
            "'{a: 3}' is no number, text, tuple or configuration (from --set note={a: 3}). Put quotes around text.",
        ),
        ("model.moe=MoE()", "MoE needs a value for 'num_experts' (from --set model.moe=MoE())."),
        (
            "model.moe.num_experts=0",
            "k=1 experts per token is more than self.num_experts=0. Choose a smaller k. "
            "(from --set model.moe.num_experts=0)",
        ),
        ("seed", "'--set seed' is not an edit. Write an option's path and its value: --set a.b.c=value."),
        ("=3", "'--set =3' is not an edit. Write an option's path and its value: --set a.b.c=value."),
        ("model..k=3", "'--set model..k=3' is not an edit. Write an option's path and its value: --set a.b.c=value."),
    ],
)
def test_a_mistake_is_one_sentence(text, expected):
    assert sentence(text) == expected


def test_an_option_of_none_becomes_the_one_thing_that_it_can_be():
    dense = Train(model=Model())
    sparse = edit("model.moe.num_experts=4", "model.moe.router.k=3", config=dense)
    assert sparse.model.moe == MoE(num_experts=4, router=TopK(k=3))
    assert sentence("model.moe.router.k=1", config=dense) == (
        "MoE needs a value for 'num_experts' (from --set model.moe.router.k=1)."
    )


def test_an_option_of_none_that_can_be_many_things_says_what_to_set_first():
    assert sentence("note.x=1") == (
        "note is None, so it has no option 'x' (from --set note.x=1). Set it first, with --set \"note=Name(...)\"."
    )


def test_an_empty_tuple_has_no_entries():
    assert sentence("data.augment=()", "data.augment.0.pixels=1") == (
        "data.augment has no entries, and '0' is none of them (from --set data.augment.0.pixels=1)."
    )


def test_what_two_edits_broke_names_both():
    assert sentence("steps=10", "model.width=8", "epochs=5") == (
        "Give either epochs or steps. (from --set steps=10, --set model.width=8, --set epochs=5)"
    )


@pytest.mark.parametrize("value", ["(1, 2", "Switch(jitter=0.01", "'open", "[" * 1000])
def test_a_value_that_was_cut_off_is_not_taken_as_text(value):
    assert sentence(f"note={value}").startswith("The value cannot be read: ")


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    for text in (f"open({str(target)!r}, 'w')", f"[open({str(target)!r}, 'w')]", f"(1).__class__({target})"):
        with pytest.raises(UserError):
            edit(f"note={text}")
    assert edit("note=__import__").note == "__import__"  # a bare word is text
    assert not target.exists()


def test_by_default_the_dataclasses_of_jmoe_can_be_named():
    classes = public_classes()
    assert classes
    assert {"TopK", "Switch", "ExpertChoice", "Soft", "MoEConfig", "DataConfig", "Digits", "Shift"} <= set(classes)
    assert not any(name.startswith("_") for name in classes)


def test_the_options_of_jmoe_can_be_edited():
    config = jmoe.models.vit.variant("B/16", moe=jmoe.MoEConfig(num_experts=8, router=jmoe.TopK(k=2)))
    edited = apply_overrides(config, ["moe.router.capacity_factor=0.25", "moe.layers=(1, 3)", "image_size=[96,128]"])
    assert edited == dataclasses.replace(
        config,
        image_size=(96, 128),
        moe=dataclasses.replace(config.moe, layers=(1, 3), router=jmoe.TopK(k=2, capacity_factor=0.25)),
    )
    edited = apply_overrides(config, ["moe.router=ExpertChoice(capacity_factor=1)", "moe.losses=(ZLoss(),)"])
    assert edited.moe.router == jmoe.ExpertChoice(capacity_factor=1.0)
    assert edited.moe.losses == (jmoe.ZLoss(),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "moe.router.k=9",
            "TopK has k=9, but there are only num_experts=8. Choose k from 1 to 8. (from --set moe.router.k=9)",
        ),
        (
            "moe.router.capacity_facto=2",
            "TopK has no option 'capacity_facto' (from --set moe.router.capacity_facto=2). "
            "Did you mean 'capacity_factor'? Its options are: k, capacity_factor, ",
        ),
        ("image_size=[9]", "ViTConfig.image_size must be tuple[int, int], not [9] (from --set image_size=[9])."),
        ("moe.router=Shift()", "MoEConfig.router must be a Router, not Shift() (from --set moe.router=Shift())."),
        (
            "moe.router=Topk()",
            "There is no configuration class 'Topk' (from --set moe.router=Topk()). Did you mean 'TopK'? "
            "What fits here: ExpertChoice, Soft, Switch, TopK, Transport.",
        ),
    ],
)
def test_a_mistake_in_the_options_of_jmoe_is_one_sentence(text, expected):
    with pytest.raises(UserError) as error:
        apply_overrides(jmoe.models.vit.variant("B/16", moe=jmoe.MoEConfig(num_experts=8)), [text])
    assert str(error.value).startswith(expected)


def test_the_source_of_the_data_can_be_another():
    config = jmoe.data.DataConfig(jmoe.data.Digits(), batch_size=8)
    assert apply_overrides(config, ["source=TFDS('mnist')"]).source == jmoe.data.TFDS("mnist")
    with pytest.raises(UserError, match=r"DataConfig.source must be a Source, not Shift\(\)"):
        apply_overrides(config, ["source=Shift()"])
    with pytest.raises(UserError, match=r"What fits here: Digits, ImageFolder, TFDS\."):
        apply_overrides(config, ["source=MNIST()"])
