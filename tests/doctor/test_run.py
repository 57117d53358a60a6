"""Runs that are sound, and runs with one fault each, which must be named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.doctor.denoising import check_denoising, judge
from rae_fast.doctor.evidence import Evidence, gather
from rae_fast.doctor.findings import OK, SUSPECT, UNKNOWN, WRONG, Finding, tell
from rae_fast.doctor.latents import check_latents
from rae_fast.doctor.run import examine_run
from rae_fast.doctor.settings import check_settings
from rae_fast.doctor.weights import check_weights, initial_weights
from rae_fast.errors import UserError
from rae_fast.latents.stats import save_statistics
from rae_fast.latents.store import open_store
from rae_fast.latents.writer import build_cache
from rae_fast.provenance import read_json, write_json
from rae_fast.training.checkpoint import facts_of


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.found for finding in findings if finding.state == WRONG}


def evidence_of(run: Path, *overrides: str) -> Evidence:
    return gather(run, None, overrides)[0]


def test_nothing_is_wrong_with_sound_runs(healthy: Path) -> None:
    for name in ("dit", "decoder"):
        findings = examine_run(healthy / name)
        assert wrong(findings) == {}
        assert "Nothing is wrong" in tell(findings)
    seen = {finding.check for finding in examine_run(healthy / "dit")}
    assert seen >= {"store", "latents", "statistics", "encoder", "decoder", "transport", "time shift", "null label"}
    assert seen >= {"classes", "sampler", "weights", "EMA", "denoising"}


@pytest.mark.parametrize(
    ("override", "check", "said"),
    [
        ("transport.params.path_type=GVP", "transport", "trained with path_type Linear, sampled with GVP"),
        ("transport.params.prediction=noise", "transport", "trained with prediction velocity, sampled with noise"),
        ("misc.time_dist_shift_base=4096", "time shift", "trained with 1, sampled with 0.3536"),
        ("misc.null_label=1", "null label", "sampled with null label 1, which is a class; the trained one is 3"),
        ("misc.num_classes=10", "classes", "trained with 3 classes, sampled with 10"),
    ],
)
def test_settings_other_than_the_training_s_are_named(healthy: Path, override: str, check: str, said: str) -> None:
    assert wrong(check_settings(evidence_of(healthy / "dit", override)))[check] == said


def test_guidance_without_a_null_row_is_named(healthy: Path) -> None:
    evidence = evidence_of(healthy / "dit", "guidance.scale=4")
    assert wrong(check_settings(evidence)) == {}
    table = "y_embedder.embedding_table.weight"
    bare = replace(evidence, sampled={**evidence.sampled, table: evidence.sampled[table][:-1]})
    assert "no null row" in wrong(check_settings(bare))["null label"]


def test_the_mend_of_a_shift_mismatch_mends_it(healthy: Path) -> None:
    (finding,) = [
        f for f in check_settings(evidence_of(healthy / "dit", "misc.time_dist_shift_base=4096")) if f.state == WRONG
    ]
    mended = finding.mend.removeprefix("set ").split()
    assert wrong(check_settings(evidence_of(healthy / "dit", "misc.time_dist_shift_base=4096", *mended))) == {}


def test_unusual_settings_are_pointed_at(healthy: Path) -> None:
    findings = check_settings(evidence_of(healthy / "dit", "sampler.params.num_steps=3"))
    assert [f.check for f in findings if f.state == SUSPECT] == ["sampler"]


# --- latents --------------------------------------------------------------------------------------------------------


def test_statistics_of_another_store_are_named(healthy: Path, pristine_store: Path, tmp_path: Path) -> None:
    store = open_store(pristine_store)
    for name, (mean, var) in {"right": (store.mean, store.var), "wrong": (store.mean, 2 * store.var)}.items():
        save_statistics(tmp_path / f"{name}.pt", mean, var)
    key = "stage_1.params.normalization_stat_path"
    assert wrong(check_latents(evidence_of(healthy / "dit", f"{key}={tmp_path / 'right.pt'}"))) == {}
    found = wrong(check_latents(evidence_of(healthy / "dit", f"{key}={tmp_path / 'wrong.pt'}")))
    assert "variance differs from the store's by 100.0%" in found["statistics"]
    missing = wrong(check_latents(evidence_of(healthy / "dit", f"{key}={tmp_path / 'none.pt'}")))
    assert "none.pt" in missing["statistics"]


def test_a_store_normalized_anew_since_the_training_is_named(run_copy: Callable[[], Path]) -> None:
    run = run_copy()
    manifest = read_json(run / "manifest.json")
    manifest["identity"]["normalization"]["images"] = 7
    write_json(run / "manifest.json", manifest)
    assert "the run was trained with" in wrong(check_latents(evidence_of(run)))["store"]


def test_latents_that_are_not_normalized_are_named(
    healthy: Path, pristine_store: Path, cache_config: Callable[..., Config], tmp_path: Path
) -> None:
    store = open_store(pristine_store)
    save_statistics(tmp_path / "wide.pt", store.mean, 16 * store.var)
    build_cache(cache_config(tmp_path / "narrow", f"cache.statistics={tmp_path / 'wide.pt'}", "cache.pixels=true"))
    evidence = replace(evidence_of(healthy / "dit"), store=open_store(tmp_path / "narrow"))
    found = wrong(check_latents(evidence))
    assert "not normalized: standard deviation 0.25" in found["latents"] and "statistics: given" in found["latents"]
    assert "now has normalization" in found["store"]


def test_another_encoder_and_a_decoder_of_another_encoder_are_named(
    healthy: Path, cache_config: Callable[..., Config], tmp_path: Path
) -> None:
    other = "stage_1.params.encoder_params.layers=[0]"
    assert "encoder.layers" in wrong(check_latents(evidence_of(healthy / "dit", other)))["encoder"]
    build_cache(cache_config(tmp_path / "other", other))
    foreign = Path(shutil.copytree(healthy / "decoder", tmp_path / "decoder"))
    config = (foreign / "config.yaml").read_text()
    path = load_config(foreign / "config.yaml").cache.path
    (foreign / "config.yaml").write_text(config.replace(str(path), str(tmp_path / "other")))
    decoder = f"stage_1.params.pretrained_decoder_path={foreign / 'export/model.pt'}"
    found = wrong(check_latents(evidence_of(healthy / "dit", decoder)))
    assert "was trained on latents of another encoder: layers [0]" in found["decoder"]


def test_a_decoder_that_restores_nothing_is_named(healthy: Path, tmp_path: Path) -> None:
    weights = torch.load(healthy / "decoder/export/model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    weights["decoder_embed.weight"] = torch.randn(weights["decoder_embed.weight"].shape, generator=generator)
    torch.save(weights, tmp_path / "other.pt")
    decoder = f"stage_1.params.pretrained_decoder_path={tmp_path / 'other.pt'}"
    found = wrong(check_latents(evidence_of(healthy / "dit", decoder)))
    assert found["decoder"].startswith("restores 8 stored images at")


# --- weights --------------------------------------------------------------------------------------------------------


def spoil_average(run: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `weights` in the place of the checkpoint's EMA."""
    path = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    (file,) = path.glob("rank-*.safetensors")
    segments = read_json(file.with_suffix(".json"))["segments"]["model"]
    flat = torch.cat([weights[name].flatten()[start : start + length] for name, start, length in segments])
    tensors = load_file(file)
    (key,) = [key for key in tensors if "/ema/" in key]
    assert tensors[key].shape == flat.shape
    save_file({**tensors, key: flat.float()}, file)
    manifest = read_json(path / "manifest.json")
    manifest["files"][file.name] = facts_of(file)
    write_json(path / "manifest.json", manifest)


