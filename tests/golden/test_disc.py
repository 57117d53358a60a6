"""Decoder training against the numbers of the reference (golden README, section 4): each part, and a whole step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from rae_fast.autoencoder import step as step_module
from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.batch import DecoderBatch, as_tokens
from rae_fast.autoencoder.decoder import ViTDecoder
from rae_fast.autoencoder.discriminator import (
    DinoBackbone,
    DinoRecipe,
    DiscriminatorHeads,
    SpectralConv1d,
    load_backbone_weights,
)
from rae_fast.autoencoder.losses import (
    VGG_CONVOLUTIONS,
    Lpips,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    vanilla_discriminator_loss,
)
from rae_fast.autoencoder.objective import AugmentDraws, DecoderObjective, GeneratorTerms, Phase
from rae_fast.autoencoder.rae import RAE, add_latent_noise, build_rae
from rae_fast.autoencoder.step import DecoderStep
from rae_fast.config import GanLoss, Optimizer, Runtime, Stage1, Stage1Params
from rae_fast.runtime import Ranks
from rae_fast.training.engine import Engine

if TYPE_CHECKING:
    from conftest import Golden

GATE = 5e-5
ELEMENTWISE_GATE = 2e-6
NO_GRADIENT = 1e-6
DISCRIMINATORS = pytest.mark.golden("disc/disc_*.npz")
VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def assert_gradients(parameters: dict[str, Tensor], arrays: Golden, prefix: str, gate: float = GATE) -> None:
    """Norm of each parameter's gradient, and its checksum sum(g_i cos(0.1 i))."""
    names = [str(name) for name in arrays.arrays[f"{prefix}param_names"]]
    assert set(names) == set(parameters)
    largest = float(arrays[f"{prefix}param_norms"].max())
    for name, norm, checksum in zip(
        names, arrays[f"{prefix}param_norms"], arrays[f"{prefix}param_cosdot"], strict=True
    ):
        grad = parameters[name].grad.double().flatten()
        scale = float(norm)
        if scale < NO_GRADIENT * largest:  # a bias in front of a norm: what is left is rounding
            assert grad.norm() < NO_GRADIENT * largest, name
            continue
        assert abs(grad.norm() - norm) <= gate * scale, name
        ours = (grad * torch.cos(0.1 * torch.arange(len(grad), dtype=torch.float64))).sum()
        assert abs(ours - checksum) <= gate * scale * len(grad) ** 0.5, name


def build(arrays: Golden) -> tuple[DinoBackbone, DiscriminatorHeads]:
    sizes, arch = arrays.meta["recipe"], arrays.meta["arch_cfg"]
    known = ("depth", "embed_dim", "num_heads", "patch_size", "mlp_ratio", "norm_eps")
    backbone = DinoBackbone(DinoRecipe(**{key: sizes[key] for key in known}), arch["key_depths"])
    load_backbone_weights(backbone, arrays.tensors("dino_sd/"), "fixture")
    heads = DiscriminatorHeads(
        1 + len(backbone.key_depths),
        sizes["embed_dim"],
        kernel_size=arch["ks"],
        norm_type=arch["norm_type"],
        spectral_norm=arch["using_spec_norm"],
    )
    heads.load_state_dict(arrays.tensors("sd/"), strict=True)
    return backbone, heads


@DISCRIMINATORS
def test_backbone_activations_are_the_reference_s(golden: Golden) -> None:
    backbone, _ = build(golden)
    activations = backbone(golden["in/fake"][:1])
    assert len(activations) == golden.meta["n_heads"]
    for i, activation in enumerate(activations):
        assert relative(activation, golden[f"out/eval_act{i}"]) <= GATE


@DISCRIMINATORS
def test_training_logits_loss_and_head_gradients_are_the_reference_s(golden: Golden) -> None:
    backbone, heads = build(golden)
    heads.train()
    fake, real = heads(backbone(golden["in/fake"])), heads(backbone(golden["in/real"]))
    assert relative(fake, golden["out/train_logits_fake"]) <= GATE
    assert relative(real, golden["out/train_logits_real"]) <= GATE
    loss = hinge_discriminator_loss(real, fake)
    loss.backward()
    assert relative(loss, golden["grad/d_loss_hinge"]) <= GATE
    assert_gradients(dict(heads.named_parameters()), golden, "grad/")


