"""Facial destylisation: the codes of portraits, and of the faces they are made after.

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 3.1. g is the generator of
faces, g' the one finetuned on the portraits (train.stylegan2 --augment), E an encoder
to z+. Of each portrait S:

1. z_e = E(S), its extrinsic code.
2. z and noise planes, from z_e and normal draws on, minimise (eq. 1)

       LPIPS(g'(z), S) + 0.1 (1 - cos of both faces) + σ(z) + 1e5 · correlation of noise

   σ(z): mean deviation over the rows. Adam's rate of 0.1 rises over the first twentieth
   of the steps and falls in a cosine over the last quarter. Planes are brought back to
   mean 0 and deviation 1 after every step.
3. z with rows 8 and on of z_e (the colors) gives a face g(z), truncated towards 0, and
   that the intrinsic code z_i = E(g(z)), again with the colors of z_e.

    python -m train.destylize --data portraits --weights weights/ffhq \\
        --portrait-weights runs/stylegan2-portraits --encoder weights/psp-z-plus \\
        --out runs/codes --batch 8

OUT then holds the table of exemplars, in natural order of the file names, that
train.dual_finetune and train.refine_exstyle read. OUT.parts/pictures has for each: the
portrait, g(z_e), the face g(z), and g(z_i). The third should be a person who looks like
the portrait; of abstract styles try --psi 0.5.

Published batches mix sums and means in the loss; here every picture is as in a batch of
one. The split of colors at row 8 is that of the code (the network's is 7); the paper
says nothing of it. LPIPS is AlexNet's unless --perceptual-net names a folder of VGG's,
the published one.
"""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxstyle import losses, refine, weights
from jaxstyle.dualstylegan import to_w_plus
from jaxstyle.encoders import adaptive_pool, encode
from jaxstyle.errors import UserError, cli
from jaxstyle.exemplars import Exemplars
from jaxstyle.features import judges
from jaxstyle.images import image_files
from jaxstyle.stylegan2 import Generator, layer_resolution, noise_names
from train import portraits, sharding
from train.cli import RunOptions, Shared, parse, start, with_out, working
from train.dual_steps import z_plus_encoder

RAMP_UP, RAMP_DOWN = 0.05, 0.25


@dataclasses.dataclass(frozen=True)
class Options:
    """Facial destylisation."""

    data: str
    """Folder of portraits, aligned as the generator's faces are."""
    weights: str = weights.DEFAULT
    """Generator of faces."""
    portrait_weights: str = ""
    """Generator finetuned on the portraits; empty: `portrait_generator` beside the
    other."""
    encoder: str = ""
    """Folder of an encoder to z+; empty: that beside the generator, or named by it."""
    lr: float = 0.1
    """Adam's rate, of the code and of the noise planes."""
    id_lambda: float = 0.1
    """Weight of the identity loss."""
    std_lambda: float = 1.0
    """Weight of the deviation over a code's rows."""
    noise_lambda: float = 1e5
    """Weight of the correlation within the noise planes."""
    psi: float = 0.7
    """Truncation of the faces, towards 0 as published; 0.5 for abstract styles."""
    color_from: int = 8
    """Rows of the codes from this on keep the portrait's colors."""
    perceptual_net: str = ""
    """LPIPS network; empty: LPIPS-AlexNet, which ships with us."""
    identity_net: str = ""
    """Identity network; empty: weights/arcface if there, else the one that ships."""
    judge_size: int = 256
    """Pixels a side at which pictures are judged."""
    run: Shared = RunOptions(steps=300, batch=4)


class Networks(NamedTuple):
    """The modules of the search.

    Attributes:
      generator: of faces and of portraits.
      encoder: to z+.
      perceptual: an `LPIPS`.
      identity: gives unit vectors of faces.
    """

    generator: Generator
    encoder: Any
    perceptual: Any
    identity: Any


def rate(t: Array | float) -> Array:
    """Share of the learning rate after a share t of the steps: []."""
    down = jnp.minimum(1.0, (1 - t) / RAMP_DOWN)
    down = 0.5 - 0.5 * jnp.cos(down * jnp.pi)
    return down * jnp.minimum(1.0, t / RAMP_UP)


def draw_portrait(
    networks: Networks, params: Any, z_plus: Array, noise: Any, psi: float = 1.0
) -> Array:
    """Pictures [batch, size, size, 3] of codes in z+, truncated towards 0.

    Args:
      networks: modules.
      params: of the generator.
      z_plus: [batch, num_ws, z_dim].
      noise: planes by layer, [batch, r, r].
      psi: truncation.
    """
    w_plus = to_w_plus(networks.generator, params, z_plus, "z_plus")
    image, _ = networks.generator.apply(
        {"params": params}, psi * w_plus, space="w_plus", noise=noise
    )
    return sharding.constrain(image)


