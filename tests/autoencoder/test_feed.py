"""What decoder training sees: latents that belong to their pixels, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rae_fast.autoencoder.batch import DecoderBatch, as_tokens
from rae_fast.autoencoder.feed import CachedFeed, OnlineFeed
from rae_fast.config import Config
from rae_fast.images.index import build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def config(decoder_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return decoder_config(tmp_path_factory.mktemp("run"), "data.train_crop=random", "data.random_resize=40")


@pytest.fixture(scope="module")
def encoder(config: Config) -> LatentEncoder:
    return LatentEncoder(config.stage_1.params, "fp32", CPU)


def cached(config: Config, ranks: Ranks, seed: int = 0) -> CachedFeed:
    store = open_store(config.cache.path)
    size = 8 // ranks.world
    return CachedFeed(store, config, batch_size=size, images_per_step=8, seed=seed, ranks=ranks, device=CPU)


def online(config: Config, encoder: LatentEncoder, ranks: Ranks) -> OnlineFeed:
    size = 8 // ranks.world
    index = build_index(config.data)
    return OnlineFeed(index, encoder, config, image_size=32, batch_size=size, images_per_step=8, seed=0, ranks=ranks)


def take(feed: CachedFeed | OnlineFeed, count: int) -> list[DecoderBatch]:
    batches = [next(feed) for _ in range(count)]
    feed.close()
    return batches


def test_cached_latents_are_those_of_the_pixels_beside_them(config: Config, encoder: LatentEncoder) -> None:
    for batch in take(cached(config, Ranks()), 4):
        fresh = as_tokens(encoder((batch.images_B3SS * 255).round().to(torch.uint8)))
        assert (batch.tokens_BNC - fresh).norm() <= 2e-3 * fresh.norm()  # float16 in the store


def test_both_views_of_an_image_come_up_with_their_own_pixels(config: Config) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in take(cached(config, Ranks()), 40):
        for row, image in zip(batch.index_B.tolist(), batch.images_B3SS, strict=True):
            seen.setdefault(row, []).append(image)
    mirrored = sum(any(torch.equal(image, images[0].flip(-1)) for image in images[1:]) for images in seen.values())
    assert mirrored > 0.8 * len(seen)
    assert all(
        torch.equal(i, images[0]) or torch.equal(i, images[0].flip(-1)) for images in seen.values() for i in images
    )


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_two_ranks_share_the_batches_of_one(config: Config, encoder: LatentEncoder, kind: str) -> None:
    def feed(ranks: Ranks) -> CachedFeed | OnlineFeed:
        return cached(config, ranks) if kind == "cached" else online(config, encoder, ranks)

    whole = take(feed(Ranks()), 7)
    parts = [take(feed(Ranks(rank, rank, 2)), 7) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert torch.equal(batch.index_B, torch.cat([part[i].index_B for part in parts]))
        assert torch.allclose(batch.tokens_BNC, torch.cat([part[i].tokens_BNC for part in parts]), atol=1e-4)
        assert batch.epoch == parts[0][i].epoch == i // 5


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_a_feed_goes_on_where_another_stopped(config: Config, encoder: LatentEncoder, kind: str) -> None:
    def feed() -> CachedFeed | OnlineFeed:
        return cached(config, Ranks()) if kind == "cached" else online(config, encoder, Ranks())

    whole = take(feed(), 7)
    first = feed()
    for _ in range(3):
        next(first)
    state = first.state()
    first.close()
    second = feed()
    second.seek(*state)
    for expected, found in zip(whole[3:], take(second, 4), strict=True):
        assert torch.equal(expected.index_B, found.index_B) and torch.equal(expected.images_B3SS, found.images_B3SS)


def test_online_crops_change_with_the_epoch_and_are_encoded_as_seen(config: Config, encoder: LatentEncoder) -> None:
    batches = take(online(config, encoder, Ranks()), 10)
    fresh = as_tokens(encoder((batches[0].images_B3SS * 255).round().to(torch.uint8)))
    assert torch.allclose(batches[0].tokens_BNC, fresh, atol=1e-4)
    crops: dict[int, set[bytes]] = {}
    for batch in batches:
        for row, image in zip(batch.index_B.tolist(), batch.images_B3SS, strict=True):
            crops.setdefault(row, set()).add(image.numpy().tobytes())
    assert sum(len(versions) == 2 for versions in crops.values()) > 25


def test_an_unreadable_image_is_replaced_and_named(
    config: Config, encoder: LatentEncoder, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = take(online(config, encoder, Ranks()), 10)
    assert all(float(batch.images_B3SS.flatten(1).std(1).min()) > 0 for batch in batches)
    assert capsys.readouterr().out.count("square/013.jpg") <= 1
