"""A published DualStyleGAN style, spread over several files, as one network folder.

| file                                   | networks in the folder                    |
| -------------------------------------- | ----------------------------------------- |
| `generator.pt`, `generator-ITER.pt`    | `generator` (the base), `dual`            |
| `generator-pretrain.pt`                | the same, `dual_trained`, `discriminator` |
| `finetune-000600.pt`                   | `portrait_generator`                      |
| `encoder.pt`                           | `encoder`, photos to z+                   |
| `encoder_wplus.pt`                     | `encoder_w_plus`, photos to w+            |
| `sampler.pt`                           | `sampler_structure`, `sampler_color`      |
| `exstyle_code.npy`, `refined_…`, `in…` | `exemplars`                               |
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import convert
from convert import dualstylegan, npy, pt
from convert.report import Report
from jaxstyle import weights
from jaxstyle.errors import UserError

# Best first; of files that differ by their number, the highest is the best.
_GENERATORS = (r"generator\.pt", r"generator-(\d+)\.pt", r"generator-pretrain.*\.pt")
_TOGETHER = (
    _GENERATORS,
    (r"finetune-(\d+)\.pt",),
    (r"encoder\.pt",),
    (r"encoder_w_?plus\.pt",),
    (r"sampler\.pt",),
    (r"exstyle_code\.npy",),
    (r"refined_exstyle_code\.npy",),
    (r"instyle_code\.npy",),
)


def _number(match: re.Match) -> int:
    return int(match[1]) if match.groups() else 0


def style_files(folder: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """The files of a style in a folder laid out as the published ones.

    The encoders lie one folder above there, for all styles.

    Returns:
      Those to read, and those of the folder that are not.

    Raises:
      UserError: the folder holds no generator.
    """
    own = sorted(p for p in Path(folder).iterdir() if p.is_file())
    above = list(Path(folder).absolute().parent.glob("encoder*.pt"))
    taken = []
    for patterns in _TOGETHER:
        found = [
            (-i, p.parent == Path(folder), _number(match), p)
            for i, pattern in enumerate(patterns)
            for p in [*own, *above]
            if (match := re.fullmatch(pattern, p.name))
        ]
        if found:
            taken.append(max(found)[-1])
        elif patterns is _GENERATORS:
            raise UserError(
                f"the folder {os.fspath(folder)} holds no generator.pt; give a folder "
                "of a DualStyleGAN style, or a single file"
            )
    return taken, [p for p in own if p not in taken]


def load(files: Sequence[str | os.PathLike]) -> convert.Loaded:
    """Networks and parameters of a style's files together.

    Args:
      files: one of DualStyleGAN's generators, and any of the others; or a folder with
        them, and further files.

    Raises:
      UserError: no generator, or two files for the same network.
    """
    report = Report(kind="DualStyleGAN style", licence=convert.LICENCES["dual"])
    paths: list[Path] = []
    for file in files:
        if os.path.isdir(file):
            taken, left = style_files(file)
            paths += taken
            report.ignored += [f"{p.name}: not of the files of a style" for p in left]
        else:
            paths.append(Path(file))
    networks: dict[str, Any] = {}
    params: dict[str, Any] = {}
    tables, digests = {}, {}
    for path in paths:
        if path.suffix == ".npy":
            data = pt.open_file(path)
            digests[path.name] = hashlib.sha256(data).hexdigest()
            kind = dualstylegan.codes_of(path.name)
            if kind in tables:
                raise UserError(f"{path}: a second file of {kind} codes")
            try:
                tables[kind] = npy.read(data)
            except UserError as e:
                raise UserError(f"{path}: {e}") from None
            continue
        found, values, told = convert.load(path)
        digests[path.name] = told.source["sha256"]
        kept = _names(path, found)
        if left := [name for name in found if name not in kept]:
            told.ignored.append(f"{', '.join(left)}: the style has its own")
        for name, new in kept.items():
            if new in networks:
                raise UserError(f"{path}: {new} is in another file already")
            networks[new], params[new] = found[name], values[name]
        # What an encoder's file lacks, the style has.
        parts = ("read", "ignored", "notes", *(["missing"] if "dual" in found else []))
        for part in parts:
            getattr(report, part).extend(
                f"{path.name}: {t}" for t in getattr(told, part)
            )
    if "dual" not in networks:
        raise UserError("none of the files is a DualStyleGAN (generator.pt)")
    if tables:
        found, values = dualstylegan.exemplars(tables, report)
        networks, params = networks | found, params | values
    for name, why in (
        ("exemplars", "no codes (exstyle_code.npy): --style-id has nothing to choose"),
        ("encoder", "no z+ encoder (encoder.pt): photos take longer to invert"),
        ("sampler_color", "no sampler.pt: new styles cannot be drawn"),
    ):
        if name not in networks:
            report.missing.append(why)
    if "encoder" in networks:
        report.more["space"] = "z_plus"
    weights.check_params(networks, params, "the files")
    _check_rows(networks)
    report.source = {"file": os.path.basename(os.path.abspath(files[0]))}
    report.more["files"] = digests
    return networks, params, report


def _names(path: Path, found: dict[str, Any]) -> dict[str, str]:
    """What the networks of a file are called in the folder; the others are left."""
    if "dual" in found or "sampler_color" in found:
        return {name: name for name in found}
    if "encoder" in found:
        plus = re.search("w_?plus", path.name)
        return {"encoder": "encoder_w_plus" if plus else "encoder"}
    if "generator" in found:
        return {"generator": "portrait_generator"}
    raise UserError(
        f"{path}: it holds {', '.join(found) or 'codes'}, which is no part of a style"
    )


def _check_rows(networks: dict[str, Any]) -> None:
    """Encoders, codes and samplers must fit the generator."""
    rows = networks["dual"].num_ws
    sampled = [networks[n].rows for n in networks if n.startswith("sampler")]
    for name, got in {
        **{n: networks[n].num_styles for n in networks if n.startswith("encoder")},
        **(
            {"exemplars": networks["exemplars"].num_ws}
            if "exemplars" in networks
            else {}
        ),
        **({"sampler": sum(sampled)} if sampled else {}),
    }.items():
        if got != rows:
            raise UserError(
                f"the {name} has codes of {got} rows, the generator takes {rows}"
            )
