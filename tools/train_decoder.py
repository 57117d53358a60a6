"""Train the decoder: pixels from latents by L1, perceptual and adversarial losses."""

from __future__ import annotations

from rae_fast.command_line import parse_tool, tool_parser
from rae_fast.errors import exit_cleanly


def main() -> None:
    """Train to the end, or to SIGTERM; the same command resumes."""
    parser = tool_parser(
        "Train a decoder of latents to pixels, on cached latents or online; the same command resumes.",
        "deepspeed tools/train_decoder.py --config configs/stage1/training/DINOv2-B.yaml cache.path=<store>",
    )
    config, _ = parse_tool(parser)
    from rae_fast.autoencoder.trainer import train_decoder

    result = train_decoder(config)
    if result["export"]:
        print(f"decoder: {result['export']}")


if __name__ == "__main__":
    exit_cleanly(main)
