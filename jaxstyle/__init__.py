"""StyleGAN2, its encoders and one-shot stylisation in JAX/Flax."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # jax takes a second to import; `jaxstyle.align --help` need not wait for it.
    if name in ("load", "save"):
        from jaxstyle import weights

        return getattr(weights, name)
    raise AttributeError(f"module 'jaxstyle' has no attribute {name!r}")
