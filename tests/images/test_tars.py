"""WebDataset tars: members found as tarfile finds them, labels from cls, json or txt, damage named."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rae_fast.config import Data
from rae_fast.errors import UserError
from rae_fast.images.entries import ReadError
from rae_fast.images.index import build_index
from rae_fast.images.patterns import expand_braces
from rae_fast.images.tars import MAX_OPEN_TARS


def write_tar(path: Path, members: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index_of(source: Path | str, **options: object):
    return build_index(Data(source=str(source), **options))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place_whatever_the_tar_s_dialect(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "x" * 60  # longer than the 100 bytes of a plain name
    members = {f"{long}/a.jpg": b"A" * 700, f"{long}/a.cls": b"5\n", "b.b.seg.png": b"B" * 512, "b.cls": b"0"}
    if format != tarfile.USTAR_FORMAT:
        members |= {"n" * 300 + ".webp": b"C", "n" * 300 + ".cls": b"7", "é.jpeg": b"D" * 513, "é.cls": b"1"}
    path = write_tar(tmp_path / "x.tar", members, format)
    index = index_of(path)
    images = [name for name in members if not name.endswith("cls")]
    assert list(index.paths) == [f"x.tar/{name}" for name in images]
    assert [index.read(i) for i in range(len(index))] == [members[name] for name in images]
    assert index.labels.tolist() == [5, 0, 7, 1][: len(images)]
    assert index.sizes.tolist() == [len(members[name]) for name in images]
    assert index.kind == "webdataset"


@pytest.mark.parametrize(
    ("members", "labels", "class_names"),
    [
        ({"0.jpg": b"x", "0.cls": b"3", "1.png": b"y", "1.cls": b"1"}, [3, 1], ()),
        ({"0.json": b'{"label": 3}', "0.jpg": b"x", "1.jpg": b"y", "1.json": b'{"cls": 1, "w": 9}'}, [3, 1], ()),
        ({"0.jpg": b"x", "0.txt": b"dog\n", "1.jpg": b"y", "1.txt": b"cat"}, [1, 0], ("cat", "dog")),
        (
            {"0.jpg": b"", "0.json": b'{"class_name": "b"}', "1.jpg": b"", "1.json": b'{"label": "a"}'},
            [1, 0],
            ("a", "b"),
        ),
        ({"0.jpg": b"x", "0.json": b'{"width": 3}', "1.jpg": b"y"}, [0, 0], ()),
        ({"0.jpg": b"x", "0.cls": b"2", "0.txt": b"a dog that runs", "1.jpg": b"y", "1.cls": b"0"}, [2, 0], ()),
    ],
)
def test_labels_come_from_cls_then_json_then_txt(
    tmp_path: Path, members: dict[str, bytes], labels: list[int], class_names: tuple[str, ...]
) -> None:
    index = index_of(write_tar(tmp_path / "x.tar", members))
    assert (index.labels.tolist(), index.class_names) == (labels, class_names)


def test_samples_in_different_folders_do_not_share_labels(tmp_path: Path) -> None:
    index = index_of(
        write_tar(tmp_path / "x.tar", {"a/0.jpg": b"x", "a/0.cls": b"4", "b/0.cls": b"6", "b/0.jpg": b"y"})
    )
    assert index.labels.tolist() == [4, 6]


def test_brace_patterns_globs_and_folders_name_the_same_tars(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"shard-{number:03d}.tar", {f"{number}.jpg": b"%d" % number, f"{number}.cls": b"0"})
    sources = [tmp_path / "shard-{000..011}.tar", tmp_path / "shard-*.tar", tmp_path]
    indexes = [index_of(source) for source in sources]
    assert list(indexes[0].paths) == [f"shard-{n:03d}.tar/{n}.jpg" for n in range(12)]
    assert len({index.digest for index in indexes}) == 1
    assert index_of(tmp_path / "shard-{003..005}.tar").paths[0] == "shard-003.tar/3.jpg"


def test_braces_are_written_out_in_order() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{train,val}-{0..1}.tar") == ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]
    with pytest.raises(UserError, match="runs backwards"):
        expand_braces("a-{3..1}.tar")


def test_a_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"0.jpg": b"x"})
    with pytest.raises(UserError, match=r"s-1\.tar does not exist"):
        index_of(tmp_path / "s-{0..1}.tar")


def test_many_threads_read_more_tars_than_may_stay_open(tmp_path: Path) -> None:
    count = 2 * MAX_OPEN_TARS + 3
    for number in range(count):
        write_tar(tmp_path / f"{number:04d}.tar", {"0.jpg": b"%d" % number})
    index = index_of(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(index.read, list(range(count)) * 3))
    assert read == [b"%d" % number for number in range(count)] * 3


def test_a_tar_that_shrinks_after_indexing_is_a_read_error_and_not_a_crash(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"x" * 5000, "1.jpg": b"y" * 5000})
    index = index_of(path)
    with path.open("r+b") as file:
        file.truncate(7000)
    assert index.read(0) == b"x" * 5000
    with pytest.raises(ReadError, match=r"x\.tar is cut short: 856 of 5000 bytes"):
        index.read(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:3000], "is cut short"),
        (lambda data: data[:1] + b"?" + data[2:], "is not an uncompressed tar, or is damaged at byte 0"),
        (lambda data: b"\x1f\x8b" + data[2:], "is not an uncompressed tar"),
        (lambda data: b"", "holds no images"),
    ],
)
def test_a_damaged_tar_is_named_with_the_byte(tmp_path: Path, damage, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"x" * 5000})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        index_of(path)


def test_broken_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tar: the \.json of 0\.jpg is not JSON"):
        index_of(write_tar(tmp_path / "x.tar", {"0.jpg": b"x", "0.json": b"{"}))
    with pytest.raises(UserError, match="entry 2 has no label"):
        index_of(write_tar(tmp_path / "y.tar", {"0.jpg": b"x", "0.cls": b"1", "1.jpg": b"x"}))
