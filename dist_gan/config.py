"""Every setting of a run, as typed sections with a docstring under each field.

A part is chosen by its `kind`; there is no inheritance between files, no interpolation and no class path. The
defaults are a complete run, the embedded one: shapes that the program draws itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dist_gan.config_values import Count as Count
from dist_gan.config_values import Decay as Decay
from dist_gan.config_values import Knob as Knob
from dist_gan.config_values import Place as Place
from dist_gan.config_values import PlaceOrNone as PlaceOrNone
from dist_gan.config_values import Ramp as Ramp
from dist_gan.config_values import Real as Real
from dist_gan.config_values import Section as Section
from dist_gan.config_values import Whole as Whole
from dist_gan.config_values import each_folder_once
from dist_gan.config_values import parse_number as parse_number


class RunSection(Section):
    """The run as a whole."""

    dir: Place = "runs/shapes"
    """Folder of the run: configuration, logs, samples, checkpoints. The same folder again resumes."""
    images: Annotated[Count, Field(gt=0)] = 240_000
    """Real images that the discriminator learns from before the run ends."""
    batch: Annotated[Count, Field(gt=0, le=2**20)] = 64
    """Images a discriminator update, over all processes and micro-batches."""
    d_updates: Annotated[Count, Field(ge=1, le=1000)] = 1
    """Discriminator updates for each generator update."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run is a function of it."""
    resume: Place = "auto"
    """`auto`: from the newest checkpoint in `dir`; `never`: only into an empty folder; or a checkpoint's path."""
    init_from: Place | None = None
    """Run folder, checkpoint or exported generator whose weights a new run begins with, as far as names and shapes fit."""
    profile: bool = False
    """Record steps 10 to 15 with torch's profiler into the TensorBoard folder."""


class DataOrder(Section):
    """What any image data set is read by."""

    holdout: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Share of the images kept from training, chosen by a hash of the key."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    lanes: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Logical readers that the order is dealt over; at least one for each process."""
    block: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Neighbouring images of a shard that are read at once and shuffled together."""
    balance: bool = False
    """Draw every class equally often, however many images it has."""
    prefetch: Annotated[Count, Field(ge=1, le=64)] = 4
    """Batches decoded ahead of need."""
    workers: Annotated[Count, Field(ge=1, le=256)] = 2
    """Threads of a process that decode."""
    memory: Annotated[Count, Field(ge=2**20, le=2**42)] = 2**29
    """Bytes of image files that a process may hold; where the blocks of all lanes do not fit, images are read singly."""
    cache: Annotated[Count, Field(ge=0, le=2**42)] = 2**28
    """Bytes that a process may keep decoded; a data set that fits is decoded once, any other at every pass."""
    bad_images: Literal["substitute", "fail"] = "substitute"
    """What becomes of an image that is damaged: the next sound one in its shard takes its place, or the run ends."""
    max_bad: Annotated[Real, Field(ge=0, le=1)] = 1e-3
    """Share of the images that may be substituted before the run ends; one is always allowed."""


class ShapesData(DataOrder):
    """Pictures that the program draws: 4 shapes in 3 colours, 32x32."""

    kind: Literal["shapes"] = "shapes"
    """The embedded data set."""
    count: Annotated[Count, Field(ge=12, le=10**6)] = 24_000
    """Pictures to draw."""


class ShardsData(DataOrder):
    """WebDataset shards with a manifest, as `dist-gan pack` or `dist-gan index` leaves them."""

    kind: Literal["shards"] = "shards"
    """Images from shards."""
    url: Place
    """Folder of the shards: a path, or a URL of an allowed scheme."""
    weight: Annotated[Count, Field(ge=1, le=10_000)] = 1
    """Share of `url` in a mixture."""
    mix: Annotated[
        dict[Place, Annotated[Count, Field(ge=1, le=10_000)]],
        Field(default_factory=dict, max_length=10_000),
        BeforeValidator(each_folder_once),
    ]
    """Further folders of shards and their weights: of every `weight` + sum of these images each gives exactly its own."""
    patience_s: Annotated[Count, Field(ge=1, le=3600)] = 120
    """Seconds that the store may stay silent before the run ends."""
    disk_cache: PlaceOrNone = ""
    """Local folder in which what was read is kept, for all processes of a machine; empty for none."""
    disk_cache_bytes: Annotated[Count, Field(ge=2**20)] = 2**36
    """Bytes that the folder may take; what was not used for longest goes first."""

    @property
    def sources(self) -> dict[str, int]:
        """Weight of each folder of shards."""
        return {self.url: self.weight} | self.mix


class PointsData(Section):
    """Points in the plane from a ring of Gaussians, for studies of the game itself."""

    kind: Literal["points"] = "points"
    """Points made on the spot, a function of seed, draw and slot."""
    modes: Annotated[Count, Field(ge=1, le=10_000)] = 8
    """Gaussians on the circle."""
    radius: Annotated[Real, Field(gt=0)] = 0.7
    """Radius of the circle; points lie in [-1, 1]."""
    sigma: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation of each Gaussian."""


