"""Pictures in the style of a DualStyleGAN's exemplars, stored ones and new ones."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from jaxstyle import images, pipeline, weights
from jaxstyle import refine as refining
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.dualstylegan import (
    NUM_WEIGHTS,
    STRUCTURE_ROWS,
    DualStyleGAN,
    style_weights,
    to_w_plus,
)
from jaxstyle.encoders import encode
from jaxstyle.encoding import CROP_SIZE, Encoder, encode_pictures, load_encoder
from jaxstyle.errors import UserError
from jaxstyle.invert import DEFAULT as DEFAULT_SEARCH
from jaxstyle.invert import Search, invert
from jaxstyle.stylegan2 import Generator, Params

# Published truncation of the face's code, towards 0.
PSI = 0.75
# Side of the pictures on the overview of a style.
THUMB = 128
PreserveColor = Literal["no", "code", "weights"]


@dataclasses.dataclass(frozen=True)
class DualOptions:
    """The exemplar, and how much of it."""

    style_id: tuple[str, ...] = ()
    """Exemplars of a DualStyleGAN style, by number or name; several give a sheet."""
    style_weights: str = "0.75,1"
    """Their weights: structure,color, or 18 numbers, one a row; smaller models read the
    first of them. 0 is the face as it is."""
    preserve_color: PreserveColor = "no"
    """Keep the face's colors: `code` gives the color transforms the face's code, as
    the published flag does; `weights` leaves them out, as color weights of 0 do."""
    blend: str = ""
    """Make one exemplar of several: their shares, such as 0.3,0.7; or structure,color:
    the structure of the first with the color of the second."""


@dataclasses.dataclass(frozen=True)
class NewOptions:
    """An exemplar that the style was not trained with."""

    style_encoder: str = ""
    """Folder of the encoder to z+ that reads --style PICTURE, or `optimize`: a search.
    Empty: the style's own encoder if it has one, else optimize."""
    refine: int = 0
    """Steps that move its code until the network gives the picture; published: 100.
    0: none."""
    rates: Annotated[refining.Rates, tyro.conf.OmitArgPrefixes] = refining.Rates()
    align_style: bool = True
    """Find and align the face in --style PICTURE; without it the middle is taken."""


class Exemplar(NamedTuple):
    """A style's extrinsic path with one exemplar.

    Attributes:
      module, params: the path.
      code: of the exemplar, w+ [1, num_ws, w_dim].
      face: its own face without the style, w+ [1, num_ws, w_dim].
      weights: of its rows, [18].
      psi: truncation of the photo's code.
      keep_color: take the color rows of the photo's code.
      shown: the picture of a new exemplar, [h, h, 3].
    """

    module: DualStyleGAN
    params: Params
    code: Array
    face: Array
    weights: np.ndarray
    psi: float
    keep_color: bool
    shown: Any = None


def parse_weights(text: str, option: str = "--style-weights") -> np.ndarray:
    """`"0.75,1"` (structure, color) or 18 numbers as [18].

    Raises:
      UserError: anything else.
    """
    values = _numbers(text)
    if len(values) not in (2, NUM_WEIGHTS):
        raise UserError(
            f"{option} is {text!r}; it must be two numbers, structure and color, or "
            f"{NUM_WEIGHTS}, one a row: 0.75,1"
        )
    return style_weights(*values) if len(values) == 2 else np.float32(values)


