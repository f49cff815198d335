"""One process' runtime: what accelerate has prepared, what fp32 means, where buckets and moments lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import AdamSection, CheckpointSection, RunConfig, RuntimeSection, SGDSection
from dist_gan.models.spectral import SpectralLinear, begin_spectral
from dist_gan.optimizers import build_optimizer
from dist_gan.resume import _not_bitwise
from dist_gan.runtime import LaunchSettings, Runtime, read_launch_settings
from dist_gan.runtime.accelerators import make_accelerators
from dist_gan.runtime.buckets import BucketedNetwork, lay_out
from dist_gan.runtime.fingerprint import fingerprint
from dist_gan.runtime.numerics import set_numerics
from dist_gan.runtime.player import TorchPlayer
from dist_gan.runtime.zero import engine_settings
from dist_gan.types import Networks, UserError
from tests.conftest import ROOT


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """Puts torch's global settings back."""
    environment = dict(os.environ)
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.usefixtures("torch_as_it_was")
def test_tf32_is_on_where_it_is_asked_for_and_nowhere_else(asked: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not asked
    runtime = Runtime(RuntimeSection(tf32=asked, threads=1), LaunchSettings())
    assert torch.backends.cudnn.allow_tf32 is asked
    assert torch.backends.cuda.matmul.allow_tf32 is asked
    assert runtime.describe()["precision"] == ("fp32+tf32" if asked else "fp32")
    assert RuntimeSection().tf32 is False


@pytest.mark.usefixtures("torch_as_it_was")
def test_deterministic_kernels_come_without_the_filling_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_numerics(RuntimeSection())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_numerics(RuntimeSection(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_seeded_runtime_draws_the_numbers_of_torchs_own_seeding() -> None:
    runtime, network = Runtime(RuntimeSection(threads=1), LaunchSettings()), nn.Dropout(0.5)
    masks = []
    for seed in (3, 2**63 - 1, 3):
        runtime.seed(seed)
        masks.append((torch.rand(5), network(torch.ones(64))))
        torch.manual_seed(seed)
        assert torch.equal(masks[-1][0], torch.rand(5))
        assert torch.equal(masks[-1][1], network(torch.ones(64)))
    assert torch.equal(masks[0][1], masks[2][1])
    assert not torch.equal(masks[0][1], masks[1][1])


class _NoNumbersFromTheHost(TorchFunctionMode):
    """Refuses what would copy a number to the device, and wait for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor), func
        return func(*args, **(kwargs or {}))


def test_a_fingerprint_sends_no_number_to_the_device() -> None:
    values = torch.arange(7.0)
    with pytest.raises(AssertionError), _NoNumbersFromTheHost():
        torch.tensor(1)
    with _NoNumbersFromTheHost():
        found = fingerprint(values)
    assert found.dtype == torch.int64
    assert found.shape == ()


# -- what is prepared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [AdamSection(), AdamSection(kind="adamw"), SGDSection(momentum=0.9)])
def test_accelerate_prepares_both_networks_and_both_fused_optimizers(section: Any) -> None:
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings())
    players = runtime.players(Networks(nn.Linear(2, 3), nn.Linear(3, 1)), g_optim=section, d_optim=section)
    accelerator = runtime._accelerators["generator"]
    for player in players:
        assert isinstance(player, TorchPlayer)
        assert isinstance(player.optimizer, AcceleratedOptimizer)
        assert player.optimizer in accelerator._optimizers
        assert player.forward_module in accelerator._models
        assert all(group["fused"] for group in player.optimizer.param_groups)
        before = player.module.weight.detach().clone()
        player.backward(player.forward_module(torch.ones(4, player.module.in_features)).sum())
        assert player.update(lr=0.1, beta2=0.9).applied
        assert not torch.equal(player.module.weight, before)
        assert all(p.grad is None for p in player.module.parameters())
        assert player.moment_names()


def test_moments_come_back_in_the_memory_layout_of_their_parameters() -> None:
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    player = TorchPlayer(
        "generator", network, network, build_optimizer(list(network.parameters()), AdamSection()), clip=0.0
    )
    player.backward(network(torch.ones(1, 3, 5, 5)).sum())
    player.update(lr=0.1, beta2=0.9)
    saved = {name: tensor.detach().clone().contiguous() for name, tensor in player.full_tensors()}
    assert not network.weight.is_contiguous()
    player.load_full_tensors(saved)
    for key in ("exp_avg", "exp_avg_sq"):
        held = player.full_moment("weight", key)
        assert held.stride() == network.weight.stride()
        assert torch.equal(held, saved[f"optimizer/weight/{key}"])
        assert held.data_ptr() != saved[f"optimizer/weight/{key}"].data_ptr()
    assert float(player.full_moment("weight", "step")) == 1.0


# -- buckets ------------------------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """Everything that a pass could touch, and gradients that arrive in the order that the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Dropout(0.5), nn.Linear(300, 900))
        self.second = nn.Sequential(SpectralLinear(8, 700), nn.Linear(700, 900))
        begin_spectral(self)

    def forward(self, inputs: Tensor) -> Tensor:
        branches = [self.first, self.second]
        if float(inputs.detach()[0, 0]) > 0:
            branches.reverse()
        return branches[0](inputs) + branches[1](inputs)


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


def _buckets(wrapped: DistributedDataParallel) -> list[list[int]]:
    """Places of the parameters of each bucket."""
    places = {id(p): place for place, p in enumerate(wrapped.parameters())}
    return [[places[id(p)] for p in b.parameters()] for b in wrapped.reducer._get_zeros_like_grad_buckets()]


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers.*:FutureWarning")
@pytest.mark.usefixtures("lone_group")
def test_buckets_are_laid_out_once_whatever_the_first_step_is_and_nothing_else_is_touched() -> None:
    layouts, seen = set(), set()
    for first in (1.0, -1.0):
        torch.manual_seed(0)
        network = TwoBranches()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        plain = DistributedDataParallel(TwoBranches(), **options)
        wrapped = DistributedDataParallel(BucketedNetwork(network), **options)
        generator = torch.get_rng_state()
        layouts.add(lay_out(wrapped))
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        laid_out = _buckets(wrapped)
        assert len(laid_out) > 1, "with one bucket alone there is less to see"
        assert [place for bucket in laid_out for place in bucket] == list(
            reversed(range(len(list(wrapped.parameters()))))
        )
        for sign, waits in ((first, True), (first, False), (-first, False), (first, False)):
            inputs = torch.full((4, 8), sign, requires_grad=True)
            for module in (wrapped, plain):
                with module.no_sync() if waits else torch.enable_grad():
                    output = module(inputs).square().sum()
                    (slope,) = torch.autograd.grad(output, inputs, create_graph=True)
                    (output + slope.square().sum()).backward()
            assert _buckets(wrapped) == laid_out
        seen.add(str(_buckets(plain)))
    assert len(layouts) == 1
    assert layouts.pop().startswith("2 buckets, ")
    assert len(seen) == 2, "without it the first step decides, which this test has to notice"


def test_gradients_that_cannot_be_compressed_on_a_cpu_are_a_mistake_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^runtime.compress: 'bf16' is for gradients on GPUs"):
        make_accelerators(
            RuntimeSection(compress="bf16"), LaunchSettings("ddp"), on_cpu=True, timeout=timedelta(seconds=10)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("told", "bucket"), [({}, 1000), ({"reduce_bucket_size": 5e8}, 1000), ({"reduce_bucket_size": 64}, 64),
                         ({"reduce_bucket_size": "auto"}, 1000)],
)  # fmt: skip
def test_a_bucket_of_zero_is_never_larger_than_the_player(told: dict[str, Any], bucket: int) -> None:
    settings = engine_settings({"zero_optimization": told}, stage=2, offload=False, clip=0.0, elements=1000)
    assert settings["zero_optimization"]["reduce_bucket_size"] == bucket


def test_deepspeed_is_told_of_the_cpu_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    for name in ("deepspeed", "transformers"):
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
    (tmp_path / "deepspeed.py").write_text("import os\nDEVICE = os.environ.get('DS_ACCELERATOR')\n")
    (tmp_path / "transformers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "unset")
    read_launch_settings(RunConfig(), {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "1"}, gpus=0)
    assert sys.modules["deepspeed"].DEVICE == "cpu"


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "launch").glob("*.yaml")))
def test_no_launch_file_overrules_the_gpus_that_the_caller_has_chosen(file: str) -> None:
    settings = yaml.safe_load((ROOT / "launch" / file).read_text())
    assert settings.get("gpu_ids", "all") == "all"


# -- a resume that is not bitwise -----------------------------------------------------------------------------------


def test_a_resume_that_sums_in_another_order_says_so(tmp_path: Path) -> None:
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings())
    checkpointer = Checkpointer(
        str(tmp_path),
        runtime=runtime,
        section=CheckpointSection(),
        facts={"gradient_layout": {"generator": "2 buckets, a"}},
    )
    same = {"world_size": 1, "strategy": "single", "torch": "2.13.0", "gradient_layout": {"generator": "2 buckets, a"}}
    assert _not_bitwise(same, checkpointer) == ()
    assert _not_bitwise({k: v for k, v in same.items() if k != "gradient_layout"}, checkpointer) == ()
    (text,) = _not_bitwise(same | {"world_size": 4, "strategy": "ddp"}, checkpointer)
    assert "of 4 processes (ddp), and 1 (single) go on" in text
    (text,) = _not_bitwise(same | {"gradient_layout": {"generator": "1 buckets, b"}}, checkpointer)
    assert "summed in another order than before" in text
    assert "torch 2.13.0" in text
