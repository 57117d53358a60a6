"""Images/s of one decoder training step: cached latents, online encoding, and the reference's order of work, in turn.

    python benchmarks/decoder_step.py --size DINOv2-B_decXL --batch 32

All models have random weights of the real sizes, all inputs lie on the device: this is the step without its data. The
baseline does what bytetriper/RAE's train_stage1.py does with the same modules: the encoder runs twice, attention is an
explicit softmax, LPIPS and the discriminator run backward twice for the adaptive weight, fake and real go through the
discriminator's backbone one after the other, and the EMA is a loop over parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from results_file import RESULTS, make_result, print_table, row, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae_fast.autoencoder.assembly import Players, build_players
from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.feed import DecoderBatch, as_tokens
from rae_fast.autoencoder.losses import VGG_CONVOLUTIONS, adaptive_weight, generator_loss, hinge_discriminator_loss
from rae_fast.autoencoder.objective import Phase, augment_draws, discretized
from rae_fast.autoencoder.rae import add_latent_noise
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import Ranks, pick_device
from rae_fast.training.batching import BatchPlan

BASELINE = "reference's order of work"
ALL_ON = Phase(perceptual=True, adversarial=True, discriminator=True)
VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
# encoder (width, layers, heads, patch, input size), decoder config, discriminator recipe
SIZES = {
    "tiny": (
        (64, 2, 2, 8, 32),
        {
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 128,
        },
        "{depth: 2, embed_dim: 64, num_heads: 2, patch_size: 8, image_size: 64}",
    ),
    "DINOv2-B_decB": (
        (768, 12, 12, 14, 224),
        "ViTB",
        "{depth: 12, embed_dim: 384, num_heads: 6, patch_size: 8, image_size: 224}",
    ),
    "DINOv2-B_decXL": (
        (768, 12, 12, 14, 224),
        "ViTXL",
        "{depth: 12, embed_dim: 384, num_heads: 6, patch_size: 8, image_size: 224}",
    ),
}
Step = Callable[[int], object]


def make_config(size: str, folder: Path, batch: int, precision: str, engine: str, compiled: bool) -> Config:
    """A config over random weights of the size, written to `folder`."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    (width, layers, heads, patch, side), decoder, recipe = SIZES[size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=side, num_register_tokens=4))
    model.save_pretrained(folder / "encoder")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(statistics))
    if isinstance(decoder, dict):
        (folder / "config.json").write_text(json.dumps(decoder))
        decoder = str(folder)
    torch.save(random_vgg(), folder / "vgg.pth")
    return load_config(
        None,
        [
            f"stage_1.params.encoder_params.dinov2_path={folder / 'encoder'}",
            f"stage_1.params.encoder_input_size={side}",
            f"stage_1.params.decoder_config_path={decoder}",
            "loader.source=online",
            f"cache.precision={precision}",
            f"gan.disc.arch.recipe={recipe}",
            "gan.disc.arch.ks=9",
            "gan.loss.disc_weight=0.75",
            "gan.loss.perceptual_weight=1.0",
            f"gan.loss.lpips_weights={folder / 'vgg.pth'}",
            f"training.global_batch_size={batch}",
            "training.clip_grad=0.0",
            f"runtime.precision={precision}",
            f"runtime.engine={engine}",
            f"runtime.compile={str(compiled).lower()}",
        ],
    )


