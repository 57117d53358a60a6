"""One index over class folders, plain folders and lists: order, labels, names, and what is said when they are wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from rae_fast.config import Data
from rae_fast.errors import UserError
from rae_fast.images.entries import PathTable, ReadError
from rae_fast.images.index import build_index

Write = Callable[[dict[str, bytes]], Path]

# Names that sort differently as text, as paths and without case.
UNSORTED = [
    "n02/b.JPEG", "n02/B.png", "n02/a/z.jpg", "n02/a.jpg", "n02/a-1/y.webp", "n01/10.jpg", "n01/9.jpg",
    "n10/x.TIFF", "n10/notes.txt", "N03/q.bmp", "n01/.hidden.jpg", "n02/a/deep/er/1.ppm",
]  # fmt: skip


def index_of(source: Path | str, **options: object):
    return build_index(Data(source=str(source), **options))


def test_class_folders_come_in_torchvision_s_order(write_files: Write) -> None:
    folder = write_files({name: name.encode() for name in UNSORTED})
    (folder / "n10" / "linked").symlink_to(folder / "n01")
    expected = ImageFolder(str(folder))
    index = index_of(folder)
    assert [str(folder / path) for path in index.paths] == [path for path, _ in expected.samples]
    assert index.labels.tolist() == expected.targets
    assert list(index.class_names) == expected.classes
    assert [index.read(i) for i in range(len(index))] == [Path(path).read_bytes() for path, _ in expected.samples]
    assert index.sizes.tolist() == [Path(path).stat().st_size for path, _ in expected.samples]


def test_a_plain_folder_has_label_0_and_the_order_of_its_paths(write_files: Write) -> None:
    folder = write_files(dict.fromkeys(["b.jpg", "a.jpg", "album/2.png", "album-1/1.gif", "read.me"], b"x"))
    index = index_of(folder)
    assert list(index.paths) == ["a.jpg", "album/2.png", "album-1/1.gif", "b.jpg"]
    pictures = [path for path in sorted(folder.rglob("*.*")) if path.suffix != ".me"]
    assert list(index.paths) == [str(path.relative_to(folder)) for path in pictures]
    assert index.labels.tolist() == [0] * 4
    assert (index.class_names, index.num_classes, index.kind) == ((), 1, "folder")


def test_an_empty_class_folder_is_an_error_as_in_torchvision(write_files: Write) -> None:
    folder = write_files({"full/1.jpg": b"x", "empty/notes.txt": b"x"})
    with pytest.raises(UserError, match=r"class folder .*empty holds no images"):
        index_of(folder)


@pytest.mark.parametrize(
    ("name", "text", "labels", "class_names"),
    [
        ("list.csv", "path,label\n1.jpg,3\nsub/2.jpg,0\n", [3, 0], ()),
        ("list.csv", "1.jpg,3\n\nsub/2.jpg,0\n", [3, 0], ()),
        ("list.csv", "label,path\ndog,1.jpg\ncat,sub/2.jpg\n", [1, 0], ("cat", "dog")),
        ("list.csv", "\ufeffpath\r\n1.jpg\r\nsub/2.jpg\r\n", [0, 0], ()),
        ("list.tsv", "1.jpg\tdog, old\nsub/2.jpg\tdog\n", [1, 0], ("dog", "dog, old")),
        ("list.jsonl", '{"path": "1.jpg", "label": 3}\n{"path": "sub/2.jpg", "label": 0}\n', [3, 0], ()),
        (
            "list.jsonl",
            '{"file_name": "1.jpg", "label": "b"}\n{"file_name": "sub/2.jpg", "label": "a"}',
            [1, 0],
            ("a", "b"),
        ),
    ],
)
def test_lists_name_files_beside_them(
    write_files: Write, name: str, text: str, labels: list[int], class_names: tuple[str, ...]
) -> None:
    folder = write_files({"1.jpg": b"one", "sub/2.jpg": b"two", name: text.encode()})
    index = index_of(folder / name)
    assert list(index.paths) == ["1.jpg", "sub/2.jpg"]
    assert [index.read(0), index.read(1)] == [b"one", b"two"]
    assert index.sizes.tolist() == [3, 3]
    assert index.labels.tolist() == labels
    assert index.class_names == class_names


def test_a_list_may_name_files_elsewhere(write_files: Write, tmp_path: Path) -> None:
    (tmp_path / "far.jpg").write_bytes(b"far")
    folder = write_files({"list.csv": f"{tmp_path}/far.jpg,0\n../far.jpg,1\n".encode()})
    index = index_of(folder / "list.csv")
    assert [index.read(0), index.read(1)] == [b"far", b"far"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "path,label\n1.jpg,-1\n", r"list.csv: entry 1 has label -1"),
        ("list.csv", "1.jpg,2\n2.jpg\n", r"list.csv: entry 2 has no label, others have"),
        ("list.csv", ",2\n", r"list.csv line 1 has no path"),
        ("list.jsonl", '{"path": "1.jpg"}\n[1]\n', r"list.jsonl line 2 is not a JSON object"),
        ("list.jsonl", '{"label": 1}\n', r"list.jsonl line 1 has no path"),
        ("list.csv", "path,label\n", r"list.csv holds no images"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(write_files: Write, name: str, text: str, message: str) -> None:
    folder = write_files({name: text.encode()})
    with pytest.raises(UserError, match=message):
        index_of(folder / name)


def test_a_missing_file_of_a_list_fails_when_it_is_read(write_files: Write) -> None:
    folder = write_files({"list.csv": b"gone.jpg,0\n"})
    index = index_of(folder / "list.csv")
    assert index.sizes.tolist() == [-1]
    with pytest.raises(ReadError, match="No such file"):
        index.read(0)


def test_files_that_vanish_shrink_or_dangle_are_read_errors(write_files: Write) -> None:
    folder = write_files({"a/1.jpg": b"1", "a/2.jpg": b"2"})
    (folder / "a" / "3.jpg").symlink_to(folder / "nowhere.jpg")
    index = index_of(folder)
    (folder / "a" / "1.jpg").unlink()
    (folder / "a" / "2.jpg").write_bytes(b"")
    for i, reason in enumerate(["No such file", "empty file", "No such file"]):
        with pytest.raises(ReadError, match=reason):
            index.read(i)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": None}, "data.source is not set"),
        ({"source": "{folder}/missing"}, "does not exist"),
        ({"source": "{folder}"}, "has no class folders"),
        ({"source": "{folder}", "kind": "folder"}, "holds no images"),
        ({"source": "{folder}", "kind": "webdataset"}, "holds no tars"),
        ({"source": "{folder}/notes.md", "kind": "imagefolder"}, "is not a folder"),
        ({"source": "{folder}/notes.md"}, "is of no known kind"),
        ({"source": "{folder}", "kind": "imagefolders"}, r"did you mean 'imagefolder'\?"),
    ],
)
def test_a_source_that_is_nothing_is_said_so(write_files: Write, options: dict, message: str) -> None:
    folder = write_files({"notes.md": b"x"})
    source = options["source"] and options["source"].format(folder=folder)
    with pytest.raises(UserError, match=message):
        build_index(Data(**{**options, "source": source}))


def test_a_link_in_a_circle_is_an_error_and_not_a_hang(write_files: Write) -> None:
    folder = write_files({"a/1.jpg": b"x"})
    (folder / "a" / "again").symlink_to(folder)
    with pytest.raises(UserError, match="links back to a folder above it"):
        index_of(folder, kind="folder")


def test_limit_keeps_the_first_images(write_files: Write) -> None:
    folder = write_files({name: name.encode() for name in UNSORTED})
    whole, part = index_of(folder), index_of(folder, limit=3)
    assert list(part.paths) == list(whole.paths)[:3]
    assert [part.read(i) for i in range(3)] == [whole.read(i) for i in range(3)]
    assert part.class_names == whole.class_names


@pytest.mark.parametrize("change", ["size", "name", "label", "order", "none"])
def test_the_digest_tells_data_sets_apart_wherever_they_lie(tmp_path: Path, change: str) -> None:
    rows = ["1.jpg,0", "2.jpg,1"]
    digests = []
    for number, changed in enumerate((False, change != "none")):
        folder = tmp_path / str(number)
        folder.mkdir()
        lines = list(rows)
        if changed and change == "label":
            lines[0] = "1.jpg,1"
        if changed and change == "order":
            lines.reverse()
        for line in lines:
            (folder / line.split(",")[0]).write_bytes(b"same size")
        if changed and change == "size":
            (folder / "1.jpg").write_bytes(b"other")
        if changed and change == "name":
            (folder / "1.jpg").rename(folder / "3.jpg")
            lines[0] = "3.jpg,0"
        (folder / "list.csv").write_text("\n".join(lines))
        digests.append(index_of(folder / "list.csv").digest)
    assert (digests[0] == digests[1]) == (change == "none")


def test_names_that_are_not_text_are_kept_as_they_are(write_files: Write, tmp_path: Path) -> None:
    folder = write_files({"a/1.jpg": b"x"})
    strange = os.fsdecode(b"\xff\xfe \xe9.jpg")
    (folder / "a" / strange).write_bytes(b"strange")
    index = index_of(folder)
    assert index.paths[1] == f"a/{strange}"
    assert index.read(1) == b"strange"


def test_path_table_is_a_list_of_names() -> None:
    names = ["a", "", "ßü/x.jpg", "z" * 300]
    table = PathTable.of(names)
    assert list(table) == names
    assert (table[-1], list(table[1:3]), list(table[2:1]), list(table[::2])) == (names[-1], names[1:3], [], names[::2])
    assert table[1:].offsets[0] == 0
    with pytest.raises(IndexError):
        table[4]


def test_a_million_names_take_a_hundred_bytes_each_at_most() -> None:
    count = 200_000
    table = PathTable.of([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count)])
    labels = sizes = np.zeros(count, np.int64)
    assert table.blob.nbytes + table.offsets.nbytes + labels.nbytes + sizes.nbytes < 100 * count
