"""Decoder training: pixels from latents by L1, perceptual and adversarial losses, on cached latents or online.

    runs/<name>/config.yaml, manifest.json       what was asked for, and what it was made from
    runs/<name>/log.jsonl, speed.jsonl           losses and speed, see `training.monitor`
    runs/<name>/eval.jsonl                       held-out PSNR, SSIM (LPIPS) of EMA and online weights
    runs/<name>/samples/step-0000500.png         held-out originals, reconstructions, differences
    runs/<name>/checkpoints/                     exact state of both players
    runs/<name>/export/                          decoder with EMA weights: model.pt (released layout), safetensors

The same command resumes. At equal global batch any number of ranks sees the same samples, crops and noise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_fast.autoencoder.assembly import Players, build_encoder_if_needed, build_feed, build_players
from rae_fast.autoencoder.objective import phase_at
from rae_fast.autoencoder.step import FIGURES
from rae_fast.config import Config
from rae_fast.geometry import resolve_geometry
from rae_fast.provenance import atomic_write
from rae_fast.runtime import Ranks, init_distributed, pick_device, ranks_from_environment
from rae_fast.training.batching import BatchPlan, checkpoint_interval, count_steps, plan_batches
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.monitor import Monitor, append_line, truncate_log
from rae_fast.training.run_folder import StopSignals, describe_run, run_folder, share_threads, sole_run

DEFAULT_NAME = "decoder"


def train_decoder(config: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train the decoder of a config to its end, or to SIGTERM; started again, go on from the newest checkpoint.

    Returns:
        steps, images, finished, run_folder, export (path of model.pt, if finished), and the last evaluation.

    Raises:
        UserError: the config contradicts itself or the store, or something it names is missing or unusable.
    """
    ranks = ranks or ranks_from_environment()
    device = pick_device(config.runtime.device, ranks.local_rank)
    resolve_geometry(config)
    init_distributed(ranks, device)
    share_threads(ranks, device)
    folder = run_folder(config, DEFAULT_NAME)
    with sole_run(folder, ranks), StopSignals() as signals:
        training = DecoderTraining(config, ranks, device, folder)
        try:
            return training.run(signals)
        finally:
            training.close()


