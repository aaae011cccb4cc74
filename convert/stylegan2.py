"""Names of StyleGAN2's generator and discriminator in three layouts.

rosinality's stylegan2-pytorch (also JoJoGAN's, StyleGAN-NADA's and the decoder of pSp
and e4e), NVIDIA's stylegan2-ada-pytorch, and ours. No weight is flipped: both keep
the orientation of the transposed convolution, as we do.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.layouts import Table, check_keys, highest, shape, to_params, to_state
from convert.report import Report
from jaxstyle import stylegan2
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Discriminator, Generator, resolutions
from jaxstyle.weights import check_params

AVERAGE_CODES = 10_000
MAX_CODE_WIDTH = 4096
NO_DISCRIMINATOR = (
    "no discriminator: train.jojo needs --perceptual lpips, and train.stylegan2 "
    "starts one from scratch"
)


def _styled(table: Table, key: str, name: str) -> None:
    """One modulated layer of rosinality's generator under our name."""
    path = ("synthesis", name)
    table[f"{key}.conv.weight"] = (*path, "weight"), "conv_of_5"
    table[f"{key}.conv.modulation.weight"] = (*path, "affine", "weight"), "dense"
    table[f"{key}.conv.modulation.bias"] = (*path, "affine", "bias"), "vector"
    if name.startswith("rgb"):
        table[f"{key}.bias"] = (*path, "bias"), "vector_of_4"
    else:
        table[f"{key}.noise.weight"] = (*path, "noise_strength"), "scalar_of_1"
        table[f"{key}.activate.bias"] = (*path, "bias"), "vector"


def generator_table(size: int, mapping_depth: int) -> Table:
    """rosinality's names, the noise planes included."""
    table: Table = {}
    for i in range(mapping_depth):
        path = ("mapping", f"dense_{i}")
        table[f"style.{i + 1}.weight"] = (*path, "weight"), "dense"
        table[f"style.{i + 1}.bias"] = (*path, "bias"), "vector"
    table["input.input"] = ("synthesis", "const"), "const_of_4"
    _styled(table, "conv1", "conv_4")
    _styled(table, "to_rgb1", "rgb_4")
    for k, r in enumerate(resolutions(size)[1:]):
        _styled(table, f"convs.{2 * k}", f"up_{r}")
        _styled(table, f"convs.{2 * k + 1}", f"conv_{r}")
        _styled(table, f"to_rgbs.{k}", f"rgb_{r}")
    for i, name in enumerate(stylegan2.noise_names(size)):
        table[f"noises.noise_{i}"] = ("noise_const", name), "plane_of_4"
    return table


def discriminator_table(size: int) -> Table:
    """rosinality's names."""
    table: Table = {}

    def layer(key, path, bias=True):
        table[f"{key[0]}.weight"] = (*path, "weight"), "conv"
        if bias:
            table[f"{key[1]}.bias"] = (*path, "bias"), "vector"

    layer(("convs.0.0", "convs.0.1"), ("from_rgb",))
    for i, r in enumerate(reversed(resolutions(size)[1:]), start=1):
        block = f"block_{r}"
        layer((f"convs.{i}.conv1.0", f"convs.{i}.conv1.1"), (block, "conv1"))
        layer((f"convs.{i}.conv2.1", f"convs.{i}.conv2.2"), (block, "conv2"))
        layer((f"convs.{i}.skip.1",), (block, "skip"), bias=False)
    layer(("final_conv.0", "final_conv.1"), ("final_conv",))
    for i, layout in enumerate(("flat_4", "dense")):
        table[f"final_linear.{i}.weight"] = (f"dense_{i}", "weight"), layout
        table[f"final_linear.{i}.bias"] = (f"dense_{i}", "bias"), "vector"
    return table


