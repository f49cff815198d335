"""Every setting of a run, as typed sections with a docstring under each field, which `train.py --help` prints.

A component is chosen by its `kind`; there is no inheritance between files, no interpolation and no class path. The
defaults are a complete run, the embedded one: shapes that the program draws itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from dist_gan.config.values import Count as Count
from dist_gan.config.values import Decay as Decay
from dist_gan.config.values import Knob as Knob
from dist_gan.config.values import Place as Place
from dist_gan.config.values import PlaceOrNone as PlaceOrNone
from dist_gan.config.values import Ramp as Ramp
from dist_gan.config.values import Real as Real
from dist_gan.config.values import Section as Section
from dist_gan.config.values import Whole as Whole
from dist_gan.config.values import each_folder_once
from dist_gan.config.values import parse_number as parse_number


class RunSection(Section):
    """The run as a whole."""

    dir: Place = "runs/shapes"
    """Folder of the run: configuration, logs, samples, checkpoints. The same folder again resumes."""
    images: Annotated[Count, Field(gt=0)] = 240_000
    """Length of the run: real images shown to the discriminator."""
    batch: Annotated[Count, Field(gt=0, le=2**20)] = 64
    """Global batch size: images per discriminator update, summed over all processes and micro-batches."""
    d_updates: Annotated[Count, Field(ge=1, le=1000)] = 1
    """Discriminator updates for each generator update."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Random seed; every random number of the run is a function of it."""
    resume: Place = "auto"
    """Checkpoint to resume from: `auto` the newest in `dir`, `never` none (`dir` has to be empty), or a path."""
    init_from: Place | None = None
    """Run folder, checkpoint or exported generator with initial weights of a new run, where names and shapes fit."""
    profile: bool = False
    """Record steps 10 to 15 with torch's profiler into the TensorBoard folder."""


class DataOrder(Section):
    """Settings shared by all image data sets."""

    holdout: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Share of the images held out from training, chosen by a hash of the key."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    lanes: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of logical readers that the sample order is divided among; at least one per process."""
    block: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of neighbouring images of a shard that are read in one request and shuffled together."""
    balance: bool = False
    """Draw every class equally often, however many images it has."""
    prefetch: Annotated[Count, Field(ge=1, le=64)] = 4
    """Number of batches decoded ahead of training."""
    workers: Annotated[Count, Field(ge=1, le=256)] = 2
    """Number of decoding threads per process."""
    memory: Annotated[Count, Field(ge=2**20, le=2**42)] = 2**29
    """Limit for undecoded images per process, in bytes; if the lanes' blocks exceed it, images are read singly."""
    cache: Annotated[Count, Field(ge=0, le=2**42)] = 2**28
    """Limit for decoded images per process, in bytes; a data set that fits is decoded once, else on every pass."""
    bad_images: Literal["substitute", "fail"] = "substitute"
    """Reaction to a damaged image: substitute the next sound one of its shard, or end the run."""
    max_bad: Annotated[Real, Field(ge=0, le=1)] = 1e-3
    """Share of damaged images that may be substituted before the run ends; one is always allowed."""


class ShapesData(DataOrder):
    """Images drawn by the program itself: 4 shapes in 3 colours, 32x32."""

    kind: Literal["shapes"] = "shapes"
    """The embedded data set."""
    count: Annotated[Count, Field(ge=12, le=10**6)] = 24_000
    """Number of images drawn."""


class ShardsData(DataOrder):
    """WebDataset shards with a manifest, as written by `dist-gan pack` or `dist-gan index`."""

    kind: Literal["shards"] = "shards"
    """Images from WebDataset shards."""
    url: Place
    """Folder of the shards: a path, or a URL of an allowed scheme."""
    weight: Annotated[Count, Field(ge=1, le=10_000)] = 1
    """Mixing weight of the shards at `url`, relative to those in `mix`."""
    mix: Annotated[
        dict[Place, Annotated[Count, Field(ge=1, le=10_000)]],
        Field(default_factory=dict, max_length=10_000),
        BeforeValidator(each_folder_once),
    ]
    """Further shard folders and their weights; of every (sum of all weights) images, each gives exactly its weight."""
    patience_s: Annotated[Count, Field(ge=1, le=3600)] = 120
    """Time limit, in seconds, for a store that does not answer; then the run ends."""
    disk_cache: PlaceOrNone = ""
    """Local folder that caches reads from the store, shared by all processes of a machine; empty for no cache."""
    disk_cache_bytes: Annotated[Count, Field(ge=2**20)] = 2**36
    """Size limit of `disk_cache`, in bytes; the least recently used entries are deleted first."""

    @property
    def sources(self) -> dict[str, int]:
        """Weight of each folder of shards."""
        return {self.url: self.weight} | self.mix


