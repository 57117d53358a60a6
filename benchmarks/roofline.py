"""What is the most that a GPU can do on this model: FLOPs, bytes, the floor in time, and what share a rate is of it?

    python benchmarks/roofline.py --model DiTDH-XL --tokens 256 --batch 256
    python benchmarks/roofline.py --config configs/my.yaml --measured 550

Arithmetic only, no GPU needed. FLOPs are those of the matrix products, as torch's FlopCounterMode counts them; bytes
are those of the passes over activations with the project's kernels, each tensor read and written once; a step takes at
least FLOPs / matrix rate + bytes / bandwidth, as the two do not overlap within one stream. Rates are those measured on
an H200 (random data) unless given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_fast.dit.registry import size_presets
from rae_fast.errors import exit_cleanly
from rae_fast.planner.roofline import (
    COPY_TBS,
    MATRIX_TFLOPS,
    SHEET_TFLOPS,
    Model,
    block_bytes,
    floor_s,
    forward_flops,
    from_file,
    from_preset,
    parameters,
    stacks,
    training_flops,
)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiTDH-XL", help=f"one of {', '.join(size_presets())}")
    parser.add_argument("--config", type=Path, help="take the model from this configuration instead")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sample; 1024 at 512 px")
    parser.add_argument("--channels", type=int, default=768, help="latent channels")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step on one GPU")
    parser.add_argument("--tflops", type=float, default=MATRIX_TFLOPS, help="matrix rate that can be reached")
    parser.add_argument("--tbs", type=float, default=COPY_TBS, help="bandwidth that can be reached")
    parser.add_argument("--measured", type=float, help="measured samples/s of one GPU, to be placed in the table")
    args = parser.parse_args()
    model = from_file(args.config) if args.config else from_preset(args.model, args.tokens, args.channels)
    print_report(model, args)


def print_report(model: Model, args: argparse.Namespace) -> None:
    """The model's figures, the floor, and what rates mean."""
    forward, training = forward_flops(model), training_flops(model)
    times = floor_s(model, args.batch, args.tflops, args.tbs)
    total = sum(times.values())
    print(f"{parameters(model):,} trainable parameters, {model.tokens} tokens")
    print(f"forward {forward / 1e9:.2f} GFLOP a sample, training {training / 1e9:.2f} GFLOP")
    for stack in stacks(model):
        there, back = block_bytes(stack, model.tokens)
        print(f"a block of width {stack.width}: {there / 1e6:.1f} MB forward, {back / 1e6:.1f} MB backward a sample")
    print(f"\nfloor at {args.tflops:g} TFLOP/s and {args.tbs:g} TB/s, batch {args.batch}, us a sample:")
    for name, seconds in times.items():
        print(f"  {name:24} {seconds * 1e6:8.1f}  {seconds / total:6.1%}")
    print(f"  {'all':24} {total * 1e6:8.1f}")
    rates = {"floor": 1 / total} | {f"{share:.0%} MFU": share * SHEET_TFLOPS * 1e12 / training for share in (0.5, 0.54)}
    if args.measured:
        rates["measured"] = args.measured
    print(f"\n{'':10} samples/s   MFU of {SHEET_TFLOPS:g}   of {args.tflops:g}   of the floor")
    for name, rate in rates.items():
        reached = rate * training / 1e12
        shares = f"{reached / SHEET_TFLOPS:10.1%}   {reached / args.tflops:6.1%}   {rate * total:12.1%}"
        print(f"{name:10} {rate:9.1f}   {shares}")


if __name__ == "__main__":
    exit_cleanly(main)