class DecoderTraining:
    """One run: models, data, and where it stands.

    Args:
        config: the whole configuration.
        ranks: who takes part.
        device: where this rank computes.
        folder: the run folder, held by this run.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, folder: Path) -> None:
        self.config, self.ranks, self.device, self.folder = config, ranks, device, folder
        self.plan: BatchPlan = plan_batches(config.training, ranks)
        encoder = build_encoder_if_needed(config, device)
        self.feed = build_feed(config, self.plan, ranks, device, encoder)
        self.steps_per_epoch = self.feed.epoch_images // self.plan.global_batch
        self.total_steps = count_steps(config.training, self.steps_per_epoch)
        identity = {"data": self.feed.identity(), "global_batch": self.plan.global_batch}
        identity["seed"] = config.training.global_seed
        describe_run(folder, config, ranks, device, identity, task="decoder")
        self.players: Players = build_players(
            config,
            self.plan,
            ranks,
            device,
            encoder,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        training = config.training
        self.checkpoints = Checkpointer(
            folder / "checkpoints", ranks, keep=training.keep_checkpoints, keep_every=training.keep_every
        )
        self.checkpoint_every = checkpoint_interval(training, self.steps_per_epoch)
        self.last_evaluation: dict[str, float] = {}
        self.step = self._resume()

    def _resume(self) -> int:
        state = self.checkpoints.restore(self.players.engines)
        step = 0 if state is None else int(state["step"])
        self.monitor = Monitor(
            self.folder,
            self.ranks,
            FIGURES,
            images_per_step=self.plan.global_batch,
            total_steps=self.total_steps,
            log_interval=self.config.training.log_interval,
            start_step=step,
            max_nonfinite=self.config.training.max_nonfinite,
            device=self.device,
            label="decoder",
        )
        if self.ranks.is_main:
            truncate_log(self.folder / "eval.jsonl", step)
        if state is not None:
            self.monitor.load_state(state["monitor"])
            self.feed.seek(state["epoch"], state["position"])
            self.last_evaluation = state["evaluation"]
            if self.ranks.is_main:
                print(f"resumed from step {step} of {self.total_steps}", flush=True)
        return step

    def run(self, signals: StopSignals) -> dict[str, Any]:
        """Train from where the run stands to its end, or until a signal is agreed upon."""
        saved = self.step
        while self.step < self.total_steps and not self.monitor.stop:
            self.players.generator.stop_requested = signals.requested
            self._train_step()
            if self._due(self.config.eval.eval_interval):
                self.evaluate()
            if self._due(self.config.training.sample_every):
                self._save_grid()
            if self._due(self.checkpoint_every):
                saved = self._save()
        finished = self.step >= self.total_steps
        if finished and saved < self.total_steps:
            self._conclude()
        if saved < self.step:
            self._save()
        self.checkpoints.wait()
        self.monitor.close()
        return self._result(finished)

    def _conclude(self) -> None:
        """What the last step owes, if its number did not call for it."""
        if not self._due(self.config.eval.eval_interval):
            self.evaluate()
        if not self._due(self.config.training.sample_every):
            self._save_grid()

    def _train_step(self) -> None:
        waited_s = self.feed.wait_s
        group = [next(self.feed) for _ in range(self.plan.accumulation)]
        phase = phase_at(self.config.gan.loss, self.step, self.steps_per_epoch)
        figures = self.players.update(group, self.step, phase)
        self.step += 1
        self.monitor.record(
            self.step,
            figures,
            epoch=self.step / self.steps_per_epoch,
            lr=self.players.generator.lr,
            wait_s=self.feed.wait_s - waited_s,
            samples=group[-1].index_B,
        )

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.step % interval == 0

    # --- evaluation, samples ----------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Measure EMA weights, and online weights if wanted, on the held-out images; one line each in eval.jsonl."""
        held_out, players = self.players.held_out, self.players
        if held_out is None:
            return
        chosen = [("ema", players.generator.ema_applied)]
        if self.config.eval.eval_model:
            chosen.append(("online", players.generator.online_applied))
        for name, applied in chosen:
            start_s = time.monotonic()
            with applied() as decoder:
                found = held_out.measure(
                    decoder, players.to_pixels, self.ranks, self.device, players.generator.autocast
                )
            images = self.step * self.plan.global_batch
            line = {"step": self.step, "images": images, "weights": name, **found}
            if name == "ema":
                self.last_evaluation = found
            if self.ranks.is_main:
                append_line(self.folder / "eval.jsonl", line)
                facts = "  ".join(f"{key}={value:.4g}" for key, value in found.items())
                print(f"step {self.step}, {name}: {facts}  ({time.monotonic() - start_s:.1f} s)", flush=True)

    def _save_grid(self) -> None:
        held_out = self.players.held_out
        if held_out is None:
            return
        with self.players.generator.ema_applied() as decoder:
            if self.ranks.is_main:
                path = self.folder / "samples" / f"step-{self.step:07d}.png"
                held_out.save_grid(path, decoder, self.players.to_pixels, self.device)

    # --- state ------------------------------------------------------------------------------------------------------

    def _save(self) -> int:
        self.monitor.flush()
        epoch, position = self.feed.state()
        state = {"epoch": epoch, "position": position, "monitor": self.monitor.state()}
        self.checkpoints.save(self.step, self.players.engines, {**state, "evaluation": self.last_evaluation})
        return self.step

    def _result(self, finished: bool) -> dict[str, Any]:
        export = self.folder / "export" / "model.pt"
        if finished:
            weights = self.players.generator.ema_weights(keep=self.ranks.is_main)
            if self.ranks.is_main:
                export_decoder(export.parent, weights)
        return {
            "steps": self.step,
            "images": self.step * self.plan.global_batch,
            "finished": finished,
            "run_folder": str(self.folder),
            "export": str(export) if finished else None,
            **self.last_evaluation,
        }

    def close(self) -> None:
        """Stop the data's threads and give the engines' memory back."""
        self.feed.close()
        for engine in self.players.engines.values():
            engine.close()


def export_decoder(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a bare decoder state dict as `model.pt`, the layout in which decoders are released, and as safetensors."""
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    with atomic_write(folder / "model.pt") as file:
        torch.save(whole, file)
    with atomic_write(folder / "model.safetensors") as file:
        file.write(save(whole))
