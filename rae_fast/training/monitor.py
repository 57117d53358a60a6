"""What a run tells about itself: JSONL files, a progress line, wandb, and the guard against non-finite steps.

    log.jsonl      step, epoch, images, losses, gradient norm, learning rate: the same bytes whether a run was
                   interrupted or not
    speed.jsonl    step, images/s, MFU, share of time spent waiting for data, memory, time of day
    events.jsonl   skipped steps and loss spikes, with the samples that were in them (one file a rank)

Figures come as device tensors that are the same on all ranks. They are read `LAG` steps later, when the device has
long produced them, so that a step never waits; and at the same step on all ranks, so that all decide alike.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.progress import Progress
from rae_fast.provenance import atomic_write
from rae_fast.runtime import Ranks, peak_memory_bytes

LAG = 2
# A loss this many standard deviations above its running mean is a spike; the mean needs so many steps first.
SPIKE_SIGMAS = 6.0
SPIKE_WARMUP = 50
SPIKE_DECAY = 0.98
# Dense bfloat16 matrix throughput by the device's name, FLOP/s (vendors' data sheets).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass
class Tally:
    """Sums since the last log line; part of a checkpoint."""

    steps: int = 0
    skipped: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Health:
    """What decides whether to go on; part of a checkpoint."""

    nonfinite_in_a_row: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    seen: int = 0


@dataclass(frozen=True)
class Pending:
    """A step whose figures are on their way to the host."""

    step: int
    epoch: float
    lr: float
    values: Tensor
    ready: Any  # torch.cuda.Event, or None where there is nothing to wait for
    samples: Tensor | None


class Monitor:
    """Follows one run.

    Args:
        folder: the run folder.
        ranks: who takes part; rank 0 writes the logs.
        names: what the figures of `record` are, in order; `loss`, `grad_norm`, `skipped` and `stop` among them. A
            name `x/count` makes `x` a sum to be divided by it (loss by timestep band).
        images_per_step: over all ranks.
        total_steps: length of the run.
        log_interval: steps between log lines.
        start_step: steps done by earlier runs of this folder; log lines beyond it are cut off.
        max_nonfinite: stop after so many skipped steps in a row.
        flops_per_image: model FLOPs of a training step, for MFU.
        device: whose memory and peak throughput.
        sink: receives each log line as a mapping (wandb).
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        names: Sequence[str],
        *,
        images_per_step: int,
        total_steps: int,
        log_interval: int,
        start_step: int = 0,
        max_nonfinite: int = 10,
        flops_per_image: float | None = None,
        device: torch.device | None = None,
        label: str = "training",
        sink: Any = None,
    ) -> None:
        self.folder, self.ranks, self.names = Path(folder), ranks, tuple(names)
        self.images_per_step, self.log_interval, self.max_nonfinite = images_per_step, log_interval, max_nonfinite
        self.device = device or torch.device("cpu")
        self.peak_flops = peak_flops(self.device)
        self.flops_per_image, self.sink = flops_per_image, sink
        self.tally, self.health = Tally(), Health()
        self.stop = False
        self.last: dict[str, float] = {}
        self._pending: deque[Pending] = deque()
        self._host: list[Tensor] = []
        self._shown: dict[str, str] = {}  # of the last interval, for the progress line
        self._wait_s, self._since_s, self._since_step = 0.0, time.monotonic(), start_step
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "speed.jsonl", self.events_name):
            if ranks.is_main or name == self.events_name:
                truncate_log(self.folder / name, start_step)
        self.progress = Progress(
            total_steps * images_per_step,
            "images",
            label,
            done=start_step * images_per_step,
            enabled=ranks.is_main,
        )

    @property
    def events_name(self) -> str:
        """This rank's file of events."""
        return "events.jsonl" if self.ranks.is_main else f"events-rank{self.ranks.rank:05d}.jsonl"

    # --- called by the training loop --------------------------------------------------------------------------------

    def record(
        self,
        step: int,
        values: Tensor,
        *,
        epoch: float,
        lr: float,
        wait_s: float = 0.0,
        samples: Tensor | None = None,
    ) -> None:
        """Take one optimizer step's figures; those of `LAG` steps ago are read now.

        Args:
            step: optimizer steps done, this one included.
            values: device tensor in the order of `names`, equal on all ranks.
            epoch: epochs done.
            lr: learning rate of the step.
            wait_s: how long the loop waited for data.
            samples: indices of this rank's samples, to be written down if something is wrong with the step.

        Raises:
            UserError: too many skipped steps in a row.
        """
        self._wait_s += wait_s
        ready = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        else:
            host = values.detach().clone()
        self._pending.append(Pending(step, epoch, lr, host, ready, samples))
        while len(self._pending) > LAG:
            self._read(self._pending.popleft())

    def flush(self) -> None:
        """Read everything that is on its way, and have the log on disk; before a checkpoint and at the end."""
        while self._pending:
            self._read(self._pending.popleft())
        for name in ("log.jsonl", self.events_name):
            path = self.folder / name
            if path.exists() and (self.ranks.is_main or name != "log.jsonl"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the log to go on as if nothing had happened; call `flush` before."""
        return {"tally": vars(self.tally).copy(), "health": vars(self.health).copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.tally, self.health = Tally(**state["tally"]), Health(**state["health"])

    def close(self) -> None:
        """Read the rest, print the last progress line, end the sink."""
        self.flush()
        self.progress.close()
        if self.sink is not None:
            self.sink.close()

    # --- reading figures --------------------------------------------------------------------------------------------

    def _read(self, pending: Pending) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        figures = dict(zip(self.names, pending.values.tolist(), strict=True))
        self.last = figures
        self.stop = self.stop or figures["stop"] > 0
        if figures["skipped"]:
            self._count_skipped(pending, figures)
        else:
            self.health.nonfinite_in_a_row = 0
            self._watch_for_spike(pending, figures["loss"])
            self.tally.steps += 1
            for name, value in figures.items():
                self.tally.sums[name] = self.tally.sums.get(name, 0.0) + value
        self.progress.advance(self.images_per_step, loss=figures["loss"], lr=pending.lr, **self._shown)
        if pending.step % self.log_interval == 0:
            self._log(pending)

    def _count_skipped(self, pending: Pending, figures: Mapping[str, float]) -> None:
        self.tally.skipped += 1
        self.health.nonfinite_in_a_row += 1
        self._event(pending, "skipped", figures)
        if self.health.nonfinite_in_a_row >= self.max_nonfinite:
            raise UserError(
                f"step {pending.step}: loss or gradient not finite for {self.max_nonfinite} steps in a row "
                f"(samples: {self.folder / self.events_name})",
                "finite ones",
                "the weights are those before the first of them; lower training.optimizer.lr, set "
                "runtime.precision=fp32 or stage_2.params.use_qknorm=true, and start again from the last checkpoint",
            )

    def _watch_for_spike(self, pending: Pending, loss: float) -> None:
        health = self.health
        excess = loss - health.loss_mean
        spread = sqrt(health.loss_variance)
        if health.seen >= SPIKE_WARMUP and excess > SPIKE_SIGMAS * max(spread, 1e-12):
            self._event(pending, "loss_spike", {"loss": loss, "mean": health.loss_mean, "spread": spread})
        weight = max(1 - SPIKE_DECAY, 1 / (health.seen + 1))
        health.loss_mean += weight * excess
        health.loss_variance = (1 - weight) * (health.loss_variance + weight * excess * excess)
        health.seen += 1

    def _event(self, pending: Pending, kind: str, figures: Mapping[str, float]) -> None:
        samples = pending.samples.tolist() if pending.samples is not None else []
        facts = {k: v if isfinite(v) else str(v) for k, v in figures.items() if k in ("loss", "grad_norm", "mean")}
        line = {"step": pending.step, "event": kind, "epoch": pending.epoch, **facts, "samples": samples}
        append_line(self.folder / self.events_name, line)

    def _log(self, pending: Pending) -> None:
        now_s = time.monotonic()
        elapsed_s, steps = max(now_s - self._since_s, 1e-9), pending.step - self._since_step
        line = {
            "step": pending.step,
            "epoch": pending.epoch,
            "images": pending.step * self.images_per_step,
            **means(self.tally),
            "lr": pending.lr,
            "skipped": self.tally.skipped,
        }
        rate = steps * self.images_per_step / elapsed_s
        speed = {
            "step": pending.step,
            "images_per_s": rate,
            "step_s": elapsed_s / max(steps, 1),
            "data_wait": self._wait_s / elapsed_s,
            "memory_bytes": memory_bytes(self.device),
            "time": time.time(),
        }
        if self.flops_per_image and self.peak_flops:
            speed["mfu"] = rate * self.flops_per_image / (self.peak_flops * self.ranks.world)
        self._shown = {"wait": f"{speed['data_wait']:.1%}"}
        if "mfu" in speed:
            self._shown["mfu"] = f"{speed['mfu']:.1%}"
        if self.ranks.is_main:
            append_line(self.folder / "log.jsonl", line)
            append_line(self.folder / "speed.jsonl", speed)
            if self.sink is not None:
                self.sink.log({**line, **speed})
        self.tally = Tally()
        self._wait_s, self._since_s, self._since_step = 0.0, now_s, pending.step


def means(tally: Tally) -> dict[str, float | None]:
    """Means over the tally's steps; where a name has a count of its own, over that."""
    found: dict[str, float | None] = {}
    for name, total in tally.sums.items():
        if name in ("skipped", "stop") or name.endswith("/count"):
            continue
        count = tally.sums.get(f"{name}/count", tally.steps)
        found[name] = total / count if count else None
    return found


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bfloat16 throughput of a device in FLOP/s, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the device's, or this process's on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, in a single write."""
    with path.open("a") as file:
        file.write(json.dumps(content) + "\n")


def truncate_log(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept, changed = [], False
    for line in path.read_text().splitlines(keepends=True):
        try:
            good = line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            kept.append(line)
        changed = changed or not good
    if changed:
        with atomic_write(path, "w") as file:
            file.writelines(kept)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
