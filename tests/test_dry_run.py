"""--dry-run says what a tool would do, and does nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def dry_run(tool: str, *arguments: str, cwd: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments, "--dry-run", "runtime.device=cpu"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(cwd.iterdir()) == []
    return done.stdout.splitlines()


def test_decoder_training_names_sizes_and_steps(tmp_path: Path, tiny_encoder: Path, image_folder: Path) -> None:
    lines = dry_run(
        "train_decoder",
        f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
        "stage_1.params.encoder_input_size=32",
        "stage_1.params.decoder_patch_size=8",
        "stage_1.params.decoder_config_path=configs/decoder/demo",
        f"data.source={image_folder}",
        "training.global_batch_size=8",
        "training.epochs=3",
        cwd=tmp_path,
    )
    assert "latents [32, 4, 4] to 32 px" in lines[0]
    assert lines[1].startswith("41 images")
    assert lines[2] == "8 images a step: 8 a rank, accumulated 1 times; 5 steps an epoch, 15 in all"


def test_dit_training_and_the_build_print_the_plan(tmp_path: Path, tiny_encoder: Path, image_folder: Path) -> None:
    shared = (
        f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
        "stage_1.params.encoder_input_size=32",
        "stage_1.params.decoder_patch_size=8",
        f"data.source={image_folder}",
        "stage_2.target=DiTDH",
        "stage_2.params.hidden_size=32",
        "stage_2.params.depth=[1, 1]",
        "stage_2.params.num_heads=2",
        "training.global_batch_size=8",
    )
    for tool in ("train_dit", "build_cache"):
        lines = dry_run(tool, *shared, cwd=tmp_path)
        assert any(line.startswith("41 images") for line in lines)
        assert any(line.startswith("latent store") for line in lines)