def nvidia_generator_table(size: int, mapping_depth: int) -> Table:
    """NVIDIA's names, the noise planes and the average latent included."""
    table: Table = {}
    for i in range(mapping_depth):
        path = ("mapping", f"dense_{i}")
        table[f"mapping.fc{i}.weight"] = (*path, "weight"), "dense"
        table[f"mapping.fc{i}.bias"] = (*path, "bias"), "vector"
    table["mapping.w_avg"] = ("w_avg",), "vector"
    table["synthesis.b4.const"] = ("synthesis", "const"), "const"
    for name in stylegan2.layer_names(size):
        kind, r = name.split("_")
        part = {"up": "conv0", "conv": "conv1", "rgb": "torgb"}[kind]
        key, path = f"synthesis.b{r}.{part}", ("synthesis", name)
        table[f"{key}.weight"] = (*path, "weight"), "conv"
        table[f"{key}.bias"] = (*path, "bias"), "vector"
        table[f"{key}.affine.weight"] = (*path, "affine", "weight"), "dense"
        table[f"{key}.affine.bias"] = (*path, "affine", "bias"), "vector"
        if kind != "rgb":
            table[f"{key}.noise_strength"] = (*path, "noise_strength"), "scalar"
            table[f"{key}.noise_const"] = ("noise_const", name), "plane"
    return table


def nvidia_discriminator_table(size: int) -> Table:
    """NVIDIA's names."""
    table: Table = {}

    def layer(key, path, layout="conv", bias=True):
        table[f"{key}.weight"] = (*path, "weight"), layout
        if bias:
            table[f"{key}.bias"] = (*path, "bias"), "vector"

    layer(f"b{size}.fromrgb", ("from_rgb",))
    for r in reversed(resolutions(size)[1:]):
        layer(f"b{r}.conv0", (f"block_{r}", "conv1"))
        layer(f"b{r}.conv1", (f"block_{r}", "conv2"))
        layer(f"b{r}.skip", (f"block_{r}", "skip"), bias=False)
    layer("b4.conv", ("final_conv",))
    layer("b4.fc", ("dense_0",), "flat_4")
    layer("b4.out", ("dense_1",), "dense")
    return table


def _size(levels: int, what: str) -> int:
    """Picture size from the number of resolutions above 4."""
    if not 1 <= levels <= 8:
        raise UserError(
            f"the {what} has {levels} resolutions above 4; 1 (8 px) to 8 (1024 px) are "
            "known"
        )
    return 4 << levels


def _power_of_two(size: int, what: str) -> int:
    if size not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise UserError(f"the {what} is of size {size}; 8 to 1024 are known")
    return size


def _widths(size: int, channels: list[int]) -> dict[str, Any]:
    """The fields for a channel table: a published multiplier where one fits."""
    for multiplier in (2, 1):
        known = stylegan2.channel_table(size, multiplier)
        if channels == list(known.values()):
            return {"channel_multiplier": multiplier}
    return {"channels": tuple(channels)}


def _code_widths(state, first: str, last: str) -> dict[str, int]:
    """Widths of z and w by the mapping's first and last layer."""
    widths = {"z_dim": shape(state, first, 2)[1], "w_dim": shape(state, last, 2)[0]}
    if max(widths.values()) > MAX_CODE_WIDTH:
        raise UserError(f"the mapping has {widths}; at most {MAX_CODE_WIDTH} are read")
    return widths


def _described(module: Generator | Discriminator) -> str:
    width = (
        f"channels {', '.join(map(str, module.channels))}"
        if module.channels
        else f"channel multiplier {module.channel_multiplier}"
    )
    if isinstance(module, Discriminator):
        return f"{module.size} px, {width}"
    return (
        f"{module.size} px, {width}, {module.mapping_depth} mapping layers, "
        f"{module.num_ws} w+ rows"
    )


def without(state: Mapping[str, Any], pattern: str, why: str, report: Report) -> dict:
    """`state` without the keys that match, which the report names as ignored."""
    dropped = dict.fromkeys(k for k in state if re.search(pattern, k))
    if dropped:
        report.ignored.append(
            f"{len(dropped)} arrays like {next(iter(dropped))}: {why}"
        )
    return {k: v for k, v in state.items() if k not in dropped}


def _without_kernels(state, pattern, report):
    """`state` without its blur kernels, which must be the published ones."""
    for key, kernel in state.items():
        if re.search(pattern, key):
            if not isinstance(kernel, np.ndarray) or kernel.shape != (4, 4):
                raise UserError(f"{key} is no blur kernel of 4 × 4")
            gain = kernel.astype(np.float32).sum()
            if not np.allclose(kernel, _kernel(1) * gain, rtol=1e-3, atol=0):
                raise UserError(f"{key} is another blur kernel than [1, 3, 3, 1]")
    return without(state, pattern, "fixed blur kernels", report)