class ArticleNetworks(Section):
    """The pair of the article that the project grew out of: dense layers, then transposed convolutions."""

    kind: Literal["article"] = "article"
    """RECIPES: literally at 32x32, one more stride-2 stage at 64x64."""
    resolution: Literal[32, 64] = 32
    """Pixels a side."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 colour."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Classes to condition on; 0 for none."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 100
    """Numbers in a latent."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.3
    """Dropout in the discriminator."""


class DCGANNetworks(Section):
    """DCGAN (Radford et al. 2016) for sides of 2^n."""

    kind: Literal["dcgan"] = "dcgan"
    """Strided convolutions both ways."""
    resolution: Literal[16, 32, 64, 128, 256] = 32
    """Pixels a side."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 colour."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Classes to condition on; 0 for none."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 100
    """Numbers in a latent."""
    g_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Channels of the generator's widest picture; doubled for each halving of the side, up to 8 times."""
    d_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Channels of the discriminator's first layer; doubled for each halving of the side, up to 8 times."""
    g_norm: Literal["batch", "none"] = "batch"
    """Normalisation in the generator."""
    d_norm: Literal["batch", "none", "spectral"] = "batch"
    """Normalisation in the discriminator: of activations, or of weights; gradient penalties are not defined for `batch`."""
    g_mapping: Annotated[Count, Field(ge=0, le=8)] = 0
    """Dense layers of 128 units that the latent passes first; they let it fall apart into modes."""
    g_smooth: bool = False
    """Generator's enlarging stages start bilinear: its first pictures are soft colours instead of white noise."""
    d_stddev: Annotated[Count, Field(ge=0, le=2**20)] = 0
    """Images of a group whose spread the discriminator sees (minibatch standard deviation); 0 for none."""


class MLPNetworks(Section):
    """Two perceptrons for points in the plane."""

    kind: Literal["mlp"] = "mlp"
    """Dense layers with LeakyReLU."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Classes to condition on; 0 for none."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 16
    """Numbers in a latent."""
    width: Annotated[Count, Field(ge=1, le=2**16)] = 128
    """Units a hidden layer."""
    depth: Annotated[Count, Field(ge=1, le=256)] = 3
    """Hidden layers."""


class ObjectiveSection(Section):
    """The game: the players' losses, and the penalties on the discriminator's gradient."""

    kind: Literal["minimax", "nonsaturating", "hinge", "least_squares", "wasserstein", "relativistic"] = "relativistic"
    """Loss of both players; formulae and sources in dist_gan/objectives/losses.py."""
    r1_gamma: Knob = 0.0
    """R1: gamma / 2 times the mean squared gradient at real images (Mescheder et al. 2018)."""
    r2_gamma: Knob = 0.0
    """R2: the same at generated images."""
    gradient_penalty: Knob = 0.0
    """WGAN-GP: lambda times (gradient norm - 1)^2 between real and generated images (Gulrajani et al. 2017)."""
    penalty_every: Annotated[Count, Field(ge=1, le=10**6)] = 1
    """Apply penalties at every k-th discriminator update, k times as strong (lazy regularisation)."""
    instance_noise: Knob = 0.0
    """Standard deviation of Gaussian noise added to all that the discriminator sees."""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """Real images get the target 1 - this value (minimax and nonsaturating)."""
    lecam: Annotated[Real, Field(ge=0)] = 0.0
    """LeCam: pulls the logits towards their running means, against overfitting (Tseng et al. 2021)."""
    shared_batch: bool = False
    """The generator's turn takes the discriminator's last batch and latents again, as the article does."""


class AdamSection(Section):
    """Adam (Kingma and Ba 2015)."""

    kind: Literal["adam", "adamw"] = "adam"
    """`adamw` decouples weight decay (Loshchilov and Hutter 2019); `adam` adds it to the gradient."""
    lr: Knob = 2e-4
    """Learning rate."""
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.5
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 on the weights."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the player's whole gradient; 0 for no clipping."""


class SGDSection(Section):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    """With momentum as in torch."""
    lr: Knob = 0.01
    """Learning rate."""
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Momentum."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 on the weights."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the player's whole gradient; 0 for no clipping."""


class EMASection(Section):
    """The averaged generator, which samples are drawn from."""

    half_life: Knob = 20_000.0
    """Images after which a weight counts half."""
    warmup: Annotated[Real, Field(ge=0)] = 0.05
    """Half-life is at most this share of the images seen so far; 0 for no limit (Karras et al. 2020)."""


