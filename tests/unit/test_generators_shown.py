"""Export and samples: the averaged generator and no other, its latents, its classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dist_gan import load_generator, pictures
from dist_gan.checkpoint import reader
from dist_gan.config import DCGANNetworks
from dist_gan.draws import Draws
from dist_gan.evaluate import density, sample, to_pictures
from dist_gan.export import export_generator, open_generator
from dist_gan.models import build_generator
from dist_gan.sampling import write_samples
from tests.games import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose averaged generator is far from its generator."""
    folder = tmp_path_factory.mktemp("run")
    trained(folder, "run.images=240", "checkpoint.every=80", "g_optim.lr=0.05", "ema.half_life=2000", "log.samples=1")
    return folder


def averaged(run: Path) -> dict[str, torch.Tensor]:
    """The average in the newest checkpoint, which differs from the generator."""
    found = reader.newest(str(run / "checkpoints"))
    assert found.url is not None
    assert found.url.endswith("-000000000240")
    tensors = reader.read(found.url)[1]
    average = {name.removeprefix("ema/"): t for name, t in tensors.items() if name.startswith("ema/")}
    assert all(not torch.allclose(t, tensors[f"generator/weights/{name}"], atol=1e-3) for name, t in average.items())
    return average


def test_what_is_exported_is_the_average_of_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    export_generator(str(run), str(tmp_path / "exported"))
    written = safetensors.torch.load_file(tmp_path / "exported" / "model.safetensors")
    expected = averaged(run)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    facts = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (facts["images"], facts["networks"]["kind"], facts["networks"]["width"]) == (240, "mlp", 8)
    generator = load_generator(str(tmp_path / "exported"))
    assert not generator.training
    assert all(torch.equal(t, expected[name]) for name, t in generator.state_dict().items())


@pytest.mark.parametrize("seed", [0, 3])
def test_the_samples_of_a_run_are_its_averages_at_the_latents_of_the_seed(run: Path, tmp_path: Path, seed: int) -> None:
    assert list(write_samples(open_generator(str(run)), str(tmp_path / "a.png"), count=5, seed=seed))
    latents = Draws(seed).normal("latents/samples", draw=0, slots=torch.arange(5), shape=(4,))
    weights = {name: t.float() for name, t in averaged(run).items()}
    hidden = torch.nn.functional.leaky_relu(latents @ weights["hidden.0.weight"].T + weights["hidden.0.bias"], 0.2)
    points = hidden @ weights["out.weight"].T + weights["out.bias"]
    expected = pictures.grid(density(points.numpy())[None], columns=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """An exported generator of pictures of three classes, written from its description."""
    section = DCGANNetworks(resolution=16, latent_dim=4, g_width=2, classes=3)
    torch.manual_seed(0)
    generator = build_generator(section).eval()
    for parameter in generator.parameters():
        parameter.data.mul_(20)
    folder = tmp_path / "generator"
    folder.mkdir()
    safetensors.torch.save_file(generator.state_dict(), folder / "model.safetensors")
    facts = {"format": "dist_gan.generator", "version": 1, "images": 1, "networks": section.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder, generator


def drawn(generator: torch.nn.Module, latents: torch.Tensor, labels: list[int]) -> np.ndarray:
    with torch.no_grad():
        return to_pictures(generator(latents, torch.tensor(labels)))


def in_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


@pytest.mark.parametrize(("label", "labels"), [(None, [0, 1, 2, 0, 1]), (2, [2] * 5)])
def test_pictures_go_through_the_classes_unless_one_is_asked_for(
    exported: tuple[Path, torch.nn.Module], tmp_path: Path, label: int | None, labels: list[int]
) -> None:
    folder, generator = exported
    list(write_samples(open_generator(str(folder)), str(tmp_path / "out"), count=5, label=label))
    latents = Draws(0).normal("latents/samples", draw=0, slots=torch.arange(5), shape=(4,))
    expected = drawn(generator, latents, labels)
    assert len({picture.tobytes() for picture in expected}) == 5
    assert np.abs(in_folder(tmp_path / "out").astype(int) - expected).max() <= 1


def test_a_walk_goes_along_the_circle_from_one_latent_to_the_next_within_a_class(
    exported: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, generator = exported
    list(write_samples(open_generator(str(folder)), str(tmp_path / "walk"), count=2, steps=3))
    ends = Draws(0).normal("latents/samples", draw=0, slots=torch.arange(4), shape=(4,))
    rows = []
    for row in range(2):
        a, b = ends[2 * row], ends[2 * row + 1]
        angle = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))
        middle = torch.sin(angle / 2) / torch.sin(angle) * (a + b)
        rows.append(drawn(generator, torch.stack((a, middle, b)), [row] * 3))
    shown = in_folder(tmp_path / "walk")
    assert np.abs(shown.astype(int) - np.concatenate(rows)).max() <= 1
    assert len({picture.tobytes() for picture in shown}) == 6


def test_samples_do_not_depend_on_the_size_of_a_batch_and_another_purpose_has_others() -> None:
    torch.manual_seed(0)
    generator = build_generator(DCGANNetworks(resolution=16, latent_dim=4, g_width=2, classes=3)).eval()
    draws, slots = Draws(0), torch.arange(7)
    whole = torch.cat(list(sample(generator, draws, slots=slots, classes=3)))
    parts = list(sample(generator, draws, slots=slots, classes=3, batch=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), whole)
    for other in ({"purpose": "modes"}, {"draw": 1}):
        assert not torch.allclose(torch.cat(list(sample(generator, draws, slots=slots, classes=3, **other))), whole)  # type: ignore[arg-type]


def test_a_density_shows_points_where_they_lie_with_up_as_up() -> None:
    picture = density(np.array([[0.9, 0.9]] * 5 + [[-0.9, -0.9]] * 2, np.float32), side=4)
    assert picture.shape == (4, 4, 3)
    grey = picture[..., 0].astype(int)
    assert (grey[0, 3], grey[0, 0], grey[3, 3]) == (min(grey.flatten()), 255, 255)
    assert grey[0, 3] < grey[3, 0] < 255