def generator(
    state: Mapping[str, Any], report: Report, what: str = "generator"
) -> tuple[Generator, dict[str, Any]]:
    """Architecture and parameters of rosinality's generator, without `w_avg`."""
    state = _without_kernels(state, r"\.kernel$", report)
    levels = 1 + max(
        highest(state, r"to_rgbs\.(\d+)\."), highest(state, r"convs\.(\d+)\.") // 2
    )
    size, depth = _size(levels, what), _depth(highest(state, r"style\.(\d+)\."))
    table = generator_table(size, depth)
    state = _with_noises(state, table, report)
    check_keys(state, table, what)
    channels = [shape(state, "input.input", 4)[1]] + [
        shape(state, f"convs.{2 * k}.conv.weight", 5)[1] for k in range(levels)
    ]
    module = Generator(
        size=size,
        mapping_depth=depth,
        **_code_widths(state, "style.1.weight", f"style.{depth}.weight"),
        **_widths(size, channels),
    )
    params = to_params(state, table, what)
    report.read.append(f"{what}: {_described(module)}")
    return module, params


def _depth(depth: int) -> int:
    if not 1 <= depth <= 8:
        raise UserError(f"the mapping has {depth} layers; 1 to 8 are known")
    return depth


def _with_noises(state, table, report):
    """`state` with every noise plane: older files lack them, others have more."""
    wanted = {k: v[0][1] for k, v in table.items() if k.startswith("noises.")}
    extra = {k for k in state if k.startswith("noises.") and k not in wanted}
    if extra:
        report.ignored.append(f"{len(extra)} noise planes that no layer reads")
    state = {k: v for k, v in state.items() if k not in extra}
    missing = [k for k in wanted if k not in state]
    if missing:
        report.missing.append(
            f"{len(missing)} of {len(wanted)} noise planes: drawn anew with a fixed "
            "key; they only matter with --noise-mode const"
        )
    for i, key in enumerate(wanted):
        if key in missing:
            r = stylegan2.layer_resolution(wanted[key])
            rng = np.random.default_rng(i)
            state[key] = rng.standard_normal((1, 1, r, r), np.float32)
    return state


def discriminator(
    state: Mapping[str, Any], report: Report, what: str = "discriminator"
) -> tuple[Discriminator, dict[str, Any]]:
    """Architecture and parameters of rosinality's discriminator."""
    state = _without_kernels(state, r"\.kernel$", report)
    levels = highest(state, r"convs\.(\d+)\.")
    size = _size(levels, what)
    table = discriminator_table(size)
    check_keys(state, table, what)
    channels = [shape(state, "final_conv.0.weight", 4)[0]] + [
        shape(state, f"convs.{i}.conv1.0.weight", 4)[0] for i in range(levels, 0, -1)
    ]
    module = Discriminator(size=size, **_widths(size, channels))
    params = to_params(state, table, what)
    report.read.append(f"{what}: {_described(module)}")
    return module, params


def nvidia_generator(
    state: Mapping[str, Any], report: Report
) -> tuple[Generator, dict[str, Any]]:
    """Architecture and parameters of NVIDIA's generator."""
    if any(k.startswith("mapping.embed.") for k in state):
        raise UserError(
            "it is a class-conditional model (mapping.embed); only unconditional ones "
            "are converted"
        )
    if any(k.startswith("synthesis.L0_") for k in state):
        raise UserError("it is a StyleGAN3 generator; only StyleGAN2 is converted")
    state = _without_kernels(state, r"\.resample_filter$", report)
    size = _power_of_two(highest(state, r"synthesis\.b(\d+)\."), "generator")
    depth = _depth(highest(state, r"mapping\.fc(\d+)\.") + 1)
    table = nvidia_generator_table(size, depth)
    if "mapping.w_avg" not in state:
        del table["mapping.w_avg"]
    check_keys(state, table, "generator")
    channels = [shape(state, "synthesis.b4.const", 3)[0]] + [
        shape(state, f"synthesis.b{r}.conv1.weight", 4)[0]
        for r in resolutions(size)[1:]
    ]
    module = Generator(
        size=size,
        mapping_depth=depth,
        **_code_widths(state, "mapping.fc0.weight", f"mapping.fc{depth - 1}.weight"),
        **_widths(size, channels),
    )
    params = to_params(state, table, "generator")
    params["w_avg"] = average_latent(params.get("w_avg"), module, params, report)
    report.read.append(f"generator: {_described(module)}")
    return module, params


