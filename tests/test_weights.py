"""Network folders: what is written comes back, and names nobody's machine."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Generator


def test_a_folder_comes_back_and_does_not_name_where_it_was_made(tmp_path):
    generator = Generator(8, channels=(4, 4), mapping_depth=1, z_dim=4, w_dim=4)
    params = {"generator": generator.init_params(key=jax.random.key(0))}
    weights.save(tmp_path / "small", {"generator": generator}, params)
    model, back = weights.load(tmp_path / "small")
    assert model.generator == generator
    jax.tree.map(np.testing.assert_array_equal, params, back)
    files = [p for p in (tmp_path / "small").rglob("*") if p.is_file()]
    assert files
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    generator = Generator(8, channels=(4, 4), mapping_depth=1, z_dim=4, w_dim=4)
    params = {"generator": generator.init_params(key=jax.random.key(0))}
    weights.save(tmp_path / "small", {"generator": generator}, params)

    def full(self, folder, tree):
        folder.mkdir()
        raise ValueError("d/1: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    for name, overwrite in (("small", True), ("other", False)):
        with pytest.raises(UserError, match=rf"{name} .* \(d/1: .* device\).* room"):
            weights.save(
                tmp_path / name, {"generator": generator}, params, overwrite=overwrite
            )
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    _, back = weights.load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_vendored_folders_load():
    for config in weights.ASSETS.glob("*/config.json"):
        model, params = weights.load(config.parent.name)
        assert set(model) == set(params)


def test_a_folder_of_pictures_does_not_hide_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = weights.ASSETS / "heads"
    (tmp_path / "heads").mkdir()
    assert str(weights.resolve("heads")) == str(shipped)
    (tmp_path / "heads" / "config.json").write_text("{}")
    assert str(weights.resolve("heads")) == "heads"
    with pytest.raises(UserError, match="does not exist.*heads"):
        weights.resolve("nothing")


@pytest.mark.parametrize("text", [".", "..", "", "examples"])
def test_only_networks_that_ship_have_names(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"weights '{text}': .* one of .*heads"):
        weights.resolve(text)
