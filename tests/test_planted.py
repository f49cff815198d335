"""The lists of planted faults follow the code: each can still be planted, and its tests are there.

`python benchmarks/planted.py` plants them and runs the tests, which takes minutes; this file takes milliseconds.
"""

from __future__ import annotations

import pytest

from benchmarks.planted import LISTS, ROOT, Fault, faults_of, outdated

FAULTS = [fault for file in LISTS if (ROOT / file).exists() for fault in faults_of(ROOT / file)]


def test_every_planted_fault_applies_exactly_once_and_names_tests_that_exist() -> None:
    reasons = [reason for fault in FAULTS if (reason := outdated(fault)) is not None]
    assert not reasons, (
        f"{len(reasons)} planted faults no longer fit the code. Whoever moves code moves its fault along: change the entry in "
        f"{' or '.join(LISTS)}, and see that it is still caught with `python benchmarks/planted.py --only NAME`.\n\n"
        + "\n\n".join(reasons)
    )


def test_every_planted_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


GOOD = Fault("good", "dist_gan/ema.py", "half_life > 0 else 1.0", "half_life > 0 else 0.0", ("tests/test_planted.py",))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "dist_gan/gone.py"}, "is gone"),
        ({"old": "no such text"}, "occurs 0 times"),
        ({"old": "self"}, "give the text as the code has it now"),
        ({"new": GOOD.old}, "are the same"),
        ({"new": "half_life > 0 else ("}, "is no Python"),
        ({"tests": ()}, "names no test"),
        ({"tests": ("tests/unit/test_gone.py::test_a",)}, "there is no test tests/unit/test_gone.py::test_a"),
        ({"tests": ("tests/test_planted.py::test_gone",)}, "there is no test tests/test_planted.py::test_gone"),
    ],
)
def test_a_fault_that_cannot_be_planted_any_more_says_what_to_change(change: dict, reason: str) -> None:
    assert outdated(GOOD) is None
    assert reason in str(outdated(GOOD._replace(**change)))
