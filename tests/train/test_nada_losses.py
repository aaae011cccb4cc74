"""StyleGAN-NADA's losses and sentences against the published code's values."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convert import clip as names
from convert.report import Report
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip_text
from jaxstyle.features.clip import CLIP, normalise
from tests.clip_models import SMALL, golden_clip, test_image
from tests.filled import GOLDEN, golden, nhwc, relative_error
from train import nada_losses, nada_text
from train.nada_losses import Terms

TINY = [f"{size}_{mode}" for mode in ("antialias", "plain") for size in (64, 256, 512)]
TINY += ["1024_antialias", "1024_plain"]
QUICK = ("64_antialias", "64_plain", "512_antialias")


def expected(part):
    return json.loads((GOLDEN / "nada.json").read_text())[part]


@functools.lru_cache(maxsize=1)
def judge_and_anchors(name):
    """The golden CLIP, and what it makes of photo -> sketch."""
    state, config = golden_clip(f"clip_{name}")
    given = names._hugging_face(config) if name.endswith("hf") else {}
    networks, params = names.networks(state, given, Report())
    judge = clip_text.Judge(name, networks["clip"], params["clip"])
    return judge, nada_losses.anchors(judge, "photo", "sketch", "tiny" in name)


def test_sentences_equal_the_published_ones():
    tokenizer = clip_text.load_tokenizer()
    for key, ids in golden("nada_tokens").items():
        kind, _, name = key.partition("_")
        templates = {"templates": nada_text.TEMPLATES, "parts": nada_text.PARTS}[kind]
        texts = nada_text.filled(name.replace("_", " "), templates)
        got = clip_text.tokenize(tokenizer, texts, CLIP())
        np.testing.assert_array_equal(got, ids, err_msg=key)


def check(name, case, about, stored):
    """Values and gradients of every loss of one case."""
    judge, given = judge_and_anchors(name)
    assert relative_error(given["direction"], stored[f"{case}_text_direction"]) < 5e-6
    size, mode = case.split("_")
    resize = "antialias" if mode == "antialias" else "torch-1.7"
    batch, size = 2 if "tiny" in name else 1, int(size)
    source = test_image(f"src:{size}", batch, size)
    other = test_image(f"dst:{size}", batch, size)
    target = np.float32(0.7) * source + np.float32(0.3) * other
    centers = {k: np.array(v) for k, v in about.get("patch_centers_seed7", {}).items()}
    wanted = [k for k in about if k not in ("patch_centers_seed7",)]

    def losses(params, given, target):
        def apply(x, method):
            return judge.module.apply({"params": params}, x, resize, method=method)

        def embed(x):
            return apply(x, "embed")

        before, after = embed(source), embed(target)

        def pair(kind, side):
            cut = [
                nada_losses.patches(x, centers[kind], side) for x in (source, target)
            ]
            return map(embed, cut)

        def value(name):
            kind = name.partition("_")[2]
            if name.startswith("direction"):
                return nada_losses.directional(before, after, given["direction"], kind)
            if name == "global":
                return nada_losses.to_text(after, given["target"])
            if name == "global_bare_text":
                return nada_losses.to_text(after, given["class"])
            if name == "manifold":
                return nada_losses.manifold(before, after, given["angle"])
            if name == "patch_directional":
                pairs = pair("directional", nada_losses.PATCH)
                return nada_losses.patch_directional(*pairs, given["parts"])
            if name == "patch_similarity":
                pairs = pair("similarity", nada_losses.SMALL_PATCH)
                parts = given["part_source"], given["part_target"]
                return nada_losses.patch_similarity(*pairs, *parts)
            assert name == "total_all_terms"
            terms = Terms(
                1, lambda_patch=0.5, lambda_global=0.25, lambda_manifold=0.125
            )
            places = centers["directional"]
            return nada_losses.loss(
                embed, given, terms, source, target, centers=places
            )[0]

        # The texture term is never reached in the published code.
        return jnp.stack([value(k) for k in wanted if k != "texture_substitute"])

    wanted = [k for k in wanted if k != "texture_substitute"]

    @jax.jit
    def run(params, given, target):
        values, back = jax.vjp(lambda x: losses(params, given, x), target)
        return values, jax.vmap(lambda c: back(c)[0])(jnp.eye(len(wanted)))

    values, gradients = run(judge.params, given, target)
    step = size // 8
    for loss, value, gradient in zip(wanted, values, gradients, strict=True):
        what = f"{case} {loss}"
        assert abs(value - about[loss]["value"]) < 1e-5, what
        norm = np.linalg.norm(gradient)
        assert abs(norm / about[loss]["grad_norm"] - 1) < 1e-4, what
        largest = np.abs(gradient).max()
        assert abs(largest / about[loss]["grad_abs_max"] - 1) < 1e-4, what
        part = nhwc(stored[f"{case}_grad_{loss}"])
        error = np.abs(gradient[:, ::step, ::step] - part).max()
        assert error < 1e-4 * largest, what


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in TINY]
)
def test_losses_equal_the_published_ones(case):
    about = expected("losses_tiny")[case]
    check("tiny_hf", case, about, golden("nada_losses_tiny"))


@pytest.mark.slow
def test_losses_at_full_size():
    about = expected("losses_vit_b32")["256_antialias"]
    check("vit_b32_hf", "256_antialias", about, golden("nada_losses_vit_b32"))


def test_equal_pictures_have_a_direction_to_go():
    wanted = jnp.array([[0.6, 0.8, 0.0]])
    same = jnp.array([[0.0, 0.0, 1.0]])
    value, gradient = jax.value_and_grad(
        lambda x: nada_losses.directional(same, x, wanted)
    )(same)
    assert value == 1
    # Downhill is where the text goes.
    np.testing.assert_allclose(-gradient / jnp.linalg.norm(gradient), wanted, atol=1e-6)


def test_crops_are_what_pillow_cuts():
    boxes = nada_losses.crop_boxes(jax.random.key(0), 2000)
    top, left, side = np.asarray(boxes).T
    assert (boxes >= 0).all() and (top + side <= 1 + 1e-6).all()
    assert (left + side <= 1 + 1e-6).all() and abs(np.median(side) - 0.5) < 0.02
    images = np.random.default_rng(0).uniform(-1, 1, (2, 40, 40, 3)).astype("f4")
    boxes = np.float32([[0.1, 0.2, 0.5], [0, 0, 1], [0.5, 0.25, 0.25], [0.3, 0, 0.7]])
    made = nada_losses.crops(images, boxes, 16)
    for crop, number, (top, left, side) in zip(made, (0, 0, 1, 1), boxes, strict=True):
        edges = 40 * np.float64([left, top, left + side, top + side])
        for channel in range(3):
            plane = Image.fromarray(images[number, ..., channel])
            wanted = plane.resize((16, 16), Image.Resampling.BILINEAR, tuple(edges))
            # Pillow sees beyond the box's border, we do too.
            np.testing.assert_allclose(crop[..., channel], wanted, atol=2e-3)
    half = nada_losses.crops(jnp.bfloat16(images), boxes, 16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype("f4"), made, atol=0.02)


def test_crops_have_the_other_losses():
    rng = np.random.default_rng(0)
    source, target = rng.uniform(-1, 1, (2, 3, 16, 16, 3)).astype("f4")
    given = {
        n: normalise(rng.standard_normal((1, 48))) for n in ("direction", "target")
    }

    def embed(x):
        return normalise(x[:, ::4, ::4].reshape(len(x), -1))

    def crop(direction, towards):
        terms = Terms(direction, lambda_global=towards, lambda_crop=0.5)
        key = jax.random.key(3)
        total, found = nada_losses.loss(embed, given, terms, source, target, key=key)
        rest = direction * found.get("direction", 0) + towards * found.get("global", 0)
        np.testing.assert_allclose(total, rest + 0.5 * found["crop"], rtol=1e-6)
        return found["crop"]

    both = 2 * crop(1.0, 0.0) + 3 * crop(0.0, 1.0)
    np.testing.assert_allclose(crop(2.0, 3.0), both, rtol=1e-5)


def test_patches_are_cut_where_the_centers_say():
    images = jnp.arange(2 * 8 * 9.0).reshape(2, 8, 9, 1)
    centers = np.array([[2, 3], [5, 4], [2, 2], [7, 6]])
    cut = nada_losses.patches(images, centers, 4)
    for patch, number, (x, y) in zip(cut, (0, 0, 1, 1), centers, strict=True):
        there = images[number, y - 2 : y + 2, x - 2 : x + 2]
        np.testing.assert_array_equal(patch, there)
    key = jax.random.key(0)
    drawn = nada_losses.patch_centers(key, (300, 512, 515, 3), 2, 510)
    assert drawn.shape == (600, 2)
    assert set(drawn[:, 1].tolist()) == {255, 256}
    assert set(drawn[:, 0].tolist()) == {255, 256, 257, 258, 259}
    with pytest.raises(UserError, match="--lambda-patch 0 below 512"):
        nada_losses.patch_centers(key, (2, 256, 256, 3), 1, 510)


def test_the_command_writes_what_a_run_needs(tmp_path, capsys):
    module = SMALL.clone(vocab_size=49408)
    params = {"clip": module.init_params(key=jax.random.key(0))}
    folder, out = tmp_path / "clip", tmp_path / "texts.npz"
    weights.save(folder, {"clip": module}, params)
    flags = ["--clip", str(folder), "--source", "photo", "--target", "sketch"]
    nada_text.main([*flags, "--text", "a dog", "--", str(out)])
    assert "wrote 161 texts" in capsys.readouterr().out
    whole = names.load_clip(folder)
    blind = names.load_clip(folder, texts=out)
    assert {*nada_text.needed("photo", "sketch"), "a dog"} <= set(blind.texts)
    jax.tree.map(
        np.testing.assert_array_equal,
        nada_losses.anchors(blind, "photo", "sketch"),
        nada_losses.anchors(whole, "photo", "sketch"),
    )
    for bad, message in (
        ([*flags, "--", str(out)], "exists already"),
        (["--clip", str(folder), "--", "x"], "there is no text"),
        ([*flags[:4], "--", "x"], "go together"),
    ):
        with pytest.raises(SystemExit):
            nada_text.main(bad)
        assert message in capsys.readouterr().err
