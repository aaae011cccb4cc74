"""One generator of two: layers swapped by resolution, or all weights mixed.

    python -m jaxstyle.blend runs/nada-photo-sketch heads --resolution 16 --out toon
    python -m jaxstyle.blend runs/art weights/ffhq --resolution 64 --width 1 --out toon
    python -m jaxstyle.blend runs/art runs/oil --share 0.3 --out styles/both

Two generators of one architecture, the second mostly finetuned from the first or the
other way round. The result is an ordinary weights folder.

*Layer swapping* (Pinkney and Adler, arXiv 2010.05334): layers up to --resolution, which
carry pose and shape, are the first's, those beyond it, which carry texture, the
second's. With --width the share of the second rises smoothly instead, as a logistic
function of the layer's place, two places a resolution, and is 0.5 at --resolution. What
a finetuned generator has changed of shapes, on the texture of photos, is the paper's
"toonification".

*--share* mixes all weights evenly (StyleGAN-NADA's interpolation between domains): the
first with 0, the second with 1. Of two DualStyleGAN styles on one base it mixes the
extrinsic paths, and the result holds the exemplars of both.

The mapping network, the average code and the noise planes are the first's; a mix with
--share mixes the former two as well.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxstyle import weights
from jaxstyle.errors import UserError, cli
from jaxstyle.exemplars import Exemplars
from jaxstyle.options import parse
from jaxstyle.stylegan2 import Generator, Params, layer_resolution, resolutions


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.blend."""

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    """A name we ship, a folder or a run: gives the coarse layers."""
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    """Gives the fine layers."""
    out: str = ""
    """Folder to write; required."""
    resolution: int | None = None
    """Last resolution of the first's layers, 4 to half the picture size; or the middle
    of a smooth change."""
    level: Literal[0, 1] = 0
    """Half a resolution later: 1 also leaves the up-convolution of the next resolution
    to the first."""
    width: float | None = None
    """Change smoothly over about this many places, two a resolution; None: at once."""
    share: float | None = None
    """Instead of --resolution: share of the second in all weights, 0 to 1 (beyond that
    is what lies beyond)."""
    base: str = ""
    """Generator on which `stylize` finds the codes of photos; empty: the one that the
    first or the second was finetuned from."""
    first_style: str | None = None
    """Which style of a first run that learned several: its name or number."""
    second_style: str | None = None
    """The same of the second."""


def place(name: str) -> int:
    """A layer's place from the coarsest: two a resolution.

    Place 0 of a resolution is the constant or the up-convolution, 1 the convolution
    after it and the to-RGB, as the published code counts them.
    """
    if name == "const":
        return 0
    level = layer_resolution(name).bit_length() - 3
    return 2 * level + (0 if name.startswith("up") else 1)


def layer_shares(
    names: Sequence[str], resolution: int, *, level: int = 0, width: float | None = None
) -> dict[str, float]:
    """Share of the second generator in each layer.

    Args:
      names: of the layers, `const`, `conv_4`, ..
      resolution, level: where it changes.
      width: of a smooth change; None: at once, behind `resolution`.
    """
    middle = place(f"up_{resolution}") + level
    away = {name: place(name) - middle for name in names}
    if width is None:
        return {name: float(x > 1) for name, x in away.items()}
    return {
        name: 1 / (1 + math.exp(min(-x / width, 700.0))) for name, x in away.items()
    }


def mix(first: Any, second: Any, share: float | Any) -> Any:
    """`(1 - share) first + share second` of two trees, exact at 0 and 1."""

    def mixed(a, b):
        return jnp.where(share == 1, b, a + share * (b - a))

    return jax.tree.map(mixed, first, second)


def way_between(trees: Sequence[Any], t: float) -> Any:
    """A point on the way through several trees in even steps, `t` from 0 to 1."""
    at = min(max(t, 0.0), 1.0) * (len(trees) - 1)
    i = min(int(at), len(trees) - 2)
    return mix(trees[i], trees[i + 1], at - i)


def swap(first: Params, second: Params, shares: Mapping[str, float]) -> dict[str, Any]:
    """A generator's parameters with each synthesis layer mixed by its share."""
    layers = {
        name: mix(first["synthesis"][name], second["synthesis"][name], share)
        for name, share in shares.items()
    }
    return {**first, "synthesis": layers}


def mix_generators(first: Params, second: Params, share: float) -> dict[str, Any]:
    """All of two generators but the noise planes, which are the first's."""
    kept = {"noise_const": first["noise_const"]}
    rest = {k: mix(first[k], second[k], share) for k in first if k not in kept}
    return rest | kept


