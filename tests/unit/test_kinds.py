"""Every kind is one value in one dict, from which help, messages and the names of what a run logs are made."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from dist_gan.config.data_sets import DATA_SETS
from dist_gan.config.kinds import classes_of, default_kinds
from dist_gan.config.reader import load_config, read_settings, schema_help
from dist_gan.config.rules import RULES, Mistake
from dist_gan.models import FAMILIES
from dist_gan.objectives.losses import LOSSES
from dist_gan.optimizers import OPTIMIZERS

CLASSES: dict[str, dict[str, Any]] = {
    "data": dict(DATA_SETS),
    "networks": {kind: family.settings for kind, family in FAMILIES.items()},
    "g_optim": {kind: optimizer.settings for kind, optimizer in OPTIMIZERS.items()},
    "d_optim": {kind: optimizer.settings for kind, optimizer in OPTIMIZERS.items()},
}
KINDS = [(name, kind) for name, classes in CLASSES.items() for kind in classes]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_kind_has_its_settings_their_help_and_a_place_in_the_list_of_kinds(name: str, kind: str) -> None:
    settings = CLASSES[name][kind]
    assert kind in get_args(settings.model_fields["kind"].annotation)
    assert settings in classes_of(name)
    title = f"{name} (kind: {settings.model_fields['kind'].default}): {' '.join(settings.__doc__.split())}"
    assert title in schema_help().splitlines()
    (line,) = read_settings(None, [f"{name}.kind=none_such"]).mistakes
    assert f"'{kind}'" in line


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_an_unknown_key_of_a_kind_is_named_and_the_keys_are_listed(name: str, kind: str) -> None:
    overrides = [f"{name}.kind={kind}", f"{name}.none_such=1", *(["data.url=x"] if kind == "shards" else [])]
    line = next(text for text in read_settings(None, overrides).mistakes if text.startswith(f"{name}.none_such: "))
    assert ", ".join(CLASSES[name][kind].model_fields) in line


def test_the_default_of_a_section_is_one_of_its_kinds() -> None:
    assert default_kinds().keys() == {*CLASSES, "objective"}
    assert default_kinds()["objective"] in LOSSES
    assert all(default_kinds()[name] in classes for name, classes in CLASSES.items())


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_says_what_it_is_and_is_offered(kind: str) -> None:
    assert "D minimises" in LOSSES[kind].description
    assert kind in schema_help()
    assert load_config(None, [f"objective.kind={kind}"]).objective.kind == kind


BROKEN: dict[str, tuple[list[str], int, list[str]]] = {
    "batch_divides_over_processes": (["run.batch=64"], 3, ["run.batch"]),
    "share_divides_into_micro_batches": (["runtime.micro_batch=24"], 1, ["runtime.micro_batch"]),
    "networks_make_what_the_data_are": (["data.kind=points"], 1, ["networks.kind"]),
    "networks_have_the_size_of_the_shapes": (["networks.resolution=64"], 1, ["networks.resolution"]),
    "networks_have_the_classes_of_the_data": (["networks.classes=11"], 1, ["networks.classes"]),
    "checkpoints_go_where_files_can_be_written": (["checkpoint.url=https://host/run"], 1, ["checkpoint.url"]),
    "every_process_has_a_lane": (["data.lanes=3"], 4, ["data.lanes"]),
    "folders_of_shards_can_be_read": (
        ["data.kind=shards", "data.url=ftp://a/b", "data.mix={ftp://c/d: 1, /e: 1}"], 1, ["data.url", "data.mix"],
    ),
    "the_mixture_has_each_folder_once": (["data.kind=shards", "data.url=/a", "data.mix={/a/: 1}"], 1, ["data.mix"]),
    "patience_ends_before_a_rank_is_missed": (
        ["data.kind=shards", "data.url=s3://a/b", "data.patience_s=300"], 1, ["data.patience_s"],
    ),
    "the_disk_cache_is_on_a_disk": (
        ["data.kind=shards", "data.url=/a", "data.disk_cache=s3://a/b"], 1, ["data.disk_cache"],
    ),
    "the_run_is_in_a_local_folder": (["run.dir=s3://a/b"], 1, ["run.dir"]),
    "what_the_run_starts_from_can_be_read": (
        ["run.resume=ftp://a/b", "run.init_from=ftp://c/d"], 1, ["run.resume", "run.init_from"],
    ),
    "the_best_checkpoint_is_that_of_a_logged_scalar": (["checkpoint.keep_best=x"], 1, ["checkpoint.keep_best"]),
    "penalties_are_of_each_image": (["objective.r1_gamma=1"], 1, ["networks.d_norm"]),
    "smoothed_labels_need_targets": (["objective.label_smoothing=0.1"], 1, ["objective.label_smoothing"]),
    "lazy_penalties_need_a_penalty": (["objective.penalty_every=2"], 1, ["objective.penalty_every"]),
}  # fmt: skip
"""Settings and number of processes that break each rule, and the places it then names."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_speaks_of_settings_that_break_it_and_of_no_others(rule: Any) -> None:
    overrides, world_size, places = BROKEN[rule.__name__]
    answer = rule(read_settings(None, overrides, world_size=world_size).config, world_size)
    mistakes = [answer] if isinstance(answer, Mistake) else list(answer)
    assert [mistake.text.partition(":")[0] for mistake in mistakes] == places
    assert not rule(load_config(None), 1)
