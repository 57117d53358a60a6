from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae_fast.config import Config, Scheduler
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.evaluation.run_report import write_run_report
from rae_fast.geometry import dit_params, resolve_geometry
from rae_fast.interop.official import load_dit_weights
from rae_fast.training import dit_setup, dit_trainer
from rae_fast.training.dit_trainer import DiTRun, train_dit
from rae_fast.training.export import checkpoint_weights, export_checkpoint
from rae_fast.training.monitor import read_log

from .tiny_run import STEPS_PER_EPOCH

DDP = "runtime.engine=ddp"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_config) -> Path:
    """Run folder of twelve undisturbed steps: six epochs of two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train_dit(tiny_config(folder, DDP))
    assert result["finished"]
    return folder / "run"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


def model_of(config: Config) -> torch.nn.Module:
    geometry = resolve_geometry(config)
    return build_dit(config.stage_2.target, {**dit_params(config, geometry), "num_classes": 3})


@pytest.mark.parametrize("stop", [2, 6, 11])
def test_run_continued_in_mid_epoch_has_the_bytes_of_the_undisturbed_one(stop, tiny_config, undisturbed, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, f"training.max_steps={stop}"))
    torch.rand(7)  # no state of torch's own generators may matter
    train_dit(tiny_config(tmp_path, DDP))
    assert (tmp_path / "run/log.jsonl").read_bytes() == (undisturbed / "log.jsonl").read_bytes()
    for name in ("ema-0.9.safetensors", "ema-0.5.safetensors"):
        assert (tmp_path / "run/export" / name).read_bytes() == (undisturbed / "export" / name).read_bytes()


def test_default_engine_is_deepspeed_stage_1_with_the_losses_of_ddp(tiny_config, undisturbed, tmp_path):
    train_dit(tiny_config(tmp_path))
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), abs=1e-5)


def test_accumulation_is_the_same_run(tiny_config, undisturbed, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "training.batch_size=4"))
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), abs=1e-5)
    lines = read_log(tmp_path / "run/log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13)), "steps are optimizer steps"


def test_activation_checkpointing_changes_no_loss(tiny_config, undisturbed, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "runtime.activation_checkpointing=true"))
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_makes_a_checkpoint_and_the_same_command_goes_on(
    number, tiny_config, undisturbed, tmp_path, monkeypatch
):
    one_step = DiTRun.one_step

    def step_then_signal(self, heartbeat) -> None:
        one_step(self, heartbeat)
        if self.engine.steps == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(DiTRun, "one_step", step_then_signal)
        result = train_dit(tiny_config(tmp_path, DDP))
    assert not result["finished"]
    assert 5 < result["step"] < 12
    assert not (tmp_path / "run/export").exists()
    result = train_dit(tiny_config(tmp_path, DDP))
    assert result["finished"]
    assert (tmp_path / "run/log.jsonl").read_bytes() == (undisturbed / "log.jsonl").read_bytes()


def test_finished_run_can_be_started_again(tiny_config, tmp_path):
    config = tiny_config(tmp_path, DDP, "training.max_steps=3")
    first = train_dit(config)
    log = (tmp_path / "run/log.jsonl").read_bytes()
    assert train_dit(config) == first
    assert (tmp_path / "run/log.jsonl").read_bytes() == log


def test_exports_are_the_references_files_and_the_checkpoints_weights(tiny_config, undisturbed, tmp_path):
    config = tiny_config(tmp_path, DDP)
    released, training = model_of(config), model_of(config)
    load_dit_weights(released, undisturbed / "export/stage2_model.pt")
    load_dit_weights(training, undisturbed / "export/checkpoint.pt", which="model")
    ema = load_file(undisturbed / "export/ema-0.9.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in released.state_dict().items())
    content = torch.load(undisturbed / "export/checkpoint.pt", weights_only=True)
    assert (content["step"], content["epoch"]) == (12, 12 // STEPS_PER_EPOCH)
    from_checkpoint = checkpoint_weights(undisturbed / "checkpoints")
    assert all(torch.equal(value, from_checkpoint[name]) for name, value in ema.items())
    online = checkpoint_weights(undisturbed / "checkpoints/step-0000012", ema="online")
    assert all(torch.equal(value, online[name]) for name, value in training.state_dict().items())
    with pytest.raises(UserError, match=r"holds no EMA 0\.7; expected one of 0\.9, 0\.5"):
        checkpoint_weights(undisturbed / "checkpoints", ema="0.7")


def test_export_on_demand_makes_averages_of_any_width(tiny_config, tmp_path):
    kept = ["power_0.1", "power_0.05", "power_0.07"]
    often = ("training.checkpoint_every=1", "training.keep_checkpoints=12", "training.optimizer.lr=0.01")
    train_dit(tiny_config(tmp_path, DDP, f"training.ema_decay=[{','.join(kept)}]", *often))
    exports = {}
    for name in (*kept, "online"):
        count = export_checkpoint(tmp_path / "run", tmp_path / f"{name}.safetensors", ema=name)
        exports[name] = load_file(tmp_path / f"{name}.safetensors")
        assert count == len(exports[name]) == len(model_of(tiny_config(tmp_path)).state_dict())
    truth = exports["power_0.07"]["final_layer.linear.weight"]
    at_the_end = load_file(tmp_path / "run/export/ema-power_0.07.safetensors")
    assert torch.equal(at_the_end["final_layer.linear.weight"], truth)
    # Without what the run itself kept of that width.
    for manifest in (tmp_path / "run/checkpoints").glob("step-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("ema/power_0.07", "forgotten"))
    made = checkpoint_weights(tmp_path / "run", ema="power_0.07")["final_layer.linear.weight"]
    nearest = min((exports[name]["final_layer.linear.weight"] - truth).norm() for name in kept[:2])
    assert (made - truth).norm() < 0.2 * nearest
    with pytest.raises(UserError, match=r"no checkpoint in .*none"):
        checkpoint_weights(tmp_path / "none")


def test_ema_distance_is_logged_at_log_lines(undisturbed, tiny_config, tmp_path):
    last = read_log(undisturbed / "log.jsonl")[-1]
    content = torch.load(undisturbed / "export/checkpoint.pt", weights_only=True)
    trained = [n for n, p in model_of(tiny_config(tmp_path)).named_parameters() if p.requires_grad]
    online, ema = (torch.cat([content[kind][n].flatten() for n in trained]) for kind in ("model", "ema"))
    assert last["ema_distance_0.9"] == pytest.approx(((ema - online).norm() / online.norm()).item(), rel=1e-5)
    assert 0 < last["ema_distance_0.5"] < last["ema_distance_0.9"]


def test_report_of_a_run_shows_curves_identity_and_checkpoints(undisturbed, pristine_store):
    page = write_run_report(undisturbed).read_text()
    for said in (str(pristine_store), "step-0000012", "loss by timestep", "relative distance of the EMA", "images/s"):
        assert said in page


def test_fine_tuning_starts_from_the_given_weights(tiny_config, undisturbed, tmp_path):
    ckpt = f"stage_2.ckpt={undisturbed / 'export/stage2_model.pt'}"
    freeze = ("training.optimizer.lr=1e-12", "training.scheduler.final_lr=1e-12", "training.max_steps=1")
    train_dit(tiny_config(tmp_path, DDP, ckpt, *freeze))
    tuned = torch.load(tmp_path / "run/export/stage2_model.pt", weights_only=True)
    given = torch.load(undisturbed / "export/stage2_model.pt", weights_only=True)
    assert all(torch.allclose(tuned[name], given[name], atol=1e-6) for name in given), "EMA included"


def test_fine_tuning_on_other_classes_keeps_all_but_the_label_table(tiny_config, undisturbed, tmp_path):
    config = tiny_config(tmp_path, DDP)
    model = build_dit(config.stage_2.target, {**dit_params(config, resolve_geometry(config)), "num_classes": 7})
    fresh = model.y_embedder.embedding_table.weight.detach().clone()
    dit_setup.load_pretrained(model, str(undisturbed / "export/stage2_model.pt"))
    given = torch.load(undisturbed / "export/stage2_model.pt", weights_only=True)
    table = model.y_embedder.embedding_table.weight
    assert torch.equal(table[:-1], fresh[:-1])
    assert torch.equal(table[-1], given[dit_setup.LABEL_TABLE][-1]), "the null label is what it was"
    assert torch.equal(model.final_layer.linear.weight, given["final_layer.linear.weight"])


def test_tables_that_are_not_learned_stay_what_they_were(tiny_config, undisturbed, tmp_path):
    model = model_of(tiny_config(tmp_path))
    trained = torch.load(undisturbed / "export/stage2_model.pt", weights_only=True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert "pos_embed" in frozen
    with torch.random.fork_rng():
        torch.manual_seed(3)
        start = model_of(tiny_config(tmp_path)).state_dict()
    assert all(torch.equal(trained[name], start[name]) for name in frozen)


def test_label_drop_of_1_is_unconditional_training(tiny_config, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "stage_2.params.class_dropout_prob=1.0", "training.max_steps=8"))
    table = torch.load(tmp_path / "run/export/checkpoint.pt", weights_only=True)["model"][dit_setup.LABEL_TABLE]
    torch.manual_seed(3)
    start = build_dit(
        "DiTDH",
        {
            "hidden_size": [32, 32],
            "depth": [2, 1],
            "num_heads": [2, 2],
            "class_dropout_prob": 1.0,
            "input_size": 4,
            "in_channels": 32,
            "num_classes": 3,
        },
    ).y_embedder.embedding_table.weight
    assert torch.equal(table[:3], start[:3]), "no label was ever used"
    assert not torch.equal(table[3], start[3])


def test_non_finite_training_stops_and_keeps_the_checkpoint_before(tiny_config, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "training.max_steps=4"))
    wild = ("training.optimizer.lr=1e38", "training.scheduler.type=constant", "training.max_nonfinite=3")
    with pytest.raises(UserError, match="not finite for 3 steps in a row"):
        train_dit(tiny_config(tmp_path, DDP, *wild, "training.checkpoint_every=100", "training.max_steps=50"))
    events = read_log(tmp_path / "run/events.jsonl")
    assert len(events) == 3
    assert all(len(event["samples"]) == 16 and set(event["samples"]) <= set(range(41)) for event in events)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-0000004\n"
    result = train_dit(tiny_config(tmp_path, DDP))
    assert result["finished"]


def refused(config: Config, monkeypatch, match: str) -> None:
    """Training is refused before the model is built."""

    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(dit_trainer, "build_model", build)
    with pytest.raises(UserError, match=match):
        train_dit(config)


def test_store_of_other_latents_is_refused(tiny_config, tmp_path, monkeypatch):
    other = ("stage_1.params.encoder_params={}", "stage_1.params.encoder_input_size=56", "misc.latent_size=[8,4,4]")
    config = tiny_config(tmp_path, DDP, *other, "stage_1.params.encoder_params.dinov2_path=null")
    refused(config, monkeypatch, r"latent_shape is \[32, 4, 4\]; expected \[8, 4, 4\]")


def test_store_of_another_encoder_input_is_refused(tiny_config, tmp_path, monkeypatch):
    other = ("stage_1.params.encoder_input_size=56", "misc.latent_size=[32,4,4]")
    config = tiny_config(tmp_path, DDP, *other, "stage_1.params.encoder_params.dinov2_path=null")
    refused(config, monkeypatch, r"encoder\.input_size is 32; expected 56")


def test_too_few_classes_are_refused(tiny_config, tmp_path, monkeypatch):
    refused(tiny_config(tmp_path, DDP, "misc.num_classes=2"), monkeypatch, r"labels up to 2.*num_classes 3")


def test_missing_store_is_refused(tiny_config, tmp_path, monkeypatch):
    refused(tiny_config(tmp_path, DDP, f"cache.path={tmp_path / 'none'}"), monkeypatch, "no latent store")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("training.global_batch_size=32", "begun with global_batch_size 16"),
        ("training.global_seed=4", "begun with global_seed 3"),
        ("stage_2.params.depth=[3,1]", "has shape none: it is absent"),
        ("training.ema_decay=0.99", r"holds EMA 0\.9, 0\.5"),
    ],
)
def test_run_folder_of_another_run_is_refused(change, match, tiny_config, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "training.max_steps=1"))
    with pytest.raises(UserError, match=match):
        train_dit(tiny_config(tmp_path, DDP, change))


def test_checkpoint_of_another_model_is_refused_before_memory_is_taken(tiny_config, tmp_path, monkeypatch):
    train_dit(tiny_config(tmp_path, DDP, "training.max_steps=1"))
    monkeypatch.setattr(dit_trainer, "Engine", None)
    with pytest.raises(UserError, match=r"blocks\.3\.\S+ has shape none"):
        train_dit(tiny_config(tmp_path, DDP, "stage_2.params.depth=[3,1]"))


def test_batch_larger_than_the_data_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="40 images are fewer than the 128"):
        train_dit(tiny_config(tmp_path, DDP, "training.global_batch_size=128"))


def test_gpu_memory_that_runs_out_is_answered_with_what_would_fit(tiny_config, tmp_path, monkeypatch):
    class Device:
        total_memory = 24 * 2**30

    def run_out(self, heartbeat) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    monkeypatch.setattr(DiTRun, "one_step", run_out)
    with pytest.raises(UserError) as caught:
        train_dit(tiny_config(tmp_path, DDP))
    said = str(caught.value)
    assert said.startswith("out of GPU memory with training.batch_size=16: CUDA out of memory; ")
    assert "would fit by our estimate" in said
    assert "training.batch_size=8" in said
    assert "\n" not in said


def test_half_precision_training_is_refused_with_what_there_is(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"runtime\.precision.*fp16.*fp32, tf32, bf16"):
        tiny_config(tmp_path, DDP, "runtime.precision=fp16")


def test_training_without_a_scheduler_section_keeps_the_learning_rate(tiny_config, tmp_path):
    train_dit(replace_scheduler(tiny_config(tmp_path, DDP, "training.max_steps=3")))
    assert [line["lr"] for line in read_log(tmp_path / "run/log.jsonl")] == [1e-3] * 3


def replace_scheduler(config: Config) -> Config:
    """The config as if its file had no scheduler."""
    return replace(config, training=replace(config.training, scheduler=Scheduler()))


def test_nothing_is_evaluated_or_drawn_before_the_first_step(tiny_config, tmp_path, monkeypatch):
    seen = []
    at_intervals = DiTRun.at_intervals
    monkeypatch.setattr(
        DiTRun, "at_intervals", lambda self, step, beat: (seen.append(step), at_intervals(self, step, beat))
    )
    due = ("eval.eval_interval=2", "eval.num_images=4", "sampler.params.num_steps=2", "training.max_steps=2")
    train_dit(tiny_config(tmp_path, DDP, *due))
    assert seen == [1, 2]
    assert [line["step"] for line in read_log(tmp_path / "run/eval.jsonl")] == [2]


def test_profiler_trace_of_some_steps(tiny_config, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "runtime.profile=2..3", "training.max_steps=4"))
    assert (tmp_path / "run/profile/steps-2-3.json").stat().st_size > 1000
