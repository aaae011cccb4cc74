"""Photos in the style of an exemplar, through the command."""

import functools
import os

import jax
import numpy as np
import pytest
from PIL import Image

from jaxstyle import (
    dual_sheets,
    dual_style,
    generate,
    images,
    interpolate,
    pipeline,
    refine,
    stylize,
    weights,
)
from jaxstyle.dualstylegan import style_weights
from jaxstyle.encoding import encode_pictures, load_encoder
from jaxstyle.errors import UserError
from jaxstyle.invert import Search
from jaxstyle.refine import Rates
from tests import dual_models


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A style folder as the converter writes it, at 32 px."""
    return dual_models.save_style(tmp_path_factory.mktemp("weights") / "cartoon")


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


def test_the_second_encoder_gives_w_plus(style, photo, tmp_path):
    """`--encoder w_plus`, the published --wplus; its codes are kept apart."""
    model, params = weights.load(style)
    second = model.encoder.init_params(key=jax.random.key(7))
    both = tmp_path / "both"
    weights.save(
        both,
        {**model, "encoder_w_plus": model.encoder},
        {**params, "encoder_w_plus": second},
        metadata={"space": "z_plus"},
    )
    flags = ("--weights", both, "--style-id", 1)
    first = run(photo, *flags)
    assert np.abs(run(photo, *flags, "--encoder", "w_plus") - first).mean() > 1e-3
    face = images.to_array(images.open_image(tmp_path / "me-face.png"))[None]
    found = []
    for network in ("encoder", "encoder_w_plus"):
        encoder = load_encoder(str(both), model.generator, network)
        found.append(
            encode_pictures(encoder, model.generator, params["generator"], face)[0]
        )
    kept = [np.load(p)["w_plus"][0] for p in tmp_path.glob("me-*.npz")]
    assert len(kept) == 2
    for code in found:
        # Coded at full precision there, from a picture of bytes here.
        assert min(np.abs(code - k).mean() for k in kept) < 0.02 * np.abs(code).mean()


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


def test_a_picture_becomes_an_exemplar(style, photo, tmp_path, capsys):
    """Its code is what the style's encoder gives, in z+, and is kept."""
    art = images.save_image("art.png", np.full((40, 40, 3), 0.3, np.float32))
    flags = ("--weights", style, "--style", art, "--no-align-style", "--grid")
    run(photo, *flags)
    (kept,) = tmp_path.glob("art-*.npz")
    model, params = weights.load(style)
    encoder = load_encoder(style, model.generator)
    crop = dual_style.style_crop(art, 256, False)
    expected = encode_pictures(
        encoder, model.generator, params["generator"], crop[None]
    )
    codes, _ = pipeline.read_codes(kept, model.generator)
    np.testing.assert_allclose(codes[0], expected[0], atol=1e-4)
    np.testing.assert_array_equal(codes[0], codes[1])
    first = images.to_array(images.open_image("out.png"))
    assert "exemplar's code of an earlier" not in capsys.readouterr().out
    np.testing.assert_array_equal(run(photo, *flags), first)
    assert "exemplar's code of an earlier" in capsys.readouterr().out


def test_an_exemplar_of_an_encoder_that_trains_on(style, photo, tmp_path):
    """Checkpoints change while the run's config.json stays."""
    model, params = weights.load(style)
    trained = params["encoder"]
    options = dual_style.NewOptions(style_encoder="encoder", align_style=False)
    found = []
    for scale in (1.0, 1.1):
        weights.save(
            "encoder",
            {"encoder": model.encoder},
            {"encoder": jax.tree.map(lambda x, s=scale: s * x, trained)},
            metadata={"space": "z_plus"},
            overwrite=True,
        )
        os.utime("encoder/config.json", (1000, 1000))
        code, _, _ = dual_style.new_codes(
            style, model, params, photo, options, cache=tmp_path
        )
        found.append(code)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.slow
