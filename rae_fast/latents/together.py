"""Several stores from one pass over the images: each JPEG is decoded once, and every encoder takes its crops from it.

Each store is built as it would be alone, to the same bytes, in a thread of its own; only decoding is shared. Builds
that ask for images at the same time get one decode of all that any of them wants, in which each skips what it has
already.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.images.decode import ImageBatch
from rae_fast.latents.sources import Decode, ImageSource

BATCHES_AHEAD = 2  # crops that a build may be ahead of the slowest of the others
# A build that waits for other ranks asks for no images; the others do not wait for it longer than this.
PATIENCE_S = 5.0


def configs_of_stores(config: Config) -> list[Config]:
    """The config itself, then one for each store of `cache.also`.

    Raises:
        UserError: one of them would be another's, or needs other images, crops or precision.
    """
    plain = replace(config, cache=replace(config.cache, also=[]))
    configs = [plain]
    for changes in config.cache.also:
        if not changes.get("path"):
            raise UserError(f"an entry of cache.also is {changes}", "its `path`, and keys of the config that differ")
        named = {("cache.path" if key == "path" else key): value for key, value in changes.items()}
        configs.append(load_config(asdict(plain), [f"{key}={json.dumps(value)}" for key, value in named.items()]))
    for other in configs[1:]:
        _check_same_images(plain, other)
    paths = [str(one.cache.path) for one in configs]
    if len(set(paths)) < len(paths):
        raise UserError(f"cache.path and cache.also name one store twice: {', '.join(paths)}", "a path for each")
    return configs


def _check_same_images(first: Config, other: Config) -> None:
    facts = [
        {
            **{f"data.{key}": value for key, value in asdict(config.data).items()},
            "data.image_size": resolve_geometry(config).image_size,
            "cache.pixels_from": config.cache.pixels_from,
            "cache.precision": config.cache.precision,
        }
        for config in (first, other)
    ]
    for name, value in facts[0].items():
        if facts[1][name] != value:
            raise UserError(
                f"cache.also: the store {other.cache.path} has {name} {facts[1][name]}, the first has {value}",
                "the same images, crops and precision in all stores of one pass",
                "build it in a run of its own",
            )


class SharedDecode:
    """One decode for several readers, each in its own thread.

    Args:
        decode: (positions, device) -> batches in that order.
        readers: how many there are; each must `leave` when it will ask no more.
    """

    def __init__(self, decode: Decode, readers: int, patience_s: float = PATIENCE_S) -> None:
        self._decode, self._patience_s = decode, patience_s
        self._changed = threading.Condition()
        self._present = set(range(readers))
        self._asked: dict[int, np.ndarray] = {}
        self._rounds: dict[int, _Round] = {}  # which one each reader is to take part in

    def shares(self, source: ImageSource) -> list[ImageSource]:
        """The source as each reader sees it."""
        return [replace(source, decode=partial(self._batches, reader)) for reader in sorted(self._present)]

    def leave(self, reader: int) -> None:
        """This reader will ask for nothing more."""
        with self._changed:
            self._present.discard(reader)
            self._changed.notify_all()

    def _batches(self, reader: int, positions: np.ndarray, device: torch.device) -> Iterator[ImageBatch]:
        if not bool((np.diff(positions) > 0).all()):
            yield from self._decode(positions, device)  # a store that was appended to: in an order of its own
            return
        shared = self._join(reader, positions, device)
        try:
            while (batch := shared.take(reader)) is not None:
                yield batch
        finally:
            shared.drop(reader)

    def _join(self, reader: int, positions: np.ndarray, device: torch.device) -> _Round:
        """Wait for the others, then begin a round over all that they want."""
        deadline = time.monotonic() + self._patience_s
        with self._changed:
            self._asked[reader] = positions
            self._changed.notify_all()
            while reader in self._asked:
                left_s = deadline - time.monotonic()
                if self._present <= set(self._asked) or left_s <= 0:
                    union = np.unique(np.concatenate(list(self._asked.values())))
                    begun = _Round(self._decode(union, device), self._asked)
                    self._rounds |= dict.fromkeys(self._asked, begun)
                    self._asked = {}
                    self._changed.notify_all()
                else:
                    self._changed.wait(left_s)
            return self._rounds[reader]


class _Round:
    """Batches of one decode, handed to all who want a part of them; whoever has none left decodes the next."""

    def __init__(self, batches: Iterator[ImageBatch], wanted: dict[int, np.ndarray]) -> None:
        self._batches, self._wanted = batches, wanted
        self._ready: dict[int, deque[ImageBatch]] = {reader: deque() for reader in wanted}
        self._changed = threading.Condition()
        self._decoding = self._ended = False
        self._failed: BaseException | None = None

    def take(self, reader: int) -> ImageBatch | None:
        """The next batch of this reader; None after the last. Raises what decoding raised, for every reader."""
        while True:
            with self._changed:
                if self._ready[reader]:
                    self._changed.notify_all()
                    return self._ready[reader].popleft()
                if self._failed is not None:
                    raise self._failed
                if self._ended:
                    return None
                others_full = any(len(queue) >= BATCHES_AHEAD for queue in self._ready.values())
                if self._decoding or others_full:
                    self._changed.wait()
                    continue
                self._decoding = True
            self._decode_next()

    def _decode_next(self) -> None:
        batch = None
        try:
            batch = next(self._batches, None)
        except BaseException as error:  # raised again in every reader's thread
            self._failed = error
        with self._changed:
            self._decoding, self._ended = False, batch is None
            if batch is not None:
                for reader, queue in self._ready.items():
                    part = select(batch, self._wanted[reader])
                    if len(part.valid_B):
                        queue.append(part)
            self._changed.notify_all()

    def drop(self, reader: int) -> None:
        """This reader wants no more; the decoder stops when nobody does."""
        with self._changed:
            self._ready.pop(reader, None)
            last = not self._ready
            self._changed.notify_all()
        if last and hasattr(self._batches, "close"):
            self._batches.close()


def select(batch: ImageBatch, wanted: np.ndarray) -> ImageBatch:
    """The images of a batch whose positions are wanted (ascending)."""
    keep_B = torch.from_numpy(np.isin(batch.positions_B.numpy(), wanted))
    if bool(keep_B.all()):
        return batch
    positions_B = batch.positions_B[keep_B]
    kept = set(positions_B.tolist())
    failures = [failure for failure in batch.failures if failure.position in kept]
    return ImageBatch(
        positions_B, batch.images_B3SS[keep_B.to(batch.images_B3SS.device)], batch.valid_B[keep_B], failures
    )
