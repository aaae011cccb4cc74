import jax

from jaxstyle.cache import use_compilation_cache


def test_folder(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert use_compilation_cache() == before
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        monkeypatch.setenv("JAXSTYLE_CACHE", str(tmp_path))
        assert use_compilation_cache() == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
