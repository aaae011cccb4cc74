"""A pickle machine that cannot run anything, and its writer.

`load` walks the opcodes itself. A global is nothing but a key of the dictionary of
functions it was given; what is not in there is refused by name. Nothing is imported,
no attribute is looked up, `__setstate__` and `__reduce__` do not exist. Amounts are
bounded: opcodes, text, size of integers, nesting, and the size a shared structure
would have when written out.

What can be built: None, bool, int, float, str, lists (sets become lists), tuples,
dicts with str or int keys, `memoryview`s of the file for bytes, and whatever the given
functions return.
"""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from jaxstyle.errors import UserError

MAX_OPCODES = 1_000_000
MAX_TEXT = 1 << 24
MAX_INT_BYTES = 16
MAX_DEPTH = 64
MAX_OBJECTS = 2_000_000

# Argument of each opcode: a struct format, `line` for text up to a newline, `bytes*`
# and `text*` for a length of 1, 4 or 8 bytes and that many bytes. Opcodes that are
# not here (extension registry, old-style instances, out-of-band buffers, NEWOBJ_EX)
# never occur in the files we read.
_NO_ARGUMENT = ")N](}0.12abdetlsuQR\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"
_ARGUMENTS = dict.fromkeys(_NO_ARGUMENT.encode("latin-1"), "") | {
    ord(op): kind
    for op, kind in {
        "\x80": "<B",  # PROTO
        "\x95": "<Q",  # FRAME
        "K": "<B",
        "M": "<H",
        "J": "<i",
        "G": ">d",
        "h": "<B",  # BINGET
        "j": "<I",
        "q": "<B",  # BINPUT
        "r": "<I",
        "I": "line",
        "L": "line",
        "F": "line",
        "V": "line",
        "S": "line",
        "c": "lines",
        "g": "line",
        "p": "line",
        "\x8a": "bytes<B",  # LONG1
        "U": "text<B",
        "T": "text<i",
        "X": "text<I",
        "\x8c": "text<B",
        "\x8d": "text<Q",
        "C": "bytes<B",
        "B": "bytes<I",
        "\x8e": "bytes<Q",
    }.items()
}


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle: never more than these two strings."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Call:
    """For `dump`: call a global with arguments (REDUCE), then hand over a state."""

    function: Global
    arguments: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Persistent:
    """For `dump`: a persistent id (BINPERSID)."""

    identity: tuple


class Record(dict):
    """The attributes of an object whose class we do not have, as a dict."""


class Stated(list):
    """An object that only its state describes: the state as its one item.

    Attributes:
      about: what else a function noted when it made it.
    """

    about: str | None = None


def damaged(why: str) -> UserError:
    """The error for bytes that are no pickle, or one of a kind nobody writes."""
    return UserError(f"its pickle is damaged: {why}")


def _argument(data: memoryview, position: int) -> tuple[int, Any, int]:
    """Opcode at `position`, its raw argument, and where the next one starts."""
    if position >= len(data):
        raise damaged("the data end too early")
    op = data[position]
    kind = _ARGUMENTS.get(op)
    position += 1
    if kind is None:
        raise damaged(f"opcode {bytes([op])!r} is not used by these files")
    if not kind:
        return op, None, position
    if kind.startswith("line"):
        lines = []
        for _ in range(2 if kind == "lines" else 1):
            text = bytes(data[position : position + 4096])
            end = text.find(b"\n")
            if end < 0:
                raise damaged("a line of text does not end")
            lines.append(text[:end].decode())
            position += end + 1
        return op, lines if kind == "lines" else lines[0], position
    form = kind.removeprefix("bytes").removeprefix("text")
    size = struct.calcsize(form)
    if position + size > len(data):
        raise damaged("the data end too early")
    (value,) = struct.unpack_from(form, data, position)
    position += size
    if form == kind:
        return op, value, position
    if not 0 <= value <= len(data) - position:
        raise damaged(f"{value} bytes are announced, {len(data) - position} are left")
    return op, data[position : position + value], position + value


