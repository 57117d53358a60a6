"""WebDataset tars as an index: members addressed by offset, read in place, never unpacked.

Bytes are read with pread, not mapped: a tar that shrinks under a mapping kills the process, a short read does not.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rae_fast.errors import UserError
from rae_fast.images.entries import Entries, ImageIndex, ReadError
from rae_fast.images.folders import number_labels
from rae_fast.images.patterns import expand, shown_names

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff")
LABEL_EXTENSIONS = ("cls", "json", "txt")  # the first that is there gives the label
JSON_LABELS = ("label", "cls", "class_id", "class_name", "class")
BLOCK = 512
MAX_OPEN_TARS = 64
MAX_LABEL_BYTES = 1 << 20
# More names than this are captions, not classes.
MAX_CLASSES = 65_536


class Member(NamedTuple):
    """A file inside a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


class OpenFiles:
    """File descriptors of the files read last. One that is closed stays open for whoever is reading from it."""

    def __init__(self, limit: int = MAX_OPEN_TARS) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def pread(self, path: str, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`; fewer at the end of the file."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _Descriptor(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
        return os.pread(file.number, size, offset)


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class TarReader:
    """Reads members by (tar, offset, size)."""

    def __init__(self, tars: list[str], tar_N: np.ndarray, offset_N: np.ndarray, size_N: np.ndarray) -> None:
        self._tars, self._tar_N, self._offset_N, self._size_N = tars, tar_N, offset_N, size_N
        self._files = OpenFiles()

    def read(self, i: int) -> bytes:
        """Bytes of member `i`.

        Raises:
            ReadError: the tar ends before it does.
        """
        size = int(self._size_N[i])
        data = self._files.pread(self._tars[self._tar_N[i]], size, int(self._offset_N[i]))
        if len(data) != size:
            raise ReadError(f"{Path(self._tars[self._tar_N[i]]).name} is cut short: {len(data)} of {size} bytes")
        return data


def index_tars(source: str) -> ImageIndex:
    """Images of WebDataset tars (a pattern, a folder, one tar) in order of tar and member.

    Members of one sample share their name up to the first dot. The label is that of the sample's .cls (a number), .json
    (label, cls, class_id, class_name or class) or .txt (a number or a class name).

    Raises:
        UserError: no tar, a damaged tar, labels that contradict each other.
    """
    tars = expand(source, ".tar", "tars")
    entries, raw_labels = Entries(), []
    tar_N, offset_N = array("l"), array("q")
    for number, (tar, shown) in enumerate(zip(tars, shown_names(tars), strict=True)):
        for image, label in _samples(tar):
            entries.add(f"{shown}/{image.name}", 0, image.size)
            tar_N.append(number)
            offset_N.append(image.offset)
            raw_labels.append(label)
    labels, class_names = number_labels(raw_labels, source)
    if len(class_names) > MAX_CLASSES:
        raise UserError(
            f"data.source {source} has {len(class_names):,} different texts for labels",
            "class names or numbers, in .cls, .json or .txt",
            "captions are no classes: leave the .txt members out",
        )
    sizes = entries.sizes()
    reader = TarReader(tars, np.array(tar_N, np.int32), np.array(offset_N, np.int64), sizes)
    return entries.finish(class_names, reader, kind="webdataset", source=source, labels=labels)


def _samples(tar: str) -> Iterator[tuple[Member, str | None]]:
    """(image, label text) of each sample that has an image; several images under one name are several samples."""
    with open(tar, "rb", buffering=1 << 16) as file:  # noqa: PTH123
        key, images, labels = None, [], {}
        for member in _members(file, tar):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if (folder, stem) != key:
                yield from ((image, _label(labels, tar, image)) for image in images)
                key, images, labels = (folder, stem), [], {}
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                images.append(member)
            elif extension in LABEL_EXTENSIONS and member.size <= MAX_LABEL_BYTES:
                labels[extension] = os.pread(file.fileno(), member.size, member.offset)
        yield from ((image, _label(labels, tar, image)) for image in images)


def _label(labels: dict[str, bytes], tar: str, image: Member) -> str | None:
    for extension in LABEL_EXTENSIONS:
        if extension not in labels:
            continue
        text = labels[extension].decode("utf-8", "replace").strip()
        if extension != "json":
            return text
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{tar}: the .json of {image.name} is not JSON: {error}", '{"label": 3}') from error
        found = [content[name] for name in JSON_LABELS if isinstance(content, dict) and content.get(name) is not None]
        if found:
            return str(found[0])
    return None


def _members(file, tar: str) -> Iterator[Member]:
    """Regular files of an uncompressed tar: ustar, GNU (long names, large sizes) and pax (path, size) headers.

    Raises:
        UserError: it is not a tar, or is cut short.
    """
    end = os.fstat(file.fileno()).st_size
    at, override = 0, {}
    while at + BLOCK <= end:
        file.seek(at)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return
        if _number(header[148:156]) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise UserError(f"{tar} is not an uncompressed tar, or is damaged at byte {at:,}", "a WebDataset tar")
        size, kind = int(override.pop("size", 0)) or _number(header[124:136]), header[156:157]
        data_at = at + BLOCK
        if data_at + size > end:
            raise UserError(
                f"{tar} is cut short: a member needs {data_at + size:,} bytes, there are {end:,}",
                "a whole tar",
                "fetch it again",
            )
        if kind == b"L":
            override["path"] = file.read(size).rstrip(b"\0")
        elif kind == b"x":
            override.update(_pax(file.read(size)))
        elif kind in (b"0", b"\0"):
            name = override.pop("path", None) or _ustar_name(header)
            yield Member(os.fsdecode(name), data_at, size)
        if kind not in (b"L", b"x"):
            override = {}
        at = data_at + -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """Octal text, or binary where the highest bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0")[0].strip()
    return int(text, 8) if text and all(48 <= c < 56 for c in text) else 0


def _ustar_name(header: bytes) -> bytes:
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _pax(records: bytes) -> dict[str, bytes]:
    """`path` and `size` of a pax extended header: records of "LENGTH KEY=VALUE\\n"."""
    found, at = {}, 0
    while at < len(records):
        length, _, _ = records[at:].partition(b" ")
        key, _, value = records[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        at += int(length)
    return found
