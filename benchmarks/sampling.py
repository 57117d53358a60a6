"""Images/s of sampling with guidance, ours against the reference's way, in turn; and what each image costs in rows.

    python benchmarks/sampling.py                                            # tiny, on a CPU, two minutes
    python benchmarks/sampling.py --size DiTDH-XL --precision bf16 --compile --cuda-graphs --batch 64

All models have random weights of the real sizes; images are decoded latents, so the decoder's time is left out of all
rows. "rows" are samples that go through the model (or the guide) for one image: what a sampler costs, whatever the
machine. The reference's way is that of bytetriper/RAE's sample.py and sample_ddp.py, written anew on the same modules:

    the batch is doubled with the null label and stays so at all times, inside the guidance interval or not; the
    doubled state is integrated, too
    autoguidance sends the doubled batch through model and guide, and throws half of it away
    dopri5 and Euler are torchdiffeq's, in Python, with times on the device
    weights are float32, bf16 is autocast (with its cache of casts), nothing is compiled
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from results_file import RESULTS, make_result, print_table, row, write_result
from torch import Tensor, nn

from rae_fast.config import Config, Guidance, Misc, Runtime, SamplerParams, SamplerSection
from rae_fast.dit.registry import build_dit, size_presets
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry
from rae_fast.runtime import DTYPES, pick_device, set_precision
from rae_fast.sampling import LatentSampler
from rae_fast.sampling.accelerate import accelerate, store_for_autocast
from rae_fast.transport.grid import time_grid
from rae_fast.transport.objective import shift_from_size

TINY = {"hidden_size": [64, 128], "depth": [4, 2], "num_heads": [4, 4]}
INTERVAL = (0.1, 0.9)  # of guidance: the reference's configs guide inside an interval of about this width
SCALE, STEPS = 1.42, 50
Draw = Callable[[Tensor, Tensor], Tensor]  # (noise_BCHW, labels_B) -> latents_BCHW


class Counted:
    """Counts the rows that go through a module."""

    def __init__(self) -> None:
        self.rows = 0

    def watch(self, module: nn.Module) -> None:
        """Count this module's calls, too; recorded passes are counted by whoever replays them."""
        module.register_forward_pre_hook(lambda _, inputs: self.add(len(inputs[0])))

    def add(self, rows: int) -> None:
        """So many more."""
        self.rows += rows


def build(size: str, latent: tuple[int, int, int], device: torch.device, seed: int) -> nn.Module:
    """A model of a named size with random weights, none of them zero."""
    shape = {"input_size": latent[1], "in_channels": latent[0], "num_classes": 1000}
    torch.manual_seed(seed)
    target, params = ("DiTDH", {**TINY, **shape}) if size == "tiny" else (size, shape)
    model = build_dit(target, params)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()


# --- the reference's way --------------------------------------------------------------------------------------------


