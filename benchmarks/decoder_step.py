"""Images/s of one decoder training step: cached latents, online encoding, and the reference's order of work, in turn.

    python benchmarks/decoder_step.py --size DINOv2-B_decXL --batch 32 --precision bf16 --compile

All models have random weights of the real sizes, all inputs lie on the device: this is the step without its data. The
baseline does what bytetriper/RAE's train_stage1.py does with the same modules: the encoder runs twice, attention is an
explicit softmax, LPIPS and the discriminator run backward twice for the adaptive weight, fake and real go through the
discriminator's backbone one after the other, and the EMA is a loop over parameters.

Needs torch and transformers. Where lpips is missing, a VGG16 of the same layers takes its place; where DeepSpeed is
missing, the engine is ddp; each is said in a line.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_file import RESULTS, make_result, print_table, row, write_result
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae_fast.autoencoder.assembly import Players, RunPlan, build_players
from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.batch import DecoderBatch, as_tokens
from rae_fast.autoencoder.losses import (
    VGG_CONVOLUTIONS,
    Lpips,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from rae_fast.autoencoder.objective import Phase, augment_draws, discretized
from rae_fast.autoencoder.rae import add_latent_noise
from rae_fast.config import (
    Cache,
    Config,
    Discriminator,
    DiscriminatorArch,
    Gan,
    GanLoss,
    Runtime,
    Stage1,
    Stage1Params,
    Training,
)
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import Ranks, pick_device
from rae_fast.training.batching import BatchPlan

BASELINE = "reference's order of work"
ALL_ON = Phase(perceptual=True, adversarial=True, discriminator=True)
VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_POOLED = (4, 9, 16, 23)  # places in torchvision's `features` where the side is halved
DECODER_EMA, DISC_WEIGHT = 0.9978, 0.75
TINY_DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}
TINY_DINO = {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8, "image_size": 64}
DINO_S8 = {"depth": 12, "embed_dim": 384, "num_heads": 6, "patch_size": 8, "image_size": 224}
DINOV2_B = (768, 12, 12, 14, 224)
# encoder (width, layers, heads, patch, input size), decoder config, discriminator recipe
SIZES: dict[str, tuple[tuple[int, ...], Any, dict[str, int]]] = {
    "tiny": ((64, 2, 2, 8, 32), TINY_DECODER, TINY_DINO),
    "DINOv2-B_decB": (DINOV2_B, "ViTB", DINO_S8),
    "DINOv2-B_decL": (DINOV2_B, "ViTL", DINO_S8),
    "DINOv2-B_decXL": (DINOV2_B, "ViTXL", DINO_S8),
}
Step = Callable[[int], object]


# --- models ---------------------------------------------------------------------------------------------------------


def make_config(args: argparse.Namespace, folder: Path) -> Config:
    """A config over random weights of the size, written to `folder`."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    (width, layers, heads, patch, side), decoder, recipe = SIZES[args.size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=side, num_register_tokens=4))
    model.save_pretrained(folder / "encoder")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(statistics))
    if isinstance(decoder, dict):
        (folder / "config.json").write_text(json.dumps(decoder))
        decoder = str(folder)
    params = Stage1Params(
        encoder_params={"dinov2_path": str(folder / "encoder")}, encoder_input_size=side, decoder_config_path=decoder
    )
    return Config(
        stage_1=Stage1(params=params),
        cache=Cache(precision=args.precision),
        gan=Gan(
            disc=Discriminator(arch=DiscriminatorArch(recipe=recipe, ks=9)),
            loss=GanLoss(disc_weight=DISC_WEIGHT, perceptual_weight=1.0),
        ),
        training=Training(global_batch_size=args.batch, clip_grad=0.0, ema_decay=DECODER_EMA),
        runtime=Runtime(precision=args.precision, engine=args.engine, compile=args.compile),
    )


