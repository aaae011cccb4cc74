"""Inversion by optimisation and by an encoder, and its command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstyle import invert, pipeline, weights
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.errors import UserError
from jaxstyle.features.lpips import LPIPS
from jaxstyle.invert import Search
from jaxstyle.stylegan2 import Generator
from tests.small_models import save_base

GENERATOR = Generator(32, channels=(16, 16, 16, 8), mapping_depth=2, z_dim=8, w_dim=8)
JUDGE = LPIPS()


@pytest.fixture(scope="module")
def setting():
    """A random generator, LPIPS, and three of the generator's pictures."""
    params = GENERATOR.init_params(key=jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (3, 8))
    apply = jax.jit(lambda p, z: GENERATOR.apply({"params": p}, z))
    targets, out = apply(params, z)
    params["w_avg"] = out["w"].mean(0)
    _, judge_params = weights.load("lpips_alexnet")
    return params, judge_params["lpips"], targets


def search_for(setting, targets, space, steps, **options):
    params, judge_params, _ = setting
    return invert.optimize(
        GENERATOR,
        params,
        JUDGE,
        judge_params,
        targets,
        Search(space=space, steps=steps),
        key=jax.random.key(2),
        progress=False,
        **options,
    )


@pytest.mark.parametrize("space", ["w_plus", "w", "z"])
def test_search_comes_near_to_the_pictures(setting, space):
    params, judge_params, targets = setting

    @jax.jit
    def distance(images):
        return JUDGE.apply({"params": judge_params}, images, targets)

    average = GENERATOR.apply({"params": params}, params["w_avg"][None], space="w")[0]
    before = distance(jnp.broadcast_to(average, targets.shape))
    found = search_for(setting, targets, space, 60)
    assert found["w_plus"].shape == (3, 10 - 2, 8)
    assert found["loss"].shape == (3,)
    after = distance(found["images"])
    assert (after < 0.7 * before).all() if space != "z" else after.sum() < before.sum()
    again = GENERATOR.apply({"params": params}, found["w_plus"], space="w_plus")[0]
    np.testing.assert_allclose(again, found["images"], atol=1e-4)
    if space != "w_plus":
        assert found[space].shape == (3, 8)
        assert (found["w_plus"] == found["w"][:, None]).all()


def test_each_picture_is_searched_alone(setting):
    targets = setting[2]
    together = search_for(setting, targets, "w_plus", 12)["w_plus"]
    alone = search_for(setting, targets[1:2], "w_plus", 12)["w_plus"]
    np.testing.assert_allclose(alone[0], together[1], atol=2e-3)
    # The same command again gives the same bits.
    again = search_for(setting, targets[1:2], "w_plus", 12)["w_plus"]
    assert (alone == again).all()


def test_rows_stay_together_for_the_first_third(setting):
    path = search_for(setting, setting[2][:1], "w_plus", 12, snapshots=12)["path"]
    spread = np.ptp(np.asarray(path)[:, 0], axis=1).max(-1)
    assert len(path) == 13
    assert (spread[:5] == 0).all() and (spread[6:] > 0).all()


def test_pull_brings_codes_to_the_average(setting):
    params, judge_params, targets = setting
    far = []
    for pull in (0.0, 100.0):
        found = invert.optimize(
            GENERATOR,
            params,
            JUDGE,
            judge_params,
            targets[:1],
            Search(space="w", steps=30, pull=pull),
            key=jax.random.key(2),
            progress=False,
        )
        far.append(float(jnp.abs(found["w"] - params["w_avg"]).max()))
    assert far[1] < 0.1 * far[0]


def test_pictures_for_lpips():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    large = invert.for_lpips(x)
    assert large.shape == (1, 128, 128, 3)
    np.testing.assert_array_equal(large[:, ::8, 7::8], x)
    np.testing.assert_array_equal(invert.for_lpips(large), large)
    x = jnp.ones((1, 1024, 1024, 3)) * jnp.arange(1024.0)[:, None, None]
    np.testing.assert_allclose(invert.for_lpips(x)[0, :, 0, 0][:2], [1.5, 5.5])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three pictures that need no alignment."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)
    for name, array in zip("abc", pixels, strict=True):
        Image.fromarray(array).save(folder / f"{name}.png")
    return folder


def test_command_optimizes(tmp_path, photos, capsys):
    base = save_base(tmp_path / "base", size=32)
    out = tmp_path / "found"
    common = ["--weights", base, "--no-align", "--steps", "3"]
    invert.main(
        [
            str(photos),
            *common,
            "--out",
            str(out),
            "--limit",
            "2",
            "--side-by-side",
            "--video",
            "--space",
            "w",
        ]
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "a-inverted.png",
        "a-search.webp",
        "b-inverted.png",
        "b-search.webp",
        "codes.npz",
    ]
    with np.load(out / "codes.npz") as file:
        assert file["w_plus"].shape == (2, 8, 16) and file["w"].shape == (2, 16)
        assert list(file["names"]) == ["a", "b"]
    assert "a: (8, 16) code, loss" in capsys.readouterr().out
    generator, _ = pipeline.load_generator(base)
    assert pipeline.read_codes(out / "codes.npz", generator)[1] == "w_plus"
    single = tmp_path / "deep" / "me.npz"
    invert.main([str(photos / "c.png"), *common, "--out", str(single), "--codes-only"])
    assert [p.name for p in single.parent.iterdir()] == ["me.npz"]


def test_command_encodes(tmp_path, photos):
    base = save_base(tmp_path / "base", size=32)
    encoder = GradualStyleEncoder(
        num_styles=8,
        size=64,
        units=(1, 1),
        channels=(8, 8),
        se_ratio=4,
        w_dim=16,
        level_rows=(3,),
    )
    folder = str(tmp_path / "encoder")
    params = {"encoder": encoder.init_params(key=jax.random.key(0))}
    weights.save(folder, {"encoder": encoder}, params)
    out = tmp_path / "codes.npz"
    common = [str(photos), "--encoder", folder, "--no-align", "--out", str(out)]
    invert.main([*common, "--weights", base, "--batch", "2"])
    with np.load(out) as file:
        assert file["w_plus"].shape == (3, 8, 16)
    assert (tmp_path / "c-inverted.png").exists()
    other = save_base(tmp_path / "other", size=16)
    with pytest.raises(SystemExit):
        invert.main([*common, "--weights", other])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--encoder", "here/e4e", "--video"], "leave out --encoder"),
        (["--encoder", "here/e4e", "--space", "w"], "options of the search"),
    ],
)
def test_refuses_in_one_line(tmp_path, photos, capsys, options, message):
    base = save_base(tmp_path / "base", size=32)
    with pytest.raises(SystemExit):
        invert.main([str(photos), "--weights", base, "--no-align", *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_refuses_pictures_of_another_size(setting):
    with pytest.raises(UserError, match=r"\[n, 32, 32, 3\]"):
        search_for(setting, jnp.zeros((1, 64, 64, 3)), "w", 3)
