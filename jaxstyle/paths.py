"""Paths on this machine and on buckets."""

import os

from etils import epath

from jaxstyle.errors import UserError, one_line


def place(path: str | os.PathLike) -> epath.Path:
    """A path on this machine or, after `gs://`, on a bucket.

    Raises:
      UserError: the extra that buckets need is not installed.
    """
    found = epath.Path(path)
    if is_remote(found):
        try:
            found.exists()
        except ImportError as error:
            raise UserError(
                f"{path} needs an extra: pip install 'jaxstyle[gcs]' "
                f"({one_line(error, 100)})"
            ) from None
    return found


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on a bucket."""
    return "://" in os.fspath(path)
