"""Log lines to Weights & Biases, online or offline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rae_fast.config import Logging
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks


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


def open_sink(settings: Logging, folder: Path, ranks: Ranks, config: Mapping[str, Any]) -> WandbSink | None:
    """The sink that the config asks for, on rank 0.

    Raises:
        UserError: wandb cannot start.
    """
    if settings.wandb == "off" or not ranks.is_main:
        return None
    return WandbSink(settings, folder, config)
