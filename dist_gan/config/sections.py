"""Every setting of a run, as typed sections with a docstring under each setting, which `train.py --help` prints.

A component is chosen by its `kind`; there is no inheritance between files, no interpolation and no class path. The
defaults are a complete run on the embedded data set, images of shapes that the program draws itself.
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
    """Folder, length, batch size and start of the run."""

    dir: Place = "runs/shapes"
    """Folder that the run writes its configuration, logs, samples and checkpoints into.

    A second start with the same folder resumes the run.
    """
    images: Annotated[Count, Field(gt=0)] = 240_000
    """Length of the run: number of real images shown to the discriminator, repeated images included."""
    batch: Annotated[Count, Field(gt=0, le=2**20)] = 64
    """Global batch size: number of real images per discriminator update, summed over all processes and micro-batches."""
    d_updates: Annotated[Count, Field(ge=1, le=1000)] = 1
    """Number of discriminator updates before each generator update."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Random seed of the run; two runs with the same settings and the same seed draw the same random numbers."""
    resume: Place = "auto"
    """Checkpoint to resume from: `auto`, `never`, or the path of a checkpoint.

    `auto` takes the newest checkpoint in `run.dir`, or begins a new run if there is none. `never` begins a new run and
    requires that `run.dir` is empty.
    """
    init_from: Place | None = None
    """Run folder, checkpoint or exported generator that a new run takes its initial weights from.

    Weights are taken where names and shapes agree. None begins with random weights.
    """
    profile: bool = False
    """Profiling: torch's profiler records steps 10 to 15 and writes them into the run's TensorBoard folder."""


class EMASection(Section):
    """Exponential moving average of the generator's weights. Samples are drawn with the averaged weights."""

    half_life: Knob = 20_000.0
    """Half-life of the moving average, in images: the number of images after which a past weight counts half."""
    warmup: Annotated[Real, Field(ge=0)] = 0.05
    """Upper limit of the half-life, as a fraction of the images seen so far (Karras et al. 2020); 0 sets no limit."""


class RuntimeSection(Section):
    """Device, precision and processes of the run.

    These settings change the learned weights by no more than rounding errors; networks whose layers compute statistics
    over a batch depend on `runtime.micro_batch` and `runtime.sync_batchnorm`, too.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each process: `auto` selects a GPU if torch finds one, and the CPU otherwise."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Floating-point precision of training.

    `auto` takes `mixed_precision` of the launch file. `bf16` uses autocast for forward passes and fp32 for gradient
    penalties. `fp64` is slow and serves numerical comparisons.
    """
    tf32: bool = False
    """TF32 arithmetic: GPUs compute fp32 matrix products and convolutions in TF32, which is faster and has a 10-bit mantissa.

    With `precision: bf16`, the setting applies to the gradient penalties, which are computed in fp32. False computes in
    full fp32.
    """
    micro_batch: Annotated[Count, Field(gt=0, le=2**20)] | None = None
    """Micro-batch size for gradient accumulation, in images per process.

    None computes the share of each process in one pass, without accumulation.
    """
    threads: Annotated[Count, Field(gt=0, le=1024)] | None = None
    """Number of CPU threads per process. None divides the machine's cores by the number of its processes."""
    sync_batchnorm: bool = False
    """Synchronised batch normalisation: statistics are computed over the images of all processes.

    False computes them per process and averages the running statistics over processes after every update.
    """
    compress: Literal["none", "bf16"] = "none"
    """Compression of the gradients that DDP sends between GPUs.

    `bf16` halves the bytes and rounds the gradients to 8 bits of mantissa; all replicas still receive equal gradients.
    """
    compare_every: Annotated[Count, Field(gt=0)] | None = None
    """Interval, in images, at which all ranks check that their copies of both networks and of the average are equal.

    None checks at checkpoints only.
    """
    deterministic: bool = False
    """Determinism on GPUs: only deterministic CUDA kernels run, so that a resumed run is bitwise equal to an unbroken one."""
    stop_every: Annotated[Count, Field(gt=0)] = 1_000
    """Interval, in images, at which ranks check for a stop signal (TERM, INT, HUP, USR1 or USR2)."""
    start_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 1800
    """Time limit, in seconds, for a rank without progress before the end of the first training step.

    When the limit is exceeded, the run ends and the error message names the rank that hangs.
    """
    step_timeout_s: Annotated[Count, Field(ge=10, le=10**6)] = 300
    """Time limit, in seconds, for a rank without progress after the first training step.

    When the limit is exceeded, the run ends and the error message names the rank that hangs.
    """


class LogSection(Section):
    """Intervals at which scalars and sample grids are logged."""

    every: Annotated[Count, Field(gt=0)] = 4_000
    """Interval, in images, at which losses and other scalars are logged."""
    samples_every: Annotated[Count, Field(gt=0)] = 20_000
    """Interval, in images, at which a grid of generated samples is saved."""
    samples: Annotated[Count, Field(ge=1, le=1024)] = 64
    """Number of generated samples in each grid."""


class CheckpointSection(Section):
    """Frequency and retention of checkpoints."""

    url: Place | None = None
    """Folder that keeps checkpoints/ and copies of the logs, such as s3://bucket/run; None: `run.dir`, seen by all machines."""
    every: Annotated[Count, Field(gt=0)] = 40_000
    """Interval, in images, at which a checkpoint is saved. The end of the run saves one, too."""
    keep: Annotated[Count, Field(ge=2, le=10**6)] = 3
    """Number of newest checkpoints that are kept.

    The newest healthy checkpoint is kept in addition. A checkpoint is healthy if no update was skipped between it and
    the next checkpoint.
    """
    keep_every: Annotated[Count, Field(gt=0)] | None = None
    """Interval, in images, between checkpoints that are never deleted. None turns this off."""
    keep_best: Annotated[str, Field(min_length=1)] | None = None
    """Name of a logged scalar; the checkpoint with the lowest value of this scalar is kept in addition.

    A `-` before the name keeps the checkpoint with the highest value instead. None keeps no such checkpoint. Names are
    loss/discriminator, loss/generator, logits/real, logits/fake, logits/generated, and others in metrics.jsonl.
    """
    wait_s: Annotated[Count, Field(ge=1, le=10**6)] = 600
    """Time limit, in seconds, for waiting until the previous checkpoint is written.

    The run waits before it saves the next checkpoint and at its end. When the limit is exceeded, the run fails.
    """


class RecoverySection(Section):
    """Limits for skipped updates, rollbacks and restarts after failures."""

    max_nonfinite: Annotated[Count, Field(ge=1, le=10**6)] = 20
    """Number of skipped updates of one network, within the last `recovery.window` updates, that causes a rollback.

    An update is skipped if its gradient is not finite.
    """
    window: Annotated[Count, Field(ge=1, le=10**6)] = 100
    """Length, in updates of one network, of the sliding window in which skipped updates are counted."""
    rollbacks: Annotated[Count, Field(ge=0, le=10**6)] = 2
    """Largest number of rollbacks to the newest healthy checkpoint; the next one ends the run with exit code 3."""
    max_restarts: Annotated[Count, Field(ge=2, le=10**6)] = 5
    """Number of starts from the same image count, without a new checkpoint, after which the run ends with exit code 3."""


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