@DISCRIMINATORS
def test_evaluation_logits_and_image_gradient_are_the_reference_s(golden: Golden) -> None:
    backbone, heads = build(golden)
    heads.eval()
    if golden.meta["arch_cfg"]["using_spec_norm"]:
        restore_untrained_sigma(heads, backbone, golden)
    fake = golden["in/fake"].requires_grad_()
    logits = heads(backbone(fake))
    assert relative(logits, golden["out/eval_logits_fake"]) <= GATE
    assert relative(heads(backbone(golden["in/real"])), golden["out/eval_logits_real"]) <= GATE
    loss = generator_loss(logits)
    assert relative(loss, golden["grad/g_loss"]) <= GATE
    assert relative(torch.autograd.grad(loss, fake)[0], golden["grad/g_loss_wrt_fake"]) <= GATE


@torch.no_grad()
def restore_untrained_sigma(heads: DiscriminatorHeads, backbone: DinoBackbone, arrays: Golden) -> None:
    """Find the u that the evaluation logits were made with.

    The fixture's `weight_u` and `weight_v` equal those of `after_train_fwd`, although evaluation ran before: what is
    missing is one number a convolution, its sigma = u^T W v. In front of a norm only sigma's sign matters; the sigma
    of the last convolution is a scale, found from one logit. All other logits, and both gradients, remain to be met.
    """
    tokens = arrays.meta["logits_len"] // arrays.meta["n_heads"]
    wanted = arrays["out/eval_logits_fake"]
    activations = backbone(arrays["in/fake"])
    for i, head in enumerate(heads.heads):
        theirs = wanted[:, i * tokens : (i + 1) * tokens]
        norms = [module for module in head.modules() if isinstance(module, SpectralConv1d)]
        best: tuple[float, Callable[[], None]] | None = None
        for signs in itertools.product((1.0, -1.0), repeat=2):
            ours = head_logits(head, norms, signs, activations[i])
            shift = float(norms[2].bias)
            at = int((ours - shift).abs().argmax())
            scale = float((theirs.flatten()[at] - shift) / (ours.flatten()[at] - shift))
            error = relative((ours - shift) * scale + shift, theirs)
            if best is None or error < best[0]:
                best = (error, lambda n=norms, s=signs, k=scale: keep(n, s, k))
        assert best is not None
        best[1]()


def head_logits(head: torch.nn.Module, convs: list[SpectralConv1d], signs: tuple[float, ...], x: Tensor) -> Tensor:
    keep(convs, signs, 1.0)
    logits = head(x).flatten(1)
    keep(convs, signs, 1.0)
    return logits


def keep(convs: list[SpectralConv1d], signs: tuple[float, ...], scale: float) -> None:
    """Flip or scale each convolution's u (twice with the same signs restores it)."""
    for conv, sign in zip(convs, signs, strict=False):
        conv.weight_u.mul_(sign)
    convs[2].weight_u.div_(scale)


@pytest.fixture
def losses(read_golden: Callable[[str], Golden]) -> Golden:
    return read_golden("disc/losses_aug_lpips.npz")


def test_augmentation_with_given_draws_is_the_reference_s(losses: Golden) -> None:
    cases = {name.removeprefix("diffaug/"): value for name, value in losses.meta.items() if name.startswith("diffaug/")}
    assert cases
    for case, arguments in cases.items():
        ours = DiffAugment(**arguments)(
            losses["diffaug/x"], losses[f"diffaug/u3/{case}"], losses["diffaug/u7"].reshape(7, -1)
        )
        assert relative(ours, losses[f"diffaug/out/{case}"]) <= ELEMENTWISE_GATE, case


