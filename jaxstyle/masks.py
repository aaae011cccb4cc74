"""Masks over the modulated layers, and rows of codes: which ones a choice is about.

A mask is one number a modulated layer, 26 at 1024 px. JoJoGAN's M (arXiv 2112.11641)
keeps the reference's code where it is 1 and takes a random one where it is 0.
"""

import re

import numpy as np

from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import layer_names, num_ws, style_rows

# Rows 0 to 6 (up to 32 px) carry pose, shape and features; the rest carries colour.
STRUCTURE_ROWS = 7
# Rows the published code mixes to keep the photo's colours, found by trial.
PRESERVE_COLOR_ROWS = (9, 11, 15, 16, 17)


def rows_mask(rows: tuple[int, ...], size: int) -> np.ndarray:
    """1 for every layer that reads one of these w+ rows: float32 [num_layers]."""
    return np.isin(style_rows(size), rows).astype(np.float32)


def named_masks(size: int) -> dict[str, np.ndarray]:
    """The masks that have names, each [num_layers].

    `structure` is 1 on rows 0–6 (JoJoGAN's published choice of what stays the
    reference's), `color` on the others, `all` and `none` everywhere and nowhere.
    """
    structure = rows_mask(tuple(range(STRUCTURE_ROWS)), size)
    return {
        "structure": structure,
        "color": 1 - structure,
        "all": np.ones_like(structure),
        "none": np.zeros_like(structure),
    }


def preserve_color_mask(size: int) -> np.ndarray:
    """1 but for the rows that `--preserve-color` mixes: [num_layers]."""
    return 1 - rows_mask(PRESERVE_COLOR_ROWS, size)


def parse_mask(text: str, size: int, argument: str = "mask") -> np.ndarray:
    """A mask from what a user typed.

    Args:
      text: a name; `0` and `1`, one a modulated layer; or layer numbers and ranges,
        `0-8,12`, that are 1.
      size: picture size of the generator.
      argument: its name, for the error.

    Returns:
      float32 [num_layers].

    Raises:
      UserError: neither, naming the layers there are.
    """
    names = named_masks(size)
    if text in names:
        return names[text]
    count = len(layer_names(size))
    bits = set(text) <= {"0", "1"}
    if len(text) == count and bits:
        return np.array([float(bit) for bit in text], np.float32)
    mask = np.zeros(count, np.float32)
    try:
        if len(text) > 2 and bits:
            raise ValueError
        for part in text.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            if not 0 <= low <= high < count:
                raise ValueError
            mask[low : high + 1] = 1
    except ValueError:
        raise UserError(
            f"{argument} is {text!r}; a {size} px generator takes "
            f"{', '.join(names)}, {count} digits 0 or 1, or layers from 0 to "
            f"{count - 1} such as 0-6,9 (it has {num_ws(size)} w+ rows but {count} "
            "modulated layers)"
        ) from None
    return mask


def row_groups(rows: int) -> dict[str, range]:
    """The rows of a w+ code that carry shape, features and colours.

    Of the 18 rows at 1024 px they are 0–3, 4–7 and 8–17 (StyleGAN's coarse, middle and
    fine styles); a shorter code is divided in the same proportion, so that the names
    mean about the same of a picture of any size.
    """
    ends = max(1, round(rows * 4 / 18)), max(2, round(rows * 8 / 18))
    return {
        "coarse": range(ends[0]),
        "middle": range(*ends),
        "fine": range(ends[1], rows),
    }


def parse_rows(text: str, rows: int, argument: str) -> list[int]:
    """Rows of a w+ code from what a user typed.

    Args:
      text: `coarse`, `middle`, `fine`, numbers and ranges such as `8-17`, or several
        of these with commas.
      rows: of the code.
      argument: its name, for the error.

    Returns:
      The rows in ascending order.

    Raises:
      UserError: anything else, naming the rows there are.
    """
    groups, chosen = row_groups(rows), set()
    for part in text.replace(" ", "").split(","):
        numbers = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if part in groups:
            chosen |= set(groups[part])
        elif numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]) < rows:
            chosen |= set(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        else:
            names = ", ".join(f"{k} ({v[0]}-{v[-1]})" for k, v in groups.items())
            raise UserError(
                f"{argument} is {text!r}; codes of this generator have the rows 0 to "
                f"{rows - 1}: give {names}, or numbers such as 0-2,{rows - 1}"
            )
    return sorted(chosen)
