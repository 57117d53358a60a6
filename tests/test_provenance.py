import hashlib

import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.provenance import atomic_write, read_json, sha256_file, sha256_tensors, versions, write_json


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_survives_and_damage_is_one_clear_line(tmp_path) -> None:
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"x": [1, 2.5, None]})
    assert read_json(path) == {"x": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_an_unwritable_place_is_a_user_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "below"):
        pass


def test_file_digest(tmp_path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_tensor_digest_sees_names_dtypes_shapes_and_values_but_not_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    base = sha256_tensors({"a": a, "b": b})
    assert base == sha256_tensors({"b": b, "a": a})
    changed = [{"c": a, "b": b}, {"a": a.double(), "b": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a + 1, "b": b}]
    assert all(sha256_tensors(other) != base for other in changed)
    assert sha256_tensors({"a": a.reshape(2, 3).T}) == sha256_tensors({"a": a.reshape(2, 3).T.contiguous()})


def test_versions_name_what_matters() -> None:
    assert {"python", "torch", "rae_fast"} <= set(versions())
