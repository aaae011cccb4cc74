import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxstyle.encoders import (
    BackboneWPlusEncoder,
    Encoder4Editing,
    LatentDiscriminator,
)
from jaxstyle.errors import UserError
from jaxstyle.features.lpips import LPIPS
from jaxstyle.stylegan2 import Discriminator, Generator
from tests.train.test_loop import mesh_of
from train import sharding
from train.state import create_state


def test_mesh_axes():
    mesh = sharding.make_mesh(data=2, fsdp=2, space=2)
    assert dict(mesh.shape) == {"style": 1, "data": 2, "fsdp": 2, "space": 2}
    assert dict(sharding.make_mesh(style=2).shape)["data"] == 4
    assert sharding.make_mesh(data=1).size == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 3}, "= 3 does not divide the 8 devices"),
        ({"data": 16}, "has 16 places for 8 devices"),
        ({"fsdp": 0}, "--mesh-fsdp is 0"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)


def test_batch_names_both_numbers():
    with pytest.raises(UserError, match="--batch is 12 over 8 devices.*--batch 16"):
        sharding.check_batch(12, mesh_of(8))
    sharding.check_batch(16, mesh_of(8))
    assert list(sharding.process_rows(mesh_of(8), 16)) == list(range(16))


def test_rules_split_weights_and_moments_alike():
    modules = {
        "generator": Generator(16, channels=(8, 8, 8), mapping_depth=2),
        "discriminator": Discriminator(16, channels=(8, 8, 8)),
    }
    shapes = jax.eval_shape(
        lambda key: create_state(
            {n: m.init_params(key=key) for n, m in modules.items()},
            {n: optax.adam(1.0) for n in modules},
            key=key,
            ema=["generator"],
        ),
        jax.random.key(0),
    )
    layout = sharding.shardings(shapes, mesh_of(8, fsdp=4))
    conv, dense = P(None, None, None, "fsdp"), P(None, "fsdp")
    for tree in (
        layout.params["generator"],
        layout.ema["generator"],
        layout.opt_state["generator"][0].mu,
        layout.opt_state["generator"][0].nu,
    ):
        assert tree["synthesis"]["up_8"]["weight"].spec == conv
        assert tree["synthesis"]["up_8"]["affine"]["weight"].spec == dense
        assert tree["mapping"]["dense_0"]["weight"].spec == dense
        # Three output channels do not divide by four.
        assert not any(tree["synthesis"]["rgb_8"]["weight"].spec)
        assert tree["synthesis"]["up_8"]["bias"].spec == P()
    critic = layout.params["discriminator"]
    assert critic["from_rgb"]["weight"].spec == conv
    assert critic["block_16"]["conv1"]["weight"].spec == conv
    assert critic["final_conv"]["weight"].spec == conv
    assert critic["dense_0"]["weight"].spec == dense
    assert layout.key.spec == layout.step.spec == P()
    whole = [s for s in jax.tree.leaves(sharding.shardings(shapes, mesh_of(8)))]
    assert all(s.is_fully_replicated for s in whole)


@pytest.mark.parametrize(
    "module",
    [Encoder4Editing(), BackboneWPlusEncoder(), LatentDiscriminator(), LPIPS()],
    ids=lambda m: type(m).__name__,
)
def test_rules_fit_every_network(module):
    shapes = jax.eval_shape(lambda: module.init_params(key=jax.random.key(0)))
    layout = sharding.shardings({"frozen": {"x": shapes}}, mesh_of(8, fsdp=8))
    for spec, x in zip(*map(jax.tree.leaves, (layout, shapes)), strict=True):
        if x.ndim == 4:
            assert spec.spec == P(None, None, None, "fsdp")


def test_rules_must_cover_and_fit():
    tree = {"a": np.zeros((4, 4)), "b": np.zeros(4)}
    with pytest.raises(UserError, match="no sharding rule covers b"):
        sharding.shardings(tree, mesh_of(2), [("^a$", P())])
    with pytest.raises(UserError, match="its shape is .4."):
        sharding.shardings(tree, mesh_of(2), [("", P(None, "fsdp"))])


def test_place_copies(key):
    mesh = mesh_of(8, fsdp=8)
    tree = {"weight": np.arange(32.0, dtype=np.float32).reshape(4, 8), "key": key}
    rules = [("weight", P(None, "fsdp")), ("", P())]
    placed = sharding.place(tree, sharding.shardings(tree, mesh, rules))
    assert placed["weight"].addressable_shards[0].data.shape == (4, 1)
    tree["weight"][:] = 0
    np.testing.assert_array_equal(placed["weight"].ravel(), np.arange(32))
    assert jnp.array_equal(jax.random.key_data(placed["key"]), jax.random.key_data(key))
    weight = placed["weight"]
    assert sharding.place(weight, weight.sharding, take=True) is weight
    assert sharding.place(weight, weight.sharding) is not weight


def test_global_batch_splits_samples_and_rows():
    mesh = sharding.make_mesh(data=2, fsdp=2, space=2)
    images = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    batch = sharding.global_batch({"image": images, "label": np.arange(8)}, mesh)
    np.testing.assert_array_equal(batch["image"], images)
    assert batch["image"].addressable_shards[0].data.shape == (2, 2, 4, 3)
    assert batch["label"].addressable_shards[0].data.shape == (2,)


def test_draws_are_split_over_the_devices(key):
    def draw(key):
        return sharding.sample_normal(key, 16, 3)

    with jax.set_mesh(mesh_of(8)):
        split = jax.jit(draw)(key)
    assert split.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(split, draw(key))
    # Sample i depends on i alone.
    np.testing.assert_array_equal(split[:5], sharding.sample_normal(key, 5, 3))


def test_constrain_leaves_what_does_not_divide():
    with jax.set_mesh(mesh_of(8)):
        odd = jax.jit(sharding.constrain)(jnp.zeros((6, 2)))
    assert odd.shape == (6, 2)


def test_weights_are_whole_inside_a_step():
    mesh = mesh_of(8, fsdp=8)
    tree = {"conv": {"weight": np.ones((1, 1, 2, 8), np.float32)}}
    layout = sharding.shardings(tree, mesh)
    placed = sharding.place(tree, layout)
    assert placed["conv"]["weight"].addressable_shards[0].data.shape[-1] == 1
    whole = jax.jit(lambda t: sharding.gathered(t, layout))(placed)
    assert whole["conv"]["weight"].is_fully_replicated