class PointsData(Section):
    """Points in the plane from a ring of Gaussians, for studies of GAN dynamics without images."""

    kind: Literal["points"] = "points"
    """Points generated in memory, a function of seed, draw and slot."""
    modes: Annotated[Count, Field(ge=1, le=10_000)] = 8
    """Number of Gaussians on the circle."""
    radius: Annotated[Real, Field(gt=0)] = 0.7
    """Radius of the circle; points lie in [-1, 1]."""
    sigma: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation of each Gaussian."""


class ArticleNetworks(Section):
    """Networks of the article that the project grew out of: dense layers, then transposed convolutions."""

    kind: Literal["article"] = "article"
    """Networks of the article: literally at 32x32, with one more stride-2 stage at 64x64."""
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
    """Strided convolutions in both networks."""
    resolution: Literal[16, 32, 64, 128, 256] = 32
    """Pixels a side."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 colour."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Classes to condition on; 0 for none."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 100
    """Numbers in a latent."""
    g_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Channels of the generator's largest feature map; doubled for each halving of the side, up to 8 times."""
    d_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Channels of the discriminator's first layer; doubled for each halving of the side, up to 8 times."""
    g_norm: Literal["batch", "none"] = "batch"
    """Normalisation in the generator."""
    d_norm: Literal["batch", "none", "spectral"] = "batch"
    """Normalisation of activations or weights in the discriminator; gradient penalties are not defined for `batch`."""
    g_mapping: Annotated[Count, Field(ge=0, le=8)] = 0
    """Number of dense layers of 128 units before the first stage; they let the latent split into modes."""
    g_smooth: bool = False
    """Bilinear initialisation of the generator's upsampling stages: first samples are smooth instead of white noise."""
    d_stddev: Annotated[Count, Field(ge=0, le=2**20)] = 0
    """Group size, in images, of the discriminator's minibatch standard deviation; 0 turns it off."""


class MLPNetworks(Section):
    """Two perceptrons for points in the plane."""

    kind: Literal["mlp"] = "mlp"
    """Dense layers with LeakyReLU."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Classes to condition on; 0 for none."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 16
    """Numbers in a latent."""
    width: Annotated[Count, Field(ge=1, le=2**16)] = 128
    """Units per hidden layer."""
    depth: Annotated[Count, Field(ge=1, le=256)] = 3
    """Number of hidden layers."""


class ObjectiveSection(Section):
    """Losses of generator and discriminator, and regularisation of the discriminator."""

    kind: Literal["minimax", "nonsaturating", "hinge", "least_squares", "wasserstein", "relativistic"] = "relativistic"
    """Loss function of both networks; formulae and sources in dist_gan/objectives/losses.py."""
    r1_gamma: Knob = 0.0
    """R1: gamma / 2 times the mean squared gradient at real images (Mescheder et al. 2018)."""
    r2_gamma: Knob = 0.0
    """R2: gamma / 2 times the mean squared gradient at generated images (Mescheder et al. 2018)."""
    gradient_penalty: Knob = 0.0
    """WGAN-GP: lambda times (gradient norm - 1)^2 between real and generated images (Gulrajani et al. 2017)."""
    penalty_every: Annotated[Count, Field(ge=1, le=10**6)] = 1
    """Interval k, in discriminator updates, at which penalties are applied, k times as strong (lazy regularisation)."""
    instance_noise: Knob = 0.0
    """Standard deviation of the Gaussian noise added to every input of the discriminator."""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """One-sided label smoothing: the target of real images is 1 minus this value (minimax and nonsaturating)."""
    lecam: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of LeCam: pulls the logits towards their running means, against overfitting (Tseng et al. 2021)."""
    shared_batch: bool = False
    """Reuse the discriminator's last batch and latents in the generator update, as the article does."""


class AdamSection(Section):
    """Adam (Kingma and Ba 2015)."""

    kind: Literal["adam", "adamw"] = "adam"
    """Optimizer: `adamw` decouples weight decay (Loshchilov and Hutter 2019), `adam` adds it to the gradient."""
    lr: Knob = 2e-4
    """Learning rate."""
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.5
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Constant added to the denominator of the update, for numerical stability."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 on the weights."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the player's whole gradient; 0 for no clipping."""


