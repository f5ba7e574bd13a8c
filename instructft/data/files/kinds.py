"""Which files of rows are read, by the ending of their name, how they are unpacked, and what other files are."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path
from typing import IO, Any

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ARROW_KINDS = (".parquet", ".arrow")
LARGE, RATIO = 64 << 20, 200  # bytes, and how many times its packed size: rows beyond both are a bomb
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
KINDS = (*TEXT_KINDS, *ARROW_KINDS)
SUFFIXES = (*KINDS, *(kind + packing for kind in KINDS for packing in PACKINGS))
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}

_AS_ROWS = 'write a JSON object a line into a .jsonl file, such as {"prompt": "…", "completion": "…"}'
# What people also have, and the way out of it.
OTHERS = {
    ".txt": f"is a plain text file, and nothing in it says where a row ends or what is asked and answered; {_AS_ROWS}",
    ".md": f"is a text for readers, not rows; {_AS_ROWS}",
    ".xlsx": "is an Excel workbook; save the sheet as CSV (UTF-8)",
    ".xls": "is an Excel workbook; save the sheet as CSV (UTF-8)",
    ".ods": "is a spreadsheet; save the sheet as CSV (UTF-8)",
    ".zip": "is an archive; unpack it and name the file or the folder",
    ".tar": "is an archive; unpack it and name the file or the folder",
    ".tgz": "is an archive; unpack it and name the file or the folder",
    ".7z": "is an archive; unpack it and name the file or the folder",
    ".pkl": "is a pickle, which can run code as it is read; save the rows as .jsonl or .parquet",
    ".pickle": "is a pickle, which can run code as it is read; save the rows as .jsonl or .parquet",
    ".pt": "is a pickle of torch, which can run code as it is read; save the rows as .jsonl or .parquet",
    ".yaml": "is YAML; save the rows as .jsonl",
    ".yml": "is YAML; save the rows as .jsonl",
    ".db": "is a database; export the table as .jsonl or CSV",
    ".sqlite": "is a database; export the table as .jsonl or CSV",
}


def suffix_of(location: str) -> str:
    """The ending of a path or URL by which a file is read; for an unknown one what stands behind the last dot.

    Of a URL the query is no part of the name; in a path a `?` is a letter like any other.

    >>> suffix_of("https://example.org/rows.jsonl.gz?download=true"), suffix_of("really?.csv")
    ('.jsonl.gz', '.csv')
    """
    if location.startswith(("http://", "https://")):
        location = re.split("[?#]", location)[0]
    name = Path(location).name.lower()
    found = next((suffix for suffix in _LONGEST_FIRST if name.endswith(suffix)), None)
    plain = Path(name)
    if found is None and plain.suffix in PACKINGS:
        return Path(plain.stem).suffix + plain.suffix
    return found or plain.suffix


def kind_of(suffix: str) -> str:
    """One of `KINDS`, for one of `SUFFIXES`.

    >>> kind_of(".csv.zst")
    '.csv'
    """
    return next(kind for kind in sorted(KINDS, key=len, reverse=True) if suffix.startswith(kind))


def not_known(location: str) -> str:
    """What to say of a file that is not read: what it is, and the way out.

    >>> not_known("notes.yml")
    'notes.yml is YAML; save the rows as .jsonl'
    """
    suffix = suffix_of(location)
    stem = "." + suffix.split(".")[1] if suffix.endswith(PACKINGS) else suffix
    if stem in OTHERS:
        return f"{location} {OTHERS[stem]}"
    packed = " or ".join((", ".join(PACKINGS[:-1]), PACKINGS[-1]))
    return f"{location} ends in {suffix or 'nothing'}; files may be {', '.join(KINDS)}, and each of them {packed}"


class Unpacked(io.RawIOBase):
    """What a packed file holds, up to what any honest file of rows would: a bomb is refused before it fills memory.

    Args:
        plain: gives the content.
        packed: the same before it is unpacked, for how far that is read.
    """

    def __init__(self, plain: IO[bytes], packed: IO[bytes]):
        self.plain, self.packed, self.bytes = plain, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.plain.read(len(buffer))
        buffer[: len(content)] = content
        self.bytes += len(content)
        refuse_bomb(self.bytes, self.packed.tell())
        return len(content)


def refuse_bomb(content: int, packed: int) -> None:
    """Refuse rows that take hundreds of times the bytes they were read from; both in bytes.

    Raises:
        OSError: in the words of a file that cannot be read.
    """
    if content > LARGE and content > RATIO * max(packed, 1):
        raise OSError(
            f"its rows grow to more than {RATIO} times the {packed:,} bytes that they were read from, as those of no "
            "honest file do; if it is one, unpack it and name what comes out"
        )


def unpacked(file: IO[bytes], suffix: str) -> IO[bytes]:
    """The bytes of a file as they were before it was packed.

    What a file begins with decides, and the ending where that says nothing: a packed file under the name of a plain
    one is read too, and one that only claims to be packed is an error of its library.

    Raises:
        OSError, EOFError: the file is no whole file of its packing, when it is read.
    """
    if suffix in ARROW_KINDS:  # read from their end, and packed inside
        return file
    buffered: Any = io.BufferedReader(file)
    head = buffered.peek(6)[:6]
    named = next((packing for packing in PACKINGS if suffix.endswith(packing)), None)
    packing = next((found for magic, found in _MAGIC.items() if head.startswith(magic)), named)
    plain: Any
    if packing is None:
        return buffered
    if packing == ".gz":
        plain = gzip.GzipFile(fileobj=buffered)
    elif packing == ".bz2":
        import bz2

        plain = bz2.BZ2File(buffered)
    elif packing == ".xz":
        import lzma

        plain = lzma.LZMAFile(buffered)  # noqa: SIM115  its reader closes what lies below
    else:
        import pyarrow as pa  # brings zstd along: no other package is needed for it

        plain = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd"))
    bounded = io.BufferedReader(Unpacked(plain, buffered))
    return io.BytesIO(bounded.read()) if kind_of(suffix) in ARROW_KINDS else bounded
