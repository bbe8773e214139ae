import jax
import numpy as np
import pytest

from jmoe.convert.transforms import Rule, apply_rules, expand_tile, natural_key, parse_rules, renumber_modules
from jmoe.errors import UserError


def counted(*shape, dtype: type = np.float32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def test_the_first_rule_that_is_found_in_a_name_applies_and_replaces_every_match():
    source = {"old/a_old": counted(2), "head/old": counted(3), "kept": counted(5)}
    target = {"new/a_new": np.zeros(2), "kept": np.zeros(5)}
    rules = [("head", ""), ("old", "new"), ("o.d", "never"), ("kept", "kept")]
    result = apply_rules(source, target, rules)
    assert list(result) == ["new/a_new", "kept"]
    np.testing.assert_array_equal(result["new/a_new"], [0, 1])
    assert result["kept"].dtype == np.float64  # of the target


@pytest.mark.usefixtures("untyped")  # a type checker would look values up, too
def test_values_are_looked_up_one_at_a_time_and_those_that_are_dropped_never():
    asked = []

    class Read(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    source = Read(b_10=counted(1), b_9=counted(1), huge=counted(1))
    apply_rules(source, {"b_9": counted(1), "b_10": counted(1)}, [("huge", None), ("b", "b")])
    assert asked == ["b_9", "b_10"]


def test_arrays_are_stacked_in_natural_order():
    source = {f"layer_{i}/w": np.full((2, 3), i) for i in (10, 2, 0, 1)}
    target = {"w": jax.ShapeDtypeStruct((2, 4, 3), np.int32)}
    stacked = apply_rules(source, target, [(r"layer_\d+/w", "w", "stack", 1)])["w"]
    np.testing.assert_array_equal(stacked[0, :, 0], [0, 1, 2, 10])


def test_a_sign_belongs_to_the_number_and_names_of_different_lengths_compare():
    names = ["a/layer_10/k", "a/layer_2/k", "a/layer_1/k", "a/layer_1/b", "b/x", "a_-2", "a_3", "a", "a_1.5"]
    assert sorted(names, key=natural_key) == [
        "a", "a/layer_1/b", "a/layer_1/k", "a/layer_2/k", "a/layer_10/k", "a_-2", "a_1.5", "a_3", "b/x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("transform", "source", "expected"),
    [
        ((), counted(2, 3), counted(2, 3)),
        (("reshape",), counted(6), counted(2, 3)),
        (("reshape", None), counted(6), counted(2, 3)),
        (("reshape", [3, 2]), counted(6), counted(3, 2)),
        (("squeeze", 1), counted(2, 1, 3), counted(2, 3)),
        (("squeeze", -1), counted(2, 1), counted(2)),
        (("stack", 0), counted(2), counted(1, 2)),
        (("expand_tile", 0, 4), counted(3), np.stack([counted(3)] * 4)),
        (("expand_tile", [0, 2], [4, 2]), counted(3, 5), np.tile(counted(3, 5)[None, :, None], (4, 1, 2, 1))),
        (("zoom",), counted(3), np.array([0, 0.5, 1, 1.5, 2])),
        (("vit_zoom",), counted(1, 4, 1), np.array([0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3]).reshape(1, 9, 1)),
    ],
    ids=str,
)
def test_transforms_by_hand(transform, source, expected):
    target = jax.ShapeDtypeStruct(expected.shape, np.float32)
    result = apply_rules({"x": source}, {"y": target}, [("x", "y", *transform)])["y"]
    np.testing.assert_array_equal(result, expected)


def test_every_expert_gets_the_same_copy():
    experts = expand_tile(counted(3, 5), 0, 7)
    assert experts.shape == (7, 3, 5)
    assert (experts == counted(3, 5)).all()


@pytest.mark.parametrize("with_values", [True, False])
def test_a_class_token_that_the_source_lacks_is_the_targets_own(with_values):
    source = counted(1, 4, 2)
    target = 100 + counted(1, 10, 2) if with_values else jax.ShapeDtypeStruct((1, 10, 2), np.float32)
    token = apply_rules({"p": source}, {"p": target}, [("p", "p", "vit_zoom")])["p"][0, 0]
    if with_values:
        np.testing.assert_array_equal(token, [100, 101])
    else:
        assert 0 < np.abs(token).max() < 0.2  # drawn with 0.02, as new positions are


def test_values_are_cast_and_where_allowed_broadcast_to_the_target():
    source, target = {"x": counted(1, 3, dtype=np.float16)}, {"x": np.ones((5, 3), np.float32)}
    rules = [("x", "x")]
    result = apply_rules(source, target, rules, broadcast=True)["x"]
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.repeat(counted(1, 3), 5, axis=0))
    with pytest.raises(UserError, match=r"^'x' has shape \(5, 3\) in the target; the source has \(1, 3\) for it\.$"):
        apply_rules(source, target, rules)
    with pytest.raises(UserError, match=r"^'x' is float32 in the target; the source has float16 for it\.$"):
        apply_rules(source, target, rules, cast=False)
    with pytest.raises(UserError, match=r"^'x': \(1, 3\) cannot be broadcast to \(2, 2\)\.$"):
        apply_rules(source, {"x": np.ones((2, 2))}, rules, broadcast=True)


def test_what_matches_nothing_is_an_error_unless_it_may_stay():
    source, target = {"a": counted(2)}, {"a": np.zeros(2), "b": np.full(3, 7.0)}
    with pytest.raises(UserError, match=r"^No rule matches 'a' of the source\. Add one; an empty replacement drops it"):
        apply_rules(source, target, [])
    with pytest.raises(UserError, match=r"^The source has nothing for 'b' of the target\.$"):
        apply_rules(source, target, [], keep_unmatched_names=True)
    result = apply_rules(source, target, [], keep_unmatched_names=True, keep_unmatched_targets=True)
    np.testing.assert_array_equal(result["a"], [0, 1])
    np.testing.assert_array_equal(result["b"], [7, 7, 7])
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in target.items()}
    with pytest.raises(UserError, match=r"^Neither source nor target has a value for 'b'\.$"):
        apply_rules(source, shapes, [], keep_unmatched_names=True, keep_unmatched_targets=True)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ([("a", "c")], "'a/1' of the source becomes 'c/1', which the target lacks."),
        ([(".*/", "b"), (r"/\d", "")], "'a/1' of the source becomes 'b1', which the target lacks."),
        ([(r"^(a).*", r"\1")], "'a/2' is not the only array of the source that becomes 'a'."),
        (
            [("^(a)/1", r"\1"), ("^(a)/2", r"\1", "stack", 0)],
            "'a/2' is not the only array of the source that becomes 'a'.",
        ),
        (
            [("a/2", ""), ("/1", "", "reshape", (7,))],
            "'a' cannot be made by the rule ('/1', '', 'reshape', (7,)): "
            "cannot reshape array of size 2 into shape (7,)",
        ),
        (
            [("a/2", ""), ("/1", "", "squeeze", "x")],
            "'a' cannot be made by the rule ('/1', '', 'squeeze', 'x'): "
            "'str' object cannot be interpreted as an integer",
        ),
        (
            [("a/2", ""), ("/1", "", "vit_zoom")],
            "'a' cannot be made by the rule ('/1', '', 'vit_zoom'): positions are [1, N, D] with the same D, "
            "not (2,) and (2,).",
        ),
        (
            [("(", "a")],
            "The rule ('(', 'a') has no regular expression: missing ), unterminated subpattern at position 0.",
        ),
        (
            [("a", r"\2")],
            r"The replacement of the rule ('a', '\\2') does not fit its expression: invalid group reference 2 "
            "at position 1.",
        ),
        (
            [("a", "b", "tile")],
            "The rule ('a', 'b', 'tile') has an unknown transform; use one of reshape, squeeze, stack, expand_tile, "
            "zoom, vit_zoom.",
        ),
        (
            [("a", "b", "stack")],
            "The rule ('a', 'b', 'stack') wants a replacement and 1 to 1 arguments of its transform.",
        ),
        (
            [("a", None, "zoom")],
            "The rule ('a', None, 'zoom') wants a replacement and 0 to 0 arguments of its transform.",
        ),
        (["head"], "A rule is (regular expression, replacement, transform, *arguments), not 'head'."),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(rules, sentence):
    with pytest.raises(UserError) as error:
        apply_rules({"a/1": counted(2), "a/2": counted(2)}, {"a": counted(2)}, rules)
    assert str(error.value) == sentence


