"""DualStyleGAN: better codes for the exemplars of a trained style.

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 3.4, latent optimisation: the
loss and the search of `jaxstyle.refine`, for every portrait of the style. Starting from
the extrinsic codes e, each with the intrinsic code i of its own face,

    LPIPS(G(i, e), S) + contextual loss (relu3_1) + 1e5 · correlation of noise planes

is minimised in e and the planes, with a rate for the structure rows, one for the color
rows and one for the planes. Codes stay in z+ and pass the mapping network every step.

    python -m train.refine_exstyle --weights runs/dual-portraits --data portraits \\
        --encoder weights/psp-z-plus --out runs/style --batch 8
    python -m jaxstyle.stylize me.jpg --weights runs/style --style-id 0

OUT is the finished style: generator, extrinsic path, all codes, and the encoder if one
is named, so that it is all that `stylize` and `train.dual_sampler` need.
OUT.parts/pictures shows each portrait, and what its code gave before and after.

The paper refines the structure rows at a low rate to keep the transfer to other faces;
the code's rates are taken: 0.005 for structure, 0.01 for colors (0.1 for cartoon).
Every picture is as in a batch of one; the published contextual loss couples a batch's.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxstyle import refine, weights
from jaxstyle.errors import UserError, cli
from jaxstyle.exemplars import Exemplars
from jaxstyle.paths import place
from train import portraits, sharding
from train.cli import RunOptions, Shared, parse, start, with_out, working
from train.dual_steps import z_plus_encoder

# What a finished style has no use for.
LEFT_OUT = ("discriminator", "dual_trained", "portrait_generator")


@dataclasses.dataclass(frozen=True)
class Options:
    """Refinement of the exemplars of a DualStyleGAN style."""

    data: str
    """Folder with the portraits that the exemplars are named after."""
    weights: str
    """Run of stage 3, or a style folder, with extrinsic and intrinsic codes."""
    encoder: str = ""
    """Folder of an encoder to z+, to go with the style; empty: that beside it."""
    rates: Annotated[refine.Rates, tyro.conf.OmitArgPrefixes] = refine.Rates()
    lpips_net: str = "lpips_alexnet"
    """LPIPS network; published: VGG's."""
    perceptual_net: str = ""
    """Trunk of the contextual loss: vgg19, vgg16, alexnet or a folder; empty: VGG-19,
    or AlexNet, which ships with us."""
    judge_size: int = refine.SIZE
    """Pixels a side at which pictures are judged; published 256."""
    run: Shared = RunOptions(steps=100, batch=4)


def start_state(
    networks: refine.Networks, options: Options, codes: Any
) -> dict[str, Any]:
    """Where the search begins, see `refine.start`, and Adam's moments."""
    key = jax.random.key(options.run.seed)
    point = refine.start(codes, networks.generator.size, key=key)
    return {"point": point, "moments": refine.optimizer(options.rates).init(point)}


def make_step(networks: refine.Networks, options: Options) -> portraits.Step:
    """One update of all pictures' codes and planes."""

    def step(state, frozen, given):
        frozen = {**frozen, "intrinsic": given["intrinsic"]}
        grads, terms = jax.grad(refine.loss, has_aux=True)(
            state["point"], frozen, networks, given
        )
        tx = refine.optimizer(options.rates)
        moves, moments = tx.update(grads, state["moments"], state["point"])
        point = refine.renormalised(optax.apply_updates(state["point"], moves))
        return {"point": point, "moments": moments}, terms

    return step


def know(networks: refine.Networks, frozen: Any, image: Any, intrinsic: Any) -> dict:
    """What the loss compares with: `lpips`, `cx`; and `intrinsic`."""
    anchors = refine.anchors(networks, {**frozen, "targets": image})
    return anchors | {"intrinsic": intrinsic}


def show(networks: refine.Networks, frozen: Any, given: Any, point: Any) -> Any:
    """Pictures of a point at the judges' size, [batch, h, h, 3]."""
    image, _ = networks.dual.apply(
        {"params": frozen["dual"]},
        networks.generator,
        frozen["generator"],
        given["intrinsic"],
        refine.codes_of(point),
        noise=point["noise"],
    )
    return refine.view(image, networks.size)


