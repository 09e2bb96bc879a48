"""The pictures to label: a folder, a list, or Parquet; named at once, read when it is their turn."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from florence2_client.pictures import Image, encoded

from florence2.images import SUFFIXES, upright_size
from florence2.locations import Size

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Picture:
    name: str
    """What it is called in the output."""
    image: str | bytes
    """A path, a URL, or an encoded file."""
    key: str
    """No other picture of the source has it."""


class Source(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Picture]: ...

    def parts(self, count: int) -> list["Source"]:
        """The same pictures in `count` sources or fewer."""


def open_source(source: str, column: str = "image") -> Source:
    """`source`: a folder of pictures or of Parquet files, searched through; a .txt of paths and URLs, one a line; a
    .jsonl whose lines have `column`; a .parquet that has it. Folders and Parquet may be anywhere pyarrow.fs reads
    (`s3://…`). In memory are all names, and of Parquet one row group. Raises ValueError for anything else, OSError for
    what can't be read.
    """
    if os.path.isdir(source) or (_is_remote(source) and not source.endswith(".parquet")):
        return _folder(source, column)
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".parquet":
        return _Table.open([source], os.path.dirname(source), column)
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{source} is no folder, .txt, .jsonl or .parquet; name one of these, for one picture a .txt")
    return _Files.of(os.path.dirname(source), _listed(Path(source), column))


@dataclass
class Reading:
    """A picture's file object, for the client, which reads it when its turn has come."""

    image: Image
    """As in Picture, or another that the client takes."""
    size: Size = (0, 0)
    """(width, height) of the upright picture, once it is read."""

    def read(self) -> bytes:
        """Raises what the client's `run` does."""
        if isinstance(self.image, str) and _is_remote(self.image):
            with _open(self.image) as file:
                data = file.read()
        else:
            data = encoded(self.image)
        self.size = upright_size(data)
        return data


@dataclass(frozen=True)
class _Files:
    """Pictures in files of their own."""

    folder: str
    """What relative names start from."""
    named: list[tuple[str, str]]
    """Names and keys."""

    @classmethod
    def of(cls, folder: str, names: Iterable[str]) -> "_Files":
        seen: Counter[str] = Counter()
        named = []
        for name in names:
            seen[name] += 1
            named.append((name, name if seen[name] == 1 else f"{name}\n{seen[name]}"))
        return cls(folder, named)

    def __len__(self) -> int:
        return len(self.named)

    def __iter__(self) -> Iterator[Picture]:
        for name, key in self.named:
            yield Picture(_printable(name), _join(self.folder, name), _printable(key))

    def parts(self, count: int) -> list[Source]:
        size = max(1, -(-len(self.named) // count))
        return [_Files(self.folder, self.named[start : start + size]) for start in range(0, len(self.named), size)]


@dataclass(frozen=True)
class _Group:
    """A row group of a Parquet file."""

    path: str
    name: str
    index: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class _Table:
    """Pictures in the rows of Parquet files."""

    column: str
    groups: list[_Group]

    @classmethod
    def open(cls, paths: list[str], folder: str, column: str) -> "_Table":
        from pyarrow import parquet

        groups = []
        for path in paths:
            name = path[len(folder) :].lstrip("/")
            with _open(path) as file:
                try:
                    found = parquet.ParquetFile(file)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
                if column not in found.schema_arrow.names:
                    columns = ", ".join(found.schema_arrow.names)
                    raise ValueError(f"{path} has no column {column}; name the pictures' with --column: {columns}")
                row = 0
                for index in range(found.num_row_groups):
                    rows = found.metadata.row_group(index).num_rows
                    groups.append(_Group(path, name, index, row, rows))
                    row += rows
        return cls(column, groups)

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def __iter__(self) -> Iterator[Picture]:
        from pyarrow import parquet

        for path, groups in groupby(self.groups, lambda group: group.path):
            # With pre_buffer more than one row group would be in memory.
            with _open(path) as file, parquet.ParquetFile(file, pre_buffer=False) as table:
                for group in groups:
                    yield from self._pictures(table, group)

    def _pictures(self, table: Any, group: _Group) -> Iterator[Picture]:
        row = group.first_row
        for batch in table.iter_batches(batch_size=16, row_groups=[group.index], columns=[self.column]):
            for value in batch.column(0).to_pylist():
                key = f"{group.name}#{row}"
                name, image = picture(value, os.path.dirname(group.path))
                yield Picture(name or key, image, key)
                row += 1

    def parts(self, count: int) -> list[Source]:
        size = max(1, -(-len(self.groups) // count))
        starts = range(0, len(self.groups), size)
        return [_Table(self.column, self.groups[start : start + size]) for start in starts]


def picture(value: Any, folder: str = "") -> tuple[str | None, Any]:
    """What a column of pictures holds, in one of the ways people write it -> its name, if it has one, and what the
    client takes. A `{"bytes", "path"}`, as in Hugging Face's data sets; a path or URL, relative to `folder`; an encoded
    file or an array as it is; nothing is an empty file."""
    if isinstance(value, dict):
        name, data = value.get("path") or None, value.get("bytes")
        return name, data if data or not name else _join(folder, name)
    if isinstance(value, str):
        return value, _join(folder, value)
    return None, b"" if value is None else value


def _folder(folder: str, column: str) -> Source:
    found: dict[bool, list[str]] = {False: [], True: []}
    for name in sorted(_walk_remote(folder) if _is_remote(folder) else _walk(folder)):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in (*SUFFIXES, ".parquet"):
            found[suffix == ".parquet"].append(name)
    if found[True] and found[False]:
        raise ValueError(f"{folder} holds pictures and Parquet files; name a folder that holds one of both")
    if found[True]:
        return _Table.open([_join(folder, name) for name in found[True]], folder, column)
    if not found[False]:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}) and no Parquet files")
    return _Files.of(folder, found[False])


def _walk(folder: str) -> Iterator[str]:
    """Paths of files, from the folder on, with slashes."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        start = os.path.relpath(parent, folder)
        for name in names:
            yield name if start == "." else Path(start, name).as_posix()


def _walk_remote(folder: str) -> Iterator[str]:
    from pyarrow.fs import FileSelector

    files, path = _remote(folder)
    for info in files.get_file_info(FileSelector(path, recursive=True)):
        if info.is_file:
            yield info.path[len(path) :].lstrip("/")


def _listed(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.suffix.lower() == ".txt":
                yield line.strip()
                continue
            try:
                name = json.loads(line)[column]
            except (ValueError, KeyError, TypeError):
                name = None
            if not isinstance(name, str) or not name:
                raise ValueError(f'{path}:{number}: a line is an object with "{column}", a path or URL')
            yield name


def _printable(name: str) -> str:
    """A file's name may be bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()


def _join(folder: str, name: str) -> str:
    if "://" in name or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}" if _is_remote(folder) else os.path.join(folder, name)


def _is_remote(location: str) -> bool:
    """Whether pyarrow.fs is to read it."""
    return "://" in location and not location.startswith(("http://", "https://"))


def _open(location: str) -> BinaryIO:
    if not _is_remote(location):
        return open(location, "rb")
    files, path = _remote(location)
    return cast(BinaryIO, files.open_input_file(path))


def _remote(location: str) -> tuple["FileSystem", str]:
    scheme, _, rest = location.partition("://")
    host, _, path = rest.partition("/")
    files, root = _file_system(f"{scheme}://{host}/")
    return files, f"{root.rstrip('/')}/{path}"


@lru_cache
def _file_system(root: str) -> tuple["FileSystem", str]:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(root)
