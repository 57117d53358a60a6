"""Decoder training: pixels from latents by L1, perceptual and adversarial losses, on cached latents or online.

    runs/<name>/config.yaml, manifest.json       what was asked for, and what it was made from
    runs/<name>/log.jsonl, speed.jsonl           losses and speed, see `training.monitor`
    runs/<name>/eval.jsonl                       held-out PSNR, SSIM (LPIPS, rFID) of EMA and online weights
    runs/<name>/samples/step-0000500.png         held-out originals, reconstructions, differences
    runs/<name>/checkpoints/                     exact state of both players
    runs/<name>/export/                          EMA weights as model.pt (released layout) and safetensors; stage_1.yaml

The same command resumes. At equal global batch any number of ranks sees the same samples, crops and noise.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rae_fast.autoencoder.assembly import RunPlan, build_encoder_if_needed, build_perceptual, build_players
from rae_fast.autoencoder.feed import build_feed
from rae_fast.autoencoder.step import FIGURES
from rae_fast.autoencoder.validation import prepare_held_out
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.interop.official import save_weights
from rae_fast.provenance import write_json
from rae_fast.runtime import Ranks, init_distributed, pick_device
from rae_fast.training.batching import checkpoint_interval, count_steps, plan_batches
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.monitor import Monitor, append_line, truncate_log
from rae_fast.training.run_folder import StopSignals, describe_run, plain, run_folder, share_threads, sole_run
from rae_fast.training.sinks import open_sink
from rae_fast.training.stall import Heartbeat
from rae_fast.training.trace import StepTrace

EVALUATIONS = "eval.jsonl"


def train_decoder(config: Config, ranks: Ranks | None = None, *, name: str = "decoder") -> dict[str, Any]:
    """Train, or go on training, the config's decoder; returns when it is done or told to stop.

    Args:
        config: the whole configuration.
        ranks: this process among all.
        name: of the run, where the config gives none.

    Returns:
        step, steps (of the whole run), finished, run_folder, export (path of model.pt, None before the end), and the
        last evaluation's psnr_db, ssim (lpips, rfid).

    Raises:
        UserError: the config contradicts itself or the store, something it names is missing or unusable, or the loss
            stays non-finite.
    """
    ranks = ranks or Ranks()
    device = pick_device(config.runtime.device, ranks.local_rank)
    if device.type == "xla":
        raise UserError(
            "runtime.device is xla in decoder training", "auto, cpu or cuda", "on XLA devices train the DiT, and sample"
        )
    share_threads(ranks, device)
    init_distributed(ranks, device)
    folder = run_folder(config, name)
    with sole_run(folder, ranks), StopSignals() as signals:
        run = DecoderRun(config, ranks, device, folder)
        try:
            return run.train(signals)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory with training.batch_size={run.batches.micro_batch}: {str(error).split('. ')[0]}",
                "",
                "lower training.batch_size (accumulation makes up for it) or set runtime.activation_checkpointing=true",
            ) from error
        finally:
            run.close()


class DecoderRun:
    """One run from its beginning or its newest checkpoint.

    Args:
        config: the whole configuration.
        ranks: this process among all.
        device: where this rank computes.
        folder: the run folder, held by this run.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, folder: Path) -> None:
        self.config, self.ranks, self.device, self.folder = config, ranks, device, folder
        training = config.training
        self.batches = plan_batches(training, ranks)
        geometry = resolve_geometry(config)
        encoder = build_encoder_if_needed(config, device)
        self.feed = build_feed(config, self.batches, ranks, device, encoder)
        self.steps_per_epoch = self.feed.epoch_images // self.batches.global_batch
        self.total_steps = count_steps(training, self.steps_per_epoch)
        perceptual = build_perceptual(config.gan.loss, encoder, device)
        plan = RunPlan(self.batches, ranks, device, self.steps_per_epoch, self.total_steps)
        self.players = build_players(config, plan, perceptual)
        self.generator = self.players.generator
        self.held_out = prepare_held_out(config, encoder, geometry.image_size, ranks, perceptual)
        # Only now: what could not begin leaves no description of itself.
        describe_run(folder, config, ranks, device, self._identity())
        self.checkpoints = Checkpointer(
            folder / "checkpoints", ranks, keep=training.keep_checkpoints, keep_every=training.keep_every
        )
        self.checkpoint_every = checkpoint_interval(training, self.steps_per_epoch)
        self.last_evaluation: dict[str, float] = {}
        state = self.checkpoints.restore(self.players.engines)
        self.step = 0 if state is None else int(state["step"])
        self.saved_step = self.step if state is not None else -1
        self.monitor = self._build_monitor()
        if ranks.is_main:
            truncate_log(folder / EVALUATIONS, self.step)
        if state is not None:
            self.monitor.load_state(state["monitor"])
            self.feed.seek(state["epoch"], state["position"])
            self.last_evaluation = state["evaluation"]

    def _identity(self) -> dict[str, Any]:
        """What must not change between the calls that make one run."""
        return {
            **self.feed.identity(),
            "global_batch": self.batches.global_batch,
            "seed": self.config.training.global_seed,
        }

    def _build_monitor(self) -> Monitor:
        return Monitor(
            self.folder,
            self.ranks,
            FIGURES,
            images_per_step=self.batches.global_batch,
            total_steps=self.total_steps,
            log_interval=self.config.training.log_interval,
            start_step=self.step,
            max_nonfinite=self.config.training.max_nonfinite,
            device=self.device,
            label="decoder",
            sink=open_sink(
                self.config.logging,
                self.folder,
                self.ranks,
                plain(asdict(self.config)),
                self.step * self.batches.global_batch,
            ),
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self, signals: StopSignals) -> dict[str, Any]:
        """Steps until the end, a signal, or an error."""
        trace = StepTrace(self.config.runtime.profile, self.folder, self.ranks)
        with Heartbeat(self.folder, self.ranks, self.config.runtime.stall_s) as heartbeat:
            while self.step < self.total_steps and not self.monitor.stop:
                self.generator.stop_requested = signals.requested
                trace.before(self.step + 1)
                self.one_step(heartbeat)
                trace.after(self.step)
                heartbeat.stepped(self.step)
                self.at_intervals(heartbeat)
            return self.finish(heartbeat)

    def one_step(self, heartbeat: Heartbeat) -> None:
        """One optimizer step of the decoder, and of the discriminator where it is on."""
        heartbeat.enter("waiting for data")
        waited_s = self.feed.wait_s
        group = [next(self.feed) for _ in range(self.batches.accumulation)]
        waited_s = self.feed.wait_s - waited_s
        heartbeat.enter("training step")
        figures = self.players.update(group, self.step, self.players.starts.phase(self.step))
        self.step += 1
        self.monitor.record(
            self.step,
            figures,
            epoch=self.step / self.steps_per_epoch,
            lr=self.generator.lr,
            wait_s=waited_s,
            samples=torch.cat([batch.index_B for batch in group]),
        )

    def at_intervals(self, heartbeat: Heartbeat) -> None:
        """What is due after a step; evaluation and grid also after the last one."""
        last = self.step == self.total_steps
        if last or self._due(self.config.eval.eval_interval):
            heartbeat.enter("evaluation")
            self.evaluate()
        if last or self._due(self.config.training.sample_every):
            heartbeat.enter("drawing samples")
            self.draw_grid()
        if self._due(self.checkpoint_every):
            heartbeat.enter("checkpoint")
            self.save()

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.step % interval == 0

    def evaluate(self) -> None:
        """Measure EMA weights, and online weights if wanted, on the held-out images; one line each in eval.jsonl."""
        if self.held_out is None:
            return
        chosen = [("ema", self.generator.ema_applied)] if self.generator.ema.labels else []
        if self.config.eval.eval_model or not chosen:
            chosen.append(("online", self.generator.online_applied))
        for name, applied in reversed(chosen):
            start_s = time.monotonic()
            with applied() as decoder:
                found = self.held_out.measure(
                    decoder, self.players.to_pixels, self.ranks, self.device, self.generator.autocast
                )
            self.last_evaluation = found
            if self.ranks.is_main:
                images = self.step * self.batches.global_batch
                line = {"step": self.step, "images": images, "weights": name, **found}
                append_line(self.folder / EVALUATIONS, line)
                facts = "  ".join(f"{key}={value:.4g}" for key, value in found.items())
                print(f"step {self.step}, {name} weights: {facts}  ({time.monotonic() - start_s:.1f} s)", flush=True)
                if self.monitor.sink is not None:
                    self.monitor.sink.log({"images": images, **{f"eval/{name}/{k}": v for k, v in found.items()}})

    def draw_grid(self) -> None:
        """Held-out originals, reconstructions by EMA weights, and differences, as a PNG of rank 0."""
        if self.held_out is None:
            return
        applied = self.generator.ema_applied if self.generator.ema.labels else self.generator.online_applied
        with applied() as decoder:
            if self.ranks.is_main:
                path = self.folder / "samples" / f"step-{self.step:07d}.png"
                self.held_out.save_grid(path, decoder, self.players.to_pixels, self.device)
                if self.monitor.sink is not None:
                    self.monitor.sink.image("samples", path, self.step * self.batches.global_batch)

    def save(self) -> None:
        """Checkpoint of this moment, written while training goes on."""
        self.monitor.flush()
        epoch, position = self.feed.state()
        state = {"epoch": epoch, "position": position, "monitor": self.monitor.state()}
        self.checkpoints.save(self.step, self.players.engines, {**state, "evaluation": self.last_evaluation})
        self.saved_step = self.step

    def finish(self, heartbeat: Heartbeat) -> dict[str, Any]:
        """Checkpoint, and after the last step also the export."""
        finished = self.step >= self.total_steps
        heartbeat.enter("last checkpoint")
        if self.saved_step != self.step:
            self.save()
        self.checkpoints.wait()
        self.monitor.close()
        export = self.folder / "export" / "model.pt"
        if finished:
            heartbeat.enter("export")
            self.export(export)
        elif self.ranks.is_main:
            print(
                f"stopped at step {self.step} of {self.total_steps} with a checkpoint; "
                "the same command goes on from here",
                flush=True,
            )
        facts = {"step": self.step, "steps": self.total_steps, "finished": finished, "run_folder": str(self.folder)}
        return {**facts, "export": str(export) if finished else None, **self.last_evaluation}

    def export(self, path: Path) -> None:
        """The EMA weights (online ones without an EMA) as a bare state dict and as safetensors, with a config of the
        autoencoder that they complete; collective.
        """
        keep = self.ranks.is_main
        generator = self.generator
        weights = generator.ema_weights(keep=keep) if generator.ema.labels else generator.weights(keep=keep)
        if keep:
            save_weights(path, weights)
            save_weights(path.with_suffix(".safetensors"), weights)
            params = replace(self.config.stage_1.params, pretrained_decoder_path=str(path))
            # JSON is YAML.
            write_json(path.with_name("stage_1.yaml"), {"stage_1": {"params": asdict(params)}})

    def close(self) -> None:
        """Stop the data's threads and give the engines' memory back."""
        self.feed.close()
        for engine in self.players.engines.values():
            engine.close()
