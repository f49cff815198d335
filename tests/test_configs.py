"""Settings: recipes load, each mistake has its line with place, value and remedy, and numbers read as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_gan.config import (
    AdamSection,
    ArticleNetworks,
    DCGANNetworks,
    Ramp,
    RunConfig,
    SGDSection,
)
from dist_gan.config.kinds import classes_of
from dist_gan.config.reader import config_hash, differences, load_config, run_dir_of, schema_help, to_yaml
from dist_gan.types import UserError
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("**/*.y*ml"))
MAX_LEAVES = 110
"""A field that no recipe or user needs is not added: past this number one asks which to take out."""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def report_of(path: Path | None, *overrides: str, world_size: int = 1) -> list[str]:
    """The lines of the report of mistakes, the first one saying how many."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value).splitlines()


def leaves() -> dict[str, dict[str, Any]]:
    """Each section with its fields, kind by kind, from the models themselves: 'data.shards' -> fields."""
    return {
        f"{name}/{section.__name__}": dict(section.model_fields)
        for name in RunConfig.model_fields
        for section in classes_of(name)
    }


# -- recipes --------------------------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_recipe_loads_and_round_trips(path: Path, world_size: int, tmp_path: Path) -> None:
    config = load_config(path, world_size=world_size)
    again = load_config(written(tmp_path, to_yaml(config)), world_size=world_size)
    assert again == config
    assert config_hash(again) == config_hash(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_has_a_header_with_its_command_and_a_folder_of_its_own(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert "accelerate launch" in header
    assert re.search(r"^# Paper", header, re.MULTILINE)
    assert load_config(path).run.dir == f"runs/{path.stem}"


def test_the_defaults_are_a_valid_run() -> None:
    assert load_config(None) == RunConfig()


# -- one mistake, one line ------------------------------------------------------------------------------------------

# What is written, the place, the value, and words of the remedy.
MISTAKES = [
    ("run: {bach: 32}", "run.bach", "32", "the keys of run are dir, images, batch"),
    ("runn: {batch: 32}", "runn", "unknown key", "the sections are run, data"),
    ("data: {url: s3://b}", "data.url", "'s3://b'", "data.kind=shards"),
    ("g_optim: {kind: sgd, beta1: 0.5}", "g_optim.beta1", "0.5", "g_optim.kind=adam"),
    ("g_optim: {lr: {start: 1, end: 0, images: 5, foo: 9}}", "g_optim.lr.foo", "9", "start, end, images, begin, shape"),
    ("networks: {g_with: 5}", "networks.g_with", "5", "g_width"),
    ("run: {batch: abc}", "run.batch", "'abc'", "whole number; write one such as 64, 10M or 128Ki"),
    ("run: {batch: 64.5}", "run.batch", "64.5", "whole number"),
    ("run: {batch: [1]}", "run.batch", "[1]", "whole number"),
    ("run: {batch: null}", "run.batch", "None", "whole number"),
    ("run: {dir: 5}", "run.dir", "5", "a valid string"),
    ("run: {profile: maybe}", "run.profile", "'maybe'", "neither true nor false"),
    ("g_optim: {lr: fast}", "g_optim.lr", "'fast'", "write one such as 0.5, 1e-3 or 10M"),
    ("g_optim: {lr: {start: 1, images: 5}}", "g_optim.lr.end", "missing", "give it a value"),
    ("g_optim: {eps: .nan}", "g_optim.eps", "nan", "write one such as"),
    ("g_optim: {lr: .inf}", "g_optim.lr", "inf", "write one such as"),
    ("g_optim: {eps: 1e400}", "g_optim.eps", "'1e400'", "write one such as"),
    ("run: [1]", "run", "[1]", "write keys and values below it"),
    ("networks: mlp", "networks", "'mlp'", "write keys and values below it"),
    ("data: {kind: shards}", "data.url", "missing", "give it a value"),
    ("networks: {resolution: 48}", "networks.resolution", "48", "16, 32, 64, 128 or 256"),
    ("runtime: {precision: fp16}", "runtime.precision", "'fp16'", "bf16"),
    ("objective: {kind: wgan}", "objective.kind", "'wgan'", "'wasserstein'"),
    ("run: {batch: 0}", "run.batch", "0", "greater than 0"),
    ("run: {d_updates: 0}", "run.d_updates", "0", "greater than or equal to 1"),
    ("run: {seed: -1}", "run.seed", "-1", "greater than or equal to 0"),
    ("data: {holdout: 0.6}", "data.holdout", "0.6", "less than or equal to 0.5"),
    ("g_optim: {beta1: 1}", "g_optim.beta1", "1", "less than 1"),
    ("checkpoint: {keep: 1}", "checkpoint.keep", "1", "greater than or equal to 2"),
    ("g_optim: {lr: {start: 1, end: 0, images: 5, begin: 9}}", "g_optim.lr", "begin 9", "images 5"),
    ("networks: {kind: biggan}", "networks", "'biggan'", "'article', 'dcgan', 'mlp'"),
    ("data: {kind: lmdb}", "data", "'lmdb'", "'shapes', 'shards', 'points'"),
    ("g_optim: {kind: lion}", "g_optim", "'lion'", "'adam', 'adamw', 'sgd'"),
    ("run: {batch: true}", "run.batch", "True", "a number, not a yes or no"),
    ("ema: {half_life: true}", "ema.half_life", "True", "a number, not a yes or no"),
    ("g_optim: {lr: false}", "g_optim.lr", "False", "a number, not a yes or no"),
    ("data: {kind: shards, url: 'pipe:cat x'}", "data.url", "'pipe:...'", "it would run a shell command"),
    ("run: {resume: 'pipe:cat x'}", "run.resume", "'pipe:...'", "it would run a shell command"),
    ("data: {kind: shards, url: 'simplecache::s3://b/x'}", "data.url", "'simplecache::s3://b/x'", "one plain URL"),
    ("data: {kind: shards, url: 'ftp://h/x'}", "data.url", "'ftp://h/x'", "s3://"),
    ("data: {kind: shards, url: 'ssh://h/x'}", "data.url", "'ssh", "use a path or one of"),
    ("data: {kind: shards, url: 'github://a:b@c/x'}", "data.url", "'github", "use a path or one of"),
    ("run: {dir: 's3://b/runs'}", "run.dir", "'s3://b/runs'", "give a path on a disk"),
    ("run: {dir: ''}", "run.dir", "''", "at least 1 character"),
    # rules that join fields
    ("objective: {gradient_penalty: 10}", "networks.d_norm", "'batch'", "set networks.d_norm=none"),
    ("objective: {r1_gamma: {start: 1, end: 0, images: 5}}", "networks.d_norm", "'batch'", "set networks.d_norm=none"),
    ("objective: {kind: hinge, label_smoothing: 0.1}", "objective.label_smoothing", "0.1", "minimax or nonsaturating"),
    ("objective: {penalty_every: 4}", "objective.penalty_every", "4", "set r1_gamma"),
    ("data: {kind: points}", "networks.kind", "'dcgan'", "points go with mlp"),
    ("networks: {kind: mlp}", "networks.kind", "'mlp'", "images with article or dcgan or own"),
    ("networks: {resolution: 64}", "networks.resolution", "64", "set networks.resolution=32"),
    ("networks: {channels: 1}", "networks.resolution", "1 channels", "networks.channels=3"),
    ("networks: {classes: 10}", "networks.classes", "10", "take 12, or 0"),
    ("data: {kind: points}\nnetworks: {kind: mlp, classes: 3}", "networks.classes", "3", "8 classes"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "place", "value", "remedy"), MISTAKES, ids=[m[0][:50] for m in MISTAKES])
def test_a_mistake_has_one_line_with_place_value_and_remedy(
    text: str, place: str, value: str, remedy: str, tmp_path: Path
) -> None:
    path = written(tmp_path, text)
    head, *lines = report_of(path)
    assert head == f"1 mistake in the configuration ({path}):"
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"  {place}: ")
    assert value in lines[0]
    assert remedy in lines[0]


@pytest.mark.parametrize("override", ["run.images", "=3", ".batch=3", "run..batch=3", "run.=3", "--batch"])
def test_what_is_no_override_is_shown_with_an_example(override: str) -> None:
    _, line = report_of(None, override)
    assert line == f"  {override!r}: is no override; write section.key=value, such as run.images=10M"


def test_an_override_that_is_no_yaml_says_so() -> None:
    _, line = report_of(None, "run.dir=[a")
    assert line == "  'run.dir=[a': the value is not YAML, or names a key twice; put text in quotes"


def test_a_file_that_is_missing_says_where_to_look(tmp_path: Path) -> None:
    _, line = report_of(tmp_path / "none.yaml")
    assert line == (
        f"  {tmp_path}/none.yaml: there is no such file; give the path of a YAML file, "
        f"`ls configs` shows those that come along"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: {batch: 3", "is not YAML"),
        (b"run:\n\tbatch: 3", "is not YAML"),
        (b"- run\n- data", "holds a list where sections are needed"),
        (b"just words", "holds a str where sections are needed"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"run: !!python/object/apply:os.system ['exit 1']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line_and_runs_nothing(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    head, *lines = report_of(path)
    assert head.startswith("1 mistake")
    assert len(lines) == 1
    assert words in lines[0]


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in report_of(tmp_path)[1]


def test_three_mistakes_stand_in_one_report_and_one_of_them_joins_fields(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {bach: 3, images: abc}\nobjective: {kind: hinge, label_smoothing: 0.1}")
    head, *lines = report_of(path)
    assert head.startswith("3 mistakes")
    places = sorted(line.split(":")[0].strip() for line in lines)
    assert places == ["objective.label_smoothing", "run.bach", "run.images"]


def test_a_file_and_its_overrides_share_one_report(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {batch: 0}")
    head, *lines = report_of(path, "nonsense", "log.every=-1", "foo.bar=1", "data.kind=points", world_size=4)
    assert head.startswith("5 mistakes")
    text = "\n".join(lines)
    for place in ("'nonsense'", "run.batch", "log.every", "foo", "networks.kind"):
        assert f"  {place}: " in text


def test_a_rule_that_joins_fields_is_silent_about_a_field_that_is_already_wrong(tmp_path: Path) -> None:
    """The default that stands in for it was not written by the user."""
    _, *lines = report_of(written(tmp_path, "run: {batch: abc}"), world_size=3)
    assert lines == ["  run.batch: 'abc' is no whole number; write one such as 64, 10M or 128Ki"]


def test_a_batch_that_does_not_divide_names_the_nearest_that_does() -> None:
    assert "take 66, or start another number of processes" in report_of(None, "run.batch=65", world_size=3)[1]
    assert "take 4, or" in report_of(None, "run.batch=1", world_size=4)[1]
    assert load_config(None, ["run.batch=66"], world_size=3).run.batch == 66


def test_a_micro_batch_that_does_not_divide_the_share_of_a_process_says_what_to_divide() -> None:
    _, line = report_of(None, "run.batch=64", "runtime.micro_batch=5", world_size=2)
    assert line == ("  runtime.micro_batch: 32 images a process do not divide into pieces of 5; choose a divisor of 32")
    assert load_config(None, ["run.batch=64", "runtime.micro_batch=16"], world_size=2).runtime.micro_batch == 16
    assert "64 images a process" in report_of(None, "runtime.micro_batch=128")[1]


def test_too_few_lanes_for_the_processes_are_refused() -> None:
    _, line = report_of(None, "data.lanes=2", world_size=4)
    assert line.startswith("  data.lanes: 2 lanes cannot be dealt to 4 processes; take")


def test_a_report_never_shows_a_secret_of_a_url() -> None:
    for url in ("ftp://user:SECRET@h/x", "s4://h/x?sig=SECRET", "simplecache::https://user:SECRET@h/x"):
        assert "SECRET" not in "\n".join(report_of(None, "data.kind=shards", f"data.url={url}"))
    assert "SECRET" not in "\n".join(report_of(None, "run.dir=s3://key:SECRET@bucket/x"))


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("64", 64), ("10M", 10_000_000), ("128Ki", 131_072), ("20k", 20_000), ("20K", 20_000), ("1.5k", 1500),
        ("1e3", 1000), ("2G", 2 * 10**9), ("1T", 10**12), ("1Mi", 2**20), ("1Gi", 2**30), ("'64'", 64), ("1_000", 1000),
        ("64.0", 64), ("2 k", 2000),
    ],
)  # fmt: skip
def test_counts_read_as_people_write_them(text: str, number: int) -> None:
    images = load_config(None, [f"run.images={text}"]).run.images
    assert images == number
    assert isinstance(images, int)


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("2.5E-4", 2.5e-4), (".5", 0.5), ("1", 1.0), ("0.5k", 500.0), ("1.", 1.0)]
)
def test_reals_read_as_people_write_them_also_where_yaml_sees_text(text: str, number: float) -> None:
    lr = load_config(None, [f"g_optim.lr={text}"]).g_optim.lr
    assert lr == number
    assert isinstance(lr, float)


@pytest.mark.parametrize("text", ["10 Mega", "10MB", "k", "1e", "--3", "1,000", "ten", "1e-3", "0x1g", "''"])
def test_what_is_no_count_is_refused(text: str) -> None:
    assert report_of(None, f"run.images={text}")[1].startswith("  run.images: ")


def test_a_ramp_takes_the_same_numbers() -> None:
    config = load_config(None, ["g_optim.lr={start: 2e-3, end: 0, images: 300k, shape: cosine}"])
    assert config.g_optim.lr == Ramp(start=0.002, end=0.0, images=300_000, begin=0, shape="cosine")
    longer = load_config(None, ["g_optim.lr.start=1e-3", "g_optim.lr.end=0", "g_optim.lr.images=1M"])
    assert longer.g_optim.lr == Ramp(start=0.001, end=0.0, images=1_000_000)


# -- overrides ------------------------------------------------------------------------------------------------------

FILE = "networks: {kind: dcgan, g_width: 17, latent_dim: 33}\ng_optim: {kind: sgd, lr: 0.5, momentum: 0.9}"


def test_choosing_another_kind_replaces_the_section(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    config = load_config(path, ["networks.kind=article", "g_optim.kind=adam"])
    assert config.networks == ArticleNetworks()
    assert config.g_optim == AdamSection()


def test_the_same_kind_leaves_the_section_as_it_is(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, FILE), ["networks.kind=dcgan", "g_optim.kind=sgd"])
    assert config.networks == DCGANNetworks(g_width=17, latent_dim=33)
    assert config.g_optim == SGDSection(lr=0.5, momentum=0.9)


def test_a_kind_counts_first_wherever_it_stands_on_the_line(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    config = load_config(
        path, ["networks.latent_dim=7", "networks.kind=article", "g_optim.lr=3e-4", "g_optim.kind=adamw"]
    )
    assert config.networks == ArticleNetworks(latent_dim=7)
    assert config.g_optim == AdamSection(kind="adamw", lr=3e-4)


def test_the_default_kind_left_out_in_the_file_is_the_same_kind(tmp_path: Path) -> None:
    path = written(tmp_path, "networks: {g_width: 17}\nobjective: {label_smoothing: 0.1, kind: minimax}")
    config = load_config(path, ["networks.kind=dcgan", "objective.kind=minimax"])
    assert config.networks == DCGANNetworks(g_width=17)
    assert config.objective.label_smoothing == 0.1


def test_a_later_override_wins_and_the_file_is_the_base(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "run: {batch: 32, seed: 4}"), ["run.batch=48", "run.batch=96"])
    assert (config.run.batch, config.run.seed, config.run.images) == (96, 4, RunConfig().run.images)


def test_an_override_of_a_section_written_with_an_anchor_leaves_the_other_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "g_optim: &o {lr: 1e-4, beta1: 0.0}\nd_optim: *o")
    config = load_config(path, ["g_optim.lr=5e-4"])
    assert config.g_optim.lr == 5e-4
    assert config.d_optim == AdamSection(lr=1e-4, beta1=0.0)


@pytest.mark.parametrize(
    "override",
    [
        "g_optim.lr=-1e-3", "d_optim.beta2=1.5", "objective.instance_noise=-1", "ema.half_life=-5",
        "g_optim.beta2={start: 0.9, end: 3, images: 5}", "g_optim.lr={start: 1e-3, end: -1, images: 5}",
    ],
)  # fmt: skip
def test_a_knob_out_of_range_is_refused(override: str) -> None:
    assert report_of(None, override)[1].startswith(f"  {override.split('=')[0]}")


@pytest.mark.parametrize(
    ("text", "key"), [("run:\n  batch: 64\n  batch: 32", "batch"), ("run: {}\ndata: {}\nrun: {}", "run")]
)
def test_a_key_written_twice_is_a_mistake(text: str, key: str, tmp_path: Path) -> None:
    assert f"the key {key!r} is written twice" in report_of(written(tmp_path, text))[1]


def test_a_key_written_twice_in_an_override_is_a_mistake_too() -> None:
    assert "batch" in "\n".join(report_of(None, "run={batch: 64, batch: 32}"))


def test_a_merge_key_with_a_change_of_its_own_is_no_key_written_twice(tmp_path: Path) -> None:
    path = written(tmp_path, "g_optim: &o {lr: 1e-4, beta1: 0.0}\nd_optim: {<<: *o, lr: 4e-4}")
    config = load_config(path)
    assert config.g_optim == AdamSection(lr=1e-4, beta1=0.0)
    assert config.d_optim == AdamSection(lr=4e-4, beta1=0.0)


@pytest.mark.parametrize("text", ["2026-01-01: 3", "run: {2026-01-01: 3}", "on: 3", "run: {~: 3}", "run: {1: 2}"])
def test_a_key_that_yaml_reads_as_no_text_is_an_unknown_key(text: str, tmp_path: Path) -> None:
    assert "unknown key (value " in report_of(written(tmp_path, text))[1]


def test_a_section_that_holds_itself_is_a_mistake(tmp_path: Path) -> None:
    assert "a section holds itself" in report_of(written(tmp_path, "run: &a {b: *a}"))[1]


@pytest.mark.parametrize("override", ["data.url=''", "run.resume=''"])
def test_an_empty_url_is_a_mistake(override: str) -> None:
    base = ["data.kind=shards", "data.url=x"]
    assert report_of(None, *base, override)[1].startswith(f"  {override.split('=')[0]}: ")


def test_the_run_folder_is_found_however_wrong_the_rest_is(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {dir: runs/mine, batch: abc}\nfoo: 3")
    assert run_dir_of(path, []) == "runs/mine"
    assert run_dir_of(path, ["run.dir=runs/other", "nonsense"]) == "runs/other"
    assert run_dir_of(None, []) is None
    assert run_dir_of(path, ["run.dir=5"]) is None
    assert run_dir_of(path, ["run=5"]) is None


# -- out again ------------------------------------------------------------------------------------------------------


def changed_value(value: Any, field: Any) -> Any:
    """Another valid value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"auto": "fp32", "relativistic": "hinge", "batch": "none"}.get(value, value + "x")
    if value is None:
        return 1
    if isinstance(value, int):
        return {32: 64, 3: 1}.get(value, value + 1) if "Literal" in str(field.annotation) else value + 1
    return value / 2 if value else 0.25


def test_the_whole_configuration_comes_back_from_its_yaml_whatever_is_chosen(tmp_path: Path) -> None:
    for overrides in (
        ["data.kind=points", "networks.kind=mlp", "g_optim.kind=sgd", "d_optim.kind=adamw"],
        ["data.kind=shards", "data.url=s3://b/x", "networks.kind=article", "networks.resolution=64"],
        [
            "g_optim.lr={start: 1e-3, end: 0, images: 1M}",
            "ema.half_life={start: 0, end: 20k, images: 1M, shape: cosine}",
        ],
        ["runtime.micro_batch=16", "runtime.threads=1", "objective.kind=minimax", "objective.label_smoothing=0.1"],
    ):
        config = load_config(None, overrides)
        again = load_config(written(tmp_path, to_yaml(config)))
        assert again == config
        assert to_yaml(again) == to_yaml(config)


def test_the_yaml_is_complete_so_that_a_change_of_defaults_cannot_change_an_old_run() -> None:
    flat = yaml.safe_load(to_yaml(RunConfig()))
    for name, section in RunConfig():
        assert set(flat[name]) == set(type(section).model_fields)


MAY_CHANGE = {
    "run.images", "run.resume", "run.dir", "run.profile", "data.url", "data.mix", "data.prefetch", "data.workers",
    "data.memory", "data.cache", "data.bad_images", "data.max_bad", "data.patience_s",
    "data.disk_cache", "data.disk_cache_bytes",
}  # fmt: skip
MAY_CHANGE_WHOLLY = {"log", "checkpoint", "runtime", "recovery"}


@pytest.mark.parametrize("name", list(RunConfig.model_fields))
def test_the_hash_ignores_what_may_change_on_resume_and_nothing_else(name: str) -> None:
    config = RunConfig()
    section = getattr(config, name)
    for key, field in type(section).model_fields.items():
        if key == "kind" and name in ("data", "networks", "g_optim", "d_optim"):
            continue  # another class
        value = changed_value(getattr(section, key), field)
        other = config.model_copy(update={name: section.model_copy(update={key: value})})
        place = f"{name}.{key}"
        free = name in MAY_CHANGE_WHOLLY or place in MAY_CHANGE
        assert (config_hash(other) == config_hash(config)) == free, place
        assert differences(config, other) == ([] if free else [f"{place}: {getattr(section, key)!r} -> {value!r}"])


def test_the_hash_tells_kinds_and_ramps_apart() -> None:
    hashes = [
        config_hash(load_config(None, overrides))
        for overrides in (
            [], ["networks.kind=article"], ["g_optim.kind=sgd"], ["g_optim.kind=adamw"], ["d_optim.kind=adamw"],
            ["data.kind=shards", "data.url=x"], ["g_optim.lr={start: 2e-4, end: 2e-4, images: 5}"],
            ["g_optim.lr={start: 2e-4, end: 2e-4, images: 6}"],
        )
    ]  # fmt: skip
    assert len(set(hashes)) == len(hashes)


def test_the_same_settings_written_otherwise_have_the_same_hash(tmp_path: Path) -> None:
    a = load_config(written(tmp_path, "run: {seed: 7, batch: 32}\ng_optim: {lr: 1e-3, beta1: 0}"))
    b = load_config(None, ["g_optim.beta1=0.0", "run.batch=32", "g_optim.lr=0.001", "run.seed=7", "g_optim.kind=adam"])
    assert config_hash(a) == config_hash(b)
    assert re.fullmatch(r"[0-9a-f]{16}", config_hash(a))


def test_the_help_names_every_setting_with_its_default_and_what_it_does() -> None:
    text = schema_help()
    blocks = {block.splitlines()[0]: block for block in re.split(r"\n\n", text)}
    assert len(blocks) >= len(leaves())
    for section, fields in leaves().items():
        name, cls = section.split("/")
        kind = fields["kind"].default if "kind" in fields else None
        (block,) = [
            block for head, block in blocks.items()
            if head.startswith((f"{name}:", f"{name} (kind: {kind})"))
        ]  # fmt: skip
        for key, field in fields.items():
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            assert f"  {name}.{key} = {default}\n" in block, (cls, key)
            assert field.description, f"{cls}.{key} has no docstring"
            assert " ".join(field.description.split()) in block
    assert "One of: linear, cosine" in text or "{start: 2e-3, end: 0, images: 300k, shape: linear}" in text


def test_the_number_of_settings_stays_under_its_ceiling() -> None:
    number = len({f"{place.split('/')[0]}.{key}" for place, fields in leaves().items() for key in fields})
    assert number <= MAX_LEAVES, f"{number} settings: take one out before adding one"


def test_settings_are_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.run = config.run  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.run.batch = 3  # type: ignore[misc]
