"""What the launcher asks for is read before anything is started, and what cannot be honoured gets one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_gan.config import RunConfig, RuntimeSection
from dist_gan.runtime import LaunchSettings, read_launch_settings
from dist_gan.types import UserError

TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
ZERO = TWO | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def recipe(**runtime: object) -> RunConfig:
    return RunConfig(runtime=RuntimeSection(**runtime))  # type: ignore[arg-type]


def refusal(environment: dict[str, str], *, config: RunConfig | None = None, gpus: int = 0) -> str:
    with pytest.raises(UserError) as error:
        read_launch_settings(config or RunConfig(), environment, gpus=gpus)
    return str(error.value)


def test_the_strategy_is_what_the_launcher_says() -> None:
    assert read_launch_settings(RunConfig(), {}, gpus=0) == LaunchSettings("single", "fp32")
    assert read_launch_settings(RunConfig(), TWO, gpus=0).strategy == "ddp"
    assert read_launch_settings(RunConfig(), TWO | {"ACCELERATE_USE_CPU": "True"}, gpus=0).strategy == "ddp"
    for stage in range(4):
        launch = read_launch_settings(RunConfig(), ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}, gpus=0)
        assert (launch.strategy, launch.zero_stage, launch.offload) == (f"zero{stage}", stage, False)
    launch = read_launch_settings(RunConfig(), ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, gpus=0)
    assert launch.offload
    assert read_launch_settings(RunConfig(), {}, gpus=0).zero_stage is None


def test_the_recipe_takes_the_launch_files_precision_unless_it_has_its_own() -> None:
    assert read_launch_settings(RunConfig(), {"ACCELERATE_MIXED_PRECISION": "bf16"}, gpus=0).precision == "bf16"
    assert read_launch_settings(recipe(precision="bf16"), {}, gpus=0).precision == "bf16"
    assert read_launch_settings(recipe(precision="fp64"), {}, gpus=0).precision == "fp64"
    text = refusal({"ACCELERATE_MIXED_PRECISION": "bf16"}, config=recipe(precision="fp32"))
    assert "runtime.precision: 'fp32' contradicts mixed_precision 'bf16' of the launch file" in text


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: 'fp16' of the launch file is not offered"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: 'inductor' of the launch file"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP in the launch file: not offered"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "gpu_ids: the launch asks for the GPUs 0,1"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "zero_stage: '4' of the launch file"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: 1.0 in the launch file"),
        (ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4 in the launch file"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device: "),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device: 'nvme'"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "offload_optimizer_device: stage 0 has nothing to offload",
        ),
    ],
)
def test_what_a_launch_cannot_have_gets_one_sentence(environment: dict[str, str], text: str) -> None:
    assert refusal(environment).startswith(text) or text in refusal(environment)
    assert "\n" not in refusal(environment)


def test_more_processes_than_gpus_are_refused_and_as_many_are_not() -> None:
    assert "2 processes on this machine and 1 GPUs" in refusal(TWO, gpus=1)
    assert read_launch_settings(RunConfig(), TWO, gpus=2).strategy == "ddp"
    assert read_launch_settings(recipe(device="cpu"), TWO, gpus=1).strategy == "ddp"


def test_a_gpu_is_missed_only_where_it_was_asked_for() -> None:
    assert "runtime.device: 'cuda', and torch finds no GPU" in refusal({}, config=recipe(device="cuda"))
    for nothing in ("", "NoDevFiles", "-1"):
        assert read_launch_settings(RunConfig(), {"CUDA_VISIBLE_DEVICES": nothing}, gpus=0).strategy == "single"
    assert read_launch_settings(recipe(device="cpu"), {"CUDA_VISIBLE_DEVICES": "0"}, gpus=0).strategy == "single"
    assert read_launch_settings(RunConfig(), {"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, gpus=1).strategy == "single"


def test_zero_refuses_the_precision_of_proofs_and_ddps_hook() -> None:
    assert "runtime.precision: 'fp64' is for proofs" in refusal(ZERO, config=recipe(precision="fp64"))
    assert "runtime.compress: 'bf16' is a hook of DDP" in refusal(ZERO, config=recipe(compress="bf16"))
    assert read_launch_settings(recipe(compress="bf16"), TWO, gpus=0).strategy == "ddp"


def test_all_mistakes_of_a_launch_come_in_one_report() -> None:
    text = refusal(ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_MIXED_PRECISION": "fp16"})
    assert text.splitlines()[0] == "the launch does not fit:"
    assert len(text.splitlines()) == 3


def deepspeed_file(tmp_path: Path, settings: object) -> dict[str, str]:
    file = tmp_path / "deepspeed.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return TWO | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def test_a_deepspeed_file_may_say_how_and_not_what(tmp_path: Path) -> None:
    allowed = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
    }
    launch = read_launch_settings(RunConfig(), deepspeed_file(tmp_path, allowed), gpus=0)
    assert launch.strategy == "zero3"
    assert launch.zero_options == {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optimizer": {"type": "Adam"}}, "the optimizers belong to the recipe (g_optim, d_optim)"),
        ({"gradient_clipping": 1.0}, "clipping belongs to the recipe"),
        ({"scheduler": {}}, "learning rates belong to the recipe"),
        ({"bf16": {"enabled": True}}, "DeepSpeed's bf16 turns the weights themselves"),
        ({"train_batch_size": 64}, "the batch belongs to the recipe"),
        ({"activation_checkpointing": {}}, "not offered; offered are zero_optimization"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param in "),
        ("{", "is no readable JSON"),
        ("[1]", "an object with `zero_optimization` is needed"),
    ],
)
def test_a_deepspeed_file_with_the_recipes_business_is_refused(tmp_path: Path, settings: object, text: str) -> None:
    said = refusal(deepspeed_file(tmp_path, settings))
    assert said.startswith("deepspeed_config_file: ")
    assert text in said


@pytest.mark.parametrize("missing", ["deepspeed", "transformers"])
def test_deepspeed_that_is_not_installed_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    import sys

    monkeypatch.setitem(sys.modules, missing, None)
    text = refusal(ZERO)
    assert f"{missing} is not installed here; pip install -e '.[deepspeed]'" in text
