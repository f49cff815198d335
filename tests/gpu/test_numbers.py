"""What is computed on a GPU is what the CPU computes: draws, fingerprints, the stream's bytes, fp32, whole steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.parity import compare
from benchmarks.parity_worker import slug
from dist_gan.checkpoint import tensorfile
from dist_gan.config import RuntimeSection, ShardsData
from dist_gan.data import ImageStream, ShardFolder
from dist_gan.data.manifest import read_manifest
from dist_gan.draws import Draws
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.runtime.fingerprint import fingerprint
from dist_gan.types import byte_range
from tests.conftest import ROOT
from tests.gpu.conftest import run

WORKER = ROOT / "benchmarks" / "parity_worker.py"
EXACT = (
    "relativistic/r1+r2/plain",
    "wasserstein/wgan-gp/accumulated",
    "spectral/plain",
    "memory/plain",
    "conditional/plain",
)
"""Cases in float64: every operation that a step is made of."""
ROUNDED = ("sgd", "r1+r2/plain", "r1/lazy")
"""Cases in float32; without Adam, whose first steps make a whole learning rate of a gradient that is rounding."""


def test_draws_and_fingerprints_are_those_of_the_cpu() -> None:
    slots = torch.arange(3, 200, 7)
    cpu, gpu = Draws(5), Draws(5, device="cuda")
    words = cpu.words("latents/generator", draw=2**33 + 1, slots=slots, count=37)
    assert torch.equal(words, gpu.words("latents/generator", draw=2**33 + 1, slots=slots, count=37).cpu())
    normal = cpu.normal("latents/generator", draw=9, slots=slots, shape=(3, 5))
    assert torch.allclose(normal, gpu.normal("latents/generator", draw=9, slots=slots, shape=(3, 5)).cpu(), atol=1e-6)
    for tensor in (normal, normal.bfloat16(), torch.arange(5, dtype=torch.uint8)):
        assert int(fingerprint(tensor)) == int(fingerprint(tensor.cuda()))
        assert int(fingerprint(tensor)) != int(fingerprint(tensor.flip(0).contiguous().cuda()))


def _stream(shards: Path, *, device: str) -> ImageStream:
    section = ShardsData(url=str(shards), lanes=8, block=16, flip=True, cache=0)
    source = ShardFolder(str(shards), read_manifest(str(shards)))
    return ImageStream(
        [(source, 1)], section=section, resolution=16, channels=3, classes=5, batch=32, slots=torch.arange(32),
        draws=Draws(3, device=device),
    )  # fmt: skip


def test_the_stream_puts_the_same_bytes_onto_the_device_while_the_device_is_busy(small_shards: Path) -> None:
    on_cpu, on_gpu = _stream(small_shards, device="cpu"), _stream(small_shards, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    try:
        for _ in range(120):  # several passes, so that pinned memory goes around many times
            expected, batch = on_cpu.next(), on_gpu.next()
            busy = busy @ busy * 1e-3  # the networks' work, which the copy must not overtake or be overtaken by
            assert batch.images.device.type == "cuda"
            assert torch.equal(byte_range(batch.images).cpu(), byte_range(expected.images)), batch.draw
            assert batch.labels is not None
            assert expected.labels is not None
            assert torch.equal(batch.labels.cpu(), expected.labels)
            assert (batch.keys, batch.draw) == (expected.keys, expected.draw)
    finally:
        on_cpu.close()
        on_gpu.close()


def test_fp32_is_not_tf32() -> None:
    runtime = Runtime(RuntimeSection(device="cuda"), LaunchSettings("single", "fp32"))
    try:
        torch.manual_seed(0)
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        exact = a.double() @ b.double()
        error = float(((a.cuda() @ b.cuda()).cpu().double() - exact).abs().max() / exact.abs().max())
        images, kernel = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
        exact = torch.nn.functional.conv2d(images.double(), kernel.double(), padding=1)
        found = torch.nn.functional.conv2d(images.cuda(), kernel.cuda(), padding=1).cpu().double()
        conv_error = float((found - exact).abs().max() / exact.abs().max())
    finally:
        runtime.close()
    assert error < 1e-5, error  # TF32's ten bits of mantissa: 3e-4
    assert conv_error < 1e-5, conv_error


def _train(shards: Path, out: Path, which: str, names: tuple[str, ...], *, on_gpu: bool) -> Path:
    """Trains cases in one process without a launcher, and so without a wrapper."""
    arguments = [str(shards), str(out), which, *(word for name in names for word in ("--only", name))]
    done = run([sys.executable, str(WORKER), *arguments], on_gpu=on_gpu)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def on_cpu(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one CPU process makes of the cases, by precision."""
    work = tmp_path_factory.mktemp("cpu")
    return {
        "losses": _train(small_shards, work / "losses", "losses", EXACT, on_gpu=False),
        "fp32": _train(small_shards, work / "fp32", "fp32", ROUNDED, on_gpu=False),
    }


def _difference(a: Path, b: Path, name: str) -> float:
    first, second = (tensorfile.from_bytes((f / f"{slug(name)}.end").read_bytes(), name=name) for f in (a, b))
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).abs().max()) for k in first if first[k].is_floating_point())


def test_twenty_steps_in_float64_are_those_of_the_cpu(
    on_cpu: dict[str, Path], small_shards: Path, tmp_path: Path
) -> None:
    found = _train(small_shards, tmp_path / "out", "losses", EXACT, on_gpu=True)
    for name in EXACT:
        assert _difference(on_cpu["losses"], found, name) <= 1e-8, name


def test_twenty_steps_in_float32_are_those_of_the_cpu_but_for_rounding(
    on_cpu: dict[str, Path], small_shards: Path, tmp_path: Path
) -> None:
    found = _train(small_shards, tmp_path / "out", "fp32", ROUNDED, on_gpu=True)
    for name in ROUNDED:
        row = compare(on_cpu["fp32"], found, name)
        assert row["max_relative_error"] <= (1e-3 if name == "sgd" else 2e-2), (name, row)
        assert row["smallest_movement"] >= 1e-3, (name, row)


def test_bf16_follows_fp32(on_cpu: dict[str, Path], small_shards: Path, tmp_path: Path) -> None:
    names = ("r1+r2/plain",)
    found = _train(small_shards, tmp_path / "out", "bf16", names, on_gpu=True)
    expected = json.loads((on_cpu["fp32"] / "report.json").read_text())[names[0]]["scalars"]
    report = json.loads((found / "report.json").read_text())[names[0]]["scalars"]
    for player in ("generator", "discriminator"):
        name = f"loss/{player}"
        assert report[name] == pytest.approx(expected[name], rel=0.1), name
        assert report[name] != expected[name], "bf16 rounds"