def test_a_rule_may_be_written_as_a_list_or_a_rule():
    rule = Rule("a", "b", "expand_tile", ((0, 1), (2, 3)))
    assert parse_rules([["a", "b", "expand_tile", [0, 1], [2, 3]]]) == parse_rules([rule]) == (rule,)


def test_modules_of_old_files_are_renumbered_per_type():
    block = ("LayerNorm_0/b", "MultiHeadDotProductAttention_1/out/b", "LayerNorm_2/b", "MlpBlock_3/Dense_1/b")
    old = [f"Transformer/encoderblock_{i}/{module}" for i in (0, 1, 10) for module in block]
    # Of three blocks the last is the third whatever its number was, and of one Dense it is the first.
    block = ("LayerNorm_0/b", "MultiHeadDotProductAttention_0/out/b", "LayerNorm_1/b", "MlpBlock_0/Dense_0/b")
    new = [f"Transformer/encoderblock_{i}/{module}" for i in (0, 1, 2) for module in block]
    assert list(renumber_modules(iter(old)).items()) == list(zip(old, new, strict=True))


def test_names_that_are_numbered_per_type_stay_as_they_are():
    names = [
        "cls",
        "posembed_input/pos_embedding",
        "block_0/Dense_0/kernel",
        "block_0/Dense_1/kernel",
        "block_1/Norm_0/b",
    ]
    assert renumber_modules(names) == {name: name for name in names}