def test_a_new_exemplar_is_searched_and_refined(style, photo, quick_compile):
    """From one search; the rows leave their start as far as their rates let them."""
    art = images.save_image("art.png", np.full((64, 64, 3), 0.3, np.float32))
    model, params = weights.load(style)
    found = []
    for steps in (0, 6):
        new = dual_style.NewOptions(
            style_encoder="optimize",
            refine=steps,
            rates=Rates(lr_color=0.1, lr_structure=0.001),
            align_style=False,
        )
        code, face, _ = dual_style.new_codes(
            style, model, params, art, new, search=Search(steps=4)
        )
        found.append(face)
    np.testing.assert_array_equal(*found)
    moved = np.abs(code - face).mean((0, 2))
    assert (moved > 0).all() and moved[7] > 10 * moved[:7].max()


@pytest.mark.slow
def test_refinement_makes_the_loss_smaller(style, quick_compile):
    model, params = weights.load(style)
    networks, frozen = refine.judge_of(model, params)
    codes = jax.random.normal(jax.random.key(1), (2, 8, 8))
    frozen |= {"intrinsic": codes, "targets": 0.3 * np.ones((2, 256, 256, 3))}
    run = functools.partial(
        refine.refine, networks, frozen, rates=Rates(lr_color=0.1, lr_noise=0.01)
    )
    before, after = (
        run(codes, steps=n, key=jax.random.key(0), progress=False)[1] for n in (1, 20)
    )
    assert (after < before).all()


def test_blends(style):
    options = dual_style.DualOptions(style_id=("0", "1", "2"), blend="1,1,2")
    ((label, mixed),) = dual_style.load(style, options)[2].items()
    assert label == "0+1+2"
    options = dual_style.DualOptions(style_id=("0", "1", "2"))
    single = list(dual_style.load(style, options)[2].values())
    a, b, c = (np.asarray(e.code) for e in single)
    np.testing.assert_allclose(mixed.code, (a + b + 2 * c) / 4, atol=1e-6)
    parts = dual_style.blend([single[0], single[2]], "structure, color").code
    np.testing.assert_array_equal(parts[:, :7], a[:, :7])
    np.testing.assert_array_equal(parts[:, 7:], c[:, 7:])
    for text, count in (("1", 1), ("1,1", 3), ("1,-1", 2), ("structure,color", 3)):
        with pytest.raises(UserError, match="a share, such as"):
            dual_style.blend(single[:count], text)


def test_overview(style, photo, capsys):
    stylize.main(["--overview", "--weights", style, "--out", "sheets"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        *([str(i), name] for i, name in enumerate(dual_models.STYLE_NAMES)),
        ["sheets/overview.png"],
    ]
    sheet = images.open_image("sheets/overview.png")
    assert sheet.width == 3 * dual_style.THUMB + 4


@pytest.mark.parametrize(
    "flags, unused",
    [
        (["me.png", "--edit", "age:+3", "--grid"], "leave out --grid, --edit"),
        (["me.png", "--style-id", "1", "--tune", "3"], "leave out --style-id, --tune"),
        (["--style", "me.png", "--intensity", "0.5"], "leave out --intensity, --style"),
        (
            ["--psi", "1", "--style-weights", "1,0"],
            "--psi, --style-weights would change",
        ),
    ],
)
def test_what_an_overview_does_not_show(style, photo, capsys, flags, unused):
    with pytest.raises(SystemExit):
        stylize.main([*flags, "--overview", "--weights", style])
    assert unused in capsys.readouterr().err


@pytest.mark.slow
def test_random_codes_fix_what_they_are_told(style):
    """A seed's exemplar is its own; --fix takes it from the first."""
    model, params = weights.load(style)

    def codes(seeds, **options):
        base = params["generator"]
        return dual_style.sample_codes(
            model.generator, base, model, params, seeds, **options
        )

    both = codes([3, 5])
    np.testing.assert_allclose(codes([5])[0], both[1], atol=1e-6)
    fixed = codes([3, 5], fix=("color",))
    np.testing.assert_array_equal(fixed[1, 7:], both[0, 7:])
    np.testing.assert_array_equal(fixed[1, :7], both[1, :7])
    assert np.abs(codes([3, 5], train=True) - both).max() > 1e-3
    base = params["generator"]
    faces = dual_style.sample_codes(model.generator, base, None, {}, [3])
    np.testing.assert_array_equal(faces[:, 0], faces[:, 6])
    assert np.abs(faces[:, 6] - faces[:, 7]).max() > 1e-3


@pytest.mark.slow
def test_random_pictures(style, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, params = weights.load(style)

    def drawn(out, *flags):
        args = ["--weights", style, "--seeds", "3,5", "--out", out, *flags]
        generate.main([*args, "--format", "npy", "--psi", "1"])
        return [np.load(f"{out}/seed000{s}.npy") for s in (3, 5)]

    a, b = drawn("a")
    assert np.abs(a - b).mean() > 1e-3
    same = drawn("b", "--fix", "content,color,structure")
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], a)
    plain = drawn("c", "--style-weights", "0,0", "--fix", "content")
    z = pipeline.seed_codes([3], 8)
    w_plus = pipeline.to_w_plus(model.generator, params["generator"], z, "z")
    expected = pipeline.pictures(model.generator, params["generator"], w_plus)
    np.testing.assert_array_equal(plain[1], expected[0])


