import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle import generate, images, pipeline
from jaxstyle.errors import UserError
from tests.small_models import GENERATOR, save_base, save_tuned


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default outputs go to the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return save_tuned(tmp_path_factory.mktemp("weights") / "tuned", base)


def run(*args):
    generate.main([str(a) for a in args])


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_parse_numbers():
    assert pipeline.parse_numbers("0-3, 7,20-20", "--seeds") == [0, 1, 2, 3, 7, 20]
    for text in ("", "a", "3-1", "-1", "1-", "1,,2", "0-99999", "4294967296"):
        with pytest.raises(UserError, match="--seeds"):
            pipeline.parse_numbers(text, "--seeds")


def test_seeds_repeat_bit_for_bit(base, tmp_path):
    run("--weights", base, "--seeds", "0-2,9", "--psi", "0.7", "--out", tmp_path / "a")
    run("--weights", base, "--seeds", "9,2", "--psi", "0.7", "--out", tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["seed0000.png", "seed0001.png", "seed0002.png", "seed0009.png"]
    for name in ("seed0002.png", "seed0009.png"):
        first, second = (tmp_path / d / name for d in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != (tmp_path / "a" / "seed0000.png").read_bytes()
    assert images.open_image(first).size == (16, 16)


@pytest.mark.parametrize("noise", ["random", "none"])
def test_noise_modes(base, tmp_path, noise):
    args = ("--weights", base, "--format", "npy", "--noise-mode", noise)
    run(*args, "--seeds", "3", "--out", tmp_path / "a")
    run(*args, "--seeds", "2-4", "--out", tmp_path / "b")
    a, b = (np.load(tmp_path / d / "seed0003.npy") for d in "ab")
    np.testing.assert_array_equal(a, b)


def test_function_is_the_generator(base):
    generator, params = pipeline.load_generator(base)
    drawn = generate.generate(generator, params, [5, 6], psi=0.5, cutoff=2, batch=2)
    z = pipeline.seed_codes([5, 6], GENERATOR.z_dim)
    expected, _ = generator.apply({"params": params}, z, psi=0.5, cutoff=2)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_psi_zero_is_one_face(base, tmp_path):
    run("--weights", base, "--seeds", "0,1", "--psi", 0, "--out", tmp_path)
    first, second = sorted(tmp_path.iterdir())
    assert first.read_bytes() == second.read_bytes()


def test_compare_and_grid(base, tuned, tmp_path, capsys):
    run(
        "--weights",
        tuned,
        "--compare",
        base,
        "--seeds",
        "4,5",
        "--grid",
        "--out",
        tmp_path,
    )
    assert len(list(tmp_path.iterdir())) == 5
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "grid.png")
    run("--weights", base, "--seeds", "4", "--out", tmp_path / "alone")
    alone = (tmp_path / "alone" / "seed0004.png").read_bytes()
    assert alone == (tmp_path / "seed0004-base.png").read_bytes()
    assert alone != (tmp_path / "seed0004.png").read_bytes()


def test_style_mixing(base, tmp_path):
    args = ("--weights", base, "--mix", "--rows", "0,1", "--cols", "5-7")
    run(*args, "--styles", "0-2", "--out", tmp_path, "--format", "npy")
    assert len(list(tmp_path.glob("mix-*.npy"))) == 6
    generator, params = pipeline.load_generator(base)
    z = pipeline.seed_codes([1, 6], GENERATOR.z_dim)
    w = generator.apply({"params": params}, z, method="mapping")
    code = jnp.repeat(w[:1, None], generator.num_ws, 1)
    code = code.at[:, :3].set(w[1])
    expected, _ = generator.apply({"params": params}, code, space="w_plus")
    mixed = np.load(tmp_path / "mix-0001-0006.npy")
    np.testing.assert_allclose(mixed, expected[0], atol=1e-5)


@pytest.mark.parametrize("space", ["w_plus", "w", "z", "styles"])
def test_codes_of_every_space(base, tmp_path, space):
    generator, params = pipeline.load_generator(base)
    z = jax.random.normal(jax.random.key(1), (2, generator.z_dim))
    expected, out = generator.apply({"params": params}, z)
    codes = {"z": z, "styles": np.concatenate(out["styles"], 1)} | {
        name: out[name] for name in ("w", "w_plus")
    }
    pipeline.write_codes(tmp_path / "me.npz", **{space: codes[space]})
    run(
        "--weights",
        base,
        "--codes",
        tmp_path / "me.npz",
        "--format",
        "npy",
        "--out",
        tmp_path,
    )
    for i in range(2):
        picture = np.load(tmp_path / f"me-{i:04d}.npy")
        assert picture.shape == (16, 16, 3) and picture.dtype == np.float32
        np.testing.assert_allclose(picture, expected[i], atol=1e-5)


def test_latent_without_batch(base, tmp_path, capsys):
    np.savez(tmp_path / "me.npz", w_plus=np.zeros((6, 16), np.float32))
    error = fails(capsys, "--weights", base, "--codes", tmp_path / "me.npz")
    assert "[6, 16]" in error and "[batch, 6, 16]" in error
    assert "add the batch axis" in error


def test_wrong_codes(base, tmp_path, capsys):
    def codes(**arrays):
        np.savez(tmp_path / "me.npz", **arrays)
        return fails(capsys, "--weights", base, "--codes", tmp_path / "me.npz")

    # Codes of a 256 px generator on a 16 px one.
    assert "[1, 14, 512]" in codes(w_plus=np.zeros((1, 14, 512)))
    assert "one of w_plus" in codes(latents=np.zeros((1, 6, 16)))
    assert "not finite" in codes(w=np.full((1, 16), np.nan))
    assert "holds no codes" in codes(w=np.zeros((0, 16)))
    assert "styles" in codes(styles=np.zeros((1, 9)))
    assert "not an .npz" in codes(w=np.array([{}], object))
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros((1, 6, 16), np.float32))
    for name in ("text.npz", "array.npy"):
        assert "not an .npz" in fails(
            capsys, "--weights", base, "--codes", tmp_path / name
        )
    assert "no such code file" in fails(
        capsys, "--weights", base, "--codes", tmp_path / "none.npz"
    )


def test_wrong_options(base, tmp_path, capsys):
    assert "rows 0 to 5" in fails(capsys, "--weights", base, "--mix")
    assert "--cutoff" in fails(capsys, "--weights", base, "--cutoff", 7)
    assert "--batch" in fails(capsys, "--weights", base, "--batch", 0)
    assert "--seeds" in fails(capsys, "--weights", base, "--seeds", "x")
    assert "--psi" in fails(capsys, "--weights", base, "--psi", "nan")
    assert "single style" in fails(capsys, "--weights", base, "--style", "oil")
    assert "no run" in fails(capsys, "--weights", base, "--step", 3)
    assert "does not exist" in fails(capsys, "--weights", tmp_path / "nothing")
    assert "must be a folder" in fails(capsys, "--weights", base, "--out", "face.png")
    mix = ("--weights", base, "--mix", "--styles", "0-2")
    error = fails(capsys, *mix, "--seeds", "1-4", "--compare", base, "--edit", "age:+3")
    assert "leave out --seeds, --compare, --edit" in error
    assert "add --mix" in fails(capsys, "--weights", base, "--cols", "5")
