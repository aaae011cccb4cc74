"""Command lines from dataclasses."""

import dataclasses
import functools
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import docstring_parser
import tyro


def parse(
    options_class: type,
    module: str,
    description: str | None,
    args: Sequence[str] | None,
    default: Any = None,
) -> Any:
    """Command line to a dataclass of options, by tyro.

    Args:
      options_class: its field docstrings are the help; fields that are dataclasses
        themselves hold options that several commands share.
      module: shown as `python -m module`.
      description: shown by --help, usually the module's docstring.
      args: instead of the command line.
      default: an instance to start from, instead of the class's own defaults.
    """
    join_help(options_class)
    kwargs = {} if default is None else {"default": default}
    return tyro.cli(
        options_class,
        args=args,
        prog=f"python -m {module}",
        description=description,
        **kwargs,
    )


def given(options: Any, names: Collection[str]) -> list[str]:
    """Flags of the options whose values are not the defaults.

    Args:
      options: an instance of a dataclass of options.
      names: which of its options, or of those that its fields hold; the name of such a
        field stands for all that it holds.
    """
    flags = []
    for field in dataclasses.fields(options):
        value, named = getattr(options, field.name), field.name in names
        if dataclasses.is_dataclass(value):
            inner = [f.name for f in dataclasses.fields(value)] if named else names
            flags += given(value, inner)
        elif named and value != field.default:
            no = "no-" if value is False else ""
            flags.append(f"--{no}{field.name.replace('_', '-')}")
    return flags


@functools.cache
def join_help(cls: type) -> None:
    """Join the lines of field docstrings, which tyro would show as they are broken."""
    hints = typing.get_type_hints(cls)
    for field in docstring_parser.parse_from_object(cls).params:
        if field.description and field.arg_name in hints:
            text = " ".join(field.description.split())
            given = cls.__annotations__[field.arg_name]
            config = tyro.conf.arg(help=text)
            cls.__annotations__[field.arg_name] = Annotated[given, config]
    for hint in hints.values():
        if dataclasses.is_dataclass(hint):
            join_help(hint)