def test_adversarial_losses_are_the_reference_s(losses: Golden) -> None:
    real, fake = losses["gan/logits_real"], losses["gan/logits_fake"]
    assert relative(hinge_discriminator_loss(real, fake), losses["gan/hinge_d_mean"]) <= ELEMENTWISE_GATE
    assert relative(vanilla_discriminator_loss(real, fake), losses["gan/vanilla_d_mean"]) <= ELEMENTWISE_GATE
    assert relative(generator_loss(fake), losses["gan/vanilla_g_mean"]) <= ELEMENTWISE_GATE


def test_adaptive_weight_is_the_reference_s(losses: Golden) -> None:
    """The cases differ by a factor of the adversarial loss, which its recorded value tells."""
    weight = losses["adapt/W"].requires_grad_()
    y = losses["adapt/x"] @ weight.T
    reconstruction, adversarial = (y - losses["adapt/target"]).abs().mean(), -(y @ losses["adapt/v"]).mean()
    (rec_grad,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(adversarial, weight)
    cases = [name.removeprefix("adapt/d_weight/") for name in losses.names("adapt/d_weight/")]
    assert cases
    for case in cases:
        assert relative(reconstruction, losses[f"adapt/rec_loss/{case}"]) <= ELEMENTWISE_GATE, case
        scale = losses[f"adapt/gan_loss/{case}"] / adversarial.detach()
        ours = adaptive_weight(rec_grad, gan_grad * scale)
        assert relative(ours, losses[f"adapt/d_weight/{case}"]) <= ELEMENTWISE_GATE, case


def formula_vgg() -> dict[str, Tensor]:
    """The weights that the README defines by a formula, under torchvision's names."""
    weights = {}
    for i, layer in enumerate(VGG_CONVOLUTIONS):
        inputs, outputs = VGG_CHANNELS[i : i + 2]
        k = np.arange(outputs * inputs * 9, dtype=np.float64)
        u = np.mod(0.6180339887498949 * k + 0.37 * (i + 1) + 1e-7 * k * k % 1.0, 1.0) - 0.5
        kernel = u * np.sqrt(12) * np.sqrt(2 / (inputs * 9))
        bias = 0.1 * (np.mod(0.7548776662466927 * np.arange(outputs) + 0.11 * i, 1.0) - 0.5)
        weights[f"features.{layer}.weight"] = torch.from_numpy(kernel.reshape(outputs, inputs, 3, 3)).float()
        weights[f"features.{layer}.bias"] = torch.from_numpy(bias).float()
    return weights


def test_lpips_and_its_gradient_are_the_reference_s(losses: Golden) -> None:
    lpips = Lpips(formula_vgg())
    recon = ((losses["lpips/b"] + 1) / 2).requires_grad_()
    target = (losses["lpips/a"] + 1) / 2
    distance = lpips(recon, target)
    assert relative(distance, losses["lpips/out_mean"]) <= GATE
    (grad,) = torch.autograd.grad(distance, recon)
    assert relative(grad / 2, losses["lpips/grad_b"]) <= GATE  # [0, 1] against the fixture's [-1, 1]
    assert float(lpips(target, target)) == float(losses["lpips/out_self"].max()) == 0.0
    assert relative(lpips.distances(recon, target), losses["lpips/out_none"].flatten()) <= GATE


# --- one whole step -------------------------------------------------------------------------------------------------


ALL_ON = Phase(perceptual=True, adversarial=True, discriminator=True)
ULP = 6e-8


@dataclass
class Step:
    """The step's inputs, and the models before it."""

    arrays: Golden
    tau: float
    optimizer: Optimizer
    rae: RAE
    heads: DiscriminatorHeads
    objective: DecoderObjective
    batch: DecoderBatch
    draws: AugmentDraws
    noised_BNC: Tensor

    @property
    def decoder(self) -> ViTDecoder:
        assert self.rae.decoder is not None
        return self.rae.decoder

    def decode(self) -> tuple[Tensor, GeneratorTerms]:
        """Patches, and the decoder's losses on them."""
        last_input = step_module.last_layer_input(self.decoder)
        patches = self.decoder(self.noised_BNC)
        images = self.batch.images_B3SS
        parts = self.objective.generator(patches, last_input()[:, 1:], images, self.heads, self.draws, ALL_ON)
        return patches, self.objective.balanced([parts])[0]


@pytest.fixture
def step(golden_file: Callable[[str], Path], read_golden: Callable[[str], Golden]) -> Step:
    arrays = read_golden("disc/stage1_step.npz")
    autoencoder, tau = found_in(arrays.meta["rae"], r"([\w/]+), no stat file, noise_tau ([\d.]+)")
    (discriminator,) = found_in(arrays.meta["disc"], r"weights of (\S+\.npz)")
    lr, *betas = map(float, found_in(arrays.meta["optimizer"], r"AdamW lr (\S+) betas (\S+) (\S+) wd 0 eps 1e-8"))
    fixture = read_golden(f"{autoencoder}/fixture.npz")
    folder, spec = fixture.path.parent, fixture.meta["spec"]
    params = Stage1Params(
        encoder_cls=spec["cls"],
        encoder_params={"path": str(folder / "encoder")},
        encoder_input_size=spec["enc_in"],
        decoder_config_path=str(folder / "decoder_config"),
        decoder_patch_size=spec["dec"]["patch"],
        pretrained_decoder_path=str(folder / "decoder_model.pt"),
    )
    rae = build_rae(Stage1(params=params)).eval()
    rae.decoder.requires_grad_(True)
    backbone, heads = build(read_golden(discriminator))
    images = fixture["in/image"]
    batch = DecoderBatch(as_tokens(rae.encode_raw(images)), images, torch.arange(len(images)), 0)
    draws = [arrays[f"in/aug_u7_{which}"].reshape(7, -1) for which in ("gen", "fake", "real")]
    objective = DecoderObjective(
        GanLoss(**{name: arrays.meta[name] for name in ("disc_weight", "perceptual_weight", "max_d_weight")}),
        rae.patches_to_pixels,
        Lpips(formula_vgg()),
        backbone,
        DiffAugment(prob=1.0, cutout=0.0),
    )
    noised = add_latent_noise(batch.tokens_BNC, float(tau), arrays["in/noise_u"], arrays["in/noise_n"])
    augment = AugmentDraws(torch.zeros(3, 3), torch.stack(draws))
    optimizer = Optimizer(lr=lr, betas=betas)
    found = Step(arrays, float(tau), optimizer, rae, heads, objective, batch, augment, noised)
    found.noised_BNC = on_the_recorded_side(found)
    return found


def found_in(text: str, pattern: str) -> tuple[str, ...]:
    """The groups of a pattern in one of the file's notes."""
    match = re.search(pattern, text)
    assert match is not None, f"{text!r} does not say {pattern}"
    return match.groups()


def on_the_recorded_side(step: Step) -> Tensor:
    """The noised latents, moved by the last bit of a float32 where that is needed.

    The recorded state lies so close to a kink (of a ReLU, say) that rounding decides on which side of it a run comes
    out: the decoder's gradients then differ by 4e-4. Among a few such moves there must be one whose gradients are the
    recorded ones.
    """
    exact = step.noised_BNC
    wanted = float(step.arrays["g/param_norms"][list(step.arrays.arrays["g/param_names"]).index("decoder_embed.bias")])
    for seed in range(12):
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        step.noised_BNC = exact * (1 + ULP * noise) if seed else exact
        patches, terms = step.decode()
        (grad,) = torch.autograd.grad(terms.surrogate(patches), step.decoder.decoder_embed.bias)
        if abs(float(grad.norm()) / wanted - 1) <= GATE:
            return step.noised_BNC
    raise AssertionError("no state within rounding of the recorded one has its gradients")


def test_step_decoder_losses_and_gradients_are_the_reference_s(step: Step) -> None:
    patches, terms = step.decode()
    recon = step.rae.patches_to_pixels(patches)
    assert relative(recon[: len(step.arrays["g/recon"])], step.arrays["g/recon"]) <= GATE
    named = {"rec_loss": "l1", "lpips": "perceptual", "gan": "adversarial"}
    for theirs in ("rec_loss", "lpips", "gan", "adaptive_weight", "total"):
        assert relative(getattr(terms, named.get(theirs, theirs)), step.arrays[f"g/{theirs}"]) <= GATE, theirs
    surrogate = terms.surrogate(patches)
    assert relative(surrogate, step.arrays["g/total"]) <= GATE
    surrogate.backward()
    assert_gradients(dict(step.decoder.named_parameters()), step.arrays, "g/")
    assert all(parameter.grad is None for parameter in step.heads.parameters())


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_step_updates_both_players_as_the_reference(step: Step, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (average,) = step.arrays.tensors("g/ema").items()
    decay, averaged = average[0].split("_", 1)
    (moved,) = step.arrays.tensors("g/after_step_").items()
    shared = {
        "optimizer": step.optimizer,
        "lr": lambda _: step.optimizer.lr,
        "ranks": Ranks(),
        "device": torch.device("cpu"),
        "runtime": Runtime(precision="fp32", engine=engine),
        "micro_batch": len(step.batch.index_B),
    }
    generator = Engine(step.decoder, ema_decays=[float(decay)], **shared)
    discriminator = Engine(step.heads, **shared)
    monkeypatch.setattr(step_module, "augment_draws", lambda *_: step.draws)
    update = DecoderStep(generator, discriminator, step.objective, tau=step.tau, seed=0)
    monkeypatch.setattr(update, "noised", lambda _: step.noised_BNC)
    before = {name: tensor.clone() for name, tensor in discriminator.weights().items()}
    figures = dict(zip(step_module.FIGURES, update([step.batch], 0, ALL_ON), strict=True))
    named = {"l1": "g/rec_loss", "perceptual": "g/lpips", "adversarial": "g/gan", "loss": "g/total"}
    named |= {"adaptive_weight": "g/adaptive_weight", "disc_loss": "d/loss", "disc_accuracy": "d/accuracy"}
    for ours, theirs in named.items():
        assert relative(figures[ours], step.arrays[theirs]) <= GATE, ours
    assert relative(generator.weights()[moved[0]], moved[1]) <= GATE
    assert relative(generator.ema_weights()[averaged], average[1]) <= GATE
    assert any(not torch.equal(tensor, before[name]) for name, tensor in discriminator.weights().items())
    for part in (generator, discriminator):
        part.close()


def test_step_discriminator_sees_what_the_reference_s_sees(step: Step) -> None:
    lr, betas = step.optimizer.lr, tuple(step.optimizer.betas)
    optimizer = torch.optim.AdamW(step.decoder.parameters(), lr=lr, betas=betas, weight_decay=0)
    patches, terms = step.decode()
    terms.surrogate(patches).backward()
    optimizer.step()
    with torch.no_grad():
        fake = step.rae.patches_to_pixels(step.decoder(step.batch.tokens_BNC))
    first = (step.arrays["d/fake_discretised"] + 1) / 2
    assert (fake[:1].clamp(0, 1) - first).abs().max() <= 0.502 / 255  # some lie on the edge between two levels
    fake[:1] = first
    step.heads.train()
    ours = step.objective.discriminator(step.heads, fake, step.batch.images_B3SS, step.draws)
    assert relative(ours.fake_logits[:1], step.arrays["d/logits_fake"][:1]) <= GATE
    assert relative(ours.real_logits, step.arrays["d/logits_real"]) <= GATE
    assert relative(ours.loss, step.arrays["d/loss"]) <= GATE
    assert float(ours.accuracy) == pytest.approx(float(step.arrays["d/accuracy"]), abs=1e-6)
    ours.loss.backward()
    # The second image is not recorded: one of its values may round to the other level.
    assert_gradients(dict(step.heads.named_parameters()), step.arrays, "d/", gate=4 * GATE)