def nvidia_discriminator(
    state: Mapping[str, Any], report: Report
) -> tuple[Discriminator, dict[str, Any]]:
    """Architecture and parameters of NVIDIA's discriminator."""
    if any(k.startswith("mapping.") for k in state):
        raise UserError(
            "its discriminator is class-conditional; only unconditional ones are "
            "converted"
        )
    state = _without_kernels(state, r"\.resample_filter$", report)
    size = _power_of_two(highest(state, r"b(\d+)\."), "discriminator")
    table = nvidia_discriminator_table(size)
    check_keys(state, table, "discriminator")
    channels = [shape(state, "b4.conv.weight", 4)[0]] + [
        shape(state, f"b{r}.conv0.weight", 4)[0] for r in resolutions(size)[1:]
    ]
    module = Discriminator(size=size, **_widths(size, channels))
    params = to_params(state, table, "discriminator")
    report.read.append(f"discriminator: {_described(module)}")
    return module, params


def average_latent(
    latent_avg: Any, module: Generator, params: Mapping[str, Any], report: Report
) -> np.ndarray:
    """The generator's `w_avg` [w_dim], from the file or estimated.

    Args:
      latent_avg: [w_dim], [1, w_dim] or one row a style; None to estimate the mean
        of mapped normals.
      module: the generator.
      params: its parameters.
      report: says which.
    """
    if latent_avg is None:
        zeros = np.zeros(module.w_dim, np.float32)
        check_params({"it": module}, {"it": {**params, "w_avg": zeros}}, "the file")
        report.missing.append(
            f"no average latent: estimated from {AVERAGE_CODES:,} codes with a fixed "
            "key"
        )
        z = jax.random.normal(jax.random.key(0), (AVERAGE_CODES, module.z_dim))
        return np.asarray(jnp.mean(stylegan2.mapping(params["mapping"], z), 0))
    rows = latent_rows(latent_avg, module.w_dim)
    report.read.append(f"average latent: {list(latent_avg.shape)}")
    if (rows != rows[0]).any():
        report.notes.append(
            "the rows of the average latent differ; the generator takes their mean"
        )
        return rows.mean(0, dtype=np.float64).astype(np.float32)
    return rows[0]


def latent_rows(latent_avg: Any, w_dim: int) -> np.ndarray:
    """An average latent as rows [n, w_dim], n = 1 for a single one."""
    if not isinstance(latent_avg, np.ndarray) or latent_avg.dtype.kind != "f":
        raise UserError("latent_avg is no float array")
    if latent_avg.ndim not in (1, 2) or latent_avg.shape[-1] != w_dim:
        raise UserError(
            f"latent_avg has shape {list(latent_avg.shape)}; it must be [{w_dim}] or "
            f"[rows, {w_dim}]"
        )
    return np.array(np.atleast_2d(latent_avg), np.float32)


def generator_state(module: Generator, params: Mapping[str, Any]) -> dict:
    """rosinality's state dict of our generator, kernel buffers included."""
    state = to_state(params, generator_table(module.size, module.mapping_depth))
    for k in range(len(resolutions(module.size)) - 1):
        state[f"convs.{2 * k}.conv.blur.kernel"] = _kernel(4)
        state[f"to_rgbs.{k}.upsample.kernel"] = _kernel(4)
    return state


def discriminator_state(module: Discriminator, params: Mapping[str, Any]) -> dict:
    """rosinality's state dict of our discriminator, kernel buffers included."""
    state = to_state(params, discriminator_table(module.size))
    for i in range(1, len(resolutions(module.size))):
        state[f"convs.{i}.conv2.0.kernel"] = _kernel(1)
        state[f"convs.{i}.skip.0.kernel"] = _kernel(1)
    return state


def _kernel(gain: int) -> np.ndarray:
    row = np.array([1, 3, 3, 1], np.float32)
    return np.outer(row, row) / np.float32(64) * np.float32(gain)
