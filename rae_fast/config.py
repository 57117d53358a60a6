"""The typed schema of the YAML: the reference's sections with their meanings, and ours.

One file describes a whole job. `rae_fast.config_file` reads it, `rae_fast.geometry` checks sizes across sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# --- stage 1: encoder and decoder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage1Params:
    """Frozen encoder and ViT decoder."""

    # Dinov2withNorm or DINOv2, MAEwNorm or MAE, SigLIP2wNorm or SigLIP2, DINOv3, TimmViT
    encoder_cls: str = "Dinov2withNorm"
    encoder_config_path: str | None = None  # where the image processor's mean and std come from; None: the encoder
    encoder_input_size: int = 224  # side the image is resized to before the encoder, pixels
    # dinov2_path | model_name | path: hub id, folder or timm's name; revision: of the hub; normalize: false keeps the
    # last norm's weights; layers: blocks to average, as [11, 23]; dtype: fp32, bf16, fp16; compile: torch.compile;
    # attention: sdpa, eager, flash_attention_2; image_mean, image_std; weights: a file, for timm
    encoder_params: dict[str, Any] = field(default_factory=dict)
    decoder_config_path: str | None = None  # Hugging Face style config.json of the decoder, or its folder
    decoder_patch_size: int = 16  # side of a decoded patch, pixels
    pretrained_decoder_path: str | None = None  # weights of the decoder, as released (`model.pt`) or safetensors
    noise_tau: float = 0.8  # latent noise in decoder training: z + tau * u * n
    train_positions: bool = True  # of the decoder, as the reference does; diffusers can hold only untrained ones
    reshape_to_2d: bool = True  # latents as [C, H, W]; as in official files, which have no other
    normalization_stat_path: str | None = None  # stat.pt with `mean`, `var`; None: not normalized
    eps: float = 1e-5  # added to var


@dataclass(frozen=True)
class Stage1:
    """The representation autoencoder."""

    target: str = "stage1.RAE"  # stage1.RAE, RAE
    ckpt: str | None = None  # stage-1 training checkpoint; its decoder is taken
    params: Stage1Params = field(default_factory=Stage1Params)


# --- stage 2: the diffusion transformer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage2:
    """The diffusion transformer: `params` are its constructor's arguments, checked against `DIT_PARAMS`."""

    target: str = "stage2.models.DDT.DiTwDDTHead"  # that is DiTDH; or stage2.models.lightningDiT.LightningDiT
    ckpt: str | None = None  # weights to start from, to sample from: any checkpoint of the reference or of ours
    params: dict[str, Any] = field(default_factory=dict)  # see the table of stage_2.params


DIT_PARAMS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "learn_sigma",
    "use_qknorm",
    "use_swiglu",
    "use_rope",
    "use_rmsnorm",
    "wo_shift",
    "use_pos_embed",
    "use_gembed",
)


@dataclass(frozen=True)
class TransportParams:
    """Path between data (t = 0) and noise (t = 1), and what the model predicts."""

    path_type: str = "Linear"  # Linear, GVP, VP
    prediction: str = "velocity"  # velocity, noise, score, data
    loss_weight: str | None = None  # None, velocity, likelihood
    train_eps: float | None = None  # distance kept from singular times in training; None: as the reference chooses it
    sample_eps: float | None = None  # the same in sampling
    time_dist_type: str = "uniform"  # uniform, logit-normal_<mu>_<sigma>
    time_dist_shift: float | None = None  # accepted as in official files; the shift follows from `misc`


@dataclass(frozen=True)
class TransportSection:
    """Flow matching."""

    params: TransportParams = field(default_factory=TransportParams)


@dataclass(frozen=True)
class SamplerParams:
    """Numerical integration from noise to data."""

    sampling_method: str = "euler"  # ODE: euler, heun, midpoint, rk4, dopri5, ...; SDE: euler, heun
    num_steps: int = 50  # points (grid reference) or steps (grid full) in time
    grid: str = "reference"  # reference: num_steps points, ends before t = 0; full: num_steps steps to t = 0
    atol: float = 1e-6  # absolute tolerance of adaptive solvers
    rtol: float = 1e-3  # relative tolerance of adaptive solvers
    reverse: bool = False  # from data to noise
    diffusion_form: str = "sigma"  # SDE: SBDM, sigma, linear, constant, decreasing, increasing-decreasing
    diffusion_norm: float = 1.0  # SDE: factor of the diffusion coefficient
    last_step: str | None = "Mean"  # SDE: Mean, Tweedie, Euler, or None
    last_step_size: float = 0.04  # SDE: length of the last step


