"""One rank's view of a build in progress: what is to be done, what is done, how the others are getting on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rae_fast.latents.codecs import Codec, get_codec
from rae_fast.latents.encode import RawBatch, StageTimes, Unit
from rae_fast.latents.layout import Plane, planes_of, shard_count, shard_rows
from rae_fast.latents.records import ShardRecord
from rae_fast.latents.storage import Storage
from rae_fast.latents.store import LatentStore
from rae_fast.progress import Progress
from rae_fast.runtime import Ranks

POLL_S, REMOTE_POLL_S = 0.1, 2.0  # each look at an object store is a request


@dataclass
class Build:
    """What the passes of a build share.

    Attributes:
        ranks: this process among all.
        storage: where the store grows.
        attrs: the store's attributes.
        encode: gives the un-normalized latents of units, batch by batch: from images, or from imported files.
        times: where the time goes.
        stop: raises when the build is to end early.
        failures: images that this rank could not decode in the pass in hand.
        kept: old rows of the shard that an append fills up.
        only: names of the planes to write, for a repair; None for all.
    """

    ranks: Ranks
    storage: Storage
    attrs: dict[str, Any]
    encode: Callable[[Sequence[Unit]], Iterator[RawBatch]]
    times: StageTimes = field(default_factory=StageTimes)
    stop: Callable[[], None] = lambda: None
    failures: int = 0
    only: frozenset[str] | None = None
    kept: ShardRecord | None = None
    _scales: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def planes(self) -> dict[str, Plane]:
        """The arrays that are written row by row."""
        attrs = self.attrs
        planes = planes_of(attrs["latent_shape"], attrs["views"], attrs["codec"], attrs["pixels"])
        return {name: plane for name, plane in planes.items() if self.only is None or name in self.only}

    @property
    def codec(self) -> Codec:
        """How latents become bytes."""
        return get_codec(self.attrs["codec"])

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(shard_count(self.attrs["num_images"], self.attrs["shard_size"]))

    def rows(self, shard: int) -> range:
        """Rows of a shard."""
        return shard_rows(shard, self.attrs["shard_size"], self.attrs["num_images"])

    def mine(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that this rank owns."""
        return [unit for unit in units if unit.shard % self.ranks.world == self.ranks.rank]

    def progress(self, label: str, units: Sequence[Unit], missing: Sequence[Unit]) -> Progress:
        """Progress over the images of all units, of which some are still missing."""
        self.failures = 0
        total, left = (sum(len(unit.rows) for unit in part) for part in (units, missing))
        return Progress(total, "images", label, done=total - left, enabled=self.ranks.is_main)

    def advance(self, progress: Progress, batch: RawBatch) -> None:
        """Count a batch; the other ranks are taken to be as fast."""
        self.failures += len(batch.failures)
        count = min(batch.count * self.ranks.world, progress.total - progress.done)
        progress.advance(count, failures=self.failures, limit=self.times.limits())

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait for other ranks; files say when, so a build survives the loss of any of them.

        Raises:
            Stopped: SIGTERM arrived meanwhile.
        """
        while not ready():
            self.stop()
            time.sleep(POLL_S if self.storage.is_local else REMOTE_POLL_S)

    def normalize(self, raw_BCHW: Tensor) -> Tensor:
        """(z - mean) / sqrt(var + eps) in float32, on the device where the latents are."""
        device = raw_BCHW.device
        if device not in self._scales:
            store = LatentStore(self.storage, self.attrs, None)
            scale = (store.var + self.attrs["normalization"]["eps"]).sqrt()
            self._scales[device] = (store.mean.to(device), scale.to(device))
        mean, scale = self._scales[device]
        return (raw_BCHW.float() - mean) / scale