def know(networks: Networks, options: Options, frozen: Any, image: Array) -> dict:
    """What is known of portraits [batch, judge_size, judge_size, 3], by name.

    `image`, `z_plus` (z_e) and the judges' `lpips` and `identity`.
    """
    seen = adaptive_pool(image, networks.encoder.size)
    return {
        "image": image,
        "z_plus": encode(networks.encoder, frozen["encoder"], seen),
        "lpips": networks.perceptual.apply(
            {"params": frozen["perceptual"]}, image, method="features"
        ),
        "identity": networks.identity.apply(
            {"params": frozen["identity"]}, image, method="embed"
        ),
    }


def loss(
    point: Any, frozen: Any, given: Any, networks: Networks, options: Options
) -> tuple[Array, dict[str, Array]]:
    """Eq. 1, a sum over the pictures.

    Args:
      point: `z_plus`, and `noise`, planes by layer.
      frozen: parameters; `portrait` is g'.
      given: of `know`.
      networks: modules.
      options: weights.

    Returns:
      The sum, and its terms for each picture [batch], without weights.
    """
    image = draw_portrait(networks, frozen["portrait"], point["z_plus"], point["noise"])
    image = refine.view(image, options.judge_size)
    face = networks.identity.apply(
        {"params": frozen["identity"]}, image, method="embed"
    )
    terms = {
        "lpips": networks.perceptual.apply(
            {"params": frozen["perceptual"]},
            image,
            given["lpips"],
            method="feature_distance",
        ),
        "identity": 1 - jnp.sum(face * given["identity"], -1),
        "deviation": jax.vmap(lambda z: losses.row_deviation(z[None]))(point["z_plus"]),
        "noise": jax.vmap(lambda p: losses.noise_correlation([x[None] for x in p]))(
            list(point["noise"].values())
        ),
    }
    total = (
        terms["lpips"]
        + options.id_lambda * terms["identity"]
        + options.std_lambda * terms["deviation"]
        + options.noise_lambda * terms["noise"]
    )
    return jnp.sum(total), terms


def start_state(
    networks: Networks, z_plus: Array, seeds: np.ndarray, seed: int
) -> dict[str, Any]:
    """Where the search begins: z_e, and normal planes of each picture's own.

    Args:
      networks: modules.
      z_plus: [batch, num_ws, z_dim].
      seeds: of the pictures, uint32 [batch].
      seed: of the run.
    """
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(seeds)
    planes = {}
    for i, name in enumerate(noise_names(networks.generator.size)):
        shape = (layer_resolution(name),) * 2
        planes[name] = jax.vmap(
            lambda k, i=i, shape=shape: jax.random.normal(
                jax.random.fold_in(k, i), shape
            )
        )(keys)
    point = {"z_plus": z_plus, "noise": planes}
    moments = optax.scale_by_adam().init(point)
    return {"point": point, "moments": moments, "step": jnp.zeros((), jnp.int32)}


def make_step(networks: Networks, options: Options) -> portraits.Step:
    """One update of all pictures' codes and planes."""

    def step(state, frozen, given):
        grads, terms = jax.grad(loss, has_aux=True)(
            state["point"], frozen, given, networks, options
        )
        moves, moments = optax.scale_by_adam().update(grads, state["moments"])
        lr = options.lr * rate(state["step"] / options.run.steps)
        point = jax.tree.map(lambda p, m: p - lr * m, state["point"], moves)
        point = refine.renormalised(point)
        return {"point": point, "moments": moments, "step": state["step"] + 1}, terms

    return step


def finish(
    networks: Networks, options: Options, frozen: Any, given: Any, point: Any
) -> dict[str, Array]:
    """The codes of pictures whose search is over, and pictures to look at.

    Returns:
      `extrinsic`, `intrinsic`, z+ [batch, num_ws, z_dim]; `shown` [batch, 4, h, h, 3].
    """

    def with_colors(z_plus):
        extrinsic = given["z_plus"][:, options.color_from :]
        return jnp.concatenate([z_plus[:, : options.color_from], extrinsic], 1)

    draw = partial(draw_portrait, networks, frozen["generator"], noise=point["noise"])
    face = draw(with_colors(point["z_plus"]), psi=options.psi)
    seen = adaptive_pool(face, networks.encoder.size)
    intrinsic = with_colors(encode(networks.encoder, frozen["encoder"], seen))
    shown = [draw(given["z_plus"]), face, draw(intrinsic, psi=options.psi)]
    shown = [given["image"], *(refine.view(x, options.judge_size) for x in shown)]
    return {
        "extrinsic": given["z_plus"],
        "intrinsic": intrinsic,
        "shown": jnp.stack(shown, 1),
    }