def test_an_average_that_is_not_updated_is_named(run_copy: Callable[[], Path]) -> None:
    run = run_copy()
    spoil_average(run, initial_weights(evidence_of(run)))
    findings = check_weights(evidence_of(run))
    assert "it is not updated" in wrong(findings)["EMA"] and "0.0%" in wrong(findings)["EMA"]
    found = wrong(check_denoising(evidence_of(run)))["denoising"]
    assert "online weights:" in found


def test_an_average_equal_to_the_online_weights_is_named(run_copy: Callable[[], Path]) -> None:
    run = run_copy()
    spoil_average(run, evidence_of(run).online)
    assert "bit for bit" in wrong(check_weights(evidence_of(run)))["EMA"]


def test_a_decay_too_slow_for_the_run_is_named(healthy: Path) -> None:
    evidence = evidence_of(healthy / "dit")
    initial, left = initial_weights(evidence), 0.9999**evidence.step
    slow = {name: left * initial[name] + (1 - left) * online for name, online in evidence.online.items()}
    training = replace(evidence.trained.training, ema_decay=[0.9999])
    found = check_weights(replace(evidence, ema=slow, trained=replace(evidence.trained, training=training)))
    assert "at decay 0.9999 the start still weighs 98%" in wrong(found)["EMA"]