def load(
    data: memoryview,
    position: int,
    functions: Mapping[str, Callable],
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Read one pickle.

    Args:
      data: the file.
      position: where the pickle starts.
      functions: for each permitted global `module.name`, what a call of it gives.
      persistent: what a persistent id stands for.

    Returns:
      The object and the end of the pickle.

    Raises:
      UserError: a global that is not among `functions`, or a damaged pickle.
    """
    try:
        value, end = _run(data, position, functions, persistent)
    except UserError:
        raise
    except RecursionError:
        raise damaged("it is nested too deeply") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise damaged(f"{type(e).__name__}, {e}") from None
    _check_nesting(value)
    return value, end


def _run(data, position, functions, persistent):
    stack: list[Any] = []
    below: list[list] = []  # the stacks under each open mark
    memo: dict[int, Any] = {}
    globals_seen: dict[str, Global] = {}
    text_left, states_left = MAX_TEXT, MAX_OPCODES

    def since_mark():
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    def pop_tuple(n):
        if len(stack) < n:
            raise damaged("the stack is empty")
        items = tuple(stack[len(stack) - n :])
        del stack[len(stack) - n :]
        return items

    def set_items(target, items):
        if not isinstance(target, dict):
            raise damaged("a key is set on something that is no dict")
        if len(items) % 2:
            raise damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing anything else could be made arbitrarily slow or deep.
            if type(key) not in (str, int):
                raise damaged(f"a dict key of type {type(key).__name__}")
            if key in target:
                raise damaged(f"the key {key!r:.80} occurs twice")
            target[key] = value

    def add(target, items):
        if type(target) is not list:
            raise damaged("an item is added to something that is no list")
        target.extend(items)

    def call(function, arguments):
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise damaged("a call of something that is no name")
        return functions[str(function)](*arguments)

    def find(module, name):
        full = f"{module}.{name}"
        if full not in functions:
            raise UserError(f"refused global {full!r:.200}")
        return globals_seen.setdefault(full, Global(module, name))

    for _ in range(MAX_OPCODES):
        op, argument, position = _argument(data, position)
        op = chr(op)
        if op in "UTXVS\x8c\x8d":
            text_left -= len(argument)
            if text_left < 0:
                raise damaged(f"more than {MAX_TEXT} bytes of text")
        match op:
            case "\x80":
                if argument > 5:
                    raise damaged(f"pickle protocol {argument}")
            case "\x95":
                pass
            case ".":
                if len(stack) != 1 or below:
                    raise damaged("it ends with an unfinished structure")
                return stack[0], position
            case "N":
                stack.append(None)
            case "\x88":
                stack.append(True)
            case "\x89":
                stack.append(False)
            case "I" if argument in ("00", "01"):
                stack.append(argument == "01")
            case "I" | "L":
                if len(argument) > 2 * MAX_INT_BYTES:
                    raise damaged("an integer is too long")
                stack.append(int(argument.removesuffix("L")))
            case "K" | "M" | "J" | "G":
                stack.append(argument)
            case "F":
                stack.append(float(argument))
            case "\x8a":
                if len(argument) > MAX_INT_BYTES:
                    raise damaged("an integer is too long")
                stack.append(int.from_bytes(argument, "little", signed=True))
            case "V":
                stack.append(argument.encode().decode("raw-unicode-escape"))
            case "S":
                if len(argument) < 2 or argument[0] != argument[-1] or "\\" in argument:
                    raise damaged("a string with escapes")
                stack.append(argument[1:-1])
            case "U" | "T":
                stack.append(bytes(argument).decode("latin-1"))
            case "X" | "\x8c" | "\x8d":
                stack.append(bytes(argument).decode("utf-8", "surrogatepass"))
            case "C" | "B" | "\x8e":
                stack.append(argument)
            case ")":
                stack.append(())
            case "]" | "\x8f":
                stack.append([])
            case "}":
                stack.append({})
            case "(":
                below.append(stack)
                stack = []
            case "1":
                since_mark()
            case "0":
                stack.pop()
            case "2":
                stack.append(stack[-1])
            case "\x85" | "\x86" | "\x87":
                stack.append(pop_tuple(ord(op) - 0x84))
            case "t":
                items = tuple(since_mark())
                stack.append(items)
            case "l" | "\x91":
                items = since_mark()
                stack.append(items)
            case "d":
                items, fresh = since_mark(), {}
                set_items(fresh, items)
                stack.append(fresh)
            case "a":
                add(stack[-2], [stack[-1]])
                stack.pop()
            case "e" | "\x90":
                items = since_mark()
                add(stack[-1], items)
            case "s":
                items = pop_tuple(2)
                set_items(stack[-1], items)
            case "u":
                items = since_mark()
                set_items(stack[-1], items)
            case "h" | "j":
                stack.append(memo[argument])
            case "g":
                stack.append(memo[int(argument[:12])])
            case "q" | "r":
                memo[argument] = stack[-1]
            case "p":
                memo[int(argument[:12])] = stack[-1]
            case "\x94":
                memo[len(memo)] = stack[-1]
            case "c":
                stack.append(find(*argument))
            case "\x93":
                module, name = pop_tuple(2)
                if type(module) is not str or type(name) is not str:
                    raise damaged("a global without a name")
                stack.append(find(module, name))
            case "R" | "\x81":
                function, arguments = pop_tuple(2)
                stack.append(call(function, arguments))
            case "b":
                state = stack.pop()
                if type(stack[-1]) is Stated:
                    if stack[-1] or type(state) is not tuple:
                        raise damaged("a state that is no tuple, or a second one")
                    stack[-1].append(state)
                elif not isinstance(stack[-1], dict):
                    # Only numpy.dtype hands over a state that is no dict; it repeats
                    # the byte order, which its function has fixed already.
                    if not isinstance(stack[-1], str) or type(state) is not tuple:
                        raise damaged("a state for something that takes none")
                elif type(state) is not dict:
                    raise damaged("a state that is no dict")
                elif type(stack[-1]) is Record:
                    # One state may be handed to any number of records.
                    states_left -= len(state)
                    if states_left < 0:
                        raise damaged("its states are too large")
                    stack[-1].update(state)
            case "Q":
                if persistent is None:
                    raise damaged("a persistent id where none may be")
                stack.append(persistent(stack.pop()))
    raise damaged(f"more than {MAX_OPCODES} opcodes")


def _check_nesting(root: Any) -> None:
    """Refuse cycles, deep nesting, and shared structures that explode when walked.

    Everything after this may recurse over the object without fear.
    """
    depth: dict[int, int] = {}
    count: dict[int, int] = {}
    open_ids: set[int] = set()
    todo = [root]
    while todo:
        value = todo[-1]
        if isinstance(value, dict):
            children = list(value.values())
        else:
            children = value if isinstance(value, (list, tuple)) else ()
        here = id(value)
        if here in depth:
            todo.pop()
            continue
        nested = [c for c in children if isinstance(c, (dict, list, tuple))]
        if here not in open_ids:
            open_ids.add(here)
            waiting = [c for c in nested if id(c) not in depth]
            if any(id(c) in open_ids for c in waiting):
                raise damaged("a structure that contains itself")
            todo += waiting
            continue
        todo.pop()
        open_ids.discard(here)
        depth[here] = 1 + max((depth[id(c)] for c in nested), default=0)
        count[here] = 1 + len(children) + sum(count[id(c)] for c in nested)
        if depth[here] > MAX_DEPTH:
            raise damaged(f"nested deeper than {MAX_DEPTH} levels")
        if count[here] > MAX_OBJECTS:
            raise damaged(f"it unfolds to more than {MAX_OBJECTS} objects")


def dump(value: Any) -> bytes:
    """Write a pickle of protocol 2 (3 when there are bytes in it).

    Args:
      value: None, bool, int, float, str, bytes, list, tuple, dict, `Global`, `Call`,
        `Persistent`, nested at will.
    """
    parts: list[bytes] = []
    write = parts.append

    def emit(value):
        match value:
            case None:
                write(b"N")
            case bool():
                write(b"\x88" if value else b"\x89")
            case int() if -(2**31) <= value < 2**31:
                write(b"J" + struct.pack("<i", value))
            case int():
                digits = value.to_bytes(
                    value.bit_length() // 8 + 1, "little", signed=True
                )
                write(b"\x8a" + bytes([len(digits)]) + digits)
            case float():
                write(b"G" + struct.pack(">d", value))
            case str():
                text = value.encode("utf-8", "surrogatepass")
                write(b"X" + struct.pack("<I", len(text)) + text)
            case bytes():
                write(b"B" + struct.pack("<I", len(value)) + value)
            case list() | tuple():
                write(b"](" if isinstance(value, list) else b"(")
                for item in value:
                    emit(item)
                write(b"e" if isinstance(value, list) else b"t")
            case dict():
                write(b"}(")
                for key, item in value.items():
                    emit(key)
                    emit(item)
                write(b"u")
            case Global():
                write(f"c{value.module}\n{value.name}\n".encode())
            case Call():
                emit(value.function)
                emit(value.arguments)
                write(b"R")
                if value.state is not None:
                    emit(value.state)
                    write(b"b")
            case Persistent():
                emit(value.identity)
                write(b"Q")
            case _:
                raise TypeError(f"cannot pickle a {type(value).__name__}")

    emit(value)
    protocol = 3 if any(p[:1] == b"B" for p in parts) else 2
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."
