"""How a command ends when something outside of it is wrong."""

import errno
import io
import os
import sys

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


def test_a_name_that_is_no_text_is_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", "strict"))
    # A stream of somebody else's, as a notebook has.
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    @cli
    def main():
        print(os.fsdecode(b"caf\xe9.png"), flush=True)

    main()
    assert written.getvalue() == b"caf\\udce9.png\n"
