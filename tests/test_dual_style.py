"""Photos in the style of an exemplar, through the command."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxstyle import dual_style, images, stylize, weights
from jaxstyle.dualstylegan import DualStyleGAN, style_weights
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.encoding import encode_pictures, load_encoder
from jaxstyle.exemplars import Exemplars
from jaxstyle.stylegan2 import Generator

SHAPE = {"size": 32, "channels": (6, 6, 4, 4), "w_dim": 8}
NAMES = ("b.jpg", "a.jpg", "c.jpg")


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A style folder as the converter writes it, at 32 px."""
    key = jax.random.key(0)
    networks = {
        "generator": Generator(mapping_depth=2, z_dim=8, **SHAPE),
        "dual": DualStyleGAN(**SHAPE),
        "encoder": GradualStyleEncoder(
            num_styles=8,
            size=32,
            units=(1, 1, 1, 1),
            channels=(4, 6, 8, 10),
            se_ratio=2,
            w_dim=8,
            start_from_w_avg=False,
        ),
        "exemplars": Exemplars(names=NAMES, num_ws=8, z_dim=8),
    }
    params = {name: m.init_params(key=key) for name, m in networks.items()}
    params["dual"] = networks["dual"].init_params(key=key, init_noise=1.0)
    params["exemplars"] = {"extrinsic": jax.random.normal(key, (3, 8, 8))}
    path = tmp_path_factory.mktemp("weights") / "cartoon"
    weights.save(path, networks, params, metadata={"space": "z_plus"})
    return str(path)


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
    return images.save_image(
        tmp_path / "me.png", Image.fromarray(values).resize((48, 40))
    )


def run(photo, *flags):
    """The picture that the command writes."""
    flags = [str(photo), "--no-align", "--out", "out.png", *map(str, flags)]
    stylize.main(flags)
    return images.to_array(images.open_image("out.png"))


def test_the_command_draws_an_exemplar(style, photo, tmp_path):
    flags = ("--weights", style, "--style-id")
    by_number = run(photo, *flags, 1)
    np.testing.assert_array_equal(by_number, run(photo, *flags, "a.jpg"))
    model, params = weights.load(style)
    generator, base = model.generator, params["generator"]
    face = images.to_array(images.open_image(tmp_path / "me-face.png"))
    encoder = load_encoder(style, generator)
    assert encoder.space == "z_plus"
    code = encode_pictures(encoder, generator, base, face[None])
    expected, _ = jax.jit(
        lambda p, face, exemplar: model.dual.apply(
            {"params": p["dual"]},
            generator,
            p["generator"],
            face,
            exemplar,
            space="w_plus",
            weights=style_weights(0.75, 1),
            psi=0.75,
        )
    )(params, code, params["exemplars"]["extrinsic"][1:2])
    shown = images.to_array(images.to_pil(np.asarray(expected[0])))
    # Coded at full precision there, from a picture of bytes here.
    assert np.abs(by_number - shown).mean() < 0.02
    # Another exemplar, other weights, other colors.
    pictures = [
        by_number,
        run(photo, *flags, 0),
        run(photo, *flags, 1, "--style-weights", "0.2,1"),
        run(photo, *flags, 1, "--style-weights", "0.75,0"),
        run(photo, *flags, 1, "--preserve-color", "code"),
        run(photo, *flags, 1, "--psi", "1"),
    ]
    distances = [
        np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]
    ]
    assert min(distances) > 0.002
    kept = run(photo, *flags, 1, "--preserve-color", "weights")
    np.testing.assert_array_equal(kept, pictures[3])
    rows = ",".join(["0.75"] * 7 + ["0"] * 11)
    np.testing.assert_array_equal(run(photo, *flags, 1, "--style-weights", rows), kept)


def test_weights_0_are_the_inversion(style, photo):
    loaded = stylize.dual_styles(
        style, dual_style.DualOptions(style_id=("2",)), psi=1.0
    )[0]
    assert loaded.name == "cartoon-2"
    code = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    inversion = stylize.stylize(loaded, code, intensity=0)
    exemplar = loaded.exemplar
    nothing = exemplar._replace(weights=style_weights(0, 0))
    made = dual_style.picture(nothing, loaded.generator, loaded.base, code)
    np.testing.assert_array_equal(made, inversion)
    half = stylize.stylize(loaded, code, intensity=0.5)
    by_hand = dual_style.picture(
        exemplar._replace(weights=0.5 * exemplar.weights),
        loaded.generator,
        loaded.base,
        code,
    )
    np.testing.assert_array_equal(half, by_hand)
    assert np.abs(half - inversion).mean() > 1e-3


def test_several_exemplars_make_a_sheet(style, photo, tmp_path):
    stylize.main(
        [str(photo), "--no-align", "--weights", style, "--style-id", "0", "b.jpg", "2"]
    )
    written = {p.name for p in (tmp_path / "stylized").glob("*.png")}
    assert {"me-grid.png", "me-cartoon-0.png", "me-cartoon-2.png"} <= written


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "hold 3 exemplars; choose with --style-id, 0 to 2"),
        (["--style-id", "3"], "must be 0 to 2 or one of b.jpg, a.jpg, c.jpg"),
        (["--style-id", "1", "--style-weights", "1"], "structure and color, or 18"),
        (["--style-id", "1", "--style-weights", "1,nan"], "structure and color, or 18"),
        (["--style-id", "1", "--layers", "structure"], "chosen with --style-weights"),
    ],
)
def test_mistakes(style, photo, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(photo, "--weights", style, *flags)
    assert message in capsys.readouterr().err


def test_exemplars_of_other_models(photo, capsys):
    with pytest.raises(SystemExit):
        run(photo, "--weights", "heads", "--base", "heads", "--style-id", "1")
    assert "heads is no DualStyleGAN style" in capsys.readouterr().err