@dataclass(frozen=True)
class SamplerSection:
    """ODE or SDE sampling."""

    mode: str = "ODE"  # ODE, SDE
    params: SamplerParams = field(default_factory=SamplerParams)


@dataclass(frozen=True)
class GuidanceModel:
    """The weaker model of autoguidance."""

    target: str = "stage2.models.DDT.DiTwDDTHead"  # as stage_2.target
    ckpt: str | None = None  # weights of the guide
    params: dict[str, Any] = field(default_factory=dict)  # as stage_2.params


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance or autoguidance, active where t_min <= t <= t_max and scale > 1."""

    method: str = "cfg"  # cfg, autoguidance
    scale: float = 1.0  # 1 or less: no guidance
    t_min: float = 0.0  # first time with guidance
    t_max: float = 1.0  # last time with guidance
    guidance_model: GuidanceModel | None = None


@dataclass(frozen=True)
class Misc:
    """Sizes shared by training and sampling; whatever is None follows from the encoder or the data."""

    latent_size: list[int] | None = None  # [C, H, W]
    num_classes: int | None = None  # None: from the data
    null_label: int | None = None  # label that means "no class"; None: num_classes
    time_dist_shift_dim: int | None = None  # shift = sqrt(dim / base); None: C * H * W
    time_dist_shift_base: int = 4096  # see time_dist_shift_dim


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon on the matrices of blocks and AdamW on everything else."""

    type: str = "adamw"  # adamw, muon (runtime.engine: ddp)
    lr: float = 2e-4  # learning rate where the scheduler gives no base_lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the first and second moment
    weight_decay: float = 0.0  # decoupled from the gradient
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float = 0.95  # muon's
    decay_norms_and_biases: bool = True  # False: norms, biases and embeddings are not decayed


@dataclass(frozen=True)
class Scheduler:
    """Learning rate by optimizer step."""

    type: str = "constant"  # linear, cosine, constant, wsd
    warmup_steps: int | None = None  # optimizer steps at base_lr (or rising to it) before the decay
    warmup_epochs: float | None = None  # the same in epochs
    decay_end_steps: int | None = None  # optimizer step at which final_lr is reached
    decay_end_epoch: float | None = None  # the same in epochs
    base_lr: float | None = None  # None: the optimizer's lr
    final_lr: float | None = None  # learning rate from the end of the decay on
    warmup_from_zero: bool = False  # rise linearly from zero during the warm-up


@dataclass(frozen=True)
class Training:
    """How long, how large, how often; steps are optimizer steps."""

    epochs: int = 1400  # passes over the data
    max_steps: int | None = None  # stop after this many optimizer steps, whatever `epochs` says
    batch_size: int | None = None  # per rank and micro-step
    global_batch_size: int | None = None  # images per optimizer step over all ranks
    grad_accum_steps: int = 1  # micro-batches per optimizer step; follows from the two sizes if both are given
    ema_decay: Any = 0.9995  # a number, or a list of numbers: the first one is sampled and evaluated
    num_workers: int | None = None  # threads that read and decode; None: from the machine
    log_interval: int = 100  # steps between lines on the screen and in speed.jsonl
    checkpoint_interval: float | None = 4  # epochs
    checkpoint_every: int | None = None  # optimizer steps; wins over checkpoint_interval
    keep_checkpoints: int = 3  # newest checkpoints kept
    keep_every: int | None = None  # checkpoints at multiples of this many steps are never deleted
    sample_every: int | None = 2500  # steps between sample grids; None: never
    clip_grad: float | None = 1.0  # largest gradient norm; None or 0: no clipping
    global_seed: int = 0  # of initialization, order, views, times, noise and label drop
    cfg_scale: float | None = None  # overrides guidance.scale while training
    max_nonfinite: int = 10  # stop after this many non-finite steps in a row
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)


@dataclass(frozen=True)
class Eval:
    """Evaluation while training."""

    eval_interval: int | None = None  # optimizer steps; None: never
    eval_model: bool = False  # also evaluate the online weights
    data_path: str | None = None  # held-out images
    reference_npz_path: str | None = None  # reference statistics or images of the generation metrics
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])  # psnr, ssim, lpips, rfid (decoder training)
    features: str = "inception"  # of rfid: inception, encoder, or my_module:function
    num_images: int = 256  # images or samples evaluated


