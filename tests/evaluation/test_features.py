"""Extractors: what they give, what they depend on, and what they say when something is missing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.features import (
    EncoderFeatures,
    build_extractor,
    image_features,
    mean_token,
    stored_features,
)
from rae_fast.evaluation.image_sets import open_images
from rae_fast.evaluation.inception import INCEPTION_FILE, Inception
from rae_fast.latents.store import open_store

CPU = torch.device("cpu")


def images(n: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the right shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        shapes = FeatureExtractorInceptionV3("x", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(tensor.shape, dtype=tensor.dtype)
        if not tensor.is_floating_point() or "running_var" in name
        else torch.randn(tensor.shape, generator=generator) * 0.05
        for name, tensor in shapes.items()
    }
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def test_inception_gives_pool_spatial_and_logits_as_adm_s_evaluator_takes_them(inception_file: Path) -> None:
    extractor = Inception(inception_file, CPU)
    network, kept = extractor._network, {}
    network.Mixed_6d.register_forward_hook(lambda _, __, output: kept.update(block=output))
    found = extractor(images(2))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "features": (2, 2048),
        "spatial": (2, 17 * 17 * 7),
        "logits": (2, 1008),
    }
    # mixed_6/conv is the first branch of the block, and its channels come last.
    first_branch = kept["block"][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(found["spatial"], first_branch)
    torch.testing.assert_close(found["logits"], found["features"] @ network.fc.weight.T)
    assert not extractor.identity["comparable_with_published"]


def test_missing_inception_weights_are_named_with_their_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=INCEPTION_FILE) as caught:
        Inception(None, CPU)
    assert str(tmp_path / "hub/checkpoints") in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_inception_is_refused_and_no_code_runs(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit Inception"):
        Inception(tmp_path / "other.pth", CPU)

    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="cannot be read"):
        Inception(tmp_path / "trap.pth", CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("attribute", ["TinyNetwork", "instance"])
def test_modules_and_classes_of_modules_are_extractors(tiny_features: str, attribute: str) -> None:
    found = build_extractor(f"tiny_features:{attribute}", None, CPU)
    features = found(images(3))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "features": (3, 6),
        "spatial": (3, 12),
        "logits": (3, 5),
    }
    assert found.identity["weights_sha256"] and found.identity["source_sha256"]


def test_a_function_of_images_in_0_to_1_is_an_extractor(tiny_features: str) -> None:
    x = images(3)
    found = build_extractor("tiny_features:colours", None, CPU)(x)["features"]
    torch.testing.assert_close(found[:, :3], x.float().mean((2, 3)) / 255)


def test_extractors_that_are_none_are_refused(tiny_features: str) -> None:
    for spec, message in {
        "tiny_features:missing": "missing",
        "no_such_module:x": "no_such_module",
        "tiny_features:number": "is a int",
        "inceptoin": "my_module:function",
        "encoder": "no encoder is named",
    }.items():
        with pytest.raises(UserError, match=message):
            build_extractor(spec, None, CPU)
    with pytest.raises(UserError, match="a feature for each image"):
        build_extractor("tiny_features:one_row", None, CPU)(images(3))


def test_features_do_not_depend_on_what_shares_a_piece(tiny_features: str, pack: Callable[..., str]) -> None:
    extractor = build_extractor(tiny_features, None, CPU)
    few = image_features(open_images(pack("few.npz", 5, 0)), extractor).compute(0, 5)[1]
    many = image_features(open_images(pack("many.npz", 70, 0)), extractor).compute(0, 70)[1]
    for name in ("features", "spatial", "logits"):
        np.testing.assert_array_equal(few[name], many[name][:5])


def test_stored_latents_give_the_features_that_their_images_give(
    cache_config: Callable[..., Config], pristine_store: Path
) -> None:
    extractor = EncoderFeatures(cache_config(pristine_store), "fp32", CPU)
    store, pixels = open_store(pristine_store), open_images(pristine_store)
    stored = stored_features(store, extractor)
    fresh = image_features(pixels, extractor)
    assert stored.count == fresh.count == 40
    by_store, by_image = (figures.compute(0, 40)[1]["features"] for figures in (stored, fresh))
    assert by_store.shape == (40, 32)
    np.testing.assert_allclose(by_store, by_image, atol=2e-3)
    token = EncoderFeatures(cache_config(pristine_store), "fp32", CPU, "cls")
    assert token.identity != extractor.identity
    first = image_features(pixels, token).compute(0, 40)[1]["features"]
    assert first.shape == (40, 32) and np.abs(first - by_image).max() > 0.1


def test_a_store_of_another_encoder_is_refused(
    cache_config: Callable[..., Config], pristine_store: Path, tmp_path: Path
) -> None:
    other = EncoderFeatures(cache_config(tmp_path, "stage_1.params.encoder_params.layers=[0,1]"), "fp32", CPU)
    with pytest.raises(UserError, match=r"encoder\.layers"):
        stored_features(open_store(pristine_store), other)


def test_mean_token_is_the_mean_over_positions() -> None:
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_token(z.half()), z.half().float().mean((2, 3)))
