"""`python -m convert FILE OUT`: original weights to a network folder, and back."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import convert
from convert import clip, pt, style
from jaxstyle import weights
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Read weights of the original projects, or write ours back for them.

    FILE may be a .pt or .pth file of rosinality's StyleGAN2, JoJoGAN, StyleGAN-NADA,
    pSp or e4e, inverted codes, an editing direction, a judge (torchvision's AlexNet,
    VGG or ResNet, ArcFace's model_ir_se50.pth, MoCo's ResNet-50), or a .pkl of
    NVIDIA's stylegan2-ada-pytorch. A DualStyleGAN style is a folder (checkpoint/cartoon
    with generator.pt and the files beside it), or generator.pt and the others --with
    it. A CLIP model is OpenAI's ViT-B-32.pt, a folder of Hugging Face's, or a file of
    one. No code in any of them is ever run.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File to read, or folder of a DualStyleGAN style; with --to pt, a network folder
    or run of ours."""
    out: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = (
        None
    )
    """Network folder to write; a .npz file for codes and directions; a .pt file."""
    check: bool = False
    """Only list what the file holds; write nothing."""
    more: Annotated[
        tuple[str, ...], tyro.conf.arg(name="with", metavar="FILE ...")
    ] = ()
    """Further files of a DualStyleGAN style for the same folder: finetune-000600.pt,
    encoder.pt, encoder_wplus.pt, sampler.pt, *_code.npy."""
    to: Literal["folder", "pt"] = "folder"
    """`pt` writes a folder of ours in the original layout."""
    kind: Literal["psp", "e4e"] | None = None
    """For an encoder whose file does not say which it is."""
    heads: str | None = None
    """For torchvision's AlexNet or VGG-16: LPIPS heads, the lpips package's file."""
    activation: Literal["quick_gelu", "gelu"] | None = None
    """For CLIP weights that have no config beside them: OpenAI's models have
    quick_gelu, LAION's gelu."""
    legacy: bool = False
    """With --to pt: the stream format of torch before 1.6."""
    force: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace OUT if it exists."""


@cli
def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    options = parse(Options, "convert", None, arguments)
    if options.out is None and not options.check:
        raise UserError("OUT is missing: where to write, or --check to only list")
    if options.out and os.path.exists(options.out) and not options.force:
        raise UserError(f"{options.out} exists already; --force replaces it")
    if options.to == "pt":
        return _to_pt(options)
    folder = os.path.isdir(options.file) and not clip.is_folder(options.file)
    if options.more or folder:
        if options.kind or options.heads:
            raise UserError("--kind and --heads are for a single file")
        networks, params, report = style.load([options.file, *options.more])
    else:
        networks, params, report = convert.load(
            options.file,
            kind=options.kind,
            heads=options.heads,
            activation=options.activation,
        )
    print(*report.lines(), sep="\n")
    if options.check:
        return None
    if networks:
        _check_folder(options.out)
        weights.save(
            options.out,
            networks,
            params,
            metadata=report.metadata(),
            overwrite=options.force,
        )
        if "clip" in networks:
            clip.copy_tokenizer(options.file, options.out)
        out = options.out
        if report.training:
            _save_arrays(os.path.join(out, "training.npz"), report.training, True)
    else:
        out = _save_arrays(options.out, params, options.force)
    print(f"wrote {out}")
    return None


def _check_folder(out: str) -> None:
    """--force replaces a network folder, and nothing else a user may have there."""
    if os.path.exists(out) and not os.path.exists(os.path.join(out, "config.json")):
        raise UserError(f"{out} is no network folder; --force replaces only those")


def _save_arrays(out: str, arrays: dict, force: bool) -> str:
    """Codes or a direction as .npz."""
    out = out if out.endswith(".npz") else f"{out}.npz"
    if os.path.exists(out) and not force:
        raise UserError(f"{out} exists already; --force replaces it")
    folder, name = os.path.split(os.path.abspath(out))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return out


def _to_pt(options: Options) -> None:
    networks, params = weights.load(options.file)
    value = convert.to_pt(networks, params)
    for key, part in value.items():
        print(f"  {key}: {len(part)} arrays" if isinstance(part, dict) else f"  {key}")
    if not options.check:
        os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
        pt.write(options.out, value, legacy=options.legacy)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