# --- decoder training: the discriminator ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscriminatorArch:
    """Heads on a frozen DINO ViT."""

    dino_ckpt_path: str | None = None  # weights file of the frozen ViT; None: timm's
    ks: int = 3  # kernel size of the residual convolution of each head
    # blocks whose output a head reads, beside the last one
    key_depths: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    norm_type: str = "bn"  # bn: per image and channel; gn: groups
    using_spec_norm: bool = True  # spectral norm on the heads' convolutions
    norm_eps: float = 1e-6  # of the heads' norms
    recipe: Any = "S_8"  # S_8, S_16, B_16, or a mapping of ViT sizes


@dataclass(frozen=True)
class Augment:
    """Differentiable augmentation of what the discriminator sees; a negative `prob` disables cutout."""

    prob: float = 1.0  # probability of each policy; negative: the same without cutout
    cutout: float = 0.0  # side of the cut square as a share of the image; 0: none


@dataclass(frozen=True)
class Discriminator:
    """The discriminator, its optimizer and schedule."""

    arch: DiscriminatorArch = field(default_factory=DiscriminatorArch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    augment: Augment = field(default_factory=Augment)


@dataclass(frozen=True)
class GanLoss:
    """Weights of the decoder's losses, and when each begins."""

    disc_loss: str = "hinge"  # hinge, vanilla
    gen_loss: str = "vanilla"  # hinge, vanilla
    disc_weight: float = 0.0  # of the adversarial loss, before the adaptive weight
    perceptual_weight: float = 0.0  # of the perceptual loss
    perceptual: str = "lpips"  # lpips, or encoder: distance in the frozen encoder's own features
    lpips_weights: str | None = None  # VGG16 weights file; None: torchvision's cache
    disc_start: float = 0  # when the adversarial loss begins
    disc_upd_start: float | None = None  # None: disc_start
    lpips_start: float = 0  # when the perceptual loss begins
    starts_in: str = "epochs"  # unit of the three starts: epochs, images
    max_d_weight: float = 1e4  # largest adaptive weight
    disc_updates: int = 1  # discriminator steps per decoder step


@dataclass(frozen=True)
class Gan:
    """L1 + perceptual + adversarial decoder training."""

    disc: Discriminator = field(default_factory=Discriminator)
    loss: GanLoss = field(default_factory=GanLoss)


# --- ours: data, cache, loader, engine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Where images come from and how they are decoded."""

    source: str | None = None  # ImageFolder, tar pattern, parquet pattern, or a list of path,label
    kind: str = "auto"  # auto, imagefolder, folder, webdataset, parquet, list
    val_source: str | None = None  # held-out images, same kind
    image_size: int | None = None  # side of the crop; None: the side that the decoder makes
    crop: str = "exact"  # exact: bit-equal to the reference's crop; fast: DALI end to end
    train_crop: str = "center"  # center, or random (decoder training online): resize, then a random crop
    random_resize: int | None = None  # short side before a random crop; None: 1.5 * image_size
    limit: int | None = None  # only the first images
    threads: int | None = None  # None: from the machine
    batch_size: int | None = None  # images decoded at once; None: by image size
    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's hardware decoder (crop: fast)


@dataclass(frozen=True)
class Cache:
    """The latent store."""

    path: str | None = None  # folder or URL of a zarr group
    codec: str = "lossless"  # lossless, balanced, compact
    # original, and hflip (the flipped image, encoded)
    views: list[str] = field(default_factory=lambda: ["original", "hflip"])
    shard_size: int = 2048  # samples in one file
    pixels: bool = False  # keep uint8 crops, so that decoder training never touches a JPEG
    pixels_from: str | None = None  # a store that kept its pixels: encode those, for another encoder, and no JPEG
    # other stores made from the same decode: each a `path`, and dotted keys of this config that differ for it
    also: list[dict[str, Any]] = field(default_factory=list)
    statistics: str = "compute"  # compute, none, given (stage_1.params.normalization_stat_path), or a stat.pt
    statistics_images: int | None = None  # None: all; else a seeded subset of this size
    encode_batch: int | None = None  # None: found by trial within memory
    precision: str = "bf16"  # of the encoder


@dataclass(frozen=True)
class Loader:
    """How training reads latents."""

    source: str = "cached"  # cached, or online: decode and encode in every step
    shuffle: str = "global"  # global, block, none
    block_size: int = 4096  # samples per block of the block shuffle
    flip: bool = True  # draw the hflip view half of the time, if the store has it
    prefetch: int = 4  # batches kept ready
    reader: str = "auto"  # auto, native, buffered, object, tensorstore, zarr
    verify: bool = True  # check each sample's checksum
    classes: list[int] | None = None  # only these classes
    balanced: bool = False  # every class equally often


@dataclass(frozen=True)
class Runtime:
    """The machine."""

    device: str = "auto"  # auto, cpu, cuda, xla
    precision: str = "bf16"  # fp32, tf32, bf16
    engine: str = "deepspeed"  # deepspeed, ddp
    kernels: str = "torch"  # torch, triton
    compile: bool = False  # torch.compile of each block and a DiT's last layer
    activation_checkpointing: bool = False  # recompute each block's activations in the backward pass
    profile: str | None = None  # steps to trace, as "10..15"
    deterministic: bool = False  # kernels whose sums have a fixed order: two runs on one machine agree bit for bit
    spmd: bool = False  # xla: one process drives all its devices; batch and weights are cut over them
    stall_s: float = 300.0  # say which rank waits for what when no training step has ended for so long


@dataclass(frozen=True)
class Logging:
    """Where a run keeps what it makes."""

    run_folder: str | None = None  # None: runs/<name of the config file>
    wandb: str = "off"  # off, online, offline
    tensorboard: bool = False  # event files in the run folder's tensorboard/
    project: str = "rae_fast"  # wandb project
    entity: str | None = None  # wandb entity
    name: str | None = None  # wandb name; None: the run folder's


@dataclass(frozen=True)
class Config:
    """The whole YAML."""

    stage_1: Stage1 = field(default_factory=Stage1)
    stage_2: Stage2 = field(default_factory=Stage2)
    transport: TransportSection = field(default_factory=TransportSection)
    sampler: SamplerSection = field(default_factory=SamplerSection)
    guidance: Guidance = field(default_factory=Guidance)
    misc: Misc = field(default_factory=Misc)
    training: Training = field(default_factory=Training)
    eval: Eval = field(default_factory=Eval)
    gan: Gan = field(default_factory=Gan)
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    loader: Loader = field(default_factory=Loader)
    deepspeed: Any = None  # a DeepSpeed config, inline or the path of its JSON; None: ZeRO stage 1
    runtime: Runtime = field(default_factory=Runtime)
    logging: Logging = field(default_factory=Logging)


CHOICES: dict[str, tuple[str, ...]] = {
    "stage_1.target": ("stage1.RAE", "RAE"),
    "stage_1.params.encoder_cls": (
        "Dinov2withNorm",
        "MAEwNorm",
        "SigLIP2wNorm",
        "DINOv2",
        "DINOv3",
        "MAE",
        "SigLIP2",
        "TimmViT",
    ),
    "transport.params.path_type": ("Linear", "GVP", "VP"),
    "transport.params.prediction": ("velocity", "noise", "score", "data"),
    "sampler.mode": ("ODE", "SDE"),
    "sampler.params.grid": ("reference", "full"),
    "guidance.method": ("cfg", "autoguidance"),
    "training.optimizer.type": ("adamw", "muon"),
    "training.scheduler.type": ("linear", "cosine", "constant", "wsd"),
    "gan.disc.arch.norm_type": ("bn", "gn"),
    "gan.loss.disc_loss": ("hinge", "vanilla"),
    "gan.loss.gen_loss": ("hinge", "vanilla"),
    "gan.loss.perceptual": ("lpips", "encoder"),
    "gan.loss.starts_in": ("epochs", "images"),
    "data.kind": ("auto", "imagefolder", "folder", "webdataset", "parquet", "list"),
    "data.crop": ("exact", "fast"),
    "data.train_crop": ("center", "random"),
    "cache.codec": ("lossless", "balanced", "compact"),
    "cache.precision": ("fp32", "tf32", "bf16", "fp16"),
    "loader.source": ("cached", "online"),
    "loader.shuffle": ("global", "block", "none"),
    "loader.reader": ("auto", "native", "buffered", "object", "tensorstore", "zarr"),
    "runtime.device": ("auto", "cpu", "cuda", "xla"),
    "runtime.precision": ("fp32", "tf32", "bf16"),
    "runtime.engine": ("deepspeed", "ddp"),
    "runtime.kernels": ("torch", "triton"),
    "logging.wandb": ("off", "online", "offline"),
}
