import jax
import jax.numpy as jnp
import pytest

from jmoe.dispatch import auto_method, combine, dispatch, resolve
from jmoe.routing import ExpertChoice, Soft, TopK

GATES = jnp.full((2, 7, 5), 0.2)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_means_gather_unless_an_accelerator_drops_nothing(platform):
    dropless = "gather" if platform == "cpu" else "ragged"
    assert auto_method(TopK(k=2, capacity_factor=0.5)(GATES), platform) == "gather"
    assert auto_method(TopK(k=2, capacity_factor=None)(GATES), platform) == dropless
    assert auto_method(TopK(k=2, capacity_factor=None, capacity=7)(GATES), platform) == dropless  # room for all 7
    assert auto_method(ExpertChoice(capacity_factor=5.0)(GATES), platform) == "gather"  # its slots are all full


def test_auto_follows_the_platform_of_jax():
    routing = TopK(k=2, capacity_factor=None)(GATES)
    assert resolve("auto", routing) == auto_method(routing, jax.default_backend())


def test_a_named_method_is_what_runs():
    routing = TopK(k=2)(GATES)
    for method in ("einsum", "gather", "ragged"):
        assert resolve(method, routing) == method


def test_a_mixing_always_goes_by_einsum():
    mixing = Soft()(GATES[..., None])
    for method in ("auto", "einsum", "gather"):
        assert resolve(method, mixing) == "einsum"


@pytest.mark.usefixtures("untyped")
def test_an_unknown_method_is_refused():
    sentence = r"^There is no dispatch method 'scatter'; use one of 'auto', 'einsum', 'gather', 'ragged'\.$"
    routing = TopK(k=2)(GATES)
    with pytest.raises(ValueError, match=sentence):
        dispatch(jnp.ones((2, 7, 3)), routing, "scatter")
    with pytest.raises(ValueError, match=sentence):
        combine(jnp.ones((2, 5, 4, 3)), routing, "scatter")


def test_a_mixing_without_slots_is_refused():
    mixing = Soft()(GATES[..., None])
    with pytest.raises(ValueError, match=r"^A soft router mixes tokens in fixed slots, which 'ragged' does not have"):
        dispatch(jnp.ones((2, 7, 3)), mixing, "ragged")


@pytest.mark.parametrize("decision", [TopK(k=2)(GATES), Soft()(GATES[..., None])], ids=["routing", "mixing"])
@pytest.mark.parametrize("shape", [(2, 6), (1, 7)])
def test_tokens_of_another_decision_are_refused(decision, shape):
    groups, tokens = shape
    with pytest.raises(ValueError, match="dispatch got x with") as error:
        dispatch(jnp.ones((*shape, 3)), decision)
    assert str(error.value) == (f"dispatch got x with {groups} groups of {tokens} tokens; the decision is of 2 of 7.")
