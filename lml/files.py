"""Files by their content, and files that somebody else made: data, which is never executed."""

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
PATH_MAX = 3800  # bytes of a path: Linux takes 4095, and names are put behind it
UNPACKED_MAX = 2**32  # bytes: features of 250,000 images, 4,096 numbers each in float32
DEPTH = 64  # of groups in groups: nothing that we read has a tenth of it
TOO_DEEP = "nested too deep"


def open_regular(path: str | Path) -> BinaryIO:
    """The file `path`, to be read in binary. OSError for a pipe, a device, a socket, a folder.

    Opening a pipe would otherwise wait for somebody to write to it.
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
    """The arrays of an .npz, by name; each is read when it is asked for.

    Zeros pack well: ValueError when the arrays unpack to more than `UNPACKED_MAX`. OSError as
    `open_regular`, and what NumPy raises for a file that is none.
    """
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > UNPACKED_MAX:
            raise ValueError(f"it unpacks to {size:,} bytes; {UNPACKED_MAX:,} are the most")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file. OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """The same in UTF-8; ValueError for what is no text."""
    return read_bytes(path).decode("utf-8")


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True, apart: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that becomes `path` at the end of the block, or leaves what was there.

    With `durable` the disk has its content before it has the name, so that after a power cut no
    file says what isn't so. Until then it lies in the same folder, or in `apart` on the same disk.
    OSError when the disk is full or read-only.
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
    """Write the whole file or leave what was there, as `replacing` does.

    RunError when the disk is full or read-only; `key` is what the user gave the folder as.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        with replacing(path, durable) as file:
            file.write(data)
    except OSError as error:
        raise disk_error(path.parent, error, key) from None


def write_json(path: Path, value: Any, key: str = "run_dir") -> None:
    """`value` as indented JSON, written like `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", key)


def disk_error(folder: Path, error: OSError, key: str = "run_dir") -> RunError:
    """What to say of a folder that could not be written to."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    remedy = f"free some space, or choose another {key}" if full else "a writable folder is asked"
    return RunError(f"{key}={folder}: {error.strerror or error}; {remedy}")


def load_json(source: str | Path) -> Any:
    """What a JSON file, or text of JSON, says. OSError or ValueError when it can't be read."""
    text = read_text(source) if isinstance(source, Path) else source
    try:
        return _shallow(json.loads(text))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _shallow(value: Any) -> Any:
    """`value`. ValueError for one that whoever walks down it would not come back from."""
    level = [value]
    for _ in range(DEPTH):
        groups = [group for group in level if isinstance(group, (dict, list))]
        if not groups:
            return value
        level = [i for g in groups for i in (g.values() if isinstance(g, dict) else g)]
    raise ValueError(TOO_DEEP)


def read_object(path: Path, schema: Any = None) -> dict[str, Any]:
    """The object in a JSON file, or in a YAML file by its suffix, as `schema` (a hint) says.

    FileNotFoundError when there is none, and UserError, naming the file and the key, when it can't
    be read, is no object, or holds what it should not.
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
    """The JSON object in `path`; {} when the file is missing, broken, or not as `schema` says."""
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
    """What a YAML file says. OSError or ValueError when it can't be read, or has aliases.

    A few lines of aliases of aliases are a value that fills the memory. `loader` is a safe one.
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
    """`value` as YAML that `load_yaml` reads: what is at several places is written at each."""
    return yaml.dump(value, Dumper=_Repeating, sort_keys=False, allow_unicode=True)


def _is_text(name: str) -> bool:
    """Whether it has no control characters, nor halves of UTF-16 characters."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def plain_name(name: Any, label: str) -> str:
    """`name`, to be put behind a folder's path. UserError unless it is that of a file in it.

    So: text without separators (of any system) and control characters, neither "." nor "..", and
    not longer than names may be. `label` begins the message.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..")
    plain = plain and PureWindowsPath(name).name == name
    plain = plain and _is_text(name)
    if not plain or len(name.encode()) > NAME_MAX:
        raise UserError(f"{label}={name!a:.200}: a plain name is asked, of one file or folder")
    return name


def check_path(path: str, label: str) -> None:
    """UserError, beginning with `label`, for text that no file system takes as a path."""
    whole = bool(path) and "\0" not in path and len(path.encode(errors="surrogatepass")) <= PATH_MAX
    if whole and all(
        len(part.encode(errors="surrogatepass")) <= NAME_MAX for part in Path(path).parts
    ):
        return
    limits = f"of names of at most {NAME_MAX} bytes"
    raise UserError(f"{label}={shown(path)}: a path is asked, {limits}")


def file_hash(path: Path) -> str:
    """sha256 of a regular file's bytes. OSError as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(path: Path) -> str:
    """The same; the hub's cache names large files by it, which saves reading."""
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name := path.resolve().name):
        return name
    return file_hash(path)
