"""CLIP's towers, preparation of pictures and tokens, against the original's values."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convert import clip as names
from convert.report import Report
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip, clip_text
from jaxstyle.features.clip import CLIP
from tests.clip_models import (
    SMALL,
    golden_clip,
    small_config,
    small_params,
    small_state,
    test_image,
    write_safetensors,
)
from tests.filled import GOLDEN, draw, golden, nhwc, relative_error

# ViT-L/14.
LARGE = {
    "patch_size": 14,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "vision_mlp": 4096,
    "text_width": 768,
    "text_heads": 12,
    "text_mlp": 3072,
    "embed_dim": 768,
}


def tokens():
    return golden("clip_tokens")["ids"].astype(np.int32)


def prompts():
    return json.loads((GOLDEN / "clip_prompts.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        "tiny_hf",
        "tiny_openai",
        pytest.param("vit_b32_hf", marks=pytest.mark.slow),
        pytest.param("vit_b32_openai", marks=pytest.mark.slow),
    ],
)
def test_equals_the_original(name):
    state, config = golden_clip(f"clip_{name}")
    given = names._hugging_face(config) if name.endswith("hf") else {}
    networks, params = names.networks(state, given, Report())
    module, params = networks["clip"], {"params": params["clip"]}
    weights.check_params(networks, {"clip": params["params"]}, "the golden data")
    assert module.vision_heads == module.vision_width // (
        32 if "tiny_hf" in name else 64
    )
    expected = golden(f"clip_{name}")
    pixels = nhwc(draw("clip", "input:pixel_values", (2, 3, 224, 224)))
    ids = tokens()[: len(expected["text_embeds"])]

    @jax.jit
    def run(p, x, ids):
        towers = ("image_features", x), ("text_features", ids)
        found = [module.apply(p, value, method=method) for method, value in towers]
        return *found, module.apply(p, x, ids)

    (image, seen), (text, read), logits = run(params, pixels, ids)
    assert relative_error(image, expected["image_embeds"]) < 5e-6
    assert relative_error(text, expected["text_embeds"]) < 5e-6
    assert relative_error(logits, expected["logits_per_image"]) < 2e-5
    if not name.endswith("hf"):
        return
    for tower, out in (("vision", seen), ("text", read)):
        for probe, got in (
            ("embed_probe", out["embedded"][:, :3, :8]),
            ("layer1_probe", out["layers"][0][:, :3, :8]),
            ("pooled_probe", out["pooled"][:, :16]),
        ):
            assert relative_error(got, expected[f"{tower}_{probe}"]) < 5e-6


def test_other_configs_equal_transformers(tmp_path):
    """Exact and tanh gelu, other epsilons, an end token that is not the largest.

    `clip_small_hf` holds what CLIPModel of transformers 5.23 gives in float64.
    """
    config, expected = small_config(), golden("clip_small_hf")
    config["vision_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
    config["text_config"] |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}
    config["text_config"] |= {"eos_token_id": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", small_state())
    judge = names.load_clip(tmp_path)
    pixels = nhwc(draw("clip", "input:small", (3, 3, 32, 32)))

    @jax.jit
    def run(params, pixels, ids):
        apply = partial(judge.module.apply, {"params": params})
        image = apply(pixels, method="encode_image")
        return image, apply(ids, method="encode_text"), apply(pixels, ids)

    got = run(judge.params, pixels, expected["ids"])
    for value, name in zip(got, ("image_embeds", "text_embeds"), strict=False):
        assert relative_error(value, expected[name]) < 5e-6
    assert relative_error(got[2], expected["logits_per_image"]) < 2e-5


@pytest.mark.parametrize(
    "count, fields",
    [
        (151_277_313, {}),
        (149_620_737, {"patch_size": 16}),
        (427_616_513, LARGE),
        (427_944_193, LARGE | {"image_size": 336}),
    ],
)
def test_sizes_of_the_published_models(count, fields):
    module = CLIP(**fields)
    shapes = jax.eval_shape(lambda: module.init_params(key=jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def cases():
    return json.loads((GOLDEN / "clip_preprocess.json").read_text())["cases"]


@pytest.mark.parametrize("case", [name for name in cases() if name.startswith("gan")])
def test_generated_pictures_are_prepared_as_the_peer_does(case):
    expected, about = golden("clip_preprocess"), cases()[case]
    _, size, mode = case.split("_")
    resize = "antialias" if mode == "antialias" else "torch-1.7"
    images = test_image(f"image:{size}", 1, *map(int, size.split("x")))
    cotangent = nhwc(draw("clip", "cotangent:224", (1, 3, 224, 224)))

    @jax.jit
    def run(x):
        y, back = jax.vjp(lambda x: CLIP().prepare(x, resize), x)
        return y, back(cotangent)[0]

    value, gradient = (np.moveaxis(np.asarray(x[0]), -1, 0) for x in run(images))
    step = about["grad_step"]
    assert relative_error(value[:, ::8, ::8], expected[case]) < 1e-6
    part = gradient[:, ::step, ::step]
    assert relative_error(part, expected[f"{case}_grad"]) < 1e-6
    for actual, name in (
        (np.linalg.norm(gradient), "grad_norm"),
        (np.abs(value).sum(), "sum_abs"),
        (value.mean(dtype=np.float64), "mean"),
        (value.std(dtype=np.float64), "std"),
        (value.min(), "min"),
        (value.max(), "max"),
    ):
        np.testing.assert_allclose(actual, about[name], rtol=1e-4)


@pytest.mark.parametrize("size", [1024, 256])
def test_the_mappers_view(size):
    images = test_image(f"image:{size}", 1, size)
    value = np.moveaxis(np.asarray(jax.jit(clip.mapper_view)(images)[0]), -1, 0)
    case = f"mapper_{size}"
    assert relative_error(value[:, ::8, ::8], golden("clip_preprocess")[case]) < 1e-6
    np.testing.assert_allclose(np.abs(value).sum(), cases()[case]["sum_abs"], rtol=1e-5)


@pytest.mark.parametrize("case", [name for name in cases() if name.startswith("pil")])
def test_photos_are_prepared_as_clip_does(case):
    about = cases()[case]
    height, width, mode = about["height"], about["width"], about["mode"]
    shape = -(-height // 8), -(-width // 8), len(mode)
    pixels = draw("clip", f"pil:{case[4:]}", shape).astype(np.float64)
    pixels = pixels.repeat(8, 0).repeat(8, 1)[:height, :width]
    pixels = np.clip(np.floor(128 + 50 * pixels), 0, 255).astype(np.uint8)
    photo = Image.fromarray(np.squeeze(pixels))
    assert photo.mode == mode
    value = np.moveaxis(CLIP().prepare_photo(photo), -1, 0)
    assert relative_error(value[:, ::8, ::8], golden("clip_preprocess")[case]) < 1e-6
    np.testing.assert_allclose(np.abs(value).sum(), about["sum_abs"], rtol=1e-5)


def test_tokens_equal_openais():
    tokenizer = clip_text.load_tokenizer()
    got = clip_text.tokenize(tokenizer, prompts()["prompts"], CLIP())
    expected = tokens()
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected[:, : got.shape[1]])
    assert not expected[:, got.shape[1] :].any()


@pytest.mark.parametrize(
    "text, plain",
    [
        ("“it’s”", '"it\'s"'),
        ("a\x00b\x1f c\u3000d", "ab c d"),
        ("&amp;lt;b&gt;", "<b>"),
        ("ﬁne ＡＢＣ", "fine ABC"),
        ("cafe\u0301", "café"),
    ],
)
def test_text_is_cleaned(text, plain):
    assert clip_text.clean(text) == plain


def test_padding_has_no_effect():
    params = {"params": small_params()}
    ids = np.array([[5, 9, 599, 0, 0, 0], [7, 8, 9, 10, 11, 599]], np.int32)
    other = ids.copy()
    other[0, 3:] = 599
    run = jax.jit(lambda p, t: SMALL.apply(p, t, method="embed_text"))
    both, changed, alone = (
        run(params, ids),
        run(params, other),
        run(params, ids[:1, :3]),
    )
    np.testing.assert_allclose(both, changed, atol=1e-6)
    np.testing.assert_allclose(both[:1], alone, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(both, axis=-1), 1, atol=1e-6)


def test_remat_bfloat16_and_a_lone_tower():
    vision = {"params": {"vision": small_params()["vision"]}}
    images = test_image("image:64", 2, 64)

    def loss(p, x, module, remat):
        return module.apply(p, x, method="embed", remat=remat)[:, 0].sum()

    run = jax.jit(jax.value_and_grad(loss, 1), static_argnums=(2, 3))
    value, gradient = run(vision, images, SMALL, False)
    again = run(vision, images, SMALL, True)
    np.testing.assert_allclose(value, again[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, again[1], atol=1e-6 * np.abs(gradient).max())
    half = SMALL.clone(dtype="bfloat16")
    embed = jax.jit(lambda m, p, x: m.apply(p, x, method="embed"), static_argnums=0)
    a, b = (embed(m, vision, images) for m in (SMALL, half))
    assert a.dtype == b.dtype == jnp.float32
    assert float((a * b).sum(-1).min()) > 0.999


def test_mistakes_are_named():
    params = {"params": small_params()}
    with pytest.raises(UserError, match=r"takes \[batch, 32, 32, 3\]"):
        SMALL.apply(params, np.zeros((1, 64, 64, 3)), method="encode_image")
    with pytest.raises(UserError, match="at most 20"):
        SMALL.apply(params, np.zeros((1, 21), int), method="encode_text")
    with pytest.raises(UserError, match="antialias or torch-1.7"):
        clip.resize_matrix(8, 4, "nearest")
    with pytest.raises(UserError, match="multiple of 32"):
        clip.mapper_view(np.zeros((1, 48, 48, 3)))
    for field, value, message in (
        ("vision_heads", 3, "must divide vision_width 16"),
        ("text_activation", "relu", "known are quick_gelu"),
        ("image_size", 33, "no multiple of patch_size"),
    ):
        with pytest.raises(UserError, match=message):
            SMALL.clone(**{field: value}).init_params(key=jax.random.key(0))


def test_words_that_do_not_fit():
    tokenizer = clip_text.load_tokenizer()
    with pytest.raises(UserError, match="has 102 tokens; this CLIP reads at most 77"):
        clip_text.tokenize(tokenizer, ["a " * 100], CLIP())
    with pytest.raises(UserError, match="beyond this CLIP's 600"):
        clip_text.tokenize(tokenizer, ["a"], SMALL)
    with pytest.raises(UserError, match="no text"):
        clip_text.tokenize(tokenizer, [], CLIP())
    known = sorted({*tokens()[0], *tokens()[1]} - {0})
    few = SMALL.clone(vocab_size=len(known), token_ids=tuple(map(int, known)))
    rows = clip_text.tokenize(tokenizer, ["a photo of a sketch"], few)
    assert rows.max() == len(known) - 1 == rows[0, -1]
    with pytest.raises(UserError, match="not learned the word 'pencil'"):
        clip_text.tokenize(tokenizer, ["a pencil sketch"], few)


def test_vocabulary_files(tmp_path):
    pairs = tmp_path / "bpe.txt"
    pairs.write_text("version\na b\n")
    with pytest.raises(UserError, match="does not hold 48894 pairs"):
        clip_text.load_tokenizer(pairs)
    with pytest.raises(UserError, match="neither tokenizer.json"):
        clip_text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="vocabulary"):
        clip_text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocabulary, merges = clip_text._byte_pairs(clip_text.VOCABULARY)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = clip_text.load_tokenizer(tmp_path)
    texts = prompts()["prompts"]
    got = clip_text.tokenize(tokenizer, texts, CLIP())
    np.testing.assert_array_equal(got, tokens()[:, : got.shape[1]])


def test_text_embeddings_from_a_file(tmp_path):
    module = SMALL.clone(vocab_size=49408)
    params = module.init_params(key=jax.random.key(0))
    judge = clip_text.Judge("small", module, params)
    texts = ["a photo", "a sketch", "a photo"]
    expected = judge.encode_texts(texts)
    assert expected.shape == (3, 8)
    np.testing.assert_array_equal(expected[0], expected[2])
    path = tmp_path / "texts.npz"
    clip_text.save_texts(path, judge, texts)
    vision = {k: v for k, v in params.items() if k != "text"}
    blind = clip_text.Judge("small", module, vision)
    known = clip_text.load_texts(path, blind)
    blind = clip_text.Judge("small", module, vision, texts=known)
    np.testing.assert_array_equal(blind.encode_texts(texts), expected)
    with pytest.raises(UserError, match="lacks 'a dog' .*train.nada_text"):
        blind.encode_texts(["a photo", "a dog"])
    other = jax.tree.map(lambda x: x + 1, vision)
    with pytest.raises(UserError, match="another CLIP"):
        clip_text.load_texts(path, clip_text.Judge("other", module, other))
    for bad in (b"", b"PK\x03\x04junk", path.read_bytes()[:200]):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(UserError, match="no file of text embeddings"):
            clip_text.load_texts(tmp_path / "bad.npz", blind)
    arrays = dict(np.load(path)) | {"embeddings": np.zeros((2, 9), np.float32)}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=r"finite float32 \[n, 8\]"):
        clip_text.load_texts(tmp_path / "bad.npz", blind)
    np.savez(tmp_path / "bad.npz", **arrays | {"texts": np.array([None, 1])})
    with pytest.raises(UserError, match="no file of text embeddings"):
        clip_text.load_texts(tmp_path / "bad.npz", blind)
