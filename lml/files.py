"""Reads and writes files. What somebody else made is read as data and never executed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import yaml

from lml.errors import RunError, UserError, first_line
from lml.schema import find_problem, shown

NAME_MAX = 255  # bytes of a file name, on all common file systems
PATH_MAX = 3800  # bytes of a path: Linux takes 4095, and names are appended to it
UNPACKED_MAX = 2**32  # bytes: features of 250,000 images, 4,096 numbers each in float32
DEPTH = 64  # levels of nested groups, ten times as many as in any file of ours
TOO_DEEP = "nested too deep"


def open_regular(path: str | Path) -> BinaryIO:
    """Open the file `path` for binary reading. OSError for a pipe, a device, a socket, a folder.

    An ordinary `open` of a pipe would wait until something writes to it.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return open(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


@contextlib.contextmanager
def open_arrays(path: str | Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz file by name; each is read when it is used.

    ValueError when the arrays unpack to more than `UNPACKED_MAX` bytes, which even a small file
    can. OSError as `open_regular`. NumPy's own errors for a file that is no .npz file.
    """
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > UNPACKED_MAX:
            raise ValueError(f"it unpacks to {size:,} bytes; at most {UNPACKED_MAX:,} are read")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file. OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """The text of a regular file in UTF-8. OSError as `open_regular`; ValueError for other data."""
    return read_bytes(path).decode("utf-8")


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True, apart: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that replaces `path` at the end of the block; after an error the old file stays.

    With `durable`, the content is on the disk before the file gets its name, so that a power cut
    leaves no file with wrong content. Until then the new file is in the same folder, or in `apart`
    on the same disk. OSError when the disk is full or read-only.
    """
    name = f".{path.name}.{os.getpid()}.tmp" if apart is None else f".{os.getpid()}.tmp"
    partial = (apart or path.parent) / name
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str, key: str = "run_dir", durable: bool = True) -> None:
    """Write the whole file, or leave the old one, as `replacing` does.

    RunError when the disk is full or read-only; it names `key`, which set the folder.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        with replacing(path, durable) as file:
            file.write(data)
    except OSError as error:
        raise disk_error(path.parent, error, key) from None


def write_json(path: Path, value: Any, key: str = "run_dir") -> None:
    """Write `value` as indented JSON, as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", key)


def disk_error(folder: Path, error: OSError, key: str = "run_dir") -> RunError:
    """The error for a folder that cannot be written to."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    remedy = f"free some space, or choose another {key}" if full else "expected a writable folder"
    return RunError(f"{key}={folder}: {error.strerror or error}; {remedy}")


def load_json(source: str | Path, unique: bool = False) -> Any:
    """The value in a JSON file, or in JSON text. OSError or ValueError when it can't be read.

    With `unique`, a key that an object has twice is a ValueError; otherwise its last value counts.
    """
    text = read_text(source) if isinstance(source, Path) else source
    try:
        return _shallow(json.loads(text, object_pairs_hook=_unique if unique else None))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!a:.100} twice")
        found[key] = value
    return found


def _shallow(value: Any) -> Any:
    """Return `value`. ValueError when it is nested deeper than `DEPTH`: recursion would fail."""
    level = [value]
    for _ in range(DEPTH):
        groups = [group for group in level if isinstance(group, (dict, list))]
        if not groups:
            return value
        level = [i for g in groups for i in (g.values() if isinstance(g, dict) else g)]
    raise ValueError(TOO_DEEP)


def read_object(path: Path, schema: Any = None) -> dict[str, Any]:
    """The object in a JSON file, or in a YAML file by its suffix, checked by the hint `schema`.

    FileNotFoundError when there is no file. UserError, naming the file and the key, when it can't
    be read, is no object, or does not fit `schema`.
    """
    try:
        value = load_yaml(path) if path.suffix == ".yaml" else load_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read ({first_line(reason)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not an object of keys and values")
    if schema is not None and (problem := find_problem(schema, value, "")):
        raise UserError(f"{path}: {problem}")
    return value


def read_json(path: Path, schema: Any = None) -> dict[str, Any]:
    """The JSON object in `path`; {} when the file is missing, broken, or does not fit `schema`."""
    try:
        return read_object(path, schema)
    except (FileNotFoundError, UserError):
        return {}


class _NoAliases:
    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)


def load_yaml(path: Path, loader: type = yaml.SafeLoader) -> Any:
    """The value in a YAML file. OSError or ValueError when it can't be read, or has aliases.

    A few lines of aliases of aliases can fill the memory. `loader` must be a safe one.
    """
    try:
        text = read_text(path)
        return _shallow(yaml.load(text, Loader=type("Loader", (_NoAliases, loader), {})))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


class _Repeating(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(value: Any) -> str:
    """`value` as YAML that `load_yaml` reads: without aliases, so repeated parts are repeated."""
    return yaml.dump(value, Dumper=_Repeating, sort_keys=False, allow_unicode=True)


def _is_text(name: str) -> bool:
    """Whether `name` has no control characters and no halves of UTF-16 characters."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def plain_name(name: Any, label: str) -> str:
    """Return `name` if it can name a file inside a folder. UserError otherwise.

    It must be text without separators (of any system) and control characters, neither "." nor
    "..", of at most `NAME_MAX` bytes. The message begins with `label`.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..")
    plain = plain and PureWindowsPath(name).name == name
    plain = plain and _is_text(name)
    if not plain or len(name.encode()) > NAME_MAX:
        raise UserError(f"{label}={name!a:.200}: expected a plain name of one file or folder")
    return name


def check_path(path: str, label: str) -> None:
    """UserError, beginning with `label`, for text that no file system takes as a path."""
    whole = bool(path) and "\0" not in path and len(path.encode(errors="surrogatepass")) <= PATH_MAX
    if whole and all(
        len(part.encode(errors="surrogatepass")) <= NAME_MAX for part in Path(path).parts
    ):
        return
    limits = f"with names of at most {NAME_MAX} bytes"
    raise UserError(f"{label}={shown(path)}: expected a path {limits}")


def file_hash(path: Path) -> str:
    """sha256 of a regular file's bytes. OSError as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(path: Path) -> str:
    """sha256 of a file of weights. The hub's cache names large files by it, which saves reading."""
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name := path.resolve().name):
        return name
    return file_hash(path)
