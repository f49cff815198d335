"""The parts of a run that a user's script hands over, and what is recorded of them."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_gan.data import Stage
from dist_gan.metrics import Metric
from dist_gan.models.own import NEEDS_SCRIPT, OwnBuilder, name_of
from dist_gan.objectives import AdversarialObjective, Objective

ObjectiveBuilder = Callable[..., Objective]
"""Builder of an objective, called as `builder(section, latent_dim=..., penalties_apart=...)`, as a subclass of
`AdversarialObjective` is."""


class Script(NamedTuple):
    """What is recorded of a user's script, in checkpoints and exported generators."""

    name: str
    """Name of the script's file."""
    sha256: str
    """Hash of that file, and of the files that the parts are defined in."""
    parts: dict[str, list[str]]
    """Names of the functions and classes of each part."""


class OwnParts(NamedTuple):
    """Parts of a run that take the place of the built-in ones, or are added to them."""

    networks: OwnBuilder | None = None
    """Function that builds the networks of the kind `own`."""
    objective: ObjectiveBuilder = AdversarialObjective
    """Builder of the losses of both players."""
    stages: Sequence[Stage] = ()
    """Steps between decoding and batching."""
    metrics: Sequence[Metric] = ()
    """Metrics of the averaged generator."""

    @property
    def functions(self) -> dict[str, list[Any]]:
        """The user's functions and classes, by the part that they make."""
        found: dict[str, list[Any]] = {
            "networks": [] if self.networks is None else [self.networks],
            "objective": [] if self.objective is AdversarialObjective else [self.objective],
            "stages": list(self.stages),
            "metrics": [metric.measure for metric in self.metrics],
        }
        return {name: functions for name, functions in found.items() if functions}

    def script(self) -> Script | None:
        """The script that these parts are from; None if there are none."""
        functions = self.functions
        if not functions:
            return None
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        found = [_file_of(function) for group in functions.values() for function in group]
        package = Path(__file__).parent
        others = {file for file in found if file is not None and package not in file.parents}
        files = [Path(main).resolve()] if main is not None else []
        files += sorted(others - set(files), key=lambda file: file.name)
        digest = hashlib.sha256()
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        parts = {name: [name_of(function) for function in group] for name, group in functions.items()}
        return Script(files[0].name if files else "an interactive session", digest.hexdigest(), parts)

    def mistakes(self, kind: str) -> list[str]:
        """Sentences about parts that do not go with networks of a kind."""
        if kind == "own" and self.networks is None:
            return [NEEDS_SCRIPT]
        if kind != "own" and self.networks is not None:
            return [
                f"networks.kind: {kind!r}, but the script builds the networks with {name_of(self.networks)}; set "
                f"networks.kind=own, or leave networks= out of dist_gan.train"
            ]
        return []


NO_PARTS = OwnParts()
"""The built-in parts alone."""


def _file_of(function: Any) -> Path | None:
    """The file that a function, or the class of an object, is defined in; None where there is none."""
    for subject in (function, getattr(function, "func", None), type(function)):
        try:
            file = inspect.getsourcefile(subject)  # type: ignore[arg-type]
        except TypeError:
            continue
        return Path(file).resolve() if file is not None and Path(file).is_file() else None
    return None