def test_weights_that_are_not_finite_are_named(healthy: Path) -> None:
    evidence = evidence_of(healthy / "dit")
    name = next(iter(evidence.online))
    broken = {**evidence.online, name: torch.full_like(evidence.online[name], torch.nan)}
    assert name in wrong(check_weights(replace(evidence, online=broken)))["weights"]


# --- denoising ------------------------------------------------------------------------------------------------------


def test_an_untrained_checkpoint_is_named_by_denoising(healthy: Path, tmp_path: Path) -> None:
    torch.save(initial_weights(evidence_of(healthy / "dit")), tmp_path / "fresh.pt")
    evidence = evidence_of(healthy / "dit", f"stage_2.ckpt={tmp_path / 'fresh.pt'}")
    assert "denoising" in wrong(check_denoising(evidence))
    folder = evidence_of(healthy / "dit", f"stage_2.ckpt={healthy / 'dit/checkpoints'}")
    assert folder.sampled.keys() == evidence.sampled.keys()
    assert wrong(check_denoising(evidence_of(healthy / "dit"))) == {}


def test_a_model_that_predicts_nothing_is_as_far_off_as_the_formula_says() -> None:
    # v = 0 errs by E|v|^2 = 2 on the linear path; the best linear guess by 1 at both ends and 2 in the middle.
    nothing = {t: 2 / (2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2)) for t in (0.1, 0.5, 0.9)}
    assert nothing[0.5] == pytest.approx(1)
    assert judge(nothing, nothing).state == WRONG
    assert judge(dict.fromkeys(nothing, 0.99), nothing).state == SUSPECT
    assert judge(dict.fromkeys(nothing, 0.6), nothing).state == OK
    assert "online weights" in judge(nothing, dict.fromkeys(nothing, 0.6)).found


# --- what is not there ----------------------------------------------------------------------------------------------


def test_without_its_store_a_run_is_judged_by_what_is_left(run_copy: Callable[[], Path], tmp_path: Path) -> None:
    run = run_copy()
    config = (run / "config.yaml").read_text()
    path = str(load_config(run / "config.yaml").cache.path)
    (run / "config.yaml").write_text(config.replace(path, str(tmp_path / "gone")))
    findings = examine_run(run)
    assert wrong(findings) == {}
    assert {finding.check for finding in findings if finding.state == UNKNOWN} == {"store", "denoising"}


def test_a_damaged_checkpoint_is_refused_by_name(run_copy: Callable[[], Path]) -> None:
    run = run_copy()
    (file,) = (run / "checkpoints").glob("step-*/rank-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged \(rank-.*bytes"):
        examine_run(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        examine_run(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint"):
        examine_run(tmp_path)