class SGDSection(Section):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    """Stochastic gradient descent with momentum as in torch."""
    lr: Knob = 0.01
    """Learning rate."""
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Momentum factor."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 on the weights."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the player's whole gradient; 0 for no clipping."""


class EMASection(Section):
    """Exponential moving average of the generator's weights; samples are drawn from it."""

    half_life: Knob = 20_000.0
    """Half-life of the average, in images: a past weight counts half after so many."""
    warmup: Annotated[Real, Field(ge=0)] = 0.05
    """Upper limit of the half-life, as a share of the images seen so far; 0 for no limit (Karras et al. 2020)."""


class RuntimeSection(Section):
    """Device, precision and process settings; none of them changes what is learned beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each process: `auto` takes a GPU if there is one, the CPU otherwise."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Arithmetic: `auto` as mixed_precision in the launch file, bf16 autocast with fp32 penalties, fp64 for proofs."""
    tf32: bool = False
    """TF32 (10-bit mantissa) for fp32 products and convolutions on GPUs, penalties under bf16 too; off: full fp32."""
    micro_batch: Annotated[Count, Field(gt=0, le=2**20)] | None = None
    """Micro-batch size for gradient accumulation, in images per process; None: its whole share of the batch."""
    threads: Annotated[Count, Field(gt=0, le=1024)] | None = None
    """CPU threads per process; None: the machine's cores divided by its processes."""
    sync_batchnorm: bool = False
    """Batch normalisation over all processes; off: per process, with averaged running statistics."""
    compress: Literal["none", "bf16"] = "none"
    """Gradient compression of DDP: `bf16` halves the bytes sent; replicas stay equal, rounding errors grow."""
    compare_every: Annotated[Count, Field(gt=0)] | None = None
    """Interval, in images, at which ranks compare their copies of networks and average; None: at checkpoints only."""
    deterministic: bool = False
    """Use deterministic CUDA kernels only, so that resuming on GPUs is bitwise exact too."""
    stop_every: Annotated[Count, Field(gt=0)] = 1_000
    """Interval, in images, at which ranks check for a stop signal (TERM, INT, HUP, USR1, USR2)."""
    start_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 1800
    """Time limit, in seconds, without progress until the first step is done; then the missing rank is named."""
    step_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 300
    """Time limit, in seconds, without progress after the first step; then the missing rank is named."""


class LogSection(Section):
    """Scalars and sample grids; intervals are in images."""

    every: Annotated[Count, Field(gt=0)] = 4_000
    """Interval, in images, between logged lines of scalars."""
    samples_every: Annotated[Count, Field(gt=0)] = 20_000
    """Interval, in images, between sample grids."""
    samples: Annotated[Count, Field(ge=1, le=1024)] = 64
    """Number of samples per grid."""


class CheckpointSection(Section):
    """Frequency and retention of checkpoints; intervals are in images."""

    every: Annotated[Count, Field(gt=0)] = 40_000
    """Interval, in images, between checkpoints; the last one is always written."""
    keep: Annotated[Count, Field(ge=2, le=10**6)] = 3
    """Number of newest checkpoints kept; the newest healthy one is kept in addition."""
    keep_every: Annotated[Count, Field(gt=0)] | None = None
    """Interval, in images, between checkpoints that are never deleted; None for no such checkpoints."""
    keep_best: Annotated[str, Field(min_length=1)] | None = None
    """Logged scalar whose lowest value marks a checkpoint to keep in addition; with `-` before the name, the highest.

    Names: loss/discriminator, loss/generator, logits/real, logits/fake, logits/generated, and others of metrics.jsonl.
    """
    wait_s: Annotated[Count, Field(ge=1, le=10**6)] = 600
    """Time limit, in seconds, for a checkpoint still being written when the run ends or saves the next one."""


class RecoverySection(Section):
    """Limits for skipped updates, rollbacks and restarts after failures."""

    max_nonfinite: Annotated[Count, Field(ge=1, le=10**6)] = 20
    """Number of skipped updates (non-finite gradient) of one network within `window` that causes a rollback."""
    window: Annotated[Count, Field(ge=1, le=10**6)] = 100
    """Length, in updates of one network, of the sliding window in which skipped updates are counted."""
    rollbacks: Annotated[Count, Field(ge=0, le=10**6)] = 2
    """Number of rollbacks to the newest healthy checkpoint before the run ends with exit code 3."""
    max_restarts: Annotated[Count, Field(ge=2, le=10**6)] = 5
    """Number of starts at the same image count, without a new checkpoint, after which the run ends with exit code 3."""


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
