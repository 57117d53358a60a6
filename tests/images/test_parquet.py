"""Hugging Face parquet: imagenet-1k's layout, rows in order, class names from the schema, each row group read once."""

from __future__ import annotations

import builtins
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rae_fast.config import Data
from rae_fast.errors import UserError
from rae_fast.images import parquet
from rae_fast.images.entries import ReadError
from rae_fast.images.index import build_index

pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["tench", "goldfish", "shark"]


def write_parquet(path: Path, images: list[bytes | None], labels: list[int] | None = None, group: int = 4) -> Path:
    """A file as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": f"{i}.JPEG"} for i, data in enumerate(images)]
    columns = {"image": pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": NAMES, "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def index_of(source: Path | str, **options: object):
    return build_index(Data(source=str(source), **options))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for part in range(2):
        rows = range(10 * part, 10 * part + 10)
        path = tmp_path / "set" / "data" / f"train-0000{part}-of-00002.parquet"
        write_parquet(path, [b"image %d" % row for row in rows], [row % 3 for row in rows])
    return tmp_path / "set"


def test_rows_come_in_order_with_labels_and_class_names(dataset: Path) -> None:
    index = index_of(dataset)
    assert index.kind == "parquet"
    assert [index.read(i) for i in range(20)] == [b"image %d" % row for row in range(20)]
    assert index.labels.tolist() == [row % 3 for row in range(20)]
    assert index.class_names == tuple(NAMES)
    assert (index.paths[0], index.paths[19]) == ("train-00000-of-00002.parquet#0", "train-00001-of-00002.parquet#9")


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row groups, as they are read."""
    read, original = [], pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return read


def test_reading_in_order_reads_each_row_group_once(dataset: Path, groups_read: list[int]) -> None:
    index = index_of(dataset)
    assert [index.read(i) for i in range(20)] == [b"image %d" % row for row in range(20)]
    assert len(groups_read) == 6


def test_threads_that_want_one_row_group_read_it_once(
    dataset: Path, groups_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUPS_KEPT", 6)  # none is dropped, however far a thread falls behind
    index = index_of(dataset)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(index.read, range(20))) == [b"image %d" % row for row in range(20)]
    assert len(groups_read) == 6


def test_any_order_gives_the_same_bytes(dataset: Path) -> None:
    index = index_of(dataset)
    order = [(7 * i) % 20 for i in range(60)]
    assert [index.read(i) for i in order] == [b"image %d" % i for i in order]


def test_a_row_without_an_image_fails_alone(tmp_path: Path) -> None:
    index = index_of(write_parquet(tmp_path / "x.parquet", [b"a", None, b"c"], [0, 1, 2]))
    assert (index.read(0), index.read(2)) == (b"a", b"c")
    with pytest.raises(ReadError, match="no image bytes"):
        index.read(1)


def test_files_without_labels_are_unlabelled(tmp_path: Path) -> None:
    index = index_of(write_parquet(tmp_path / "x.parquet", [b"a", b"b"]))
    assert (index.labels.tolist(), index.class_names) == ([0, 0], ())


def test_the_digest_covers_what_the_rows_hold(tmp_path: Path) -> None:
    digests = {
        index_of(write_parquet(tmp_path / str(number) / "x.parquet", images, labels)).digest
        for number, (images, labels) in enumerate(
            [([b"a", b"b"], [0, 1]), ([b"a", b"b"], [0, 1]), ([b"a", b"longer"], [0, 1]), ([b"a", b"b"], [1, 0])]
        )
    }
    assert len(digests) == 3


def test_mixed_splits_are_refused_with_a_pattern_to_use(dataset: Path) -> None:
    write_parquet(dataset / "data" / "test-00000-of-00001.parquet", [b"t"], [-1])
    with pytest.raises(UserError, match=r"several splits: test, train.*/data/train-\*\.parquet"):
        index_of(dataset)
    assert len(index_of(f"{dataset}/data/train-*.parquet")) == 20
    with pytest.raises(UserError, match="holds -1"):
        index_of(dataset / "data" / "test-00000-of-00001.parquet")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"has no column of images, only \['text'\]"):
        index_of(tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        index_of(tmp_path / "broken.parquet")


def test_without_pyarrow_the_extra_is_named(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **options: object):
        if name.startswith("pyarrow"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install rae_fast\[parquet\]"):
        index_of(dataset)
