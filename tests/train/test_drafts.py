import dataclasses
import pathlib
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional

import pytest

from jmoe.errors import UserError
from jmoe.train.drafts import Draft, MisfitError, annotation, build, describe, fit


@dataclasses.dataclass(frozen=True)
class Line:
    slope: float = 1.0

    def __call__(self, x):
        return self.slope * x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
    size: int
    line: Line | None = None

    def __post_init__(self):
        if self.size % 2:
            raise ValueError(f"size={self.size} is odd. Use an even size.")


class Curve(typing.Protocol):
    slope: float

    def __call__(self, x): ...


Pixels = typing.NewType("Pixels", int)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3.0, int, 3),
        (3, float, 3.0),
        (3, float | None, 3.0),
        (None, Optional[float], None),  # noqa: UP045
        (2.0, int | float, 2.0),
        (2, float | int, 2),
        (True, bool, True),
        ("a", Literal["a", "b"], "a"),
        (1, Literal[1, 2], 1),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), tuple[float, int], (1.0, 2)),
        ((), tuple[int, ...], ()),
        ((1, "a"), tuple, (1, "a")),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], Sequence[float], (1.0, 2.0)),
        ((5, 7), tuple[int, ...] | Literal["every-2"], (5, 7)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("data/cifar", pathlib.Path, pathlib.Path("data/cifar")),
        ("data/cifar", str | pathlib.Path, "data/cifar"),
        (Line(), Line, Line()),
        (Line(), Callable[[float], float], Line()),
        (Line(), Curve, Line()),
        (4, Pixels, 4),
        (object, Any, object),
        ("anything", typing.TypeVar("T"), "anything"),
    ],
)
def test_a_fitting_value_comes_as_the_annotation_wants_it(value, hint, expected):
    fitted = fit(value, hint)
    assert fitted == expected
    assert type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3.5, int),
        (float("nan"), int),
        (float("inf"), int),
        (True, int),
        (True, float),
        (1, bool),
        (10**400, float),
        ("3", float),
        (3, str),
        (None, str),
        ("c", Literal["a", "b"]),
        (True, Literal[1, 2]),
        (5, tuple[int, ...]),
        ((1, 2, 3), tuple[int, int]),
        ((1,), tuple[()]),
        ((1, "a"), tuple[int, ...]),
        ({"a": "b"}, dict[str, float]),
        ("a", Line),
        (Half(size=2), Line),
        ("a", Callable[[float], float]),
        (Half(size=2), Curve),
        (0.5, Curve),
        ("a", int | None),
    ],
)
def test_a_value_of_another_type_does_not_fit(value, hint):
    with pytest.raises(MisfitError):
        fit(value, hint)


def test_a_draft_fits_where_the_class_it_will_build_fits():
    draft = Draft(Line, {}, ())
    assert fit(draft, Line | None) is draft
    assert fit(draft, Callable[[float], float]) is draft
    assert fit(draft, Curve) is draft
    for hint in (Half, int, str | None):
        with pytest.raises(MisfitError):
            fit(draft, hint)
    with pytest.raises(MisfitError):
        fit(Draft(Half, {}, ()), Callable[[float], float])


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float | None, "a number or None"),
        (int | str | bool, "an integer or text or true or false"),
        (Literal["softmax", "sigmoid"], "'softmax' or 'sigmoid'"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Line | None, "a Line(...) or None"),
        (pathlib.Path, "a Path"),
        (Callable[[float], float], "something that can be called, such as a configuration Name(...)"),
    ],
)
def test_an_annotation_is_described_in_words(hint, words):
    assert describe(hint) == words


@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Odd(Line):
    next: "Odd | None" = None
    only_for_checkers: "NotImported" = None  # noqa: F821


def test_the_annotation_of_an_option_is_found_wherever_it_stands():
    assert annotation(Odd, "next") == Odd | None
    assert annotation(Odd, "slope") is float  # inherited
    assert annotation(Odd, "only_for_checkers") is Any


def test_drafts_are_built_from_the_inside_out():
    draft = Draft(Half, {"size": 4, "line": Draft(Line, {"slope": 2.0}, ())}, ())
    assert build((draft, {"a": [draft]}, 3)) == (Half(size=4, line=Line(2.0)), {"a": [Half(size=4, line=Line(2.0))]}, 3)


def test_what_the_class_refuses_names_who_asked_for_it():
    with pytest.raises(UserError) as error:
        build(Draft(Half, {"size": 3}, ("--set a.size=3", "--set a.line=None", "--set a.size=3")))
    assert str(error.value) == "size=3 is odd. Use an even size. (from --set a.size=3, --set a.line=None)"


def test_a_missing_option_is_named():
    with pytest.raises(UserError) as error:
        build(Draft(Half, {}, ("--set a=Half()",)))
    assert str(error.value) == "Half needs a value for 'size' (from --set a=Half())."
