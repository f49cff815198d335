"""The examples of docs/extending.md, each run as it is printed there, as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.parity import launch_file
from dist_gan import cli, load_generator
from dist_gan.checkpoint import reader
from dist_gan.models.own import OwnNetworks
from dist_gan.types import UserError
from tests.conftest import ROOT, launch

EXAMPLES = dict(
    re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)
)
SMALL = [
    "data.count=64", "run.batch=8", "run.images=48", "log.samples=4", "runtime.threads=1", "data.workers=1",
    "checkpoint.every=16", "checkpoint.keep=10",
]  # fmt: skip
TINY = ["networks.g_width=2", "networks.d_width=2", "networks.latent_dim=4"]
OWN = ["networks.kind=own", "networks.options.width=8", "networks.latent_dim=4"]


def script(folder: Path, name: str, *, before: str = "") -> Path:
    """An example as a file, with lines before it."""
    path = folder / name
    path.write_text(f"{before}{EXAMPLES[name]}")
    return path


def trained(path: Path, run: Path, *overrides: str, processes: int = 1, strategy: str | None = None) -> tuple[int, str]:
    """Exit code and output of a start of a script."""
    file = None if strategy is None else launch_file(strategy, path.parent)
    done = launch(path, [f"run.dir={run}", *SMALL, *overrides], processes=processes, config_file=file, timeout_s=240)
    return done.returncode, done.stdout + done.stderr


def logged(run: Path) -> set[str]:
    return {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}


@pytest.mark.parametrize(
    ("name", "scalar"),
    [("my_loss.py", "loss/generator"), ("my_penalty.py", "penalty/drift"), ("my_stage.py", "loss/generator"),
     ("my_metric.py", "metric/contrast")],
)  # fmt: skip
def test_an_example_runs_as_it_is_printed(name: str, scalar: str, tmp_path: Path) -> None:
    code, output = trained(script(tmp_path, name), tmp_path / "run", *TINY)
    assert code == 0, output[-3000:]
    assert scalar in logged(tmp_path / "run")
    found = reader.newest(str(tmp_path / "run" / "checkpoints"))
    record = reader.read_manifest(str(found.url))["script"]
    assert record["name"] == name
    assert len(record["sha256"]) == 64


def test_every_example_of_the_page_is_run_by_a_test() -> None:
    assert sorted(EXAMPLES) == ["my_loss.py", "my_metric.py", "my_networks.py", "my_penalty.py", "my_stage.py"]


KILL = """
import os, signal
from dist_gan.checkpoint.writer import Checkpointer

saving = Checkpointer.save

def killed(self, images, *rest, **more):
    if images == 32:
        self.drain()
        os.kill(os.getpid(), signal.SIGKILL)
    return saving(self, images, *rest, **more)

Checkpointer.save = killed

"""


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return reader.read(str(reader.newest(str(run / "checkpoints")).url))[1]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_own_networks_on_two_processes_resume_bitwise_after_a_kill(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killing, path = script(tmp_path, "my_networks.py", before=KILL), tmp_path / "plain" / "my_networks.py"
    code, _ = trained(killing, cut, *OWN, processes=2, strategy=strategy)
    assert code != 0
    assert reader.read_manifest(str(reader.newest(str(cut / "checkpoints")).url))["images"] == 16
    path.parent.mkdir()
    script(path.parent, path.name)
    for run in (cut, whole):
        code, output = trained(path, run, *OWN, processes=2, strategy=strategy)
        assert code == 0, output[-3000:]
        noted = re.findall(r"the checkpoint was written with my_networks\.py \(sha256 \w{12}\), and my_networks\.py", output)
        assert len(noted) == (1 if run is cut else 0)
    ours, theirs = tensors_of(cut), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("optimizer/" in name for name in ours)
    if strategy == "ddp":
        _is_exported(whole, path, capsys)


def _is_exported(run: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = run.parent / "generator"
    assert cli.main(["sample", str(run), str(run.parent / "a.png")]) == 2
    assert "load_generator(folder, build=function)" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(exported)]) == 0
    with pytest.raises(UserError, match=r"built by .*build.* in my_networks\.py \(sha256 \w{12}\)"):
        load_generator(str(exported))
    scope: dict[str, object] = {"__name__": "example"}
    exec(path.read_text(), scope)  # noqa: S102
    generator = load_generator(str(exported), build=scope["build"])  # type: ignore[arg-type]
    average = {name.removeprefix("ema/"): t for name, t in tensors_of(run).items() if name.startswith("ema/")}
    assert all(torch.equal(tensor, average[name]) for name, tensor in generator.state_dict().items())
    assert generator(torch.zeros(2, 4)).shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match="returned Linear; let it return"):
        load_generator(str(exported), build=lambda section: torch.nn.Linear(1, 1))  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="the weights do not fit the networks"):
        load_generator(str(exported), build=_others)


def _others(section: OwnNetworks) -> tuple[torch.nn.Module, torch.nn.Module]:
    return torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)


def test_ranks_with_different_scripts_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank_{rank}.py").write_text(f"# {rank}\n{EXAMPLES['my_networks.py']}")
    (tmp_path / "choose.py").write_text(
        "import os, sys\n"
        f"os.execv(sys.executable, [sys.executable, '{tmp_path}/rank_' + os.environ['RANK'] + '.py', *sys.argv[1:]])\n"
    )
    code, output = trained(tmp_path / "choose.py", tmp_path / "run", *OWN, processes=2)
    assert code != 0
    assert "the parts of the script of rank 1 differ from rank 0's (rank_1.py" in output


@pytest.mark.parametrize(
    ("path", "overrides", "sentence"),
    [
        (ROOT / "train.py", OWN, "networks.kind: 'own' is built by a script of the user's"),
        (None, TINY, "networks.kind: 'dcgan', but the script builds the networks with build; set networks.kind=own"),
    ],
)
def test_own_networks_and_their_kind_go_together(
    path: Path | None, overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    done = launch(path or script(tmp_path, "my_networks.py"), ["--dry-run", *overrides])
    assert sentence in done.stdout + done.stderr
    assert done.returncode != 0
