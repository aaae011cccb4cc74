"""Codes of portraits: what is done stays done, whatever happens to the rest."""

import contextlib
import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.exemplars import Exemplars
from jaxstyle.images import image_files
from train import destylize, portraits
from train.cli import RunOptions

META, IDENTITY = {"scheme": "destylize"}, {"generator": "abc"}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("10.png", "2.png", "1.png")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(path)
    return tmp_path


def options_of(folder, **values):
    run = RunOptions(out=str(folder / "out"), steps=300, **values.pop("run", {}))
    return destylize.Options(data=str(folder / "pictures"), run=run, **values)


@pytest.fixture
def open_parts():
    """Parts that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(options, identity=IDENTITY):
            parts = portraits.Parts(options, META, identity)
            stack.callback(parts.close)
            return parts

        yield make


def codes_of(value):
    return {"extrinsic": np.full((8, 4), value, "f4")}


def test_what_is_done_is_kept_by_picture(folder, open_parts, capsys):
    parts = open_parts(options_of(folder))
    files = image_files(folder / "pictures")
    assert [f.name for f in files] == ["1.png", "2.png", "10.png"]
    assert parts.left(files) == files
    sheet = [np.zeros((8, 8, 3))] * 4
    parts.write(files[1], sheet, **codes_of(1))
    parts.write(files[0], sheet, **codes_of(0))
    assert parts.left(files) == files[2:]
    assert "2 of 3 pictures are done" in capsys.readouterr().out
    # The order is that of the names, and what has no codes is left out.
    names, tables = portraits.assemble(parts, files)
    assert names == ("1.png", "2.png")
    np.testing.assert_array_equal(tables["extrinsic"][:, 0, 0], [0, 1])
    # Another picture of the same name, a damaged file: not done.
    Image.new("RGB", (40, 40), "white").save(files[0])
    (parts.folder / "codes" / "2.png.npz").write_bytes(b"PK")
    assert parts.left(files) == files
    with pytest.raises(UserError, match="no picture has codes"):
        portraits.assemble(parts, files)
    assert (parts.folder / "pictures" / "2.png.jpg").exists()


def test_the_folder_is_written_whole_and_again(folder, open_parts):
    parts = open_parts(options_of(folder))
    for names in (("a",), ("a", "b")):
        module = Exemplars(names=names, num_ws=8, z_dim=4)
        params = {"extrinsic": np.zeros((len(names), 8, 4), "f4")}
        portraits.save(parts, {"exemplars": module}, {"exemplars": params}, META)
        model, _ = weights.load(folder / "out")
        assert model.exemplars.names == names


def test_other_options_are_refused(folder, open_parts):
    options = options_of(folder)
    parts = open_parts(options)
    assert (parts.folder / ".lock").exists()
    with pytest.raises(UserError, match="--psi 0.7 → 0.5"):
        open_parts(dataclasses.replace(options, psi=0.5))
    with pytest.raises(UserError, match="another generator"):
        open_parts(options, {"generator": "def"})
    fewer = dataclasses.replace(options.run, steps=100)
    with pytest.raises(UserError, match="--steps 300 → 100"):
        open_parts(dataclasses.replace(options, run=fewer))
    # The batch is no matter.
    other = dataclasses.replace(options.run, batch=16)
    open_parts(dataclasses.replace(options, run=other))
    (folder / "strange").mkdir()
    run = dataclasses.replace(options.run, out=str(folder / "strange"))
    with pytest.raises(UserError, match="was not written by this command"):
        open_parts(dataclasses.replace(options, run=run))


def test_batches_are_filled_and_broken_pictures_left_out(folder, capsys):
    files = image_files(folder / "pictures")
    found = list(portraits.chunks(files, 2, 32))
    assert [[f.name for f in names] for names, _ in found] == [
        ["1.png", "2.png"],
        ["10.png"],
    ]
    assert all(x.shape == (2, 32, 32, 3) for _, x in found)
    np.testing.assert_array_equal(found[1][1][0], found[1][1][1])
    files[2].write_bytes(b"broken")
    ((names, _),) = portraits.chunks(files, 2, 32)
    assert names == files[:2] and "left out" in capsys.readouterr().out
    ((names, x),) = portraits.chunks(files, 4, 32)
    assert names == files[:2] and len(x) == 4
    with pytest.raises(UserError, match=r"10\.png"):
        list(portraits.chunks(files[2:], 2, 32))


def test_a_size_that_pictures_can_be_brought_to():
    for size in (32, 64, 128, 256):
        portraits.check_size(size, 64)
    for size in (16, 96, 0):
        with pytest.raises(UserError, match=f"--judge-size is {size}; .*pictures' 64"):
            portraits.check_size(size, 64)
