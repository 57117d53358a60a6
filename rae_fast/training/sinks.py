"""Log lines to others: Weights & Biases, online or offline, and TensorBoard's event files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rae_fast.config import Logging
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks


class Sink(Protocol):
    """Whatever takes log lines."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One log line; `images` says how far the run was."""

    def image(self, name: str, path: Path, images: int) -> None:
        """A picture at a count of images seen."""

    def close(self) -> None:
        """Nothing comes after this."""


class WandbSink:
    """One wandb run per run folder; started again, the same run goes on."""

    def __init__(self, settings: Logging, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        name = settings.name or folder.name
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                mode=settings.wandb,
                dir=str(folder),
                config=dict(config),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(
                f"logging.wandb is {settings.wandb}, but wandb does not start: {error}",
                "a key (wandb login) and a connection",
                "set logging.wandb=offline or off",
            ) from error
        self._run.define_metric("*", step_metric="images")

    def log(self, line: Mapping[str, Any]) -> None:
        """One log line."""
        self._run.log({key: value for key, value in line.items() if value is not None and key != "time"})

    def image(self, name: str, path: Path, images: int) -> None:
        """A picture at a count of images seen."""
        self._run.log({name: self._wandb.Image(str(path)), "images": images})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class TensorBoardSink:
    """Event files in `tensorboard/`; what an interrupted run logged beyond its checkpoint is purged by the next one."""

    def __init__(self, folder: Path, start_images: int) -> None:
        from tensorboardX import SummaryWriter

        suffix = f".{start_images}"
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_images or None, filename_suffix=suffix
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """One log line."""
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("images", "time"):
                self._writer.add_scalar(key, value, line["images"])

    def image(self, name: str, path: Path, images: int) -> None:
        """A picture at a count of images seen."""
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log(self, line: Mapping[str, Any]) -> None:
        """One log line."""
        for sink in self._sinks:
            sink.log(line)

    def image(self, name: str, path: Path, images: int) -> None:
        """A picture at a count of images seen."""
        for sink in self._sinks:
            sink.image(name, path, images)

    def close(self) -> None:
        """End all."""
        for sink in self._sinks:
            sink.close()


def open_sink(
    settings: Logging, folder: Path, ranks: Ranks, config: Mapping[str, Any], start_images: int = 0
) -> Sink | None:
    """The sinks that the config asks for, on rank 0.

    Args:
        settings: section `logging`.
        folder: the run folder.
        ranks: this process among all.
        config: the whole configuration, plain.
        start_images: images seen by earlier runs of this folder.

    Raises:
        UserError: wandb cannot start.
    """
    found: list[Sink] = []
    if ranks.is_main and settings.wandb != "off":
        found.append(WandbSink(settings, folder, config))
    if ranks.is_main and settings.tensorboard:
        found.append(TensorBoardSink(folder, start_images))
    return Sinks(found) if found else None
