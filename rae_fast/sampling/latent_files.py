"""Latents of samples in one file (.npy) or one zarr array, filled row by row by any number of processes.

Shapes: N samples, n of them at a time, [C, H, W] a latent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.provenance import atomic_write
from rae_fast.sampling.folder import cannot_write

FORMATS = ("npy", "zarr")


class LatentFile:
    """Float32 [N, C, H, W] at `latents.npy` or `latents.zarr` in a folder; a row not yet written is zero.

    Args:
        folder: of the samples.
        layout: npy or zarr (a chunk for each sample).
        shape: [N, C, H, W].

    Raises:
        UserError: unknown layout.
    """

    def __init__(self, folder: Path, layout: str, shape: tuple[int, ...]) -> None:
        if layout not in FORMATS:
            raise UserError(f"--latents {layout}", f"one of {', '.join(FORMATS)}")
        self.path, self.layout, self.shape = folder / f"latents.{layout}", layout, shape

    def create(self) -> None:
        """Make it, or keep what is there; one process does this before any writes.

        Raises:
            UserError: an array of another shape is there, or the place cannot be written.
        """
        try:
            if self.path.exists():
                self._open()
            elif self.layout == "npy":
                with atomic_write(self.path) as file:
                    header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    file.truncate(file.tell() + 4 * int(np.prod(self.shape)))
            else:
                self._create_zarr()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _create_zarr(self) -> None:
        import zarr

        about = {"contents": "normalized latents of the samples, by number", "maker": "rae_fast"}
        zarr.create_array(
            str(self.path),
            shape=self.shape,
            chunks=(1, *self.shape[1:]),
            dtype="float32",
            compressors=None,
            attributes=about,
        )

    def write(self, rows: np.ndarray, latents_nCHW: Tensor) -> None:
        """Put latents into consecutive rows; they are on the disk when this returns.

        Raises:
            UserError: there is no room for them.
        """
        array, values = self._open(), latents_nCHW.float().cpu().numpy().astype("<f4", copy=False)
        first = int(rows[0])
        try:
            if self.layout == "zarr":
                array[first : first + len(rows)] = values
            else:
                self._write_bytes(np.ascontiguousarray(values), array.offset + first * values[0].nbytes)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _write_bytes(self, values: np.ndarray, offset: int) -> None:
        # By exact byte ranges and not through a mapping: on a network file system, machines would overwrite one
        # another's halves of shared pages.
        handle = os.open(self.path, os.O_WRONLY)
        try:
            left = memoryview(values).cast("B")
            while left:
                written = os.pwrite(handle, left, offset)
                left, offset = left[written:], offset + written
            os.fsync(handle)
        finally:
            os.close(handle)

    def _open(self) -> Any:
        """A numpy mapping or a zarr array."""
        if self.layout == "npy":
            array = np.load(self.path, mmap_mode="r")
        else:
            import zarr

            array = zarr.open_array(str(self.path), mode="r+")
        if tuple(array.shape) != self.shape:
            raise UserError(f"{self.path} holds {list(array.shape)}", f"{list(self.shape)}", "give another --folder")
        return array
