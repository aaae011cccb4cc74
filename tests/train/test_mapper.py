"""The latent mapper's scheme: its loss by hand, and short runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle import mapper as inference
from jaxstyle import pipeline, weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip_text
from jaxstyle.features.clip import normalise
from jaxstyle.mapper import Mapper
from tests.clip_models import SMALL, small_params
from tests.small_models import save_base
from tests.train.test_loop import lines
from train import mapper
from train.cli import RunOptions

TEXT = "an old man"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A generator, a CLIP model and a file with the text's embedding."""
    folder = tmp_path_factory.mktemp("mapper")
    save_base(folder / "base")
    weights.save(folder / "clip", {"clip": SMALL}, {"clip": small_params()})
    judge = clip_text.Judge(
        "small", SMALL, small_params(), texts={TEXT: np.ones(8, np.float32)}
    )
    clip_text.save_texts(folder / "texts.npz", judge, [TEXT])
    return folder


def arguments(material, out, *more):
    flags = f"--weights {material}/base --clip {material}/clip --text-embeddings "
    flags += (
        f"{material}/texts.npz --id-lambda 0 --batch 2 --sample-every 0 --out {out}"
    )
    return ["--target", TEXT, *flags.split(), "--log-every", "1", *map(str, more)]


def test_defaults():
    """Those of the published command; the small CLIP for the model that ships."""
    options = mapper.resolve(mapper.Options(target=TEXT, weights="weights/ffhq"))
    assert options.clip == ("ViT-B/32", "ViT-B/16")
    assert options.run.out == "runs/mapper-an-old-man"
    lambdas = [
        getattr(options, f"{n}_lambda") for n in ("clip", "id", "latent_l2", "norm")
    ]
    assert (lambdas, options.lr, options.run.batch) == ([1, 0.1, 0.8, 0.5], 0.5, 2)
    assert mapper.resolve(mapper.Options(target=TEXT)).clip == (mapper.SMALL_CLIP,)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"target": " "}, "--target is empty"),
        ({"clip": ("a", "b"), "clip_weights": (1.0,)}, "1 entries for 2 CLIP models"),
        ({"clip_lambda": 0.0}, "no text to follow"),
        ({"validate_count": 0}, "must be at least 1"),
        ({"groups": ()}, "--groups is empty"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(UserError, match=message):
        mapper.resolve(mapper.Options(**{"target": TEXT, **values}))


def test_the_published_view_is_for_large_models():
    judge = clip_text.Judge("small", SMALL, small_params())
    options = mapper.Options(target=TEXT, clip=("small",), view="styleclip")
    with pytest.raises(UserError, match="but --clip small reads 32"):
        mapper.check_view(options, [judge])


@pytest.mark.slow
def test_loss_by_hand(material):
    model, params = weights.load(material / "base")
    generator, base = model.generator, params["generator"]
    module = Mapper(num_ws=6, w_dim=16)
    values = module.init_params(key=jax.random.key(0))
    codes = jax.random.normal(jax.random.key(1), (3, 6, 16))
    text = normalise(jnp.ones((1, 8)))
    frozen = {"generator": base, "clip": {"0": small_params()}, "text": {"0": text}}
    options = mapper.Options(target=TEXT, clip=("small",), id_lambda=0.0)
    total, terms = mapper.loss_fn(
        values,
        frozen,
        codes,
        options=options,
        mapper=module,
        generator=generator,
        modules=[SMALL],
        identity=None,
    )
    moved = module.apply({"params": values}, codes)
    seen = []
    for each in (codes, moved):
        image, _ = generator.apply({"params": base}, each, space="w_plus")
        clip = {"params": small_params()}
        pixels = SMALL.apply(clip, image, method="prepare")
        seen.append(np.float64(SMALL.apply(clip, pixels, method="encode_image")))
    lengths = [np.linalg.norm(x, axis=1) for x in seen]
    expected = {
        "clip": np.mean(1 - seen[1] @ text[0] / lengths[1]),
        "latent": np.mean(np.square(np.float64(moved) - codes)),
        "norm": np.mean(np.square(lengths[1] - lengths[0])),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    whole = expected["clip"] + 0.8 * expected["latent"] + 0.5 * expected["norm"]
    np.testing.assert_allclose(total, whole, rtol=1e-4)


@pytest.mark.slow
def test_a_run_follows_the_text_and_goes_on(material, tmp_path, quick_compile):
    out = tmp_path / "run"
    flags = "--optim adam --lr 1 --latent-l2-lambda 0 --validate-every 1".split()
    mapper.main([*arguments(material, out, "--steps", 30), *flags])
    values = [x["val_clip"] for x in lines(out)]
    assert values[-1] < values[0]
    mapper.main([*arguments(material, out, "--steps", 32), *flags])
    assert [x["step"] for x in lines(out)] == list(range(1, 33))
    model, params = pipeline.load_generator(material / "base")
    found = inference.load(str(out), model)
    codes = np.random.default_rng(0).standard_normal((2, 6, 16), np.float32)
    assert np.abs(inference.move(found, codes) - codes).mean() > 1e-3


@pytest.mark.slow
def test_codes_of_a_file(material, tmp_path):
    codes = np.random.default_rng(0).standard_normal((3, 6, 16), np.float32)
    pipeline.write_codes(tmp_path / "codes.npz", w_plus=codes)
    options = mapper.Options(
        target=TEXT, codes=str(tmp_path / "codes.npz"), run=RunOptions(batch=2)
    )
    model, base = pipeline.load_generator(material / "base")
    judge = clip_text.Judge(
        "small", SMALL, small_params(), texts={TEXT: np.ones(8, np.float32)}
    )
    frozen = mapper.frozen_of(options, model, base, [judge])
    drawn = mapper.drawn_codes(options, model, frozen, jax.random.key(3), 50)
    assert {tuple(row) for row in np.asarray(drawn[:, 0])} == {
        tuple(row) for row in codes[:, 0]
    }
