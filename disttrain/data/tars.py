"""Plain tar archives, member by member: the bytes below webdataset shards.

Under `shards.py`. Reading invariant: `walk` reads front to back, never back or ahead, and yields
regular files that lie wholly inside the archive under safe relative names, in the order of the
archive, or raises DataError; nothing is extracted, and memory grows with the number of names alone.
The standard library's reader is not used because it
takes a damaged header in mid-archive for the end, so that the rest of a shard vanishes silently.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax (path and size records), GNU long names and base-256
sizes. Writing: `member_header` depends on name and size alone, so equal members give equal bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from disttrain.data.plain_files import LONGEST_NAME
from disttrain.errors import DataError
from disttrain.files import Readable

BLOCK = 512
END = bytes(2 * BLOCK)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_PIECE = 2**20
_EXTRA_LIMIT = 2**20  # bytes of a pax or long-name record
_REGULAR, _FOLDER = (b"0", b"\0"), b"5"
_PAX, _PAX_GLOBAL, _LONG_NAME = b"x", b"g", b"L"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive; its bytes are archive[offset : offset + size].

    `data` is these bytes where they were wanted.
    """

    name: str
    offset: int
    size: int
    data: bytes | None = None


def member_header(name: str, size: int) -> bytes:
    """Header blocks of a regular file: mode 0644, owner 0, time 0."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """Zeros that fill a member of `size` bytes up to whole blocks."""
    return bytes(-size % BLOCK)


def member_size(name: str, size: int) -> int:
    """Bytes that a member of `size` bytes takes in an archive."""
    return len(member_header(name, size)) + size + len(padding(size))


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member name, cut at the first dot after the last slash.

    The rule of webdataset: "a/b.mask.png" -> ("a/b", "mask.png"). None for names without a key
    (hidden files, no dot) and for webdataset's own "__x__" members, which belong to no sample.
    """
    first = name.partition("/")[0]
    if len(first) >= 4 and first.startswith("__") and first.endswith("__"):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return folder + slash + stem, extension.lower()


def _nothing(name: str, size: int) -> bool:
    return False


def walk(
    handle: Readable, where: str, wanted: Callable[[str, int], bool] = _nothing
) -> Iterator[Member]:
    """Regular files of the archive in `handle`, read up to the mark of its end.

    Args:
        wanted: given the name and size of a member, says whether its bytes are kept.

    Raises:
        DataError: damaged, truncated, compressed, or with a member that is refused: a link, a
            device, an absolute name or one with "..", a name that occurs twice.
    """
    tape = _Tape(handle, where)
    seen: set[str] = set()
    extra: dict[str, str] = {}
    while True:
        position = tape.position
        header = tape.block()
        if not any(header):
            tape.refuse_rest()
            return
        kind, size = header[156:157], _checked_size(header, position, where)
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
            if size > _EXTRA_LIMIT:
                raise DataError(f"{where}: a name record of {size} bytes at byte {position}")
            extra |= _records(tape.record(size), kind, position, where)
            continue
        size = _number(extra["size"], position, where) if "size" in extra else size
        size = 0 if kind == _FOLDER else size  # some writers store the sum of its files there
        name = extra.get("path") or _header_name(header, position, where)
        extra = {}
        if len(name) > LONGEST_NAME:
            raise DataError(f"{where}: a member name of {len(name)} letters at byte {position}")
        _refuse_unsafe(name, kind, where)
        if kind not in _REGULAR or name.endswith("/"):
            tape.body(name, size, keep=False)
            continue
        name = name.removeprefix("./")
        if name in seen:
            raise DataError(f"{where}: member {name!r} occurs twice; write the shard again")
        seen.add(name)
        yield Member(name, position + BLOCK, size, tape.body(name, size, wanted(name, size)))


