"""Trains a diffusion transformer from a latent store: `train_dit` is what `tools/train_dit.py` calls.

Everything random about a sample (order, view, timestep, noise, label drop) is a function of (seed, epoch, row of the
store), so a run is the same run whatever interrupts it, and on whatever number of ranks it goes on.

Shapes: B samples of a micro-batch, C, H, W of a latent.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.dit.fused import prepare_kernels
from rae_fast.errors import UserError
from rae_fast.latents.loader import BatchStream, LatentBatch, build_loader
from rae_fast.latents.store import LatentStore
from rae_fast.planner.roofline import from_config, training_flops
from rae_fast.rng import Stream
from rae_fast.runtime import DTYPES, Ranks, init_distributed, pick_device
from rae_fast.training.batching import (
    BatchPlan,
    checkpoint_interval,
    count_steps,
    ema_decays,
    plan_batches,
)
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.dit_setup import (
    TrainingData,
    build_model,
    check_pretrained,
    load_pretrained,
    open_training_data,
    out_of_memory,
)
from rae_fast.training.engine import RECORD, Engine
from rae_fast.training.export import export_weights
from rae_fast.training.monitor import Monitor, peak_flops
from rae_fast.training.online_evaluation import OnlineEvaluation
from rae_fast.training.pairs import PairMaker
from rae_fast.training.previews import Previews, decoder_of, has_decoder
from rae_fast.training.run_folder import StopSignals, describe_run, plain, run_folder, share_threads, sole_run
from rae_fast.training.schedule import build_schedule
from rae_fast.training.sinks import open_sink
from rae_fast.training.stall import Heartbeat
from rae_fast.training.trace import StepTrace

if TYPE_CHECKING:
    from rae_fast.xla.spmd import DeviceMesh

# Edges of the timestep bands whose losses are logged apart.
BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
EMA_DISTANCE = "ema_distance_"  # then the decay
BAND_NAMES = tuple(f"loss_t{low:.2f}-{high:.2f}" for low, high in pairwise(BANDS))


def train_dit(config: Config, ranks: Ranks | None = None, *, name: str = "dit") -> dict[str, Any]:
    """Train, or go on training, the config's diffusion transformer; returns when it is done or told to stop.

    Args:
        config: the whole configuration.
        ranks: this process among all.
        name: of the run, where the config gives none.

    Returns:
        step, steps (of the whole run), finished, run_folder.

    Raises:
        UserError: sections that contradict each other, a store or checkpoint that does not fit, too little memory, or
            a loss that stays non-finite.
    """
    ranks = ranks or Ranks()
    mesh = _device_mesh(config)
    device = pick_device(config.runtime.device, ranks.local_rank)
    share_threads(ranks, device)
    folder = run_folder(config, name)
    batches = plan_batches(config.training, ranks)
    data = open_training_data(config, batches, ranks, device)
    if config.stage_2.ckpt is not None and not any((folder / "checkpoints").glob("step-*")):
        check_pretrained(config, data.geometry)
    init_distributed(ranks, device)
    with sole_run(folder, ranks), StopSignals() as signals:
        describe_run(folder, config, ranks, device, data.identity, data=data.facts)
        run = None
        try:
            run = DiTRun(config, data, batches, ranks, device, folder, mesh)
            return run.train(signals)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(config, data.geometry, batches, ranks, device, error) from error
        finally:
            if run is not None:
                run.close()


def _device_mesh(config: Config) -> DeviceMesh | None:
    if not config.runtime.spmd:
        return None
    if config.runtime.device != "xla":
        raise UserError(f"runtime.spmd is true with runtime.device {config.runtime.device}", "runtime.device: xla")
    from rae_fast.xla.spmd import DeviceMesh

    return DeviceMesh()


class DiTRun:
    """One run from its beginning or its newest checkpoint.

    Args:
        config: the whole configuration.
        data: what is trained on.
        batches: batch sizes.
        ranks: this process among all.
        device: where this rank computes.
        folder: the run folder.
        mesh: all XLA devices of this process, where batch and weights are cut over them.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        batches: BatchPlan,
        ranks: Ranks,
        device: torch.device,
        folder: Path,
        mesh: DeviceMesh | None = None,
    ) -> None:
        training, geometry = config.training, data.geometry
        self.config, self.geometry, self.batches, self.ranks, self.device = config, geometry, batches, ranks, device
        self.folder, self.seed, self.facts = folder, training.global_seed, plain(data.facts)
        self.stream = self._open_stream(data)
        self.steps_per_epoch = self.stream.epoch_images // batches.global_batch
        self.total_steps = count_steps(training, self.steps_per_epoch)
        self.pairs = PairMaker(config, geometry.latent_shape)
        self.checkpoints = Checkpointer(
            folder / "checkpoints", ranks, keep=training.keep_checkpoints, keep_every=training.keep_every
        )
        self.checkpoint_every = checkpoint_interval(training, self.steps_per_epoch)
        self.model = build_model(config, geometry)
        self.checkpoints.check_model("model", self.model)
        if config.stage_2.ckpt is not None and not self.checkpoints.steps():
            load_pretrained(self.model, config.stage_2.ckpt, say=ranks.is_main)
        self.engine = self._build_engine(mesh)
        state = self.checkpoints.restore({"model": self.engine})
        if state is not None:
            self.stream.seek(state["epoch"], state["position"])
        self.monitor = self._build_monitor()
        if state is not None:
            self.monitor.load_state(state["monitor"])
        self.saved_step = self.engine.steps if state is not None else -1
        rae = self._build_decoder(data.store)
        self.previews = self._build_previews(rae)
        self.evaluation = self._build_evaluation(data.store, rae)
        self._bands = torch.tensor(BANDS[1:-1], device=device)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _open_stream(self, data: TrainingData) -> BatchStream:
        if data.online is not None:
            return data.online
        assert data.store is not None
        return build_loader(
            self.config.loader,
            data.store,
            batch_size=self.batches.micro_batch,
            images_per_step=self.batches.global_batch,
            seed=self.seed,
            ranks=self.ranks,
            device=self.device,
        )

    def _build_engine(self, mesh: DeviceMesh | None) -> Engine:
        training = self.config.training
        schedule = build_schedule(
            training.scheduler,
            lr=training.optimizer.lr,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        if self.device.type == "xla":
            return self._build_xla_engine(schedule, mesh)
        dtype = DTYPES[self.config.runtime.precision]
        prepare_kernels(self.model, self.batches.micro_batch, dtype, self.device)
        return Engine(
            self.model,
            optimizer=training.optimizer,
            lr=schedule,
            ranks=self.ranks,
            device=self.device,
            runtime=self.config.runtime,
            deepspeed=self.config.deepspeed,
            accumulation=self.batches.accumulation,
            micro_batch=self.batches.micro_batch,
            clip_grad=training.clip_grad,
            ema_decays=ema_decays(training),
        )

    def _build_xla_engine(self, schedule: Callable[[int], float], mesh: DeviceMesh | None) -> Engine:
        from rae_fast.xla.engine import XlaEngine, announce

        training = self.config.training
        announce(self.config.runtime, self.config.deepspeed, self.ranks)
        return XlaEngine(
            self.model,
            optimizer=training.optimizer,
            lr=schedule,
            ranks=self.ranks,
            device=self.device,
            runtime=self.config.runtime,
            accumulation=self.batches.accumulation,
            clip_grad=training.clip_grad,
            ema_decays=ema_decays(training),
            mesh=mesh,
        )

    def _build_monitor(self) -> Monitor:
        averages = [f"{EMA_DISTANCE}{label}" for label in self.engine.ema.labels]
        names = [*RECORD, *(part for name in (*BAND_NAMES, *averages) for part in (name, f"{name}/count"))]
        return Monitor(
            self.folder,
            self.ranks,
            names,
            images_per_step=self.batches.global_batch,
            total_steps=self.total_steps,
            log_interval=self.config.training.log_interval,
            start_step=self.engine.steps,
            max_nonfinite=self.config.training.max_nonfinite,
            flops_per_image=self._flops_per_image(),
            device=self.device,
            label="DiT",
            sink=open_sink(
                self.config.logging,
                self.folder,
                self.ranks,
                {**plain(asdict(self.config)), "made_from": self.facts},
                self.engine.steps * self.batches.global_batch,
            ),
        )

    def _flops_per_image(self) -> float | None:
        """For MFU, where rank 0 has a device whose peak throughput is known."""
        known = self.ranks.is_main and peak_flops(self.device) is not None
        return training_flops(from_config(self.config, self.geometry)) if known else None

    def _build_decoder(self, store: LatentStore | None) -> RAE | None:
        """For sample grids and features of pixels, where the config asks for them and names a decoder."""
        wanted = self.config.training.sample_every or (
            self.config.eval.eval_interval and self.config.eval.reference_npz_path
        )
        if not wanted:
            return None
        if not has_decoder(self.config):
            if self.ranks.is_main:
                print("no stage_1.params.pretrained_decoder_path: training without sample grids and FID", flush=True)
            return None
        return decoder_of(self.config, store, self.device)

    def _build_previews(self, rae: RAE | None) -> Previews | None:
        if not self.config.training.sample_every or rae is None:
            return None
        return Previews(self.config, self.geometry, rae, self.folder)

    def _build_evaluation(self, store: LatentStore | None, rae: RAE | None) -> OnlineEvaluation | None:
        if not self.config.eval.eval_interval:
            return None
        start = self.engine.steps
        evaluation = OnlineEvaluation(
            self.config, self.geometry, store, self.folder, self.ranks, self.device, start, rae=rae
        )
        if evaluation.measures:
            return evaluation
        if self.ranks.is_main:
            print("neither a store nor eval.reference_npz_path and a decoder: training without evaluation", flush=True)
        return None

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self, signals: StopSignals) -> dict[str, Any]:
        """Steps until the end, a signal, or an error."""
        trace = StepTrace(self.config.runtime.profile, self.folder, self.ranks)
        self.settle()
        with Heartbeat(self.folder, self.ranks, self.config.runtime.stall_s) as heartbeat:
            while self.engine.steps < self.total_steps and not self.monitor.stop:
                step = self.engine.steps + 1
                self.engine.stop_requested = signals.requested
                trace.before(step)
                self.one_step(heartbeat)
                trace.after(step)
                heartbeat.stepped(step)
                self.at_intervals(step, heartbeat)
            return self.finish(heartbeat)

    def settle(self) -> None:
        """Training mode; and what is alive now lives to the end, so collections in the loop need not look at it."""
        self.model.train()
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Stop the loader's thread and give the engine's memory back."""
        self.stream.close()
        self.engine.close()
        gc.unfreeze()

    def one_step(self, heartbeat: Heartbeat) -> None:
        """One optimizer step: all its micro-batches, then the update."""
        wait_s, samples = 0.0, []
        for _ in range(self.batches.accumulation):
            heartbeat.enter("waiting for data")
            asked_s = time.monotonic()
            batch = next(self.stream)
            wait_s += time.monotonic() - asked_s
            heartbeat.enter("forward and backward")
            self.engine.backward(self.loss(batch))
            samples.append(batch.index_B)
            heartbeat.enter("optimizer step and gradient reduction")
            self.engine.step()
        self.monitor.record(
            self.engine.steps,
            torch.cat([self.engine.record, self.ema_distances()]),
            epoch=self.engine.steps / self.steps_per_epoch,
            lr=self.engine.lr,
            wait_s=wait_s,
            samples=torch.cat(samples) if len(samples) > 1 else samples[0],
        )

    def ema_distances(self) -> Tensor:
        """(relative distance of the weights, 1) for each EMA, flat, before a log line; else zeros, not measured."""
        if self.engine.steps % self.config.training.log_interval:
            return torch.zeros(2 * len(self.engine.ema.labels), dtype=torch.float64, device=self.device)
        distances = self.engine.ema_distances()
        return torch.stack([distances, torch.ones_like(distances)], dim=1).flatten()

    def loss(self, batch: LatentBatch) -> Tensor:
        """Mean flow-matching loss of a micro-batch; its sums by timestep band go to the engine's record."""
        drop_B = rng.uniform(self.seed, batch.epoch, batch.index_B, Stream.LABEL_DROP)
        model = partial(self._predict, batch.labels_B, drop_B)
        loss_B, t_B = self.pairs.loss(model, batch, self.seed)
        self.engine.observe(self.by_band(loss_B.detach(), t_B))
        return loss_B.mean()

    def _predict(self, labels_B: Tensor, drop_B: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return self.engine(x_BCHW, t_B, labels_B, labeldrop_u=drop_B)

    def by_band(self, loss_B: Tensor, t_B: Tensor) -> Tensor:
        """(sum of losses, count) for each timestep band, flat, float64."""
        band_B = (t_B[:, None] >= self._bands).sum(dim=1)
        sums = torch.zeros(len(BAND_NAMES), 2, dtype=torch.float64, device=loss_B.device)
        # A matrix product instead of a scatter: the order of its sum is fixed, also on a GPU.
        member = torch.nn.functional.one_hot(band_B, len(BAND_NAMES)).to(torch.float64)
        values = torch.stack([loss_B.to(torch.float64), torch.ones_like(loss_B, dtype=torch.float64)], dim=1)
        sums += member.T @ torch.nan_to_num(values)
        return sums.flatten()

    def at_intervals(self, step: int, heartbeat: Heartbeat) -> None:
        """What is due after a step."""
        training = self.config.training
        if self.previews is not None and step % training.sample_every == 0:
            heartbeat.enter("drawing samples")
            path = self.previews.draw(self.engine, step)
            if path is not None and self.monitor.sink is not None:
                self.monitor.sink.image("samples", path, step * self.batches.global_batch)
        if self.evaluation is not None and step % self.config.eval.eval_interval == 0:
            heartbeat.enter("evaluation")
            for line in self.evaluation.evaluate(self.engine, step, step * self.batches.global_batch):
                if self.monitor.sink is not None:
                    names = [measure.name for measure in self.evaluation.measures]
                    distances = {f"eval/{line['weights']}/{name}": line[name] for name in names}
                    self.monitor.sink.log({**distances, "images": line["images"]})
        if self.checkpoint_every and step % self.checkpoint_every == 0:
            heartbeat.enter("checkpoint")
            self.save()

    def save(self) -> None:
        """Checkpoint of this moment, written while training goes on."""
        self.monitor.flush()
        epoch, position = self.stream.state()
        state = {"epoch": epoch, "position": position, "monitor": self.monitor.state()}
        self.checkpoints.save(self.engine.steps, {"model": self.engine}, state)
        self.saved_step = self.engine.steps

    def finish(self, heartbeat: Heartbeat) -> dict[str, Any]:
        """Checkpoint, and after the last step also the export."""
        finished = self.engine.steps >= self.total_steps
        heartbeat.enter("last checkpoint")
        if self.saved_step != self.engine.steps:
            self.save()
        self.checkpoints.wait()
        self.monitor.close()
        if finished:
            heartbeat.enter("export")
            epoch = self.engine.steps // self.steps_per_epoch
            export_weights(self.folder / "export", self.engine, step=self.engine.steps, epoch=epoch)
        elif self.ranks.is_main:
            print(
                f"stopped at step {self.engine.steps} of {self.total_steps} with a checkpoint; "
                "the same command goes on from here",
                flush=True,
            )
        facts = {"step": self.engine.steps, "steps": self.total_steps, "finished": finished}
        return {**facts, "run_folder": str(self.folder)}
