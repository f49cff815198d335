"""Exported generators, and checkpoints as their source: whatever their files say, nothing is built before it is compared."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gan import cli, load_generator
from dist_gan.checkpoint import reader
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection
from dist_gan.config.reader import load_config, to_yaml
from dist_gan.ema import GeneratorEMA
from dist_gan.export import open_generator
from dist_gan.models import build_generator
from dist_gan.runtime import Runtime
from dist_gan.types import UserError
from tests.services.test_checkpoint import runtime

assert runtime  # the fixture

NAMES = ("airplane", "3", "\x1b[31mred")


def source(folder: Path, runtime: Runtime, *settings: str, classes: tuple[str, ...] | None = None) -> Path:
    """A run folder with one checkpoint that holds an averaged generator and nothing else."""
    config = load_config(None, ["data.kind=shards", "data.url=x", *settings])
    ema = GeneratorEMA(build_generator(config.networks), device=torch.device("cpu"), dtype=torch.float32)
    facts: dict[str, Any] = {"config": to_yaml(config)} | ({} if classes is None else {"classes": list(classes)})
    found = Checkpointer(str(folder / "checkpoints"), runtime=runtime, section=CheckpointSection(), facts=facts)
    found.save(64, {"ema": ema})
    found.drain()
    return folder


SMALL = ("networks.resolution=16", "networks.g_width=4", "networks.latent_dim=8")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    return source(tmp_path_factory.mktemp("conditional"), runtime, *SMALL, "networks.classes=3", classes=NAMES)


@pytest.fixture
def exported(conditional: Path, tmp_path: Path) -> Path:
    assert cli.main(["export", str(conditional), str(tmp_path / "generator")]) == 0
    return tmp_path / "generator"


@pytest.fixture
def sparing() -> Iterator[None]:
    """Fails what takes more than ten seconds or 400 MB more than there were."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def edit(folder: Path, **networks: Any) -> None:
    facts = json.loads((folder / "config.json").read_text())
    facts["networks"] |= networks
    (folder / "config.json").write_text(json.dumps(facts))


def test_a_generator_that_is_made_without_memory_first_is_the_same(conditional: Path, exported: Path) -> None:
    found, direct = load_generator(str(exported)), open_generator(str(conditional))
    assert direct.class_names == NAMES
    assert direct.images == 64
    url = reader.newest(str(conditional / "checkpoints")).url
    _, tensors = reader.read(str(url))
    for module in (found, direct.module):
        assert not module.training
        for name, tensor in module.state_dict().items():
            assert not tensor.requires_grad
            assert torch.equal(tensor, tensors[f"ema/{name}"])
    latents, labels = torch.randn(4, 8), torch.arange(4) % 3
    assert torch.equal(found(latents, labels), direct.module(latents, labels))


DCGAN = (
    {"latent_dim": 10**9}, {"g_width": 10**9}, {"classes": 10**9}, {"latent_dim": 10**15}, {"g_width": 2**62},
    {"g_width": 10**30}, {"resolution": 2**40}, {"resolution": 256}, {"classes": -1}, {"g_mapping": 10**9},
    {"kind": "mlp", "depth": 10**9}, {"kind": [1]}, {"channels": 10**9}, {"g_norm": "none"}, {"classes": 0},
)  # fmt: skip
PERCEPTRON = (
    {"kind": "mlp", "depth": 10**9}, {"kind": "mlp", "width": 10**9}, {"kind": "mlp", "depth": 10**6, "width": 1},
    {"kind": "mlp", "latent_dim": 10**9}, {"kind": "mlp", "classes": 10**12},
)  # fmt: skip


@pytest.mark.parametrize("networks", [*DCGAN, *PERCEPTRON], ids=str)
def test_absurd_networks_are_refused_before_anything_is_built(
    exported: Path, sparing: None, networks: dict[str, Any]
) -> None:
    if networks.get("kind") == "mlp":
        facts = json.loads((exported / "config.json").read_text())
        (exported / "config.json").write_text(json.dumps(facts | {"networks": networks}))
    else:
        edit(exported, **networks)
    with pytest.raises(UserError, match=str(exported)) as caught:
        load_generator(str(exported))
    assert len(str(caught.value)) < 700
    assert cli.main(["sample", str(exported), str(exported / "x.png")]) == 2


@pytest.mark.parametrize("networks", [{"g_width": 10**6}, {"latent_dim": 10**7}, {"resolution": 256}], ids=str)
def test_a_checkpoint_whose_settings_are_not_those_of_its_tensors_is_refused(
    tmp_path: Path, runtime: Runtime, sparing: None, networks: dict[str, Any]
) -> None:
    run = source(tmp_path, runtime, *SMALL)
    folder = Path(str(reader.newest(str(run / "checkpoints")).url))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in networks.items():
        before = {"g_width": 4, "latent_dim": 8, "resolution": 16}[name]
        manifest["config"] = manifest["config"].replace(f"  {name}: {before}\n", f"  {name}: {value}\n")
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMIT").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match="networks"):
        open_generator(str(run))


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


