"""Where a run begins: another run's weights, a checkpoint that was named, a folder that has to be empty."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_gan.attempts import note_end, note_start
from dist_gan.checkpoint import reader
from dist_gan.export import export_generator
from dist_gan.types import TrainingFailed, UserError
from tests.games import lines, started, trained

GAME = (
    "run.images=160", "checkpoint={every: 80, keep: 100}", "objective={kind: hinge, lecam: 0.1}", "log.samples=1",
    "ema.half_life=300", "g_optim.lr=1e-2", "d_optim.lr=1e-2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with two checkpoints, whose average is still far from its generator."""
    folder = tmp_path_factory.mktemp("run")
    trained(folder, *GAME)
    return folder


def kept(run: Path, serial: int = 2) -> dict[str, Tensor]:
    (place,) = (run / "checkpoints").glob(f"checkpoint-{serial:04d}-*")
    return reader.read(str(place))[1]


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str) -> bool:
    return all(torch.equal(t, theirs[prefix + name]) for name, t in ours.items())


def test_another_runs_average_becomes_generator_and_average_and_its_discriminator_is_taken(
    run: Path, tmp_path: Path
) -> None:
    source = kept(run)
    with started(tmp_path, *GAME, f"run.init_from={run}") as begun:
        state = begun.state
        weights = {n: p.detach() for n, p in state.generator.parameters.items()}
        assert equal(weights, source, "ema/")
        assert not equal(weights, source, "generator/weights/"), "the source's generator is that of one moment"
        assert equal(dict(state.ema.tensors()), source, "ema/")
        assert equal(
            {n: p.detach() for n, p in state.discriminator.parameters.items()}, source, "discriminator/weights/"
        )
        assert state.generator.moment_names() == state.discriminator.moment_names() == ()
        assert (state.progress.images, state.progress.d_updates) == (0, 0)
        assert state.stream.values()["draw"] == 0
        assert all(not bool(tensor.any()) for tensor in state.memory.values())
    (event,) = lines(tmp_path / "events.jsonl")
    assert event["event"] == "start"
    count = len(weights)
    assert f"generator: {count} of {count} tensors taken" in event["notes"][0]


def test_an_exported_generator_leaves_the_discriminator_at_its_own_start(run: Path, tmp_path: Path) -> None:
    export_generator(str(run), str(tmp_path / "exported"))
    with started(tmp_path / "a", *GAME) as begun:
        fresh = {n: p.detach().clone() for n, p in begun.state.discriminator.parameters.items()}
    with started(tmp_path / "b", *GAME, f"run.init_from={tmp_path / 'exported'}") as begun:
        assert equal({n: p.detach() for n, p in begun.state.generator.parameters.items()}, kept(run), "ema/")
        assert all(torch.equal(p, fresh[n]) for n, p in begun.state.discriminator.parameters.items())
        notes = lines(tmp_path / "b" / "events.jsonl")[0]["notes"]
    assert f"discriminator: 0 of {len(fresh)} tensors taken" in notes[1]


def test_weights_of_another_shape_stay_at_their_start_and_are_named(run: Path, tmp_path: Path) -> None:
    with started(tmp_path, *GAME, "networks.latent_dim=3", f"run.init_from={run}") as begun:
        state = begun.state
        assert torch.equal(state.generator.parameters["out.weight"].detach(), kept(run)["ema/out.weight"])
        averaged = dict(state.ema.tensors())
        assert all(torch.equal(averaged[n], p) for n, p in state.generator.parameters.items())
        notes = lines(tmp_path / "events.jsonl")[0]["notes"]
    assert "generator: 3 of 4 tensors taken" in notes[0]
    assert "hidden.0.weight is (8, 4), not (8, 3)" in notes[0]


def test_a_run_with_a_checkpoint_of_its_own_takes_no_others_weights(run: Path, tmp_path: Path) -> None:
    settings = (*GAME, f"run.init_from={run}")
    trained(tmp_path, *settings)
    own, theirs = kept(tmp_path), kept(run)
    assert not torch.equal(own["generator/weights/out.weight"], theirs["ema/out.weight"])
    with started(tmp_path, *settings, "run.images=320", attempt=2) as begun:
        assert begun.state.progress.images == 160
        assert equal({n: p.detach() for n, p in begun.state.generator.parameters.items()}, own, "generator/weights/")


def test_a_named_checkpoint_is_taken_although_there_is_a_newer_one(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (first,) = (tmp_path / "copy" / "checkpoints").glob("checkpoint-0001-*")
    with started(tmp_path / "copy", *GAME, f"run.resume={first}", attempt=2) as begun:
        assert begun.state.progress.images == 80
        assert begun.state.stream.values()["draw"] == 10
        assert equal(
            {n: p.detach() for n, p in begun.state.generator.parameters.items()}, kept(run, 1), "generator/weights/"
        )
        assert begun.state.memory["lecam/updates"] == 10


def test_never_refuses_a_folder_with_a_checkpoint_and_begins_in_an_empty_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run.resume: 'never'"), started(run, *GAME, "run.resume=never"):
        pass
    with started(tmp_path, *GAME, "run.resume=never") as begun:
        assert begun.state.progress.images == 0


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (data,) = (tmp_path / "copy" / "checkpoints").glob("checkpoint-0002-*/data-*")
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    with started(tmp_path / "copy", *GAME, attempt=2) as begun:
        assert begun.state.progress.images == 80
    event = lines(tmp_path / "copy" / "events.jsonl")[-1]
    assert event["images"] == 80
    assert "checkpoint-0002" in event["notes"][0]


# -- starts in vain -------------------------------------------------------------------------------------------------


def test_as_many_starts_in_vain_as_allowed_may_begin_and_the_next_may_not(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        assert note_start(tmp_path, attempt=attempt, images=800, limit=3) is None
    refused = note_start(tmp_path, attempt=4, images=800, limit=3)
    assert refused is not None
    assert "3 attempts in a row began at 800 images" in refused
    assert note_start(tmp_path, attempt=5, images=800, limit=4) is None, "a start that was refused did not begin"


def test_a_new_checkpoint_or_an_end_as_it_should_be_begins_the_count_anew(tmp_path: Path) -> None:
    for attempt, images in enumerate((0, 0, 800, 0, 0), start=1):
        assert note_start(tmp_path, attempt=attempt, images=images, limit=3) is None, attempt
    assert note_start(tmp_path, attempt=6, images=0, limit=3) is None
    note_end(tmp_path, attempt=6, outcome="preempted")
    for attempt in (7, 8, 9):
        assert note_start(tmp_path, attempt=attempt, images=0, limit=3) is None, attempt
    assert note_start(tmp_path, attempt=10, images=0, limit=3) is not None


def test_a_run_that_never_gets_to_a_checkpoint_ends_after_the_starts_it_may_have(tmp_path: Path) -> None:
    settings = (*GAME, "recovery.max_restarts=2")
    for attempt in (1, 2):
        with started(tmp_path, *settings, attempt=attempt):
            pass
    with pytest.raises(TrainingFailed, match="2 attempts in a row"), started(tmp_path, *settings, attempt=3):
        pass
