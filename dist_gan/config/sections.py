"""Every setting of a run, as typed sections with a docstring under each field, which `train.py --help` prints.

A component is chosen by its `kind`; there is no inheritance between files, no interpolation and no class path. The
defaults are a complete run, the embedded one: shapes that the program draws itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_gan.config.data_sets import DATA_SETS, DataOrder, DataSection, PointsData, ShapesData, ShardsData
from dist_gan.config.values import Choice, Count, Knob, Place, Ramp, Real, Section, Whole
from dist_gan.models import FAMILIES
from dist_gan.models.article import ArticleNetworks
from dist_gan.models.dcgan import DCGANNetworks
from dist_gan.models.family import NetworkSettings
from dist_gan.models.mlp import MLPNetworks
from dist_gan.objectives.section import ObjectiveSection
from dist_gan.optimizers import OPTIMIZERS, AdamSection, OptimizerSettings, SGDSection

__all__ = [
    "AdamSection",
    "ArticleNetworks",
    "CheckpointSection",
    "DCGANNetworks",
    "DataOrder",
    "DataSection",
    "EMASection",
    "LogSection",
    "MLPNetworks",
    "NetworksSection",
    "ObjectiveSection",
    "PointsData",
    "Ramp",
    "RecoverySection",
    "RunConfig",
    "RunSection",
    "RuntimeSection",
    "SGDSection",
    "ShapesData",
    "ShardsData",
]


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


Data = Annotated[DataSection, Choice(DATA_SETS, default="shapes")]
NetworksSection = Annotated[
    NetworkSettings, Choice({kind: family.settings for kind, family in FAMILIES.items()}, default="dcgan")
]
Optim = Annotated[
    OptimizerSettings, Choice({kind: found.settings for kind, found in OPTIMIZERS.items()}, default="adam")
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