WEIGHTS = {
    "empty": b"",
    "four bytes": b"\0" * 4,
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "a nested header": (2 * 10**5).to_bytes(8, "little") + b"[" * 2 * 10**5,
    "a list": (2).to_bytes(8, "little") + b"[]",
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "a tensor of 2^80 numbers": header(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}),
    "a negative place": header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + b"\0" * 4,
    "a place that is text": header(a={"dtype": "F32", "shape": [1], "data_offsets": "04"}) + b"\0" * 4,
    "an unknown dtype": header(a={"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "places that overlap": header(
        a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    )
    + b"\0" * 4,
    "a place left out": header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"\0" * 8,
    "a pickle": b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix",
}


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_weights_that_are_no_such_file_are_one_sentence(exported: Path, sparing: None, weights: str) -> None:
    (exported / "model.safetensors").write_bytes(WEIGHTS[weights])
    with pytest.raises(UserError, match=str(exported)):
        load_generator(str(exported))


def test_weights_of_a_tebibyte_that_are_none_take_no_memory(exported: Path, sparing: None) -> None:
    begin = header(a={"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]})
    with open(exported / "model.safetensors", "wb") as file:
        file.write(begin)
        file.truncate(len(begin) + 2**40)
    assert os.path.getsize(exported / "model.safetensors") > 2**40
    with pytest.raises(UserError, match="the weights do not fit the networks"):
        load_generator(str(exported))


CONFIGS = (
    b"", b"[]", b"null", b"{}", b"\xff", b"[" * 300_000, b'{"format": 3}', b'{"format": "dist_gan.generator", "version": 2}',
    b'{"format": "dist_gan.generator", "version": 1}', b'{"format": "dist_gan.generator", "version": 1, "networks": []}',
    b'{"format": "dist_gan.generator", "version": 1, "networks": {"kind": "dcgan", "g_width": "\\ud800"}}',
    b'{"format": "dist_gan.generator", "version": 1, "networks": {"kind": "dcgan"}, "classes": "abc"}',
    b'{"format": "dist_gan.generator", "version": 1, "networks": {"kind": "dcgan"}, "images": -1}', b"1" * 5000,
    b" " * 2**21,
)  # fmt: skip


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_of_other_types_is_one_sentence(exported: Path, sparing: None, content: bytes) -> None:
    (exported / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=str(exported)):
        load_generator(str(exported))
    for name in ("config.json", "model.safetensors"):
        (exported / name).unlink()
        (exported / name).mkdir()
        with pytest.raises(UserError, match=str(exported)):
            load_generator(str(exported))


def test_an_export_of_another_version_says_what_it_does_not_know(exported: Path) -> None:
    edit(exported, tall=3)
    with pytest.warns(UserWarning, match="does not know the setting 'tall'"):
        load_generator(str(exported))


def labelled(capsys: pytest.CaptureFixture[str], url: Path, dest: Path, label: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["sample", str(url), str(dest), "--count", "2", "--label", label])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_class_is_asked_for_by_name_or_number_of_a_run_and_of_an_export(
    capsys: pytest.CaptureFixture[str], conditional: Path, exported: Path, tmp_path: Path
) -> None:
    pictures = []
    for url in (conditional, exported):
        for label, number in (("airplane", 0), ("0", 0), ("2", 2)):
            code, said = labelled(capsys, url, tmp_path / "x.png", label)
            assert code == 0, said
            assert f"2 pictures of class {number}" in said
            pictures.append((tmp_path / "x.png").read_bytes())
        for label, words in (
            ("ship", "there is no class 'ship'; give 0 to 2 or a name: airplane, 3"),
            ("3", "give 0 to 2"),
        ):
            code, said = labelled(capsys, url, tmp_path / "y.png", label)
            assert code == 2
            assert words in said
    assert pictures[0] == pictures[1] == pictures[3] == pictures[4] != pictures[2] == pictures[5]


def test_what_was_written_without_names_goes_by_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runtime: Runtime
) -> None:
    old = source(tmp_path / "old", runtime, *SMALL, "networks.classes=3")
    assert labelled(capsys, old, tmp_path / "x.png", "2")[0] == 0
    code, said = labelled(capsys, old, tmp_path / "x.png", "airplane")
    assert code == 2
    assert "names of the classes were not recorded; give a number from 0 to 2" in said
    without = source(tmp_path / "without", runtime, *SMALL)
    assert "trained without classes" in labelled(capsys, without, tmp_path / "x.png", "cat")[1]
