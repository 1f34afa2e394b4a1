"""Stores images while the next ones are made."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lml.runs.store import RunFolder


class Writer:
    """Stores images while the network goes on with the next batch; holds at most two batches."""

    def __init__(self, folder: RunFolder, threads: int = 2):
        self.folder = folder
        self._pool = ThreadPoolExecutor(threads)
        self._pending = []

    def submit(self, images: Iterable[tuple[int, np.ndarray, np.ndarray | None]]) -> None:
        """Wait for the images before, then queue these, as arguments of `RunFolder.write_image`."""
        self.wait()
        self._pending = [self._pool.submit(self.folder.write_image, *image) for image in images]

    def wait(self) -> None:
        """Return when all is stored; raise the error of the first image that could not be."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()  # queued images are still stored
