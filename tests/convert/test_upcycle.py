import jax
import numpy as np
import pytest
from flax import nnx

from jmoe import ExpertChoice, MoEConfig, Soft, TopK
from jmoe.convert.infer import parameter_shapes
from jmoe.convert.names import flatten, nest
from jmoe.convert.upcycle import upcycle_arrays, upcycle_params
from jmoe.errors import UserError
from jmoe.models.vit import VisionTransformer, ViTConfig
from tests.drawn import normal
from tests.routing import routers
from tests.tolerance import tolerance

E = 3
EVERYBODY = TopK(k=2, capacity_factor=None, renormalize=True)


def dense():
    """A dense model of two blocks, and parameters of which no two are alike."""
    config = ViTConfig(patch_size=2, width=8, depth=2, hidden_dim=12, num_heads=2, num_classes=5, image_size=(4, 6))
    draw = np.random.default_rng(0)
    shapes = sorted(parameter_shapes(config).items())
    return config, {name: draw.normal(size=shape, scale=0.4).astype(np.float32) for name, shape in shapes}


def sparse(router=EVERYBODY, layers=(1,), **options):
    config, _ = dense()
    moe = MoEConfig(num_experts=E, router=router, layers=layers, **options)
    return ViTConfig(**{**vars(config), "moe": moe})


def logits(config, params):
    """Of six images, in training mode without noise or dropout."""
    graph = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))[0]
    state = nnx.state(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, _with_numbers(nest(params)))
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x).logits)(state, normal(6, 4, 6, 3)))


def _with_numbers(tree):
    """Blocks are counted by integers."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _with_numbers(value) for key, value in tree.items()}


def test_every_expert_is_a_copy_of_the_mlp_and_everything_else_as_it_was():
    _, params = dense()
    result = upcycle_params(params, sparse(layers=(0, 1)))
    assert result.keys() == parameter_shapes(sparse(layers=(0, 1))).keys()
    copies = [name for name in result if "/moe/experts/" in name]
    assert len(copies) == 8
    for name in copies:
        assert result[name].shape[0] == E
        assert (result[name] == params[name.replace("moe/experts", "mlp")]).all()
    for name in result.keys() & params.keys():
        np.testing.assert_array_equal(result[name], params[name])
    assert len(result.keys() & params.keys()) == len(params) - 8


def test_gates_are_normal_with_the_published_deviation_and_all_different():
    wide = ViTConfig(**{**vars(sparse(layers=(0, 1))), "width": 512, "hidden_dim": 4})
    gates = upcycle_gates(wide, seed=0)
    kernel, second = gates.values()
    assert kernel.shape == (512, E)
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)  # of 1,536
    assert kernel.dtype == np.float32
    assert not np.isclose(kernel, second).any()
    wider = upcycle_gates(wide, seed=0, gate_std=0.5)
    np.testing.assert_allclose(wider["blocks/0/moe/gate/kernel"], 25 * kernel, rtol=1e-5)
    assert not np.isclose(upcycle_gates(wide, seed=1)["blocks/0/moe/gate/kernel"], kernel).any()


def upcycle_gates(config, **options):
    zeros = {
        name: np.zeros(shape, np.float32)
        for name, shape in parameter_shapes(ViTConfig(**{**vars(config), "moe": None})).items()
    }
    return {name: value for name, value in upcycle_params(zeros, config, **options).items() if "/gate/" in name}


def test_slots_of_a_soft_router_start_as_they_always_do():
    gates = upcycle_gates(sparse(router=Soft(slots_per_expert=2), images_per_group=1))
    assert gates["blocks/1/moe/gate/scale"] == 1
    assert gates["blocks/1/moe/gate/mu"].shape == (8, E, 2)
    assert 0.1 < gates["blocks/1/moe/gate/mu"].std() < 0.3  # 1 / sqrt(D * E) = 0.2


@pytest.mark.parametrize(
    "router",
    [EVERYBODY, ExpertChoice(capacity_factor=float(E), renormalize=True)],
    ids=routers.name,
)
def test_with_renormalised_weights_and_room_for_everybody_the_start_is_the_dense_model(router):
    config, params = dense()
    expected = logits(config, params)
    assert expected.std() > 0.1
    start = sparse(router)
    np.testing.assert_allclose(logits(start, upcycle_params(params, start)), expected, **tolerance(np.float32))


@pytest.mark.parametrize(
    "router", [TopK(k=2, capacity_factor=None), TopK(k=2, capacity_factor=0.5, renormalize=True)], ids=routers.name
)
def test_without_either_it_is_not(router):
    config, params = dense()
    start = sparse(router)
    assert np.abs(logits(start, upcycle_params(params, start)) - logits(config, params)).max() > 0.01


def test_the_state_of_an_optimizer_is_copied_to_every_expert_and_zero_at_the_gates():
    # A moment, a factored one, the placeholder of one that is not factored, and a counter.
    state = {
        "mu/blocks/1/mlp/w_in": normal(2, 5),
        "v_row/blocks/1/mlp/w_in": normal(2),
        "v/blocks/1/mlp/w_in": np.zeros(1, np.float32),
        "mu/blocks/0/mlp/w_in": normal(2, 5, seed=2),
        "count": np.int32(7),
    }
    wanted = {
        "count": (),
        "mu/blocks/0/mlp/w_in": (2, 5),
        "mu/blocks/1/moe/experts/w_in": (E, 2, 5),
        "v_row/blocks/1/moe/experts/w_in": (E, 2),
        "v/blocks/1/moe/experts/w_in": (1,),
        "mu/blocks/1/moe/gate/kernel": (2, E),
    }
    state = {name: np.asarray(value) for name, value in state.items()}
    result = upcycle_arrays(state, wanted)
    assert {name: value.shape for name, value in result.items()} == wanted
    assert result["count"] == 7
    for moment in ("mu", "v_row"):
        assert (result[f"{moment}/blocks/1/moe/experts/w_in"] == state[f"{moment}/blocks/1/mlp/w_in"]).all()
    np.testing.assert_array_equal(result["mu/blocks/0/mlp/w_in"], state["mu/blocks/0/mlp/w_in"])
    assert not result["mu/blocks/1/moe/gate/kernel"].any()


def test_what_does_not_fit_is_named():
    _, params = dense()
    with pytest.raises(UserError) as error:
        upcycle_params(params, sparse(hidden_dim=16))
    assert str(error.value) == (
        "The dense model cannot be made sparse like this: "
        "'blocks/1/mlp/b_in' is (12,) there and would be (3, 16) at 'blocks/1/moe/experts/b_in'; "
        "'blocks/1/mlp/w_in' is (8, 12) there and would be (3, 8, 16) at 'blocks/1/moe/experts/w_in'; "
        "'blocks/1/mlp/w_out' is (12, 8) there and would be (3, 16, 8) at 'blocks/1/moe/experts/w_out'."
    )


def test_what_is_left_over_or_lacking_is_named():
    _, params = dense()
    params["extra"] = params.pop("head/bias")
    with pytest.raises(
        UserError, match=r"like this: it lacks 'head/bias'; the sparse model has no place for 'extra'\.$"
    ):
        upcycle_params(params, sparse())


def test_gates_without_a_deviation_are_refused():
    with pytest.raises(UserError, match=r"^The gates want a standard deviation above 0, or nothing .*; it is 0\.0\.$"):
        upcycle_params({}, sparse(), gate_std=0.0)


def test_the_dense_model_is_not_changed():
    _, params = dense()
    before = flatten({name: value.copy() for name, value in params.items()})
    upcycle_params(params, sparse())
    assert all((params[name] == before[name]).all() for name in before)
