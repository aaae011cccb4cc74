"""How a command ends when something outside of it is wrong."""

import errno
import os

import pytest

from jaxstyle.errors import cli


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_cannot_be_written_is_one_line(code, capsys):
    @cli
    def main():
        raise OSError(code, os.strerror(code), "out/a.png")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: out/a.png: {os.strerror(code)}\n"