class RuntimeSection(Section):
    """How the machine is used; no setting here changes what is learned beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU for each process where there is one, and the CPU elsewhere."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """`auto` takes the launch file's mixed_precision. bf16 is autocast, penalties stay in fp32. fp64 is for proofs."""
    tf32: bool = False
    """TF32 (10 bits of mantissa) for GPU products and convolutions in fp32, penalties under bf16 included; off: full fp32."""
    micro_batch: Annotated[Count, Field(gt=0, le=2**20)] | None = None
    """Images a process forwards at once; its share of the batch is accumulated in pieces of this size. None: at once."""
    threads: Annotated[Count, Field(gt=0, le=1024)] | None = None
    """CPU threads a process; None: cores divided by the processes of this machine."""
    sync_batchnorm: bool = False
    """Batch normalisation over the batch of all processes, instead of each its own with averaged running statistics."""
    compress: Literal["none", "bf16"] = "none"
    """`bf16` halves the bytes of DDP's gradients on their way between processes; replicas stay equal, rounding grows."""
    compare_every: Annotated[Count, Field(gt=0)] | None = None
    """Images between comparisons of the replicas of networks and average; None: at every checkpoint only."""
    deterministic: bool = False
    """Only deterministic CUDA kernels, so that a resumed run is bitwise the same there too."""
    stop_every: Annotated[Count, Field(gt=0)] = 1_000
    """Images between looks of all processes for a request to stop (the signals TERM, INT, USR1, USR2)."""
    start_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 1800
    """Longest time without progress until the first step is done; then the rank that is missing is named."""
    step_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 300
    """The same afterwards."""


class LogSection(Section):
    """What is seen, and how often, in images."""

    every: Annotated[Count, Field(gt=0)] = 4_000
    """Images between lines of scalars."""
    samples_every: Annotated[Count, Field(gt=0)] = 20_000
    """Images between grids of samples."""
    samples: Annotated[Count, Field(ge=1, le=1024)] = 64
    """Samples a grid."""


class CheckpointSection(Section):
    """Checkpoints, in images."""

    every: Annotated[Count, Field(gt=0)] = 40_000
    """Images between checkpoints; the last one is always written."""
    keep: Annotated[Count, Field(ge=2, le=10**6)] = 3
    """Newest checkpoints that are kept; the newest healthy one is kept besides."""
    keep_every: Annotated[Count, Field(gt=0)] | None = None
    """Images between checkpoints that are kept for good; None for none."""
    keep_best: Annotated[str, Field(min_length=1)] | None = None
    """Name of a logged scalar: the checkpoint with its lowest value is kept besides, with `-` before it the highest.

    Names: loss/discriminator, loss/generator, logits/real, logits/fake, logits/generated, and others of metrics.jsonl.
    """
    wait_s: Annotated[Count, Field(ge=1, le=10**6)] = 600
    """Longest wait for a checkpoint that is still being written when the run ends or saves the next one."""


class RecoverySection(Section):
    """When training has failed."""

    max_nonfinite: Annotated[Count, Field(ge=1, le=10**6)] = 20
    """Updates of one player skipped in the window, for a gradient that is not finite, after which the run rolls back."""
    window: Annotated[Count, Field(ge=1, le=10**6)] = 100
    """Updates of a player that skipped ones are counted in."""
    rollbacks: Annotated[Count, Field(ge=0, le=10**6)] = 2
    """Times that a run goes back to its newest healthy checkpoint before it ends with exit code 3."""
    max_restarts: Annotated[Count, Field(ge=2, le=10**6)] = 5
    """Starts from the same images without a new checkpoint, after which the run ends with exit code 3."""


def _kind_of(default: str) -> Any:
    def kind(value: Any) -> str:
        if isinstance(value, Mapping):
            return str(value.get("kind", default))
        return str(getattr(value, "kind", default))

    return Discriminator(kind)


Data = Annotated[
    Annotated[ShapesData, Tag("shapes")] | Annotated[ShardsData, Tag("shards")] | Annotated[PointsData, Tag("points")],
    _kind_of("shapes"),
]
NetworksSection = Annotated[
    Annotated[ArticleNetworks, Tag("article")]
    | Annotated[DCGANNetworks, Tag("dcgan")]
    | Annotated[MLPNetworks, Tag("mlp")],
    _kind_of("dcgan"),
]
Optim = Annotated[
    Annotated[AdamSection, Tag("adam")] | Annotated[AdamSection, Tag("adamw")] | Annotated[SGDSection, Tag("sgd")],
    _kind_of("adam"),
]


class RunConfig(Section):
    """The whole of a run's settings."""

    run: RunSection = RunSection()
    data: Data = ShapesData()
    networks: NetworksSection = DCGANNetworks()
    objective: ObjectiveSection = ObjectiveSection()
    g_optim: Optim = AdamSection()
    d_optim: Optim = AdamSection()
    ema: EMASection = EMASection()
    runtime: RuntimeSection = RuntimeSection()
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