def test_random_pictures_are_written_batch_by_batch(style, tmp_path, monkeypatch):
    draw, written = dual_style.pictures, []

    def seen(exemplar, generator, base, codes, **options):
        written.append(len(list(tmp_path.glob("*.npy"))))
        return draw(exemplar, generator, base, codes, **options)

    monkeypatch.setattr(dual_style, "pictures", seen)
    args = ["--weights", style, "--seeds", "3-5", "--style-id", "0", "2"]
    args += ["--batch", "2", "--out", str(tmp_path), "--format", "npy", "--grid"]
    generate.main(args)
    # Of two seeds and of the last, each in both styles.
    assert written == [0, 2, 4, 5]
    assert images.open_image(tmp_path / "grid.png").width == 3 * 32 + 2 * 2


def test_ways_through_faces_and_exemplars(style, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--weights", style, "--from", "3", "--to", "5", "--style-id", "0", "2"]
    interpolate.main([*args, "--n", "3", "--moves", "face", "style", "both"])
    sheet = np.asarray(images.open_image("interpolation.png"))
    rows = [
        [sheet[-102:, -102:][34 * i :][:32, 34 * j :][:, :32] for j in range(3)]
        for i in range(3)
    ]
    face, other, both = rows
    np.testing.assert_array_equal(face[0], other[0])
    np.testing.assert_array_equal(face[0], both[0])
    ends = [face[2], other[2], both[2], face[0]]
    differences = [
        np.abs(a.astype(float) - b).mean() for i, a in enumerate(ends) for b in ends[:i]
    ]
    assert min(differences) > 0.5
    args = ["--weights", style, "--from", "3", "--style-id", "1", "--table", "2"]
    interpolate.main([*args, "--out", "table.png"])
    table = np.asarray(images.open_image("table.png"))[-66:, -66:]
    tiles = [table[i:, j:][:32, :32] for i in (0, 34) for j in (0, 34)]
    assert len({tile.tobytes() for tile in tiles}) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--style-id", "1", "2", "--moves", "face"], "no second end: add --to"),
        (["--style-id", "1"], "--to is not given"),
        (["--to", "4", "--morph"], "two or more --weights"),
        (["--style-id", "1", "--table", "1"], "from 2 to 20"),
        (["--to", "4", "--intensity", "0.5", "--table", "2"], "--to, --intensity"),
        (["--edit", "age:+3", "--table", "2"], "leave out --edit"),
        (["--out", "a.gif", "--table", "2"], "--table is a sheet"),
    ],
)
def test_mistakes_of_ways(style, capsys, flags, message):
    with pytest.raises(SystemExit):
        interpolate.main(["--weights", style, "--from", "3", *flags])
    assert message in capsys.readouterr().err


