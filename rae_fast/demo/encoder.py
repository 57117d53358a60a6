"""The demo's frozen encoder: pretrained DINOv2 if this machine has it, else a small one with seeded random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

PRETRAINED = "facebook/dinov2-with-registers-small"
TOKENS_A_SIDE = 4
WEIGHTS_SEED = 0
POSITION_STD = 0.5
# Narrow, so that a diffusion model of a few million parameters can learn its latents in minutes.
RANDOM_CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 64,
    "num_register_tokens": 4,
}


def prepare_encoder(folder: Path) -> dict[str, object]:
    """Put an encoder into `folder` in Hugging Face's layout and say what it is.

    Returns:
        path, description, input_size (pixels), width.
    """
    cached = _cached_pretrained()
    if cached is not None:
        config = json.loads((cached / "config.json").read_text())
        return {
            "path": str(cached),
            "description": f"{PRETRAINED}, pretrained",
            "input_size": TOKENS_A_SIDE * int(config["patch_size"]),
            "width": int(config["hidden_size"]),
        }
    _write_random_encoder(folder)
    return {
        "path": str(folder),
        "description": f"Dinov2WithRegistersModel with seeded random weights ({PRETRAINED} is not on this machine)",
        "input_size": RANDOM_CONFIG["image_size"],
        "width": RANDOM_CONFIG["hidden_size"],
    }


def _cached_pretrained() -> Path | None:
    """Folder of the pretrained encoder in the local Hugging Face cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(PRETRAINED, name) for name in ("config.json", "model.safetensors")]
    return Path(files[0]).parent if all(isinstance(file, str) for file in files) else None


def _write_random_encoder(folder: Path) -> None:
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shutil.rmtree(folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHTS_SEED)
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**RANDOM_CONFIG))
        # Fresh tables are so small that patches would hardly know where they are.
        model.embeddings.position_embeddings.data.normal_(0, POSITION_STD)
    model.save_pretrained(folder)
    BitImageProcessor(
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], size={"shortest_edge": 64}
    ).save_pretrained(folder)