def mix_styles(
    networks: Sequence[Mapping[str, Any]],
    params: Sequence[Params],
    names: Sequence[str],
    share: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two DualStyleGAN styles on one base as one, with the exemplars of both.

    Args:
      networks, params: of both folders.
      names: to tell the exemplars of both apart.
      share: of the second.

    Raises:
      UserError: styles on different bases, or paths of different depth.
    """
    first, second = params
    digests = [weights.digest(p["generator"]) for p in params]
    if digests[0] != digests[1] or networks[0]["dual"] != networks[1]["dual"]:
        raise UserError(
            f"{names[0]} and {names[1]} have different base generators or paths; only "
            "DualStyleGAN styles on one base can be mixed"
        )
    kept = {k: networks[0][k] for k in ("generator", "encoder") if k in networks[0]}
    found = {**kept, "dual": networks[0]["dual"]}
    values = {k: first[k] for k in kept} | {
        "dual": mix(first["dual"], second["dual"], share)
    }
    if all("exemplars" in n for n in networks):
        tables = [n["exemplars"] for n in networks]
        codes = tuple(k for k in tables[0].codes if k in tables[1].codes)
        labels = [
            f"{name}/{x}"
            for name, table in zip(names, tables, strict=True)
            for x in table.names
        ]
        found["exemplars"] = Exemplars(
            tuple(labels), tables[0].num_ws, tables[0].z_dim, codes
        )
        values["exemplars"] = {
            k: jnp.concatenate([p["exemplars"][k] for p in params]) for k in codes
        }
    return found, values


def base_of(options: Options) -> str:
    """The generator that photos are inverted on."""
    for name in (options.first, options.second):
        if base := options.base or weights.read_config(name)["metadata"].get("base"):
            return base
    # Neither was finetuned from a generator we know: the one that gives the shapes.
    return options.first


def check(options: Options, size: int) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: naming the option.
    """
    if not options.out:
        raise UserError("--out is not given; name the folder to write")
    if (options.resolution is None) == (options.share is None):
        raise UserError(
            "give either --resolution, to swap layers, or --share, to mix all weights"
        )
    if options.share is not None:
        if options.width is not None or options.level:
            raise UserError("--width and --level go with --resolution, not --share")
        if not math.isfinite(options.share):
            raise UserError(f"--share is {options.share}; it must be from 0 to 1")
        return
    allowed = resolutions(size)[:-1]
    if options.resolution not in allowed:
        raise UserError(
            f"--resolution is {options.resolution}; of {size} px generators it must be "
            f"one of {', '.join(map(str, allowed))}"
        )
    if options.width is not None and not 0 < options.width < math.inf:
        raise UserError(f"--width is {options.width}; it must be above 0, such as 1")


def same(first: Generator, second: Generator, options: Options) -> None:
    """Refuse generators of different architectures.

    Raises:
      UserError: naming both.
    """

    def layout(g):
        return g.size, g.channel_table, g.w_dim, g.z_dim, g.mapping_depth

    if layout(first) != layout(second):
        raise UserError(
            f"{options.first} is a {first.size} px generator with channels "
            f"{list(first.channel_table.values())} and {first.mapping_depth} mapping "
            f"layers, {options.second} one of {second.size} px, "
            f"{list(second.channel_table.values())} and {second.mapping_depth}; both "
            "must be of one architecture"
        )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.blend`."""
    options = parse(Options, "jaxstyle.blend", __doc__, args)
    loaded = [
        weights.load(options.first, style=options.first_style),
        weights.load(options.second, style=options.second_style),
    ]
    networks, params = zip(*loaded, strict=True)
    generator = networks[0].generator
    check(options, generator.size)
    same(generator, networks[1].generator, options)
    metadata = {
        "scheme": "blend",
        "blend": {
            k: v
            for k, v in dataclasses.asdict(options).items()
            if k not in ("out", "base") and v is not None
        },
    }
    dual = ["dual" in n for n in networks]
    if any(dual):
        if not all(dual) or options.share is None:
            raise UserError(
                f"{options.first if dual[0] else options.second} is a DualStyleGAN "
                "style; two of these on one base can be mixed, with --share"
            )
        names = [Path(name).name for name in (options.first, options.second)]
        if names[0] == names[1]:
            names = ["first", "second"]
        found, values = mix_styles(networks, params, names, options.share)
        space = weights.read_config(options.first)["metadata"].get("space")
        metadata |= {"space": space} if space else {}
        how = "stylize --overview --weights {}"
    else:
        first, second = (p["generator"] for p in params)
        if options.share is not None:
            mixed = mix_generators(first, second, options.share)
        else:
            shares = layer_shares(
                list(first["synthesis"]),
                options.resolution,
                level=options.level,
                width=options.width,
            )
            mixed = swap(first, second, shares)
            for name in sorted(shares, key=place):
                print(f"{name:10s} {shares[name]:.2f} of {options.second}")
        found, values = {"generator": generator}, {"generator": mixed}
        metadata["base"] = base_of(options)
        how = f"generate --weights {{}} --compare {metadata['base']} --grid"
    weights.save(
        options.out, found, jax.tree.map(np.asarray, values), metadata=metadata
    )
    print(f"{options.out}\nnow: python -m jaxstyle.{how.format(options.out)}")


if __name__ == "__main__":
    main()