def random_vgg() -> dict[str, Tensor]:
    """VGG16's convolutions with random weights, under torchvision's names: a step costs the same."""
    weights = {}
    for i, layer in enumerate(VGG_CONVOLUTIONS):
        inputs, outputs = VGG_CHANNELS[i : i + 2]
        weights[f"features.{layer}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        weights[f"features.{layer}.bias"] = torch.zeros(outputs)
    return weights


class VggDistance(nn.Module):
    """LPIPS's work without its package: VGG16, unit-length features, a weighted mean of squares at five depths."""

    def __init__(self, vgg: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name.replace(".", "_"): tensor for name, tensor in vgg.items()})
        depths = [i for i, layer in enumerate(VGG_CONVOLUTIONS) if layer + 2 in VGG_POOLED or layer == 28]
        self.heads = nn.ParameterDict({str(VGG_CONVOLUTIONS[i]): torch.rand(VGG_CHANNELS[i + 1]) for i in depths})
        self.requires_grad_(False)

    def forward(self, recon_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Mean distance of images in [0, 1], a scalar."""
        recon, target = (self.features(2 * x - 1) for x in (recon_B3HW, target_B3HW))
        total = torch.zeros((), device=recon_B3HW.device)
        for name, head in self.heads.items():
            difference = F.normalize(recon[name].float(), dim=1) - F.normalize(target[name].float(), dim=1)
            total = total + (difference.square() * head[:, None, None]).sum(1).mean()
        return total

    def features(self, x_B3HW: Tensor) -> dict[str, Tensor]:
        """Activations by the place of their convolution in torchvision's `features`."""
        found, x = {}, x_B3HW
        for layer in VGG_CONVOLUTIONS:
            if any(place < layer and place > layer - 3 for place in VGG_POOLED):
                x = F.max_pool2d(x, 2)
            weight, bias = (self.weights[f"features_{layer}_{kind}"] for kind in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found[str(layer)] = x
        return found


def build_distance(device: torch.device) -> nn.Module:
    """LPIPS with random VGG weights, or what stands in for it."""
    if installed("lpips"):
        distance: nn.Module = Lpips(random_vgg())
    else:
        print("lpips is not installed here: a VGG16 of the same layers takes its place")
        distance = VggDistance(random_vgg())
    distance = distance.to(device)
    return distance.to(memory_format=torch.channels_last) if device.type == "cuda" else distance


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def assemble(config: Config, device: torch.device) -> Players:
    """Engines and losses as training builds them."""
    batch = config.training.global_batch_size
    assert batch is not None
    plan = RunPlan(BatchPlan(batch, 1, batch), Ranks(), device, steps_per_epoch=1, total_steps=1000)
    return build_players(config, plan, build_distance(device))


# --- contenders -----------------------------------------------------------------------------------------------------


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
        # The reference's explicit softmax multiplies in bfloat16; torch's would go to float32 for it.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

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
        (reconstruction + DISC_WEIGHT * weight * adversarial).backward()
        self.optimizers[0].step()
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.decoder.parameters(), strict=True):
                ours.mul_(DECODER_EMA).add_(theirs, alpha=1 - DECODER_EMA)

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


# --- measuring ------------------------------------------------------------------------------------------------------


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each round")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--engine", choices=("ddp", "deepspeed"), default="ddp")
    parser.add_argument("--compile", action="store_true", help="compile our blocks; the baseline stays as it is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_step.json")
    args = parser.parse_args()
    if args.engine == "deepspeed" and not installed("deepspeed"):
        print("DeepSpeed is not installed here: the engine is ddp")
        args.engine = "ddp"
    return args


def contenders(args: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """The three steps by name, over models and inputs of their own."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args, Path(folder))
        encoder = LatentEncoder(config.stage_1.params, args.precision, device)
        players = assemble(config, device)
        plain = assemble(replace(config, runtime=replace(config.runtime, engine="ddp", compile=False)), device)
    side = config.stage_1.params.decoder_patch_size * encoder.latent_shape[1]
    images = torch.randint(0, 256, (args.batch, 3, side, side), dtype=torch.uint8, device=device)
    return {
        BASELINE: ReferenceStep(plain, encoder, images, args.precision == "bf16"),
        "online: encoder once": online_step(players, encoder, images),
        "cached: no encoder": cached_step(players, as_tokens(encoder(images)).float(), images),
    }


def main() -> None:
    """Measure all three in turn, round after round."""
    args = parse()
    device = pick_device(args.device)
    steps = contenders(args, device)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds_of(step, 0, 2, device)
    for number in range(args.rounds):
        for name, step in steps.items():
            rates[name].append(args.batch / seconds_of(step, number * args.steps, args.steps, device))
    result = make_result(
        "decoder_step",
        "How many images/s does one step of decoder training make, data aside?",
        BASELINE,
        [row(name, values, "images/s") for name, values in rates.items()],
        device,
        **{name: getattr(args, name) for name in ("size", "batch", "precision", "engine", "compile")},
        perceptual="lpips" if installed("lpips") else "VGG16 without lpips",
    )
    print_table(result)
    write_result(args.output, result)


if __name__ == "__main__":
    main()
