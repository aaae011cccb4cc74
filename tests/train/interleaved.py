"""Processes whose devices take turns along the mesh, as on many TPU slices; a command.

Each process reads its rows of three batches of 8, and prints what all have together.
"""

import jax
import numpy as np
from jax.sharding import AxisType

from train import cli, data, sharding


def main():
    """Print the numbers of each batch, in order."""
    cli.start(cli.RunOptions())
    devices = sorted(jax.devices(), key=lambda d: (d.id % 2, d.id))
    shape = (1, len(devices), 1, 1)
    axes = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, sharding.AXES, axes, devices=devices)
    numbers = np.arange(20, dtype=np.float32)[:, None, None, None]
    source = numbers * np.ones((4, 4, 3), np.float32)
    stream = data.batches(list(source), 8, mesh, seed=0)
    for _ in range(3):
        batch = sharding.global_batch(next(stream), mesh)
        whole = jax.jit(
            lambda x: x.mean((1, 2, 3)), out_shardings=sharding.replicated(mesh)
        )
        print("numbers", np.asarray(whole(batch["image"])).astype(int).tolist())


if __name__ == "__main__":
    main()