def random_vgg() -> dict[str, Tensor]:
    """VGG16's convolutions with random weights: LPIPS costs the same."""
    weights = {}
    for i, layer in enumerate(VGG_CONVOLUTIONS):
        inputs, outputs = VGG_CHANNELS[i : i + 2]
        weights[f"features.{layer}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        weights[f"features.{layer}.bias"] = torch.zeros(outputs)
    return weights


def assemble(config: Config, batch: int, device: torch.device) -> tuple[Players, LatentEncoder]:
    """Engines, losses and encoder as training builds them."""
    encoder = LatentEncoder(config.stage_1.params, config.cache.precision, device)
    plan = BatchPlan(batch, 1, batch)
    return build_players(config, plan, Ranks(), device, encoder, steps_per_epoch=1, total_steps=1000), encoder


def cached_step(players: Players, tokens: Tensor, images: Tensor) -> Step:
    """Latents and pixels are there."""
    index = torch.arange(len(images), device=images.device)
    batch = DecoderBatch(tokens, images.float() / 255, index, 0)
    return lambda step: players.update([batch], step, ALL_ON)


def online_step(players: Players, encoder: LatentEncoder, images: Tensor) -> Step:
    """The encoder runs once."""
    index = torch.arange(len(images), device=images.device)

    def step(number: int) -> object:
        batch = DecoderBatch(as_tokens(encoder(images)).float(), images.float() / 255, index, 0)
        return players.update([batch], number, ALL_ON)

    return step


class ReferenceStep:
    """The reference's order of work on the same modules, plain PyTorch."""

    def __init__(self, players: Players, encoder: LatentEncoder, images: Tensor, autocast: bool) -> None:
        self.encoder, self.images, self.device = encoder, images, images.device
        self.objective, self.to_pixels = players.update.objective, players.to_pixels
        self.decoder, self.heads = players.generator.module, players.engines["disc"].module
        self.average = copy.deepcopy(self.decoder).requires_grad_(False)
        self.optimizers = [
            torch.optim.AdamW(module.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
            for module in (self.decoder, self.heads)
        ]
        self.augment = DiffAugment(1.0, 0.0)
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext()
        self.index = torch.arange(len(images), device=self.device)

    def __call__(self, number: int) -> None:
        draws = augment_draws(0, 0, number, self.index)
        real = self.images.float() / 255
        with sdpa_kernel(SDPBackend.MATH):
            self.update_decoder(real, draws.policy_3P[0], draws.u_3UB[0])
            self.update_discriminator(real, draws.policy_3P[1:], draws.u_3UB[1:])

    def update_decoder(self, real: Tensor, policy: Tensor, draws: Tensor) -> None:
        """LPIPS, discriminator and the decoder's last layer run backward for the weight, and again for the update."""
        self.heads.eval()
        with self.autocast():
            recon = self.to_pixels(self.decoder(add_latent_noise(as_tokens(self.encoder(self.images)), 0.8)).float())
            reconstruction = (recon - real).abs().mean() + self.objective.perceptual(recon, real).float()
            seen = self.augment(recon * 2 - 1, policy, draws)
            adversarial = generator_loss(self.heads(self.objective.backbone(seen)))
        last = self.decoder.last_layer
        grads = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (reconstruction, adversarial)]
        weight = adaptive_weight(*grads)
        self.optimizers[0].zero_grad(set_to_none=True)
        (reconstruction + 0.75 * weight * adversarial).backward()
        self.optimizers[0].step()
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.decoder.parameters(), strict=True):
                ours.mul_(0.9978).add_(theirs, alpha=1 - 0.9978)

    def update_discriminator(self, real: Tensor, policies: Tensor, draws: Tensor) -> None:
        """The encoder runs again; fake and real go through the backbone one after the other."""
        self.heads.train()
        with self.autocast():
            with torch.no_grad():
                fake = self.to_pixels(self.decoder(as_tokens(self.encoder(self.images))).float())
            logits = [
                self.heads(self.objective.backbone(self.augment(image, policies[i], draws[i])))
                for i, image in enumerate((discretized(fake), real * 2 - 1))
            ]
            loss = hinge_discriminator_loss(logits[1], logits[0])
        self.optimizers[1].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[1].step()


def seconds_of(step: Step, first: int, steps: int, device: torch.device) -> float:
    """Mean seconds of a step."""
    synchronize(device)
    start_s = time.perf_counter()
    for number in range(first, first + steps):
        step(number)
    synchronize(device)
    return (time.perf_counter() - start_s) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure all three in turn, round after round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each round")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--engine", choices=("ddp", "deepspeed"), default="ddp")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's blocks (not the baseline's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_step.json")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args.size, Path(folder), args.batch, args.precision, args.engine, args.compile)
        players, encoder = assemble(config, args.batch, device)
        plain, _ = assemble(without_engine(config), args.batch, device)
    side = config.stage_1.params.decoder_patch_size * encoder.latent_shape[1]
    images = torch.randint(0, 256, (args.batch, 3, side, side), dtype=torch.uint8, device=device)
    steps: dict[str, Step] = {
        BASELINE: ReferenceStep(plain, encoder, images, args.precision == "bf16"),
        "online: encoder once": online_step(players, encoder, images),
        "cached: no encoder": cached_step(players, as_tokens(encoder(images)).float(), images),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds_of(step, 0, 2, device)
    for number in range(args.rounds):
        for name, step in steps.items():
            rates[name].append(args.batch / seconds_of(step, number * args.steps, args.steps, device))
    facts = {"size": args.size, "batch": args.batch, "precision": args.precision, "engine": args.engine}
    result = make_result(
        "decoder_step",
        "How many images/s does one step of decoder training make, data aside?",
        BASELINE,
        [row(name, values, "images/s") for name, values in rates.items()],
        device,
        **facts,
        compile=args.compile,
    )
    print_table(result)
    write_result(args.output, result)


def without_engine(config: Config) -> Config:
    """The same models without a compiled or sharded engine, for the baseline."""
    return replace(config, runtime=replace(config.runtime, engine="ddp", compile=False))


if __name__ == "__main__":
    main()
