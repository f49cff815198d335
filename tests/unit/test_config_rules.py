"""Rules that join settings, on both sides of their limits."""

from __future__ import annotations

import pytest

from dist_gan.config.reader import load_config
from dist_gan.types import UserError


def refused(*overrides: str, world_size: int = 1) -> str | None:
    """The report on settings; None if they are accepted."""
    try:
        load_config(None, overrides, world_size=world_size)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("settings", "world_size", "place"),
    [
        (["run.batch=64", "runtime.micro_batch=64"], 1, None),
        (["run.batch=64", "runtime.micro_batch=64"], 2, "runtime.micro_batch"),  # it divides the batch, not the share
        (["run.batch=64", "runtime.micro_batch=32"], 2, None),
        (["run.batch=64", "runtime.micro_batch=24"], 1, "runtime.micro_batch"),
        (["run.batch=96"], 3, None),
        (["run.batch=64"], 3, "run.batch"),
        (["data.lanes=4"], 4, None),
        (["data.lanes=3"], 4, "data.lanes"),
        (["networks.classes=12"], 1, None),
        (["networks.classes=11"], 1, "networks.classes"),
        (["objective.label_smoothing=0.1", "objective.kind=minimax"], 1, None),
        (["objective.label_smoothing=0.1", "objective.kind=nonsaturating"], 1, None),
        (["objective.label_smoothing=0.1", "objective.kind=hinge"], 1, "objective.label_smoothing"),
        (["objective.r1_gamma=1", "networks.d_norm=none"], 1, None),
        (["objective.r1_gamma=1", "networks.d_norm=spectral"], 1, None),
        (["objective.r1_gamma=1"], 1, "networks.d_norm"),
        (["objective.r2_gamma=1"], 1, "networks.d_norm"),
        (["objective.gradient_penalty=1"], 1, "networks.d_norm"),
        (["objective.r1_gamma={start: 0, end: 1, images: 10}"], 1, "networks.d_norm"),
        (["objective.penalty_every=2"], 1, "objective.penalty_every"),
        (["objective.penalty_every=2", "objective.r2_gamma=1", "networks.d_norm=none"], 1, None),
        (["data.kind=points", "networks.kind=mlp", "networks.classes=8"], 1, None),
        (["data.kind=points", "networks.kind=mlp", "networks.classes=7"], 1, "networks.classes"),
        (["data.kind=points"], 1, "networks.kind"),
        (["networks.kind=mlp"], 1, "networks.kind"),
    ],
)  # fmt: skip
def test_settings_are_refused_together_exactly_where_they_do_not_fit(
    settings: list[str], world_size: int, place: str | None
) -> None:
    report = refused(*settings, world_size=world_size)
    assert (report is None) == (place is None), report
    assert place is None or f"  {place}: " in str(report)
