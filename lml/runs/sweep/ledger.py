"""The record of a sweep: outputs/<name>/sweep.yaml."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lml.errors import UserError, say
from lml.files import disk_error, dump_yaml, read_object, write_atomic
from lml.runs.provenance import command_line
from lml.runs.sweep.cells import DONE
from lml.schema import SweepFile


class Ledger:
    """sweep.yaml in the folder of a sweep. Other sweeps of that name are refused until `close`."""

    def __init__(self, folder: Path):
        self.path = folder / "sweep.yaml"
        holder = folder / ".sweep.holder"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".sweep.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            by = holder.read_text() if holder.exists() else "another process"
            raise UserError(
                f"name={folder.name}: {by} is sweeping in {folder}; wait for it, or choose "
                "another name"
            ) from None
        except OSError as error:
            raise disk_error(folder, error) from None
        command = command_line()
        write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()} (`{command}`)")
        self._written: list[dict[str, Any]] | None = None
        self.commands, self.cells = self._read()
        self.commands = list(dict.fromkeys([*self.commands, command]))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        try:
            kept = read_object(self.path, SweepFile)
            return kept["commands"], kept["cells"]
        except FileNotFoundError:
            return [], []
        except UserError as error:
            aside = self.path.with_name(f"{self.path.name}.broken")
            os.replace(self.path, aside)
            say(
                f"{self.path}: not a sweep's file; kept as {aside.name}, and written anew "
                f"({str(error).partition(': ')[2]})"
            )
            return [], []

    def write(self, cells: Sequence[dict[str, Any]]) -> None:
        """Write these cells, and those of earlier sweeps that they do not replace."""
        if cells == self._written:
            return
        self._written = list(cells)
        runs = {cell["run"] for cell in cells}
        asked = [cell["overrides"] for cell in cells]
        kept = [
            cell
            for cell in self.cells
            if cell["run"] not in runs - {None}
            and (cell["status"] == DONE or cell["overrides"] not in asked)
        ]
        value = {"commands": self.commands, "cells": [*kept, *cells]}
        write_atomic(self.path, dump_yaml(value))

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()
