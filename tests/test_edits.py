"""Rows by name, style mixing, directions."""

import numpy as np
import pytest

from convert import pt
from convert.__main__ import main as convert_command
from jaxstyle import edits, inputs, masks
from jaxstyle.errors import UserError


@pytest.mark.parametrize(
    "rows, coarse, middle, fine",
    [
        (18, (0, 3), (4, 7), (8, 17)),
        (14, (0, 2), (3, 5), (6, 13)),
        (10, (0, 1), (2, 3), (4, 9)),
        (6, (0, 0), (1, 2), (3, 5)),
        (4, (0, 0), (1, 1), (2, 3)),
    ],
)
def test_row_names_scale_with_the_code(rows, coarse, middle, fine):
    groups = masks.row_groups(rows)
    assert [(g[0], g[-1]) for g in groups.values()] == [coarse, middle, fine]
    assert masks.parse_rows("coarse,middle,fine", rows, "-") == list(range(rows))


def test_rows_by_number():
    assert masks.parse_rows("8-17", 18, "-") == list(range(8, 18))
    assert masks.parse_rows("coarse, 9", 10, "-") == [0, 1, 9]
    for text in ("8-17", "7-3", "rough", "", "1,", "10", "-1"):
        with pytest.raises(UserError, match=r"--mix-rows is .*0 to 9.*fine \(4-9\)"):
            masks.parse_rows(text, 10, "--mix-rows")


def test_mixing_moves_the_chosen_rows():
    rng = np.random.default_rng(0)
    codes, other = rng.normal(size=(2, 6, 4)), rng.normal(size=(6, 4))
    mixed = edits.mix_rows(codes, other, [3, 5], 0.25)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed[:, [0, 1, 2, 4]], codes[:, [0, 1, 2, 4]], 1e-6)
    wanted = 0.75 * codes[:, [3, 5]] + 0.25 * other[[3, 5]]
    np.testing.assert_allclose(mixed[:, [3, 5]], wanted, 1e-5)
    np.testing.assert_allclose(
        edits.mix_rows(codes, other, [3])[:, 3], [other[3]] * 2, 1e-6
    )


def test_published_direction_moves_codes(tmp_path):
    direction = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    pt.write(str(tmp_path / "age.pt"), direction)
    folder = tmp_path / "directions"
    convert_command([str(tmp_path / "age.pt"), str(folder / "age.npz")])
    edit = edits.parse_edit("age:+3", str(folder), 6, 8)
    assert edit.label == "age+3"
    codes = np.ones((2, 6, 8), np.float32)
    back = edits.parse_edit(f"{folder}/age.npz:-1.5", "nowhere", 6, 8)
    moved = edits.apply_edits(codes, [edit, back])
    np.testing.assert_allclose(moved, codes + 1.5 * direction, 1e-5)
    with pytest.raises(UserError, match="file of PyTorch; convert it first"):
        edits.parse_edit(f"{tmp_path}/age.pt:1", str(folder), 6, 8)
    with pytest.raises(UserError, match=r"no smile.npz.*holds age.*convert smile.pt"):
        edits.parse_edit("smile:1", str(folder), 6, 8)
    with pytest.raises(UserError, match=r"shape \[1, 8\].*\[1, 512\] or \[18, 512\]"):
        edits.parse_edit("age:1", str(folder), 18, 512)


@pytest.mark.parametrize("text", ["age", "age:", ":3", "age:more", "age:nan"])
def test_edit_is_a_name_and_a_number(text):
    with pytest.raises(UserError, match="must be a direction and a strength"):
        edits.parse_edit(text, ".", 6, 8)


def test_files_that_hold_no_direction(tmp_path):
    path = tmp_path / "age.npz"
    for content in (b"", b"nothing", b"PK\x03\x04 and so on"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no direction"):
            edits.read_direction(path)
    for array in (np.zeros((0, 8)), np.zeros(8), np.full((1, 8), np.inf)):
        np.savez(path, direction=array)
        with pytest.raises(UserError, match="holds no direction"):
            edits.read_direction(path)


def test_inputs_can_be_seen():
    grey = np.array([[[0.0], [1.0]]], np.float32)
    np.testing.assert_array_equal(inputs.visible(grey)[0, :, 0], [-1, 1])
    classes = inputs.one_hot(np.arange(19)[None], 19)
    colours = inputs.visible(classes)[0]
    assert colours.shape == (19, 3) and (colours[0] == -1).all()
    apart = np.abs(colours[:, None] - colours[None]).max(-1) + 9 * np.eye(19)
    assert apart.min() > 0.05
