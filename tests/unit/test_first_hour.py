"""The README's first hour: the commands that it prints load, and its recipe starts a game that goes on.

Whether it ends in pictures takes minutes: benchmarks/first_hour.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.first_hour import cut
from dist_gan import __main__ as program
from dist_gan import cli
from dist_gan.build import new_game
from dist_gan.config import RunConfig
from dist_gan.config.reader import load_config
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.pictures import write_png
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.types import Scalars
from tests.conftest import ROOT

SECTION = (ROOT / "README.md").read_text().split("## The first hour")[1].split("\n## ")[0]
UPDATES = 60
"""Without the smooth start D's loss is 0.04 by then, the logits 3.6 apart; with it 0.24 and 1.4."""


def words_of_the_readme(program: str) -> list[str]:
    """Words after `program` in the first of the section's commands, as a shell would hand them on."""
    found = re.search(rf"{re.escape(program)} ((?:[^\n\\#]|\\\n)*)", SECTION)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


def soft_pictures(count: int, *, resolution: int, seed: int = 0) -> np.ndarray:
    """Fields of colour as smooth as enlarged photographs, N x side x side x 3."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    soft = torch.nn.functional.interpolate(noise, size=resolution, mode="bicubic", align_corners=False)
    return (soft.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def first_updates(config: RunConfig, folder: Path, *, updates: int) -> tuple[Scalars, torch.Tensor]:
    """Scalars, means of the last third of `updates`, and 16 pictures of the trained generator itself."""
    runtime = Runtime(config.runtime, LaunchSettings(precision="fp32"))
    draws = Draws(config.run.seed, dtype=runtime.dtype)
    stream = ImageStream(
        [(ShardFolder(str(folder), read_manifest(str(folder))), 1)], section=config.data,
        resolution=config.networks.resolution, channels=3, classes=0, batch=config.run.batch,
        slots=runtime.slots(config.run.batch), draws=draws,
    )  # fmt: skip
    networks = build_networks(config.networks, seed=config.run.seed)
    game = new_game(config, runtime, networks, stream, draws)
    state = game.state
    scalars = ScalarMeans()
    for update in range(updates):
        if update == updates * 2 // 3:
            scalars = ScalarMeans()
        game.step(knobs_at(state.progress.images, config=config), scalars)
    stream.close()
    latents = torch.randn(16, config.networks.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = state.generator.module(latents)
    return scalars.flush(runtime), made


def roughness(pictures: torch.Tensor) -> float:
    """Mean square between neighbouring pixels over twice the variance: 0 for one colour, 1 for white noise."""
    across = (pictures[..., 1:] - pictures[..., :-1]).square().mean()
    return float(across / (2 * pictures.var()))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the README's first command leaves beside its photographs."""
    place = tmp_path_factory.mktemp("user")
    (place / "photos").mkdir()
    for index, picture in enumerate(soft_pictures(128, resolution=64)):
        write_png(str(place / "photos" / f"{index:03d}.png"), picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["pack", *words_of_the_readme("dist-gan pack"), "--workers", "1"]) == 0
    return place / "shards"


def test_the_readmes_command_names_a_recipe_and_dry_runs(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, *overrides = words_of_the_readme("train.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(shards.parent)
    assert program.main(["--dry-run", str(ROOT / path), *overrides]) == 0
    shown = capsys.readouterr().out
    assert "url: shards" in shown
    assert "resolution: 64" in shown


@pytest.mark.parametrize("side", [64, 128])
def test_a_recipe_for_photographs_starts_with_soft_pictures(side: int) -> None:
    config = load_config(ROOT / "configs" / f"photos-{side}.yaml", world_size=2)
    assert config.networks.resolution == side
    latents = torch.randn(16, config.networks.latent_dim, generator=torch.Generator().manual_seed(0))
    for smooth in (True, False):
        section = config.networks.model_copy(update={"g_smooth": smooth})
        with torch.no_grad():
            made = build_networks(section, seed=0).generator(latents)
        assert (roughness(made) < 0.2) is smooth, roughness(made)
        assert 0.1 < made.std().item() < 0.8
        assert made.std(dim=0).mean().item() > 0.5 * made.std().item(), "pictures hardly depend on their latents"


def test_the_readmes_recipe_starts_a_game_that_neither_player_has_won_and_without_its_start_it_is_lost(
    shards: Path,
) -> None:
    path, *overrides = words_of_the_readme("train.py")
    overrides = [f"data.url={shards}" if o.startswith("data.url") else o for o in overrides]
    lost = {}
    for smooth in (True, False):
        config = load_config(ROOT / path, [*overrides, f"networks.g_smooth={smooth}".lower(), "runtime.threads=1"])
        scalars, made = first_updates(config, shards, updates=UPDATES)
        gap = scalars["logits/real"] - scalars["logits/fake"]
        lost[smooth] = scalars["loss/discriminator"] < 0.1 and gap > 2.5
        if smooth:
            assert scalars["loss/discriminator"] > 0.12
            assert 0 < gap < 2.5
            assert scalars["gradient_norm/generator"] > 1e-3
            assert made.std(dim=0).mean().item() > 0.1
            assert roughness(made) < 0.2
    assert lost == {True: False, False: True}


def test_pictures_for_the_benchmark_are_taken_evenly_from_all_folders(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.png", "b/2.PNG", "b/notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    assert cut(tmp_path / "in", tmp_path / "two", pictures=2) == 2
    taken = {p.relative_to(tmp_path / "two").as_posix() for p in (tmp_path / "two").rglob("*.*")}
    assert taken == {"a/1.jpg", "b/1.png"}
    assert cut(tmp_path / "in", tmp_path / "all", pictures=0) == 4
    assert (tmp_path / "all" / "b" / "2.PNG").read_bytes() == b"b/2.PNG"