def load(options: Options) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The style's networks, parameters and metadata, the encoder among them.

    Raises:
      UserError: it has no exemplars, or lacks their codes.
    """
    model, params = weights.load(options.weights)
    metadata = weights.read_config(options.weights)["metadata"]
    if "dual" not in model or "exemplars" not in model:
        raise UserError(
            f"{options.weights} holds {', '.join(model)}; it must be a DualStyleGAN "
            "with exemplars: a run of train.dual_finetune"
        )
    lacking = [n for n in ("extrinsic", "intrinsic") if n not in params["exemplars"]]
    if lacking:
        raise UserError(
            f"the exemplars of {options.weights} have no {' and no '.join(lacking)} "
            "codes; train.destylize finds them"
        )
    networks = {n: m for n, m in model.items() if n not in LEFT_OUT}
    if options.encoder:
        found = z_plus_encoder(options.encoder, "", model.generator, "float32")
        networks["encoder"], params["encoder"] = found.module, found.params
    space = metadata.get("space") if not options.encoder else "z_plus"
    metadata = {"scheme": "refine_exstyle", "base": options.weights}
    metadata |= {"space": space} if "encoder" in networks and space else {}
    return networks, params, metadata


def search(options: Options, mesh: Any) -> None:
    """The whole run; what `main` calls after reading the command line."""
    run = options.run
    sharding.check_batch(run.batch, mesh)
    style, params, metadata = load(options)
    portraits.check_size(options.judge_size, style["generator"].size)
    table, module = params["exemplars"], style["exemplars"]
    files = [place(options.data) / name for name in module.names]
    if missing := [f.name for f in files if not f.is_file()]:
        raise UserError(
            f"--data {options.data} has no picture for {len(missing)} of the "
            f"{len(files)} exemplars, the first {missing[0]}"
        )
    style["generator"] = working(style["generator"], run)
    networks, frozen = refine.judge_of(
        style,
        params,
        perceptual=options.lpips_net,
        perceptual_net=options.perceptual_net,
        size=options.judge_size,
    )
    find_in = partial(find, options, mesh, networks, frozen, table, files)
    if run.compile_for:
        find_in(None)
    digests = {name: weights.digest(p) for name, p in frozen.items()}
    digests["exemplars"] = weights.digest(table)
    with contextlib.closing(portraits.Parts(options, metadata, digests)) as parts:
        find_in(parts)
        names, refined = portraits.assemble(parts, files)
        kept = jnp.array([module.names.index(name) for name in names])
        tables = {kind: codes[kept] for kind, codes in table.items()} | refined
        kinds = tuple(k for k in ("extrinsic", "refined", "intrinsic") if k in tables)
        style["exemplars"] = Exemplars(names, module.num_ws, module.z_dim, kinds)
        params["exemplars"] = {k: tables[k] for k in kinds}
        portraits.save(parts, style, params, metadata)
    if jax.process_index() == 0:
        print(
            f"now: python -m jaxstyle.stylize me.jpg --style-id 0 --weights {run.out}"
        )


def find(
    options: Options,
    mesh: Any,
    networks: refine.Networks,
    frozen: Any,
    table: Any,
    files: Sequence[Path],
    parts: portraits.Parts | None,
) -> None:
    """Find the refined codes of those files that have none.

    Args:
      options: of the scheme.
      mesh: of the run.
      networks, frozen: of `refine.judge_of`.
      table: the exemplars' codes, [n, num_ws, z_dim] by kind.
      files: all portraits.
      parts: where the codes are kept; None with `compile_for`.
    """
    left = parts.left(files) if parts else files
    if not left:
        return
    run, shape = options.run, table["extrinsic"].shape[1:]
    know_fn = jax.jit(partial(know, networks))
    show_fn = jax.jit(partial(show, networks))
    begin = partial(start_state, networks, options)
    frozen = portraits.place_whole(frozen, mesh)
    image = jax.ShapeDtypeStruct((run.batch, *(options.judge_size,) * 2, 3), "f4")
    codes = jax.ShapeDtypeStruct((run.batch, *shape), "f4")
    given = jax.eval_shape(know_fn, frozen, image, codes)
    state = jax.eval_shape(begin, codes)
    step = portraits.compiled(
        make_step(networks, options), run, mesh, state, frozen, given
    )
    with jax.set_mesh(mesh):
        done = len(files) - len(left)
        for names, pictures in portraits.chunks(left, run.batch, options.judge_size):
            began = time.perf_counter()
            rows = [files.index(f) for f in names]
            rows = jnp.array(rows + rows[-1:] * (run.batch - len(rows)))
            given = know_fn(
                frozen,
                portraits.place_rows(pictures, mesh),
                portraits.place_rows(table["intrinsic"][rows], mesh),
            )
            state = portraits.place(begin(table["extrinsic"][rows]), mesh)
            before = sharding.fetch(show_fn(frozen, given, state["point"]))
            for _ in range(run.steps):
                state, terms = step(state, frozen, given)
            after = sharding.fetch(show_fn(frozen, given, state["point"]))
            found = sharding.fetch(refine.codes_of(state["point"]))
            for i, file in enumerate(names):
                parts.write(
                    file, [x[i] for x in (pictures, before, after)], refined=found[i]
                )
            done += len(names)
            portraits.tell(done, len(files), names, sharding.fetch(terms), began)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.refine_exstyle`."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"style-{PurePath(options.data).name}")
    search(options, start(options.run))


if __name__ == "__main__":
    main()
