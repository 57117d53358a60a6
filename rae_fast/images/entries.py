"""What an index of images is, whatever the images come from: ordered names, labels, sizes, and a way to read each.

A million images must stay small in memory, so names are one blob with offsets and the rest are numpy arrays.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from typing import Protocol, overload

import numpy as np

from rae_fast.errors import UserError

UNKNOWN_SIZE = -1


class ReadError(OSError):
    """One image could not be read; `str()` is the reason in one line, fit for a failure record."""


class PathTable(Sequence[str]):
    """An immutable list of names in two arrays: `blob` uint8 (the names joined) and `offsets` int64 [N + 1]."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names: Sequence[str]) -> PathTable:
        """The table of these names."""
        encoded = [os.fsencode(name) for name in names]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> PathTable: ...
    def __getitem__(self, at: int | slice) -> str | PathTable:
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                return PathTable.of([self[i] for i in range(first, last, step)])
            last = max(first, last)
            ends = self.offsets[first : last + 1]
            return PathTable(self.blob[ends[0] : ends[-1]], ends - ends[0])
        at = range(len(self))[at]
        # Names are file names: bytes that need not be UTF-8.
        return os.fsdecode(self.blob[self.offsets[at] : self.offsets[at + 1]].tobytes())


class Reader(Protocol):
    """Where the encoded bytes of entry `i` come from; called from several threads at once."""

    def read(self, i: int) -> bytes:
        """Encoded bytes of entry `i`.

        Raises:
            OSError: it cannot be read.
        """


class ImageIndex:
    """N images in a fixed order: `paths`, `labels` int64 [N], `sizes` int64 [N] (bytes, -1 unknown), `class_names`.

    Args:
        paths: names relative to the source, the address that a person finds an image by.
        labels: class of each image; 0 throughout when there are none.
        sizes: encoded bytes of each image.
        class_names: names by label, or empty when the source has none.
        reader: gives the bytes.
        kind: which sort of source this is.
        source: the source as the user wrote it.
        extra: what else identifies the data (sizes of containers whose members' sizes are unknown).
    """

    def __init__(
        self,
        paths: PathTable,
        labels: np.ndarray,
        sizes: np.ndarray,
        class_names: Sequence[str],
        reader: Reader,
        *,
        kind: str,
        source: str,
        extra: bytes = b"",
    ) -> None:
        assert len(paths) == len(labels) == len(sizes)
        self.paths, self.labels, self.sizes = paths, labels, sizes
        self.class_names = tuple(class_names)
        self.kind, self.source = kind, source
        self._reader, self._extra = reader, extra

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """Number of classes: of names where there are names, else the largest label + 1."""
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def digest(self) -> str:
        """Hex sha256 over the ordered paths, sizes and labels: another digest means other data."""
        digest = hashlib.sha256(b"rae_fast image index 1\0")
        for part in (self.paths.offsets, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        digest.update(self.paths.blob.tobytes())
        digest.update(self._extra)
        return digest.hexdigest()

    def read(self, i: int) -> bytes:
        """Encoded bytes of image `i`.

        Raises:
            ReadError: it vanished, shrank or cannot be read.
        """
        try:
            data = self._reader.read(i)
        except ReadError:
            raise
        except OSError as error:
            raise ReadError(f"cannot be read: {error.strerror or error}") from error
        if not data:
            raise ReadError("empty file")
        return data

    def first(self, count: int) -> ImageIndex:
        """The index of the first `count` images."""
        return ImageIndex(
            self.paths[:count],
            self.labels[:count],
            self.sizes[:count],
            self.class_names,
            self._reader,
            kind=self.kind,
            source=self.source,
            extra=self._extra,
        )


class Entries:
    """Collects an index, entry by entry, in compact arrays."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._offsets = array("q", [0])
        self._labels = array("q")
        self._sizes = array("q")

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, path: str, label: int, size: int) -> None:
        """Append one image."""
        self._blob += os.fsencode(path)
        self._offsets.append(len(self._blob))
        self._labels.append(label)
        self._sizes.append(size)

    def sizes(self) -> np.ndarray:
        """Sizes so far, int64 [N]."""
        return np.array(self._sizes, np.int64)

    def finish(
        self,
        class_names: Sequence[str],
        reader: Reader,
        *,
        kind: str,
        source: str,
        extra: bytes = b"",
        labels: Sequence[int] | np.ndarray | None = None,
    ) -> ImageIndex:
        """The index of what was added; `labels` in place of those given one by one, where they are known at the end.

        Raises:
            UserError: nothing was added.
        """
        if not len(self):
            raise UserError(
                f"data.source {source} holds no images (data.kind {kind})", "at least one image", "check the path"
            )
        return ImageIndex(
            PathTable(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._offsets, np.int64)),
            np.array(self._labels if labels is None else labels, np.int64),
            self.sizes(),
            class_names,
            reader,
            kind=kind,
            source=source,
            extra=extra,
        )