def test_layers_of_an_exemplar_are_refused_before_work(style, photo, tmp_path, capsys):
    art = images.save_image("art.png", np.full((40, 40, 3), 0.3, np.float32))
    for flags in (["--style-id", "1"], ["--style", art, "--no-align-style"]):
        with pytest.raises(SystemExit):
            run(photo, "--weights", style, *flags, "--layers", "structure")
        assert "chosen with --style-weights" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "hold 3 exemplars; choose with --style-id, 0 to 2"),
        (["--style-id", "3"], "must be 0 to 2 or one of b.jpg, a.jpg, c.jpg"),
        (["--style-id", "1", "--style-weights", "1"], "structure and color, or 18"),
        (["--style-id", "1", "--style-weights", "1,nan"], "structure and color, or 18"),
        (["--style", "none.png"], "none.png: no such picture"),
        (["--style", "me.png", "--refine", "-1"], "--refine is -1"),
        (["--style-id", "1", "--encoder", "w_plus"], "hold no encoder_w_plus"),
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


def test_figures_of_the_paper(style, tmp_path, capsys):
    args = ["--weights", style, "--style-id", "a.jpg", "2", "--n", "3"]
    dual_sheets.main([*args, "--out", str(tmp_path)])
    assert len(capsys.readouterr().out.split()) == 3
    model, params = weights.load(style)
    generator, base = model.generator, params["generator"]
    wanted = dual_style.DualOptions(style_id=("1",), style_weights="1,1")
    _, _, found = dual_style.load(style, wanted)
    exemplar = found["1"]
    z = pipeline.seed_codes([3, 8], generator.z_dim)
    faces = pipeline.to_w_plus(generator, base, z, "z")
    draw = functools.partial(dual_sheets.draw, generator=generator, base=base)
    nothing = draw(exemplar._replace(weights=dual_sheets.NOTHING), face=faces[0])
    np.testing.assert_array_equal(
        nothing, pipeline.pictures(generator, base, exemplar.psi * faces[:1])[0]
    )
    # Every row does something of its own.
    rows = [
        draw(exemplar._replace(weights=dual_sheets.single_row(i)), face=faces[0])
        for i in range(generator.num_ws)
    ]
    apart = [np.abs(a - b).max() for a in [nothing] for b in rows]
    assert min(apart) > 1e-3 and len({x.tobytes() for x in rows}) == len(rows)
    for name, columns in (("layers", 11), ("weights", 6), ("moves", 3)):
        sheet = images.open_image(tmp_path / f"{name}.jpg")
        assert sheet.width > columns * generator.size


@pytest.mark.slow
def test_a_new_exemplar_before_and_after(style, photo, tmp_path, quick_compile):
    art = images.save_image(tmp_path / "art.png", np.full((64, 64, 3), 0.3, np.float32))
    options = dual_sheets.Options(
        weights=style,
        style=art,
        out=tmp_path,
        new=dual_style.NewOptions(refine=2, align_style=False),
    )
    model, params = weights.load(style)
    base = params["generator"]
    z = pipeline.seed_codes([3], model.generator.z_dim)
    faces = pipeline.to_w_plus(model.generator, base, z, "z")
    sheet = dual_sheets.new_sheet(options, model.generator, base, faces)
    assert sheet.height > 2 * 32 and sheet.width > 3 * 32
    assert len(list(tmp_path.glob("art-*.npz"))) == 2


def test_figures_need_an_exemplars_style(capsys):
    with pytest.raises(SystemExit):
        dual_sheets.main(["--weights", "heads"])
    assert "'heads' hold no DualStyleGAN style" in capsys.readouterr().err
