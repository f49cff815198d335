"""Checkpoints that an earlier version wrote, and checkpoints that lack a part.

`checkpoints-of-4eecc79` holds two checkpoints of one run on points with LeCam regularisation, written by the commit of that
name, which stored the objective's memory inside the part `progress`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_gan.checkpoint import reader
from dist_gan.types import UserError
from tests.games import lines, started, trained

EARLIER = Path(__file__).with_name("checkpoints-of-4eecc79")
FIRST, SECOND = "checkpoint-0001-000000000080", "checkpoint-0002-000000000160"
GAME = (
    "run.images=160", "checkpoint={every: 80, keep: 100}", "objective={kind: hinge, lecam: 0.1}", "log.every=80",
    "log.samples=1", "ema.half_life=300",
    "g_optim={lr: 1e-2, beta1: 0, beta2: 0.99}", "d_optim={lr: 1e-2, beta1: 0, beta2: 0.99}",
)  # fmt: skip


def test_a_run_of_an_earlier_version_goes_on_with_its_objectives_memory_and_ends_where_that_version_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EARLIER / FIRST, tmp_path / "checkpoints" / FIRST)
    _, before = reader.read(str(EARLIER / FIRST))
    with started(tmp_path, *GAME, attempt=2) as run:
        assert run.state.progress.images == 80
        assert run.state.memory.keys() == {"lecam/real", "lecam/fake", "lecam/updates"}
        assert all(torch.equal(tensor, before[f"progress/{name}"]) for name, tensor in run.state.memory.items())
    trained(tmp_path, *GAME, attempt=3)
    assert "begins anew" not in capsys.readouterr().err
    _, theirs = reader.read(str(EARLIER / SECOND))
    _, ours = reader.read(str(tmp_path / "checkpoints" / SECOND))
    assert ours.keys() == {name.replace("progress/", "objective/") for name in theirs}
    for name, tensor in theirs.items():
        # float64: what differs between processors stays far below what a change of the code brings
        torch.testing.assert_close(ours[name.replace("progress/", "objective/")], tensor, rtol=1e-9, atol=1e-12)


def without(folder: Path, part: str) -> None:
    """Removes a part from the first checkpoint of a run, as if an earlier version had written it; the second is deleted."""
    shutil.rmtree(folder / "checkpoints" / SECOND)
    place = folder / "checkpoints" / FIRST
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["values"][part]
    gone = "x" * len(part)  # its tensors get names of the same length that no part has
    for name, file in manifest["files"].items():
        data = (place / name).read_bytes().replace(f'"{part}/'.encode(), f'"{gone}/'.encode())
        (place / name).write_bytes(data)
        file["sha256"] = hashlib.sha256(data).hexdigest()
    manifest["tensors"] = {
        gone + name.removeprefix(part) if name.startswith(f"{part}/") else name: entry
        for name, entry in manifest["tensors"].items()
    }
    text = json.dumps(manifest).encode()
    (place / "manifest.json").write_bytes(text)
    (place / "COMMIT").write_text(hashlib.sha256(text).hexdigest())


@pytest.mark.parametrize("part", ["objective", "recovery"])
def test_a_part_that_a_checkpoint_lacks_begins_anew_and_says_so(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, *GAME)
    without(tmp_path, part)
    manifest, stored = reader.read(str(tmp_path / "checkpoints" / FIRST))
    capsys.readouterr()
    with started(tmp_path, *GAME, attempt=2) as run:
        state = run.state
        memory_is_new = not any(bool(tensor.any()) for tensor in state.memory.values())
        assert memory_is_new == (part == "objective")
        assert all(torch.equal(t, stored[f"generator/{name}"]) for name, t in state.generator.tensors())
        assert all(torch.equal(t, stored[f"discriminator/{name}"]) for name, t in state.discriminator.tensors())
        assert all(torch.equal(t, stored[f"ema/{name}"]) for name, t in state.ema.tensors())
        assert state.progress.values() == manifest["values"]["progress"]
        assert state.stream.values()["draw"] == manifest["values"]["stream"]["draw"]
    note = f"the checkpoint holds no state of the part '{part}', which begins anew"
    assert note in capsys.readouterr().err
    assert lines(tmp_path / "events.jsonl")[-1]["notes"] == [note]


@pytest.mark.parametrize("part", ["generator", "ema", "stream", "progress"])
def test_a_checkpoint_without_a_part_that_every_version_wrote_is_refused(part: str, tmp_path: Path) -> None:
    trained(tmp_path, *GAME)
    without(tmp_path, part)
    with pytest.raises(UserError, match=f"does not hold {part}"), started(tmp_path, *GAME, attempt=2):
        pass