def load(options: Options) -> tuple[Networks, dict[str, Any]]:
    """Modules, and parameters by name: the two generators', encoder's and judges'.

    Raises:
      UserError: a network is missing, or of another architecture.
    """
    model, params = weights.load(options.weights)
    generator = model.generator
    if options.portrait_weights:
        other, found = weights.load(options.portrait_weights)
        portrait, found = other.generator, found["generator"]
    elif "portrait_generator" in model:
        portrait, found = model.portrait_generator, params["portrait_generator"]
    else:
        raise UserError(
            "--portrait-weights is not given; name the generator finetuned on the "
            "portraits: python -m train.stylegan2 --augment"
        )
    if architecture(portrait) != architecture(generator):
        raise UserError(
            f"--portrait-weights are of {portrait.size} px and another architecture "
            f"than --weights {options.weights}; finetune that one"
        )
    run = options.run
    encoder = z_plus_encoder(options.encoder, options.weights, generator, run.dtype)
    perceptual = judges.choose("perceptual", options.perceptual_net, run.dtype)
    identity = judges.choose("identity", options.identity_net, run.dtype)
    networks = Networks(
        working(generator, run), encoder.module, perceptual.module, identity.module
    )
    return networks, {
        "generator": params["generator"],
        "portrait": found,
        "encoder": encoder.params,
        "perceptual": perceptual.params,
        "identity": identity.params,
    }


def architecture(generator: Generator) -> tuple:
    """What two generators must share for their codes to mean the same."""
    widths = generator.mapping_depth, generator.z_dim, generator.w_dim
    return generator.channel_table, *widths


def check(options: Options, generator: Generator) -> None:
    """Refuse values that cannot be.

    Raises:
      UserError: naming the option.
    """
    if not 0 <= options.color_from <= generator.num_ws:
        raise UserError(
            f"--color-from is {options.color_from}; it must be 0 to {generator.num_ws} "
            "(no row keeps its color)"
        )
    portraits.check_size(options.judge_size, generator.size)


def search(options: Options, mesh: Any) -> None:
    """The whole run; what `main` calls after reading the command line."""
    sharding.check_batch(options.run.batch, mesh)
    files = image_files(options.data)
    networks, frozen = load(options)
    check(options, networks.generator)
    if options.run.compile_for:
        find(options, mesh, networks, frozen, None, files)
    metadata = {"scheme": "destylize", "base": options.weights}
    digests = {name: weights.digest(p) for name, p in frozen.items()}
    with contextlib.closing(portraits.Parts(options, metadata, digests)) as parts:
        find(options, mesh, networks, frozen, parts, files)
        names, tables = portraits.assemble(parts, files)
        rows, width = tables["extrinsic"].shape[1:]
        module = Exemplars(names, rows, width, ("extrinsic", "intrinsic"))
        tables = {name: tables[name] for name in module.codes}
        portraits.save(parts, {"exemplars": module}, {"exemplars": tables}, metadata)


def find(
    options: Options,
    mesh: Any,
    networks: Networks,
    frozen: Any,
    parts: portraits.Parts | None,
    files: Sequence[Path],
) -> None:
    """Find the codes of those files that have none.

    Args:
      options: of the scheme.
      mesh: of the run.
      networks, frozen: of `load`.
      parts: where they are kept; None with `compile_for`.
      files: all pictures.
    """
    left = parts.left(files) if parts else files
    if not left:
        return
    run, frozen = options.run, portraits.place_whole(frozen, mesh)
    know_fn = jax.jit(partial(know, networks, options))
    finish_fn = jax.jit(partial(finish, networks, options))
    side, begin = options.judge_size, partial(start_state, networks)
    image = jax.ShapeDtypeStruct((run.batch, side, side, 3), "f4")
    given = jax.eval_shape(know_fn, frozen, image)
    seeds = np.zeros(run.batch, "u4")
    state = jax.eval_shape(lambda z: begin(z, seeds, 0), given["z_plus"])
    step = portraits.compiled(
        make_step(networks, options), run, mesh, state, frozen, given
    )
    with jax.set_mesh(mesh):
        done = len(files) - len(left)
        for names, pictures in portraits.chunks(left, run.batch, side):
            began = time.perf_counter()
            given = know_fn(frozen, portraits.place_rows(pictures, mesh))
            seeds = [zlib.crc32(f.name.encode()) for f in names]
            seeds += seeds[-1:] * (run.batch - len(names))
            state = begin(given["z_plus"], np.array(seeds, "u4"), run.seed)
            state = portraits.place(state, mesh)
            for _ in range(run.steps):
                state, terms = step(state, frozen, given)
            found = sharding.fetch(finish_fn(frozen, given, state["point"]))
            for i, file in enumerate(names):
                codes = {k: found[k][i] for k in ("extrinsic", "intrinsic")}
                parts.write(file, found["shown"][i], **codes)
            done += len(names)
            portraits.tell(done, len(files), names, sharding.fetch(terms), began)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.destylize`."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"codes-{PurePath(options.data).name}")
    search(options, start(options.run))


if __name__ == "__main__":
    main()
