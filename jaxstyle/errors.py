"""One-line errors for mistakes a user can make, and the wrapper of every command."""

import errno
import functools
import logging
import os
import sys

_PATH_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ENAMETOOLONG,
}


class UserError(ValueError):
    """A mistake in what the user gave: argument, value, rule and way out, one line."""


def one_line(text, limit=600):
    """`text` without line breaks or control characters, at most `limit` long."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error):
    """The innermost message, without the places in libraries it came through."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = one_line(str(error).split(" [")[0], 2000)
    # What the system said comes last.
    return text if len(text) < 200 else f"{text[:70]} … {text[-120:]}"


def _without_traceback(record):
    # What fails in Orbax's threads comes back as an exception too.
    return not record.exc_info


def _unraisable(what, shown=sys.unraisablehook):
    # One write has failed, and Orbax has closed the event loop that TensorStore's
    # threads still tell of the others.
    if str(what.exc_value) != "Event loop is closed":
        shown(what)


def _hush_writers():
    """Keep off the screen what the threads of a failed write say besides the error."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_without_traceback)
    sys.unraisablehook = _unraisable


def cli(main):
    """Wrap the `main` of a command so that user errors end without a traceback.

    `UserError`, and file system errors such as a missing file, a forbidden folder or
    a full disk, print `error: ...` to stderr and exit with code 1; Ctrl-C exits with
    130. Every other exception is a bug and keeps its traceback. What the stream
    cannot hold is printed as `\\udce9`.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        _hush_writers()
        for stream in (sys.stdout, sys.stderr):
            # File names are bytes, not all of which are text.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = one_line(error)
        except BrokenPipeError:
            # The reader of our output left (`... | head`); stop python from
            # complaining again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.errno not in _PATH_ERRORS:
                raise
            name = f"{error.filename}: " if error.filename else ""
            message = one_line(f"{name}{error.strerror}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)

    return wrapped