class _Tape:
    """An archive that only moves forward; `position` is in bytes."""

    def __init__(self, handle: Readable, where: str) -> None:
        self._handle, self._where = handle, where
        self.position = 0

    def block(self) -> bytes:
        """The next header."""
        start = self.position
        block = self._take(BLOCK)
        if start == 0 and block.startswith(_COMPRESSED):
            raise DataError(
                f"{self._where}: a compressed archive, which has no seeking; unpack it to .tar"
            )
        return self._whole(block, BLOCK)

    def record(self, size: int) -> bytes:
        """The bytes of a record of a header's kind; the padding behind them is passed over."""
        record = self._whole(self._take(size), size)
        self._whole(self._take(len(padding(size))), len(padding(size)))
        return record

    def body(self, name: str, size: int, keep: bool) -> bytes | None:
        """Pass over the bytes of a member and its padding; they are returned if `keep`."""
        data = self._take(size) if keep else None
        left = len(padding(size)) + (size - len(data) if data is not None else size)
        while left and (piece := self._take(min(left, _PIECE))):
            left -= len(piece)
        if left:
            raise DataError(
                f"{self._where}: cut short within {name!r}; fetch or write the shard again"
            )
        return data

    def refuse_rest(self) -> None:
        """The mark of the end is behind: nothing but zeros may follow.

        Otherwise it is no end but zeros where a header was, and what follows would be lost.
        """
        position = self.position
        while piece := self._take(_PIECE):
            if piece.count(0) < len(piece):
                raise DataError(
                    f"{self._where}: more after the end mark at byte {position - BLOCK} (damaged, "
                    "or several tars in one); fetch or write it again"
                )

    def _take(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        pieces: list[bytes] = []
        while size and (piece := self._handle.read(min(size, _PIECE))):
            pieces.append(piece)
            size -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def _whole(self, data: bytes, size: int) -> bytes:
        if len(data) != size:
            raise DataError(
                f"{self._where}: not a whole tar archive (no end mark by byte {self.position}); "
                "fetch or write the shard again"
            )
        return data


def _checked_size(header: bytes, position: int, where: str) -> int:
    """Size field of a header whose checksum fits."""
    found = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if found != _field(header[148:156], position, where):
        what = "not a plain tar archive" if position == 0 else f"damaged header at byte {position}"
        raise DataError(f"{where}: {what}; fetch or write it again")
    return _field(header[124:136], position, where)


def _field(field: bytes, position: int, where: str) -> int:
    """A number as octal digits, or big-endian after a byte 0x80 (GNU)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise DataError(
            f"{where}: not a plain tar archive, or a damaged header at byte {position}; "
            "fetch or write it again"
        )
    return int(digits or b"0", 8)


def _number(text: str, position: int, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DataError(f"{where}: damaged size record at byte {position}")
    return int(text)


def _text(raw: bytes, position: int, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: a member name at byte {position} is not UTF-8") from error


def _header_name(header: bytes, position: int, where: str) -> str:
    raw = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and prefix:
        raw = prefix + b"/" + raw
    return _text(raw, position, where)


def _records(record: bytes, kind: bytes, position: int, where: str) -> dict[str, str]:
    """ "path" and "size" said by a pax or GNU long-name record for the member after it."""
    if kind == _LONG_NAME:
        return {"path": _text(record.split(b"\0", 1)[0], position, where)}
    found: dict[str, str] = {}
    while record.strip(b"\0"):
        length, _, _ = record.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        body, record = record[len(length) + 1 : count], record[count:]
        keyword, equals, value = body[:-1].partition(b"=")
        if count <= len(length) + 1 or body[-1:] != b"\n" or not equals:
            raise DataError(f"{where}: damaged name record at byte {position}")
        if keyword.startswith(b"GNU.sparse"):
            raise DataError(f"{where}: a sparse file at byte {position} is refused")
        if keyword in (b"path", b"size"):
            if kind == _PAX_GLOBAL:
                raise DataError(f"{where}: one name for all members (byte {position}) is refused")
            found[keyword.decode()] = _text(value, position, where)
    return found


def _refuse_unsafe(name: str, kind: bytes, where: str) -> None:
    if kind not in (*_REGULAR, _FOLDER):
        what = _REFUSED.get(kind, f"of unknown type {kind!r}")
        raise DataError(f"{where}: member {name!r} is {what}, which is refused")
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise DataError(f"{where}: member name {name!r} is refused; names must stay inside")
