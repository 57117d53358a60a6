"""Images as files: class folders in torchvision's order, a folder without classes, and a list of path,label."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rae_fast.errors import UserError
from rae_fast.images.entries import UNKNOWN_SIZE, Entries, ImageIndex, PathTable

# torchvision's ImageFolder, so that the two agree on what an image is, and GIF, which PIL reads.
IMAGENET_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXTENSIONS = (*IMAGENET_EXTENSIONS, ".gif")


class FileReader:
    """Reads whole files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)
        self.paths: PathTable | None = None

    def read(self, i: int) -> bytes:
        """Bytes of file `i`."""
        assert self.paths is not None
        path = self.paths[i]
        # A list may hold absolute paths. No Path here: it would cost as much as reading.
        path = path if path.startswith("/") else f"{self._root}/{path}"
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()


def index_class_folders(root: Path, source: str) -> ImageIndex:
    """Folder of class folders: label = place of the class among the sorted names, files as ImageFolder orders them.

    Raises:
        UserError: no class folder, or one without images.
    """
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not class_names:
        raise UserError(f"data.source {source} has no class folders", "one folder per class", "or set data.kind=folder")
    entries = Entries()
    for label, name in enumerate(class_names):
        before = len(entries)
        # torchvision sorts whole folder paths as strings, then the files inside each.
        for folder, files in sorted(_walk(f"{root}/{name}", name)):
            for file, size in sorted(files):
                if file.lower().endswith(IMAGENET_EXTENSIONS):
                    entries.add(f"{folder}/{file}", label, size)
        if len(entries) == before:
            raise UserError(
                f"class folder {root / name} holds no images",
                f"files ending in {' '.join(IMAGENET_EXTENSIONS)}",
                "remove the folder, or set data.kind=folder for images without classes",
            )
    return _finish(entries, class_names, root, "imagefolder", source)


def index_folder(root: Path, source: str) -> ImageIndex:
    """All images below a folder, without classes (label 0), ordered by path, part by part.

    Raises:
        UserError: there are none.
    """
    found = [
        (f"{folder}/{file}" if folder else file, size)
        for folder, files in _walk(str(root), "")
        for file, size in files
        if file.lower().endswith(EXTENSIONS)
    ]
    entries = Entries()
    for path, size in sorted(found, key=lambda item: item[0].split("/")):
        entries.add(path, 0, size)
    return _finish(entries, (), root, "folder", source)


def index_list(file: Path, source: str) -> ImageIndex:
    """CSV (`path,label`, header or not) or JSONL (`{"path": ..., "label": ...}`); paths relative to the list's folder.

    Labels are whole numbers, or names (numbered in sorted order), or absent throughout (label 0).

    Raises:
        UserError: the list cannot be read, or a line of it is wrong.
    """
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"data.source {source} cannot be read: {error.strerror}", "a CSV or JSONL list") from error
    rows = list(_jsonl_rows(text, file) if file.suffix in (".jsonl", ".ndjson", ".json") else _csv_rows(text, file))
    labels, class_names = number_labels([label for _, _, label in rows], str(file))
    entries = Entries()
    for (_, path, _), label in zip(rows, labels, strict=True):
        try:
            size = (file.parent / path).stat().st_size
        except OSError:
            size = UNKNOWN_SIZE  # reading it will fail, and that is recorded against this image
        entries.add(path, label, size)
    return _finish(entries, class_names, file.parent, "list", source)


def number_labels(raw: list[str | None], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class names from texts: all absent -> 0; all whole numbers -> themselves; else sorted names.

    Raises:
        UserError: some are absent, or a number is negative.
    """
    if all(text is None for text in raw):
        return [0] * len(raw), ()
    for number, text in enumerate(raw):
        if text is None:
            raise UserError(f"{where}: entry {number + 1} has no label, others have", "a label for each, or for none")
    try:
        labels = [int(text) for text in raw if text is not None]
    except ValueError:
        class_names = sorted({text for text in raw if text is not None})
        numbers = {name: label for label, name in enumerate(class_names)}
        return [numbers[text] for text in raw if text is not None], tuple(class_names)
    if min(labels) < 0:
        entry = labels.index(min(labels)) + 1
        raise UserError(f"{where}: entry {entry} has label {min(labels)}", "labels from 0 upwards")
    return labels, ()


def _finish(
    entries: Entries, class_names: list[str] | tuple[str, ...], root: Path, kind: str, source: str
) -> ImageIndex:
    reader = FileReader(root)
    index = entries.finish(class_names, reader, kind=kind, source=source)
    reader.paths = index.paths
    return index


def _walk(folder: str, name: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, list]]:
    """(name, [(file, size)]) of a folder and of all below it, links followed.

    Raises:
        UserError: a folder cannot be listed, or a link leads back to a folder above it.
    """
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    try:
        own = os.stat(folder)  # noqa: PTH116
        if (own.st_dev, own.st_ino) in above:
            raise UserError(f"{folder} links back to a folder above it", "a tree of folders", "remove the link")
        with os.scandir(folder) as found:
            for entry in found:
                if entry.is_dir():
                    folders.append(entry.name)
                else:
                    files.append((entry.name, _size(entry)))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed: {error.strerror}", "a readable folder", "mend its rights"
        ) from error
    yield name, files
    for inner in folders:
        yield from _walk(f"{folder}/{inner}", f"{name}/{inner}" if name else inner, (*above, (own.st_dev, own.st_ino)))


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return UNKNOWN_SIZE  # a dangling link: reading it will fail, and that is recorded against this image


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line number, path, label) of a CSV file; a first line that names the columns is used, then left out."""
    delimiter = "\t" if file.suffix == ".tsv" else ","
    path_at, label_at = 0, 1
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1):
        cells = [cell.strip() for cell in row]
        if number == 1 and "path" in cells:
            path_at, label_at = cells.index("path"), cells.index("label") if "label" in cells else len(cells)
            continue
        if not any(cells):
            continue
        if path_at >= len(cells) or not cells[path_at]:
            raise UserError(f"{file} line {number} has no path: {row}", "path,label")
        yield number, cells[path_at], cells[label_at] if label_at < len(cells) and cells[label_at] else None


def _jsonl_rows(text: str, file: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line number, path, label) of a JSONL file; `file_name` is taken for `path`, as Hugging Face writes it."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = row.get("path", row.get("file_name"))
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{file} line {number} is not a JSON object: {error}", '{"path": ..., "label": ...}'
            ) from error
        if not isinstance(path, str) or not path:
            raise UserError(f"{file} line {number} has no path", '{"path": ..., "label": ...}')
        label = row.get("label")
        yield number, path, None if label is None else str(label)