def reference_draw(model: nn.Module, guide: nn.Module | None, method: str, shift: float, precision: str) -> Draw:
    """Doubled batch through torchdiffeq; `guide` for autoguidance.

    Raises:
        ImportError: torchdiffeq is not installed.
    """
    from torchdiffeq import odeint

    times = torch.tensor(time_grid(STEPS, "reference", shift), dtype=torch.float32)
    dtype = DTYPES[precision]

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        x0, y = torch.cat([noise, noise]), torch.cat([labels, torch.full_like(labels, 1000)])

        def drift(t: Tensor, x: Tensor) -> Tensor:
            t_B = torch.ones(len(x), device=x.device) * t
            inside = ((t_B >= INTERVAL[0]) & (t_B <= INTERVAL[1])).reshape(-1, 1, 1, 1)
            if guide is not None:
                strong, weak = model(x, t_B, y), guide(x, t_B, y)
                return torch.where(inside, weak + SCALE * (strong - weak), strong).float()
            half = x[: len(x) // 2]
            conditional, unconditional = model(torch.cat([half, half]), t_B, y).chunk(2)
            mixed = unconditional + SCALE * (conditional - unconditional)
            guided = torch.where(inside[: len(half)], mixed, conditional)
            return torch.cat([guided, guided]).float()

        context = torch.autocast(noise.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with torch.no_grad(), context:
            options = {"atol": 1e-6, "rtol": 1e-3} if method == "dopri5" else {}
            return odeint(drift, x0, times.to(noise.device), method=method, **options)[-1][: len(noise)]

    return draw


# --- ours -----------------------------------------------------------------------------------------------------------


def our_sampler(
    model: nn.Module, guide: nn.Module | None, method: str, latent: tuple[int, int, int], precision: str
) -> LatentSampler:
    """The sampler that tools/sample.py runs, of a config without files."""
    config = Config(
        sampler=SamplerSection("ODE", SamplerParams(sampling_method=method, num_steps=STEPS)),
        guidance=Guidance("autoguidance" if guide is not None else "cfg", SCALE, *INTERVAL),
        misc=Misc(latent_size=list(latent), num_classes=1000),
        runtime=replace(Runtime(), precision=precision),
    )
    shift = shift_from_size(latent[0] * latent[1] * latent[2])
    return LatentSampler(model, config, Geometry(latent, 16 * latent[1], 1000, 1000, shift), guide)


def our_draw(sampler: LatentSampler) -> Draw:
    """From noise, as the reference's draw, for the comparison's sake."""
    return lambda noise, labels: sampler.integrate(noise, labels, lambda step: torch.zeros_like(noise))


# --- measuring ------------------------------------------------------------------------------------------------------


def make_contenders(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[Draw, Counted]]:
    """Every way by name; those that this machine cannot run are left out and named."""
    latent = (16, 4, 4) if args.size == "tiny" else (768, 16, 16)
    shift = shift_from_size(latent[0] * latent[1] * latent[2])
    sizes = {"cfg": (args.size,), "autoguidance": (args.size, "tiny" if args.size == "tiny" else "DiTDH-S")}
    asked = [name for name in ("compile", "cuda_graphs") if getattr(args, name)]
    contenders: dict[str, tuple[Draw, Counted]] = {}
    for method, guided in (("euler", "cfg"), ("dopri5", "cfg"), ("euler", "autoguidance")):
        label = f"{method}, {guided}"

        def models(guided: str = guided) -> list[nn.Module]:
            return [build(size, latent, device, seed) for seed, size in enumerate(sizes[guided])]

        theirs = models()
        try:
            draw = reference_draw(theirs[0], theirs[1] if theirs[1:] else None, method, shift, args.precision)
        except ImportError as error:
            print(f"{label}: the reference's way cannot run here: {error}")
        else:
            contenders[f"reference's way: {label}"] = (draw, counted(theirs))
        for fast in (False, True) if asked else (False,):
            ours = models()
            for module in ours:
                store_for_autocast(module.requires_grad_(False), DTYPES[args.precision])
                if fast:
                    accelerate(module, device, compiled=args.compile, cuda_graphs=args.cuda_graphs)
            sampler = our_sampler(ours[0], ours[1] if ours[1:] else None, method, latent, args.precision)
            name = f"ours: {label}" + (f", {' and '.join(asked)}" if fast else "")
            contenders[name] = (our_draw(sampler), counted(ours))
    return contenders


def counted(models: list[nn.Module]) -> Counted:
    """A counter that watches these models."""
    count = Counted()
    for model in models:
        count.watch(model)
    return count


def seconds_of(draw: Draw, noise: Tensor, labels: Tensor) -> float:
    """One batch, from start to end."""
    synchronize(noise.device)
    start_s = time.perf_counter()
    draw(noise, labels)
    synchronize(noise.device)
    return time.perf_counter() - start_s


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_agreement(contenders: dict[str, tuple[Draw, Counted]], noise: Tensor, labels: Tensor) -> dict[str, float]:
    """Relative distance of each way's latents from the reference's with the same method; warms everything up."""
    results = {name: draw(noise, labels) for name, (draw, _) in contenders.items()}
    distances = {}
    for name, found in results.items():
        wanted = next((v for k, v in results.items() if k == f"reference's way: {_setting(name)}"), None)
        if wanted is not None:
            distances[name] = float((found - wanted).norm() / wanted.norm())
    return distances


def _setting(name: str) -> str:
    """Method and guidance in a contender's name."""
    return ", ".join(name.split(": ", 1)[1].split(", ")[:2])


def main() -> None:
    """Measure all in turn, round after round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", *size_presets()), default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks (GPU)")
    parser.add_argument("--cuda-graphs", action="store_true", help="also ours with CUDA graphs (GPU)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json")
    args = parser.parse_args()
    device = pick_device(args.device)
    set_precision(args.precision)
    contenders = make_contenders(args, device)
    baseline = next((name for name in contenders if name.startswith("reference")), next(iter(contenders)))
    latent = (16, 4, 4) if args.size == "tiny" else (768, 16, 16)
    noise, labels = torch.randn(args.batch, *latent, device=device), torch.arange(args.batch, device=device) % 1000
    distances = check_agreement(contenders, noise, labels)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    rows_per_image = {}
    for number in range(args.rounds):
        for name, (draw, count) in contenders.items():
            before = count.rows
            rates[name].append(args.batch / seconds_of(draw, noise, labels))
            if number == 0:
                rows_per_image[name] = (count.rows - before) / args.batch
    result = make_result(
        "sampling",
        f"How many images/s does {args.size} draw with guidance in t = {INTERVAL[0]} to {INTERVAL[1]}, decoding aside?",
        baseline,
        [
            row(name, values, "images/s", rows_per_image=rows_per_image[name], distance=distances.get(name))
            for name, values in rates.items()
        ],
        device,
        size=args.size,
        batch=args.batch,
        precision=args.precision,
        steps=STEPS,
        guidance_scale=SCALE,
    )
    print_table(result)
    for entry in result["rows"]:
        print(f"{entry['name']}: {entry['rows_per_image']:.0f} rows an image")
    write_result(args.output, result)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
