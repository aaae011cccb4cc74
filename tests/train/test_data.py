import functools
import io
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from jaxstyle.errors import UserError
from tests.train import many, toy
from tests.train.test_loop import mesh_of
from train import data, prepare, read_speed, transforms

# Pictures that say which they are: constant, the sign of the left half tells a flip.
MARKED = (
    np.stack([np.full((4, 4, 3), (i + 1) / 16, np.float32) for i in range(12)])
    * np.where(np.arange(4) < 2, 1, -1)[None, None, :, None]
)


def numbers(images):
    return np.rint(np.abs(images[:, 0, 0, 0]) * 16).astype(int).tolist()


def take(iterator, count):
    return np.concatenate([next(iterator)["image"] for _ in range(count)])


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        shade = np.full((6, 9, 3), 50 * i, np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_each_epoch_shows_every_picture_once_in_a_new_order():
    stream = data.batches(MARKED, 4, mesh_of(2), seed=3)
    first, second = numbers(take(stream, 3)), numbers(take(stream, 3))
    assert sorted(first) == sorted(second) == list(range(1, 13))
    assert first != second
    again = data.batches(MARKED, 4, mesh_of(1), seed=3)
    assert numbers(take(again, 3)) == first
    other = data.batches(MARKED, 4, mesh_of(1), seed=4)
    assert numbers(take(other, 3)) != first


def test_one_picture_at_a_time():
    stream = data.batches(MARKED, 1, mesh_of(1), seed=0)
    assert sorted(numbers(take(stream, 12))) == list(range(1, 13))


def test_position_is_kept():
    stream = data.batches(MARKED, 5, mesh_of(1), seed=0, transform=data.mirrored)
    take(stream, 3)
    position = stream.get_state()
    expected = take(stream, 4)
    other = data.batches(MARKED, 5, mesh_of(1), seed=0, transform=data.mirrored)
    other.set_state(position)
    np.testing.assert_array_equal(take(other, 4), expected)


def test_numbers_of_an_item_become_one_axis():
    def transform(item, rng):
        return {"image": item[:, ::-1], "number": np.float32(3)}

    batch = next(data.batches(MARKED, 4, mesh_of(1), seed=0, transform=transform))
    assert batch["number"].shape == (4,) and batch["image"].shape[1:] == MARKED[0].shape


def test_mirror_flips_about_half():
    images = take(
        data.batches(MARKED, 12, mesh_of(1), seed=0, transform=data.mirrored), 20
    )
    share = (images[:, 0, 0, 0] < 0).mean()
    assert 0.35 < share < 0.65
    plain = take(data.batches(MARKED, 12, mesh_of(1), seed=0), 20)
    assert (plain[:, 0, 0, 0] > 0).all()


def test_processes_share_a_global_batch(monkeypatch):
    whole = take(
        data.batches(MARKED, 6, mesh_of(1), seed=1, transform=data.mirrored), 4
    )
    parts = []
    shares = np.array([0, 3]), np.array([1, 2, 4, 5])
    for rows in shares:
        monkeypatch.setattr(data, "process_rows", lambda *_, r=rows: r)
        stream = data.batches(MARKED, 6, mesh_of(1), seed=1, transform=data.mirrored)
        parts.append([next(stream)["image"] for _ in range(4)])
    places = np.argsort(np.concatenate(shares))
    steps = [np.concatenate(p)[places] for p in zip(*parts, strict=True)]
    np.testing.assert_array_equal(whole, np.concatenate(steps))


def test_processes_may_take_turns_along_the_mesh():
    """Their rows of a batch are no neighbours then."""
    found = [
        re.findall("numbers (.*)", text)
        for count in (1, 2)
        for text in many.finished(many.started("tests.train.interleaved", [[]] * count))
    ]
    assert len(found[0]) == 3 and len(set(found[0])) == 3
    assert found[1] == found[0] and found[2] == found[0]


def test_folder_is_cropped_and_resized(folder):
    source = data.open_source(str(folder), 4)
    assert len(source) == 5
    assert source[0].shape == (4, 4, 3) and source[0].dtype == np.float32
    np.testing.assert_allclose(
        [s.mean() for s in source], np.arange(5) / 2.55 - 1, 1e-5
    )
    changed = data.fingerprint(source)
    (folder / "4.png").unlink()
    assert data.fingerprint(data.open_source(str(folder), 4)) != changed


def test_array_file(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    np.save(tmp_path / "a.npy", array)
    source = data.open_source(str(tmp_path / "a.npy"), 8)
    np.testing.assert_allclose(source[3], array[3] / 127.5 - 1, 0, 1e-6)
    assert data.open_source(str(tmp_path / "a.npy"), 4)[0].shape == (4, 4, 3)
    np.save(tmp_path / "b.npy", array / 255)
    with pytest.raises(UserError, match="holds float64.*must be uint8"):
        data.open_source(str(tmp_path / "b.npy"), 8)
    (tmp_path / "c.npy").write_text("nothing")
    with pytest.raises(UserError, match="not a .npy file"):
        data.open_source(str(tmp_path / "c.npy"), 8)


def test_too_few_pictures():
    with pytest.raises(UserError, match="--batch is 16, but --data holds only 12"):
        data.batches(MARKED, 16, mesh_of(8), seed=0)


def test_damaged_picture_is_named_and_left_out(folder, capsys):
    (folder / "2.png").write_bytes(b"\x89PNG nothing")
    source = data.open_source(str(folder), 4)
    stream = data.batches(source, 5, mesh_of(1), seed=0)
    images = take(stream, 4)
    assert len(images) == 20 and np.isfinite(images).all()
    # Once, although it came up four times; 3.png took its place.
    printed = capsys.readouterr().out
    assert printed.count("left out:") == 1
    assert re.search(r"2.png is damaged .* \(1 of at most 10\)", printed)
    shades = np.rint((images[:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert (shades == 150).sum() == 8 and (shades == 100).sum() == 0
    strict = data.ReadOptions(max_broken=0)
    stream = data.batches(source, 5, mesh_of(1), seed=0, reading=strict)
    with pytest.raises(UserError, match="2.png.*--max-broken is 0"):
        next(stream)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"")
    stream = data.batches(source, 5, mesh_of(1), seed=0)
    with pytest.raises(UserError, match="5 pictures in a row"):
        next(stream)
    assert threading.active_count() < 50


def test_broken_input_of_a_pair_is_named(folder, tmp_path, capsys):
    inputs = tmp_path / "labels"
    inputs.mkdir()
    for i in range(5):
        Image.new("L", (6, 9), i).save(inputs / f"{i}.png")
    (inputs / "1.png").write_bytes(b"nothing")
    (folder / "4.png").write_bytes(b"")
    pairs = data.open_pairs(str(folder), str(inputs), labels=True)
    # A class that does not exist makes an example as useless as a damaged file.
    labels = functools.partial(transforms.labels, size=4, classes=3)
    stream = data.batches(pairs, 5, mesh_of(1), seed=0, transform=labels)
    batch = next(stream)
    assert sorted(set(batch["input"].argmax(-1)[:, 0, 0].tolist())) == [0, 2]
    printed = capsys.readouterr().out
    assert f"{inputs}/1.png is damaged" in printed
    assert f"{folder}/4.png is an empty file" in printed
    assert f"{folder}/3.png: a label map holds the class 3; there are 3" in printed
    assert "(3 of at most 10)" in printed
    reading = data.ReadOptions(workers=1)
    there = data.batches(
        pairs, 5, mesh_of(1), seed=0, transform=labels, reading=reading
    )
    np.testing.assert_array_equal(next(there)["input"], batch["input"])
    there.close()


def test_resumed_run_sees_the_same_pictures(tmp_path, monkeypatch):
    folder, seen, following = tmp_path / "pictures", [], data.Batches.__next__
    folder.mkdir()
    for i in range(11):
        shade = np.full((8, 8, 3), 20 * i, np.uint8)
        shade[:, :4] += 9
        Image.fromarray(shade).save(folder / f"{i}.png")
    monkeypatch.setattr(toy, "PICTURES", data.open_source(str(folder), 8))

    def record(batches):
        seen.append(following(batches)["image"])
        return {"image": seen[-1]}

    monkeypatch.setattr(data.Batches, "__next__", record)
    toy.run(toy.options(tmp_path / "whole"), mesh_of(2))
    whole, seen[:] = np.stack(seen), []
    for steps in (4, 6):
        toy.run(toy.options(tmp_path / "parts", steps=steps), mesh_of(2))
    # Across ends of epochs, and not one picture twice or left out.
    np.testing.assert_array_equal(np.stack(seen), whole)


def test_workers_read_the_same(folder):
    source = data.open_source(str(folder), 4)
    here = data.batches(source, 2, mesh_of(1), seed=0, transform=data.mirrored)
    there = data.batches(
        source,
        2,
        mesh_of(1),
        seed=0,
        transform=data.mirrored,
        reading=data.ReadOptions(workers=2),
    )
    np.testing.assert_array_equal(take(there, 4), take(here, 4))
    assert there.get_state() == here.get_state() == {"batches": 4}
    # The position does not depend on who reads.
    there.close()
    here.set_state(there.get_state())
    expected = take(here, 3)
    here.set_state({"batches": 4})
    np.testing.assert_array_equal(take(here, 3), expected)


def test_pairs_belong_together_by_name(folder, tmp_path):
    inputs = tmp_path / "labels"
    inputs.mkdir()
    for i in range(5):
        classes = Image.new("P", (6, 9), i)
        classes.putpalette([10 * i, 0, 0] * 256)
        classes.save(inputs / f"{i}.png")
    pairs = data.open_pairs(str(folder), str(inputs), labels=True)
    for label, picture in pairs:
        assert label.mode == "L" and picture.mode == "RGB"
        assert np.asarray(label).max() * 50 == np.asarray(picture).max()
    changed = data.fingerprint(pairs)
    (inputs / "3.png").unlink()
    with pytest.raises(UserError, match="no picture for 1 of the 5.*3.png"):
        data.open_pairs(str(folder), str(inputs), labels=True)
    (folder / "3.png").unlink()
    assert data.fingerprint(data.open_pairs(str(folder), str(inputs))) != changed
    same = data.open_pairs(str(folder))
    assert same[0][0] == same[0][1]
    Image.new("RGB", (4, 4), (1, 2, 3)).save(inputs / "0.png")
    with pytest.raises(UserError, match="0.png is a colour picture"):
        data.Folder(str(inputs / "0.png"), labels=True)[0]


@pytest.fixture
def prepared(tmp_path):
    """A prepared TFDS data set of four grey pictures, in the wanted form."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def make(form):
        class Shades(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                image = tfds.features.Image(shape=(8, 8, 1))
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict({"image": image})
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(4):
                    file = io.BytesIO()
                    Image.new("L", (8, 8), 60 * i).save(file, "PNG")
                    # TFDS passes encoded pictures through; arrays need TensorFlow.
                    yield i, {"image": io.BytesIO(file.getvalue())}

        builder = Shades(data_dir=tmp_path, file_format=form)
        builder.download_and_prepare()
        return str(tmp_path)

    return make


@pytest.mark.filterwarnings("ignore")
def test_tfds_array_record(prepared):
    folder = prepared("array_record")
    source = data.open_source("tfds:shades:train[:75%]", 4, folder)
    assert len(source) == 3 and source[0].shape == (4, 4, 3)
    shades = sorted(round((source[i].mean() + 1) * 127.5) for i in range(3))
    assert all(s % 60 == 0 for s in shades) and len(set(shades)) == 3
    with pytest.raises(UserError, match="no such split.*it has train"):
        data.open_source("tfds:shades:test", 4, folder)


@pytest.mark.filterwarnings("ignore")
def test_tfds_in_another_form_names_the_command(prepared, tmp_path):
    folder = prepared("array_record")
    info = next(tmp_path.glob("shades/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="tfds build shades --file_format=array_record"):
        data.open_source("tfds:shades:train", 4, folder)
    with pytest.raises(
        UserError, match="tfds build nothing --file_format=array_record"
    ):
        data.open_source("tfds:nothing:train", 4, folder)


@pytest.mark.filterwarnings("ignore")
def test_prepared_folder_is_data(folder, tmp_path, capsys):
    (folder / "1.png").write_bytes(b"\x89PNG nothing")
    out = tmp_path / "set"
    # As a command: TFDS looks for the builder's module.
    command = [sys.executable, "-m", "train.prepare", str(folder), str(out)]
    arguments = ["--size", "4", "--workers", "1"]
    printed = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "1.png is damaged" in printed.stderr and "4 examples" in printed.stdout
    assert f"--data tfds:pictures:train --tfds-folder {out}\n" in printed.stdout
    assert [p.name for p in out.iterdir()] == ["pictures"]
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(out / "pictures" / "1.0.0"))
    assert builder.info.file_format.value == "array_record"
    assert builder.as_data_source("train")[0]["image"].shape == (4, 4, 3)
    half = data.open_source("tfds:pictures:train[:50%]", 4, str(out))
    assert len(half) == 2
    source = data.open_source(str(out), 4)
    means = sorted(float(source[i].mean() + 1) * 127.5 for i in range(len(source)))
    np.testing.assert_allclose(means, [0, 100, 150, 200], atol=1e-3)
    assert data.open_pairs(str(out))[0][0].size == (4, 4)
    there = data.batches(
        source, 2, mesh_of(1), seed=0, reading=data.ReadOptions(workers=1)
    )
    here = data.batches(source, 2, mesh_of(1), seed=0)
    np.testing.assert_array_equal(take(there, 3), take(here, 3))
    there.close()
    with pytest.raises(SystemExit):
        prepare.main([str(folder), str(out)])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main([str(folder), str(tmp_path / "no"), "--max-broken", "0"])
    assert "--max-broken is 0" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_damaged_example_of_a_set_is_named(folder, tmp_path, capsys):
    out = tmp_path / "set"
    prepare.main([str(folder), str(out), "--size", "4"])
    source = data.open_source(str(out), 4)
    capsys.readouterr()

    examples = [dict(source.source.source[i]) for i in range(5)]
    examples[2]["image"] = examples[2]["image"][:30]
    source.source.source = examples
    images = take(data.batches(source, 5, mesh_of(1), seed=0), 2)
    assert len(images) == 10
    printed = capsys.readouterr().out
    assert f"left out: {out}[2] is damaged" in printed


@pytest.mark.filterwarnings("ignore")
def test_prepared_pairs(folder, tmp_path):
    inputs = tmp_path / "labels"
    inputs.mkdir()
    for i in range(5):
        Image.new("L", (7, 7), i).save(inputs / f"{i}.png")
    out = tmp_path / "set"
    arguments = ["--source", str(inputs), "--labels", "--size", "4"]
    prepare.main([str(folder), str(out), *arguments])
    pairs = data.open_pairs(str(out))
    for label, picture in pairs:
        assert label.mode == "L" and label.size == (7, 7)
        assert int(np.asarray(label).max()) * 50 == np.asarray(picture).max()
    assert len(pairs) == 5 and len(data.fingerprint(pairs)) == 16


def test_read_speed(folder, capsys):
    arguments = ["--size", "4", "--batch", "2", "--batches", "2", "--workers", "0"]
    read_speed.main([str(folder), *arguments])
    printed = capsys.readouterr().out
    assert "5 pictures, to 4 px" in printed
    assert "plain PIL loop" in printed and "threads" in printed
    with pytest.raises(SystemExit):
        read_speed.main([str(folder), "--workers", "-1"])
    assert "--workers is (-1,); none may be negative" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_many_pictures_take_the_memory_of_a_few_batches(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "one.jpg")
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3000):
        (folder / f"{i}.jpg").symlink_to(tmp_path / "one.jpg")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stream = data.batches(data.open_source(str(folder), 300), 4, mesh_of(1), seed=0)
    next(stream)
    before, most = resident(), 0
    for _ in range(150):
        next(stream)
        most = max(most, resident())
    # A batch is 4 MB, and 600 MB were read.
    assert most - before < 64 * 2**20
