import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.nn import MoEConfig, MoEMlp
from jmoe.routing import EntropicPlan, ExpertChoice, Gating, Importance, Load, QuadraticPlan, TopK, Transport, decide
from tests.drawn import drawn, normal
from tests.routing.routers import compiled, kept_places, weights_of

G, S, E = 2, 12, 4
route = compiled(decide)
route_loss = compiled(lambda options, gating: options[0](gating, decide(options[1], gating)))
choose = compiled(lambda choice, plan: choice(plan))
transport = compiled(lambda router, gating: router.transport(gating))
QUIET = TopK(k=1, capacity_factor=1.0, multiple=1, noise_std=0.0)


def noisy_gating(seed=0, skew=0.0):
    """Logits of which some experts may be liked by all, with noise."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(G, S, E)) + skew * np.arange(E), jnp.float32)
    return Gating(logits=logits, noisy_logits=logits + jnp.asarray(rng.normal(size=(G, S, E)), jnp.float32), sigma=1.0)


def test_two_tokens_that_want_one_expert_share_it_by_how_much_they_lose_elsewhere():
    """Both like expert 0 best, the first by more: the plan has it for the first, and the second goes to expert 1."""
    gating = Gating(logits=(logits := jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]]))), noisy_logits=logits)
    assert [place[1] for place in kept_places(route(QUIET, gating))] == [0]  # one is dropped
    plan = EntropicPlan(steps=50)
    for choice in (QUIET, ExpertChoice(capacity_factor=1.0, noise_std=0.0)):
        routing = route(Transport(choice=choice, plan=plan), gating)
        assert kept_places(routing) == [(0, 0, 0, 0), (0, 1, 0, 1)]
        assert weights_of(routing) == pytest.approx({(0, 0, 0, 0): 0.9, (0, 1, 0, 1): 0.4})
    # Scaled by columns and rows to sums of 1, it is [[x, 1 - x], [1 - x, x]] with (x / (1 - x))^2 = 9 / 1.5.
    x = np.sqrt(6) / (1 + np.sqrt(6))
    np.testing.assert_allclose(transport(Transport(plan=plan), gating), [[[x, 1 - x], [1 - x, x]]], rtol=1e-5)


@pytest.mark.parametrize("plan", [EntropicPlan(), EntropicPlan(solver="newton"), QuadraticPlan()], ids=repr)
def test_a_plan_drops_fewer_choices_than_gates_that_all_like_the_same(plan):
    gating = noisy_gating(skew=0.5)
    by_gates, by_plan = route(QUIET, gating), route(Transport(choice=QUIET, plan=plan), gating)
    dropped_by_gates, dropped_by_plan = (np.mean(routing.slot >= routing.capacity) for routing in (by_gates, by_plan))
    assert dropped_by_plan < dropped_by_gates - 0.1


@pytest.mark.parametrize("choice", [TopK(k=2), ExpertChoice()], ids=["tokens choose", "experts choose"])
def test_choices_are_by_the_plan_and_weights_by_what_one_says(choice):
    gating = noisy_gating()
    router = Transport(choice=choice, plan=EntropicPlan())
    plan = transport(router, gating)
    sources = {"gates": jax.nn.softmax(gating.noisy_logits), "clean_gates": jax.nn.softmax(gating.logits), "plan": plan}
    for weights, source in sources.items():
        kept = weights_of(route(dataclasses.replace(router, weights=weights), gating))
        assert kept.keys() == set(kept_places(choose(choice, plan)))
        for (g, e, _, s), weight in kept.items():
            assert weight == pytest.approx(float(source[g, s, e]), rel=1e-6)


def test_the_sparse_plan_has_as_many_nonzeros_as_are_chosen():
    gating = noisy_gating()
    of_tokens = transport(Transport(choice=TopK(k=2, noise_std=0.0)), gating)
    assert ((of_tokens > 0).sum(axis=2) <= 2).all()
    np.testing.assert_allclose(of_tokens.sum(axis=2), 1, rtol=1e-5)
    of_experts = transport(Transport(choice=ExpertChoice(capacity_factor=1.0, multiple=5)), gating)
    assert ((of_experts > 0).sum(axis=1) <= 5).all()  # C = 3, rounded up to a multiple of 5
    np.testing.assert_allclose(of_experts.sum(axis=1), 3, rtol=1e-5)


def test_losses_of_token_choice_may_be_added_to_it():
    gating = noisy_gating()
    router = Transport(choice=TopK(k=2), plan=EntropicPlan())
    assert router.losses == ()
    for loss in (Importance(), Load()):
        both = [route_loss((loss, router), gating) for router in (router, TopK(k=2))]
        np.testing.assert_allclose(*both)
        assert both[0] > 0


def test_a_layer_learns_through_the_weights():
    config = MoEConfig(num_experts=E, hidden_dim=5, router=Transport(choice=QUIET), images_per_group=2)
    layer = drawn(lambda rngs: MoEMlp(config, 3, rngs=rngs))
    graph, state = nnx.split(layer)

    @jax.jit
    @jax.grad
    def gradient(state):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(normal(4, 6, 3)).y))

    assert gradient(state)["gate"]["kernel"][...].any()


def test_noise_is_that_of_the_choice():
    assert Transport(choice=TopK(k=1, noise_std=0.5)).noise_std == 0.5
    assert Transport().noise_std == 0.0  # the paper has none


def test_an_ensemble_is_refused():
    gating = dataclasses.replace(noisy_gating(), members=2)
    with pytest.raises(ValueError, match=r"^Transport cannot route the 2 members of an ensemble"):
        decide(Transport(), gating)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (TopK(k=5), r"^TopK has k=5, but there are only 4 experts\. Choose k from 1 to 4\.$"),
        (ExpertChoice(capacity_factor=5.0), r"^ExpertChoice gives each expert 15 of a group's 12 tokens"),
    ],
    ids=["too many experts", "too many tokens"],
)
def test_what_the_choice_refuses_is_refused(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        Transport(choice=choice)(noisy_gating())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Transport(weights="softmax"),
            r"^Transport wants weights 'gates', 'clean_gates' or 'plan'; it got 'so",
        ),
        (lambda: QuadraticPlan(steps=0), r"^QuadraticPlan wants at least 1 of its steps; it got 0\.$"),
        (lambda: QuadraticPlan(learning_rate=0.0), r"^QuadraticPlan wants a learning_rate above 0; it got 0\.0\.$"),
        (lambda: EntropicPlan(solver="lbfgs"), r"^EntropicPlan wants solver 'sinkhorn' or 'newton'; it got 'lbfgs'\.$"),
        (lambda: EntropicPlan(steps=-1), r"^EntropicPlan wants at least 0 steps; it got -1\.$"),
        (
            lambda: EntropicPlan(solver="newton", steps=0),
            r"^EntropicPlan wants at least 1 of Newton's steps; it got 0\.$",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