def _numbers(text: str) -> list[float]:
    """Finite numbers with commas, or nothing."""
    try:
        values = [float(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        return []
    return values if np.isfinite(values).all() else []


# What a sampler's picture is made of.
PARTS = ("content", "color", "structure")


def parse_fix(text: str) -> tuple[str, ...]:
    """What stays the same in all pictures, from `content,color`.

    Raises:
      UserError: something else than `PARTS`.
    """
    parts = tuple(part for part in text.replace(" ", "").split(",") if part)
    if not set(parts) <= set(PARTS):
        raise UserError(f"--fix is {text!r}; it must be of {', '.join(PARTS)}")
    return parts


def sample_codes(
    generator: Generator,
    base: Params,
    samplers: Mapping[str, Any] | None,
    params: Params,
    seeds: Sequence[int],
    *,
    fix: Sequence[str] = (),
    train: bool = False,
) -> np.ndarray:
    """Codes of exemplars that a sampler makes up, one a seed: w+ [n, num_ws, w_dim].

    Args:
      generator, base: of the style.
      samplers, params: `sampler_structure` and `sampler_color`, among others; None:
        codes of random faces, one for structure and one for color.
      seeds: one a code.
      fix: `color` or `structure` or both: those of the first seed for all.
      train: normalise by the statistics of all seeds together, as published; else by
        those of the training, so that a seed's code is its own.

    Raises:
      UserError: no sampler, or one of another size.
    """
    if train and len(seeds) < 2:
        raise UserError("--sampler-statistics batch needs at least two seeds")
    parts, counts = [], (STRUCTURE_ROWS, generator.num_ws - STRUCTURE_ROWS)
    for i, (part, rows) in enumerate(zip(("structure", "color"), counts, strict=True)):
        name = f"sampler_{part}"
        if samplers is not None and name not in samplers:
            raise UserError(
                "this style has no sampler; python -m train.dual_sampler --weights "
                "STYLE makes one, for --sampler; or choose exemplars with --style-id, "
                "or take those of random faces with --sampler random"
            )
        keys = pipeline.seed_keys(seeds, 2 + i)
        width = generator.z_dim if samplers is None else samplers[name].z_dim
        z = jax.vmap(lambda k, n=width: jax.random.normal(k, (n,)))(keys)
        if samplers is None:
            codes = jnp.repeat(z[:, None], rows, 1)
        else:
            codes, _ = samplers[name].apply({"params": params[name]}, z, train=train)
        parts.append(codes[:1].repeat(len(seeds), 0) if part in fix else codes)
    codes = jnp.concatenate(parts, 1)
    if codes.shape[1:] != (generator.num_ws, generator.z_dim):
        raise UserError(
            f"the sampler gives codes of shape {list(codes.shape[1:])}; this style "
            f"takes [{generator.num_ws}, {generator.z_dim}]: --sampler must be of it"
        )
    return np.asarray(_to_w_plus(generator, base, codes))


def is_dual(name: str) -> bool:
    """Whether a folder holds a DualStyleGAN."""
    return "dual" in weights.read_config(name)["networks"]


def load(
    name: str,
    options: DualOptions,
    *,
    step: int | None = None,
    psi: float = PSI,
    pictures: Sequence[Path] = (),
    new: NewOptions | None = None,
    search: Search = DEFAULT_SEARCH,
    key: Array | None = None,
    cache: Any = None,
) -> tuple[Generator, Params, dict[str, Exemplar]]:
    """A style folder's base generator, its parameters, and exemplars by label.

    Args:
      name: of the folder.
      options: which exemplars, and how much of them.
      step: another checkpoint of a run than its last.
      psi: truncation of the faces' codes.
      pictures: new exemplars; without any and without `style_id` it is an error.
      new: how their codes are found.
      search: options of that search, but for its space.
      key: of the search.
      cache: folder that keeps those codes, as NAME-DIGEST.npz; None keeps nothing.

    Raises:
      UserError: no exemplar is chosen, or there is no such one; another mistake in the
        options.
    """
    model, params = weights.load(name, step=step)
    if not options.style_id and not pictures:
        count = len(model.exemplars.names) if "exemplars" in model else 0
        stored = f", 0 to {count - 1} or a name" if count else ""
        raise UserError(
            f"weights {name!r} hold {count} exemplars; choose with --style-id{stored}, "
            "or give a picture with --style"
        )
    # Before any search for codes.
    parse_weights(options.style_weights)
    if options.blend:
        parse_blend(options.blend, len(options.style_id) + len(pictures))
    exemplar = partial(make_exemplar, model.dual, params["dual"], options, psi)
    found = {}
    for style_id in options.style_id:
        code, face = stored_codes(model, params, style_id)
        found[str(model.exemplars.index(style_id))] = exemplar(code, face)
    for path, label in zip(pictures, images.file_names(pictures), strict=True):
        code, face, crop = new_codes(
            name,
            model,
            params,
            path,
            new or NewOptions(),
            search=search,
            key=key,
            cache=cache,
        )
        label = f"{label}-new" if label in found else label
        found[label] = exemplar(code, face, crop)
    if options.blend:
        found = {"+".join(found): blend(list(found.values()), options.blend)}
    return model.generator, params["generator"], found


def make_exemplar(
    module: DualStyleGAN,
    params: Params,
    options: DualOptions,
    psi: float,
    code: Any,
    face: Any = None,
    shown: Any = None,
) -> Exemplar:
    """An exemplar of codes; the arguments are those of `load` and of `Exemplar`.

    Raises:
      UserError: weights that are none.
    """
    table = parse_weights(options.style_weights)
    if options.preserve_color == "weights":
        table = np.where(np.arange(NUM_WEIGHTS) < STRUCTURE_ROWS, table, 0)
    keep_color = options.preserve_color == "code"
    return Exemplar(module, params, code, face, table, psi, keep_color, shown)


def stored_codes(
    model: Mapping[str, Any], params: Params, style_id: str | int
) -> tuple[Array, Array]:
    """Codes of a stored exemplar and of its face, both w+ [1, num_ws, w_dim].

    Its own code stands in for the face's if that is not kept.

    Raises:
      UserError: no such exemplar.
    """
    exemplars, tables = model["exemplars"], {"params": params["exemplars"]}
    code = exemplars.apply(tables, style_id)
    face = code
    if "intrinsic" in params["exemplars"]:
        face = exemplars.apply(tables, style_id, "intrinsic")
    return tuple(
        _to_w_plus(model["generator"], params["generator"], c) for c in (code, face)
    )


@partial(jax.jit, static_argnums=0)
def _to_w_plus(generator, params, codes):
    return to_w_plus(generator, params, codes, "z_plus")


def new_codes(
    name: str,
    model: Mapping[str, Any],
    params: Params,
    path: Path,
    options: NewOptions,
    *,
    search: Search = DEFAULT_SEARCH,
    key: Array | None = None,
    cache: Any = None,
) -> tuple[Array, Array, np.ndarray]:
    """A picture as an exemplar: codes of it and of its face, and the picture cut out.

    Both codes are w+ [1, num_ws, w_dim]. The face's is what the encoder gives: taking
    the style out of it needs the portrait generator of the style's training
    (`train.destylize`).

    Args:
      name, model, params: of the style.
      path: of the picture.
      options: see there.
      search: see `load`.
      key: of the searches.
      cache: folder that keeps the codes; None keeps nothing.

    Raises:
      UserError: not a picture, no face in it, an encoder that does not give z+.
    """
    if options.refine < 0:
        raise UserError(f"--refine is {options.refine}; it must be 0 or a few hundred")
    generator, base = model["generator"], params["generator"]
    crop = style_crop(path, max(CROP_SIZE, generator.size), options.align_style)
    how = options.style_encoder or (
        name
        if weights.read_config(name)["metadata"].get("space") == "z_plus"
        and "encoder" in model
        else "optimize"
    )
    search = dataclasses.replace(search, space="z_plus")
    encoder: Any = how
    said: Any = dataclasses.astuple(search)
    if how != "optimize":
        encoder = exemplar_encoder(how, generator)
        said = f"{how} {weights.digest(encoder.params)}"
    numbers = (said, options.refine, dataclasses.astuple(options.rates))
    sha = hashlib.sha256(crop.tobytes())
    sha.update(repr((weights.digest(params), numbers)).encode())
    kept = None
    if cache is not None:
        kept = cache / f"{path.stem}-{sha.hexdigest()[:8]}.npz"
        if kept.exists():
            print(f"exemplar's code of an earlier run: {kept}")
            codes, _ = pipeline.read_codes(kept, generator)
            return jnp.asarray(codes[:1]), jnp.asarray(codes[1:]), crop
    key = jax.random.key(0) if key is None else key
    if encoder != "optimize" and not options.refine:
        # The program that encodes photos too.
        face = jnp.asarray(encode_pictures(encoder, generator, base, crop[None]))
        found = [face, face]
    else:
        start = z_plus_code(generator, base, crop, encoder, search=search, key=key)
        codes = [start, start]
        if options.refine:
            codes[0] = refined(model, params, crop, start, options, key=key)
        found = [_to_w_plus(generator, base, jnp.asarray(c)) for c in codes]
    if kept is not None:
        pipeline.write_codes(kept, w_plus=np.concatenate(found))
    return found[0], found[1], crop


def refined(
    model: Mapping[str, Any],
    params: Params,
    crop: np.ndarray,
    start: np.ndarray,
    options: NewOptions,
    *,
    key: Array,
) -> np.ndarray:
    """The code z+ [1, num_ws, z_dim] of a picture, refined from that of its face."""
    networks, frozen = refining.judge_of(model, params)
    targets = pipeline.resize(jnp.asarray(crop)[None], refining.SIZE)
    code, _ = refining.refine(
        networks,
        {**frozen, "intrinsic": jnp.asarray(start), "targets": targets},
        start,
        steps=options.refine,
        rates=options.rates,
        key=jax.random.fold_in(key, 1),
    )
    return code


def style_crop(path: Path, size: int, align: bool) -> np.ndarray:
    """The face in a picture of a style, [size, size, 3].

    Raises:
      UserError: not a picture, or no face in it.
    """
    images.open_image(path)
    try:
        crop, _ = prepare(path, size, AlignOptions(align=align))
    except UserError:
        raise UserError(
            f"--style {path}: no face found, as in many drawings; cut the face out and "
            "give that picture with --no-align-style"
        ) from None
    return images.to_array(crop)


def exemplar_encoder(name: str, generator: Generator) -> Encoder:
    """An encoder whose codes are exemplars'.

    Raises:
      UserError: one of other codes.
    """
    encoder = load_encoder(name, generator)
    if encoder.space != "z_plus" or encoder.inputs != "photo":
        raise UserError(
            f"--style-encoder {name} gives codes of {encoder.space} from "
            f"{encoder.inputs}; exemplars need one of python -m train.psp --space "
            "z_plus, or optimize"
        )
    return encoder


def z_plus_code(
    generator: Generator,
    params: Params,
    crop: np.ndarray,
    encoder: Literal["optimize"] | Encoder,
    *,
    search: Search,
    key: Array,
) -> np.ndarray:
    """The code of a picture [h, h, 3], z+ [1, num_ws, z_dim].

    Args:
      generator, params: of the style.
      crop: the picture.
      encoder: `optimize`, or an encoder; see `exemplar_encoder`.
      search, key: of that search, in z_plus.
    """
    if encoder == "optimize":
        found = invert(generator, params, crop[None], search=search, key=key)
        return found["z_plus"]
    x = pipeline.resize(jnp.asarray(crop)[None], encoder.module.size)
    return np.asarray(
        jax.jit(encode, static_argnums=0)(encoder.module, encoder.params, x)
    )


def parse_blend(text: str, count: int) -> np.ndarray | None:
    """Shares of `count` exemplars with a sum of 1; None: structure,color.

    Raises:
      UserError: another text, or another number of shares than of exemplars.
    """
    if text.replace(" ", "") == "structure,color" and count == 2:
        return None
    shares = np.float32(_numbers(text))
    if len(shares) != count or count < 2 or not shares.sum() > 0:
        raise UserError(
            f"--blend is {text!r} for {count} exemplars; choose two or more and give "
            "each a share, such as 0.3,0.7, or two of them structure,color"
        )
    return shares / shares.sum()


def blend(exemplars: Sequence[Exemplar], text: str) -> Exemplar:
    """One exemplar of several of a style, mixed in w+.

    Args:
      exemplars: at least two.
      text: shares with commas, brought to a sum of 1; or `structure,color`: the rows up
        to 6 of the first and the others of the second.

    Raises:
      UserError: see `parse_blend`.
    """
    first, shares = exemplars[0], parse_blend(text, len(exemplars))
    rows = jnp.arange(first.code.shape[1])[:, None] < STRUCTURE_ROWS

    def mixed(codes):
        if shares is None:
            return jnp.where(rows, *codes)
        return sum(w * code for w, code in zip(shares, codes, strict=True))

    code, face = (mixed([getattr(e, f) for e in exemplars]) for f in ("code", "face"))
    return first._replace(code=code, face=face, shown=None)


@partial(jax.jit, static_argnames=("generator", "module", "noise"))
def _draw(generator, base, module, params, face, code, table, psi, noise, key):
    return module.apply(
        {"params": params},
        generator,
        base,
        face,
        code,
        space="w_plus",
        extrinsic_space="w_plus",
        weights=table,
        psi=psi,
        noise=noise,
        key=key,
    )[0]


def pictures(
    exemplar: Exemplar,
    generator: Generator,
    base: Params,
    codes: Any,
    *,
    intensity: float = 1.0,
    noise: str = "const",
    keys: Array | None = None,
    batch: int = 1,
) -> np.ndarray:
    """Faces in an exemplar's style.

    Args:
      exemplar: see `load`; its code may be one a face, w+ [n, num_ws, w_dim].
      generator, base: the intrinsic path.
      codes: of the faces, w+ [n, num_ws, w_dim].
      intensity: times all weights, and of the truncation: 0 is the face itself.
      noise: as in `Generator`.
      keys: [n], for random noise.
      batch: faces at a time; see `pipeline.in_batches`.

    Returns:
      [n, size, size, 3], nominally in [-1, 1].
    """
    faces = generator.check_codes(np.asarray(codes), "w_plus")
    table = exemplar.weights * np.float32(intensity)
    psi = np.float32(1 + (exemplar.psi - 1) * intensity)
    if not table[: generator.num_ws].any():
        # To the bit what the plain generator draws: another program rounds otherwise.
        return pipeline.pictures(
            generator, base, faces * psi, noise=noise, keys=keys, batch=batch
        )
    others = np.broadcast_to(np.asarray(exemplar.code), faces.shape)
    if exemplar.keep_color:
        rows = np.arange(faces.shape[1])[:, None] < STRUCTURE_ROWS
        others = np.where(rows, others, faces)
    return pipeline.in_batches(
        lambda rows: _draw(
            generator,
            base,
            exemplar.module,
            exemplar.params,
            *rows[:2],
            table,
            psi,
            noise,
            rows[2],
        ),
        (faces, others, keys),
        batch,
    )


def picture(
    exemplar: Exemplar, generator: Generator, base: Params, code: Any, **arguments: Any
) -> np.ndarray:
    """A single face [num_ws, w_dim] in an exemplar's style, [size, size, 3].

    `arguments` are those of `pictures`.
    """
    return pictures(exemplar, generator, base, np.asarray(code)[None], **arguments)[0]


def portrait(exemplar: Exemplar, generator: Generator, base: Params) -> np.ndarray:
    """An exemplar as the style itself draws it: its own face, all weights 1."""
    whole = exemplar._replace(weights=style_weights(), psi=1.0, keep_color=False)
    return picture(whole, generator, base, exemplar.face[0])


def overview(
    name: str,
    options: DualOptions,
    *,
    step: int | None = None,
    psi: float = PSI,
    code: Any = None,
) -> tuple[Any, list[str]]:
    """A sheet of all exemplars of a style, under each its number.

    Args:
      name: of the folder.
      options: weights and colors, for a face.
      step: another checkpoint of a run than its last.
      psi: truncation of the face's code.
      code: a face, w+ [num_ws, w_dim], to draw with each of them; None: the exemplars.

    Returns:
      The sheet, and the exemplars' names in order.

    Raises:
      UserError: the folder holds no exemplars.
    """
    names = list(weights.load(name, step=step)[0].exemplars.names)
    ids = tuple(str(i) for i in range(len(names)))
    wanted = dataclasses.replace(options, style_id=ids, blend="")
    generator, base, found = load(name, wanted, step=step, psi=psi)
    tiles = []
    for exemplar in tqdm(found.values(), unit="exemplar", disable=len(found) < 20):
        if code is None:
            drawn = portrait(exemplar, generator, base)
        else:
            drawn = picture(exemplar, generator, base, code)
        tiles.append(images.to_pil(drawn).resize((THUMB, THUMB)))
    columns = int(np.ceil(np.sqrt(1.5 * len(tiles))))
    return images.grid(tiles, columns, captions=ids), names
