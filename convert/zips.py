"""Zip archives whose entries are stored as they are: the only kind torch writes.

The central directory is read here rather than by `zipfile`, which builds an object of
several hundred bytes for each entry before anyone can look at their number, and
unpacks compressed entries of any size.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable

from jaxstyle.errors import UserError

MAX_ENTRIES = 100_000
_END, _END64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def damaged(why: str) -> UserError:
    """The error for a zip archive that cannot be read."""
    return UserError(f"its zip archive is damaged: {why} (an interrupted download?)")


def _unpack(form: str, data: memoryview, position: int) -> tuple:
    if not 0 <= position <= len(data) - struct.calcsize(form):
        raise damaged("a record lies outside the file")
    return struct.unpack_from(form, data, position)


def _directory(data: memoryview) -> tuple[int, int]:
    """Number of entries and place of the central directory."""
    start = max(0, len(data) - 65557)
    found = bytes(data[start:]).rfind(_END)
    if found < 0:
        raise damaged("it has no end record")
    end = start + found
    count, _, offset, comment = _unpack("<HIIH", data, end + 10)
    if end + 22 + comment != len(data):
        raise damaged("its end record does not end the file")
    if count == 0xFFFF or offset == 0xFFFFFFFF:
        signature, _, end64 = _unpack("<4sIQ", data, end - 20)
        if signature != _LOCATOR or bytes(data[end64 : end64 + 4]) != _END64:
            raise damaged("it has no zip64 end record")
        count, _, offset = _unpack("<QQQ", data, end64 + 32)
    if count > MAX_ENTRIES:
        raise damaged(f"it announces {count} entries, at most {MAX_ENTRIES} are read")
    return count, offset


def entries(data: memoryview) -> dict[str, memoryview]:
    """The contents of a zip archive by name, as views of `data`.

    Entries in a folder `code` are left out.

    Raises:
      UserError: a damaged archive, compressed or encrypted entries, a name that
        occurs twice, or entries that overlap.
    """
    count, position = _directory(data)
    found: dict[str, memoryview] = {}
    spans = []
    for _ in range(count):
        signature, flags, method, crc, packed, size, *lengths, local = _unpack(
            "<4s4xHH4xIIIHHH8xI", data, position
        )
        if signature != b"PK\1\2":
            raise damaged("an entry of its directory is missing")
        name_end = position + 46 + lengths[0]
        name = bytes(data[position + 46 : name_end]).decode("utf-8", "replace")
        extra = bytes(data[name_end : name_end + lengths[1]])
        position += 46 + sum(lengths)
        size, packed, local = _zip64(extra, size, packed, local)
        # A TorchScript archive's program: compressed, and never read.
        if "/code/" in name:
            continue
        if method or packed != size:
            raise UserError(
                f"entry {name!r:.80} of its zip archive is compressed; torch never "
                "compresses: unpack and save it again with torch.save"
            )
        if flags & 1:
            raise UserError(f"entry {name!r:.80} of its zip archive is encrypted")
        if name in found:
            raise damaged(f"entry {name!r:.80} occurs twice")
        signature, *skipped = _unpack("<4s22xHH", data, local)
        begin = local + 30 + sum(skipped)
        if signature != b"PK\3\4" or begin + size > len(data):
            raise damaged(f"entry {name!r:.80} lies outside the file")
        content = data[begin : begin + size]
        # torch leaves 0 when its checksums are switched off.
        if crc and zlib.crc32(content) != crc:
            raise damaged(f"the checksum of entry {name!r:.80} is wrong")
        found[name] = content
        spans.append((begin, begin + size))
    spans.sort()
    if any(a[1] > b[0] for a, b in zip(spans, spans[1:], strict=False)):
        raise damaged("entries overlap")
    return found


def _zip64(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Sizes and place of an entry, from its zip64 field where they do not fit."""
    values = []
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == 1:
            whole = extra[4 : 4 + length // 8 * 8]
            values = list(struct.unpack(f"<{len(whole) // 8}Q", whole))
        extra = extra[4 + length :]
    fields = []
    for field in (size, packed, local):
        if field == 0xFFFFFFFF:
            if not values:
                raise damaged("a zip64 field is missing")
            field = values.pop(0)
        fields.append(field)
    return tuple(fields)


def write(path: str | os.PathLike, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write entries as they are, all with the same date: equal input, equal file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents:
            archive.writestr(zipfile.ZipInfo(name), content)
