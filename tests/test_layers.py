"""The house stands on its floors: who may import whom, which outside library has which owner, and what is banned.

Everything is read from the syntax trees, so that an import inside a function, or under `if TYPE_CHECKING:`, counts as
much as one at the top of a module.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "wording", "mistakes", "types", "urls", "json_text", "config.values", "config.text", "storage", "storage.*",
        "pictures.*", "records",
        "checkpoint", "checkpoint.tensorfile", "process", "process.terminal", "process.last_words",
    ),
    (
        "models.*", "objectives.*", "optimizers", "config", "config.*", "draws", "ema", "schedules", "health.diagnostics",
        "health",
    ),
    (
        "runtime.*", "data.*", "packing.*", "embedded.*", "tracker", "checkpoint.schema", "checkpoint.reader",
        "checkpoint.retention", "checkpoint.share", "checkpoint.restoring", "checkpoint.writer", "scalars", "process.outcome",
        "attempts", "run_mirror", "run_folder", "export", "project", "health.monitor", "health.candidate", "metrics.*",
        "evaluate", "own_parts",
    ),
    (
        "run_data", "health.recovery", "state", "step", "sampling", "resume", "report", "saving", "build", "trainer",
        "process.outcome_writer", "process.ending", "process.life", "process.start",
    ),
    ("cli", "__main__", "door", "train"),
)  # fmt: skip
"""Floor by floor, L0 first. In L3 the order of the names is the order of building: a room sees only earlier rooms."""

LADDER = 3
"""The floor whose rooms stand on one another."""

MANIFEST = ("data.manifest", "data.manifest_types", "data.manifest_reader")

DOORS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("packing.*", "data.*", MANIFEST),
    ("data.*", "packing.*", ()),
    ("data.*", "embedded.*", ()),
    ("embedded.*", "data.*", ()),
    *((name, "data.*", MANIFEST) for name in MANIFEST),
)
"""Inside a floor: which modules see of which others only the named ones. Reading and packing share the manifest alone."""

OWNERS: dict[str, tuple[str, ...]] = {
    "accelerate": ("runtime.*",),
    "deepspeed": ("runtime.*",),
    "torch.nn.parallel": ("runtime.*",),
    "torch.distributed": ("runtime.*",),
    "webdataset": ("data.*", "packing.*"),
    "fsspec": ("storage.client",),
    "s3fs": (),
    "boto3": (),
    "PIL": ("pictures.*",),
    "simplejpeg": ("pictures.*",),
    "safetensors": ("checkpoint.tensorfile",),
    "tensorboard": ("tracker",),
    "torch.utils.tensorboard": ("tracker",),
    "pydantic": ("config.*", "models.*", "objectives.*", "optimizers", "export"),
    "yaml": ("config.*", "run_folder", "export"),
}
"""Outside library, and the only rooms that may know it."""

BANNED = (
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "importlib", "runpy",
    "torch.load", "torch.save", "torch.hub", "torch.serialization", "torch.multiprocessing",
    "os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader",
    "builtins",
)  # fmt: skip
"""What reads or runs code that came as data, or starts what nobody watches."""

BANNED_BUILTINS = ("eval", "exec", "compile", "__import__")

PACKAGES_OF = {"PIL": "pillow", "yaml": "pyyaml"}
"""Import names that differ from the package's."""


def modules() -> dict[str, Path]:
    """Short names ('data.order', 'train') of all our modules; a package is its name, the root is ''."""
    found = {"train": ROOT / "train.py"}
    for path in sorted((ROOT / "dist_gan").rglob("*.py")):
        parts = path.relative_to(ROOT / "dist_gan").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules().items()}


def matches(name: str, pattern: str) -> bool:
    stem = pattern.removesuffix(".*")
    return name == stem or (pattern.endswith(".*") and name.startswith(stem + "."))


def floor_of(name: str) -> tuple[int, int] | None:
    """Floor, and place on the ladder for those of L3."""
    for floor, patterns in enumerate(FLOORS):
        for rung, pattern in enumerate(patterns):
            if matches(name, pattern):
                return floor, rung if floor == LADDER else 0
    return None


@lru_cache(maxsize=256)
def names_used(tree: ast.Module, *, module: str, is_package: bool = False) -> frozenset[str]:
    """Every dotted name that the module imports, or reaches through an import: `import torch; torch.load` too."""
    full = "dist_gan" + (f".{module}" if module else "")
    aliases: dict[str, str] = {}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                used.add(name.name)
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = full.split(".")
                above = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                used.add(f"{base}.{name.name}")
                aliases[name.asname or name.name] = f"{base}.{name.name}"
    for node in ast.walk(tree):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in aliases:
            used.add(".".join([aliases[node.id], *reversed(chain)]))
    return frozenset(used)


def ours(used: Collection[str], *, known: set[str]) -> set[str]:
    """Our modules among the names: the longest part of each that is a module."""
    found = set()
    for name in used:
        if name != "dist_gan" and not name.startswith("dist_gan."):
            continue
        short = name.removeprefix("dist_gan").removeprefix(".")
        while short and short not in known:
            short = short.rpartition(".")[0]
        found.add(short)
    return found


def imports() -> dict[str, set[str]]:
    paths = modules()
    return {
        name: ours(
            names_used(tree, module=name, is_package=paths[name].name == "__init__.py"), known=set(paths)
        )
        - {name}
        for name, tree in trees().items()
    }  # fmt: skip


def uses(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies below it; `os.exec` also catches `os.execv`."""
    return name == prefix or name.startswith(prefix + ".") or (prefix in ("os.exec", "os.spawn", "os.posix_spawn")
                                                               and name.startswith(prefix))  # fmt: skip


def layering_mistakes(graph: dict[str, set[str]]) -> list[str]:
    mistakes = []
    for name, seen in sorted(graph.items()):
        here = floor_of(name)
        for other in sorted(seen - {""}):
            there = floor_of(other)
            if here is None or there is None:
                continue  # another test's sentence
            if there[0] > here[0]:
                mistakes.append(f"{name} (L{here[0]}) imports {other} (L{there[0]}), which is above it")
            elif there[0] == here[0] == LADDER and there[1] >= here[1]:
                mistakes.append(f"{name} imports {other}, which comes after it inside L{LADDER}")
    return mistakes


def door_mistakes(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {other}; of {others} it may see {', '.join(allowed) or 'nothing'}"
        for who, others, allowed in DOORS
        for name, seen in sorted(graph.items())
        if matches(name, who)
        for other in sorted(seen)
        if matches(other, others) and other not in allowed
    ]


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of imports, if there is one."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str] | None:
        state[name] = 1
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        path.pop()
        state[name] = 2
        return None

    for name in sorted(graph):
        if name not in state and (found := visit(name)):
            return found
    return None


def banned_in(tree: ast.Module, *, module: str) -> list[str]:
    found = [f"{module} uses {name}" for name in sorted(names_used(tree, module=module))
             if any(uses(name, banned) for banned in BANNED)]  # fmt: skip
    safe = {"yaml.SafeLoader"} | {
        node.name for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
            loaders = [*node.args[1:], *(k.value for k in node.keywords if k.arg == "Loader")]
            if not loaders or not all(ast.unparse(loader) in safe for loader in loaders):
                found.append(f"{module} loads YAML otherwise than safely, line {node.lineno}")
        if isinstance(node, ast.Name) and node.id in BANNED_BUILTINS:
            found.append(f"{module} uses {node.id}, line {node.lineno}")
        off = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell") and not off:
            found.append(f"{module} passes {node.arg}, line {node.value.lineno}")
    return found


# -- the house ----------------------------------------------------------------------------------------------------


def test_every_module_has_its_floor() -> None:
    homeless = [name for name in modules() if name and floor_of(name) is None]
    assert not homeless, (
        f"{', '.join(homeless)}: not in FLOORS; say on which floor a new room stands, and in L3 after which"
    )


def test_every_room_named_alone_exists_or_is_announced_by_the_design() -> None:
    still_to_come = {"health.diagnostics", "health.monitor", "health.recovery"}
    named = {pattern for floor in FLOORS for pattern in floor if not pattern.endswith(".*")}
    gone = named - set(modules()) - still_to_come
    assert not gone, f"{', '.join(sorted(gone))}: named in FLOORS, and there is no such module; take the name out"


def test_nobody_imports_from_above() -> None:
    mistakes = layering_mistakes(imports())
    assert not mistakes, "\n".join(mistakes)


def test_reading_and_packing_share_the_manifest_alone() -> None:
    mistakes = door_mistakes(imports())
    assert not mistakes, "\n".join(mistakes)


def test_every_door_leads_to_a_module_that_exists_and_somebody_goes_through_it() -> None:
    graph = imports()
    used = {other for name, seen in graph.items() if matches(name, "packing.*") for other in seen}
    assert used & set(MANIFEST), "packing writes no manifest"
    assert set(MANIFEST) <= set(graph)


def test_no_imports_run_in_a_circle() -> None:
    found = cycle({name: seen - {""} for name, seen in imports().items()})
    assert found is None, " -> ".join(found or [])


def test_the_front_door_shows_only_what_loads_a_generator_and_only_the_version_is_taken_through_it() -> None:
    tree = trees()[""]
    assert ours(names_used(tree, module="", is_package=True), known=set(modules())) <= {"door", "export"}
    through = {
        (name, used)
        for name, other in trees().items()
        for used in names_used(other, module=name)
        if re.fullmatch(r"dist_gan\.\w+", used) and used.removeprefix("dist_gan.") not in modules()
    }
    assert {used for _, used in through} <= {"dist_gan.__version__"}, through


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_an_outside_library_is_known_to_its_owner_alone(library: str) -> None:
    intruders = [
        f"{name} uses {used}"
        for name, tree in trees().items()
        for used in sorted(names_used(tree, module=name))
        if uses(used, library) and not any(matches(name, owner) for owner in OWNERS[library])
    ]
    assert not intruders, f"{library} belongs to {', '.join(OWNERS[library]) or 'nobody'}: {'; '.join(intruders)}"


def test_owners_are_not_stale() -> None:
    """A rule about a library that nobody uses would hold without meaning anything."""
    used = {used for name, tree in trees().items() for used in names_used(tree, module=name)}
    unused = [library for library, owners in OWNERS.items() if owners and not any(uses(u, library) for u in used)]
    assert set(unused) <= {"deepspeed", "tensorboard"}, f"nobody uses {unused}"


def test_every_outside_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}  # type: ignore[index]
    tops = {
        used.partition(".")[0]
        for name, tree in trees().items()
        for used in names_used(tree, module=name)
    } - set(sys.stdlib_module_names) - {"dist_gan"}  # fmt: skip
    missing = {top for top in tops if PACKAGES_OF.get(top, top).lower() not in declared}
    assert not missing, f"imported, but not in pyproject.toml: {', '.join(sorted(missing))}"


def test_nothing_unpickles_and_nothing_starts_a_shell_or_runs_text() -> None:
    found = [line for name, tree in trees().items() for line in banned_in(tree, module=name)]
    assert not found, "\n".join(found)


OUTLETS = ("safe", "report", "lines", "help_text")
"""What makes text from outside fit to be printed, and a text that is ours alone."""


def unsafe_prints(tree: ast.Module) -> list[int]:
    """Lines that print, or write with tqdm, anything that has not been made safe in the same call."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("print", "tqdm.write"):
            continue
        made = [arg.func for arg in node.args if isinstance(arg, ast.Call)]
        if len(made) != len(node.args) or not {ast.unparse(f).rpartition(".")[2] for f in made} <= set(OUTLETS):
            found.append(node.lineno)
    return found


def test_whatever_is_printed_goes_through_the_room_that_makes_it_safe() -> None:
    found = {name: lines for name, tree in trees().items() if (lines := unsafe_prints(tree))}
    assert not found, f"print(safe(text)) or print(report(text)): {found}"


@pytest.mark.parametrize("line", ["print(x)", "print(f'{x}')", "print(str(x))", "tqdm.write(x)", "print(safe(x), y)"])
def test_the_checker_sees_a_print_that_is_not_safe(line: str) -> None:
    assert unsafe_prints(ast.parse(line)) == [1]


def test_no_folder_holds_more_than_a_quarter_of_the_library() -> None:
    lines: Counter[Path] = Counter()
    for path in (ROOT / "dist_gan").rglob("*.py"):
        lines[path.parent] += len(path.read_text(encoding="utf-8").splitlines())
    large = [f"{folder.name}: {count:,}" for folder, count in lines.items() if 4 * count > lines.total()]
    assert not large, f"{large} of {lines.total():,} lines: divide the folder by meaning"


def test_no_file_of_the_library_is_longer_than_a_reader_keeps_in_mind() -> None:
    paths = sorted((ROOT / "dist_gan").rglob("*.py"))
    long = [f"{p.name}: {n}" for p in paths if (n := len(p.read_text(encoding="utf-8").splitlines())) > 350]
    assert not long, f"{long}: more than 350 lines; divide the file by meaning"


def test_no_room_is_a_lumber_room() -> None:
    lumber = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}
    files = [p for p in (ROOT / "dist_gan").rglob("*") if p.stem.lower().strip("_") in lumber]
    assert not files, f"{files}: name a room by what it does"


def test_layer_0_and_1_know_no_rank_and_no_process() -> None:
    """Words that only a distributed program needs."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID"}
    found = [
        f"{name}, line {node.lineno}"
        for name, tree in trees().items()
        if name and (floor_of(name) or (9, 0))[0] <= 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found, f"read by a room of the lowest floors: {found}"


def test_the_parts_that_settings_are_assembled_from_know_the_types_of_values_alone() -> None:
    """Sections are made from the dicts of networks, losses and optimizers, which therefore stand below them."""
    parts = ("models.*", "objectives.*", "optimizers")
    found = {
        name: sorted(other for other in seen if matches(other, "config.*") and other != "config.values")
        for name, seen in imports().items()
        if any(matches(name, part) for part in parts)
    }
    assert not any(found.values()), found


def test_torch_is_loaded_after_its_threads_have_been_told_to_sleep(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, sys; print(os.environ.get('OMP_WAIT_POLICY')); sys.exit(9)")
    found = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    found.pop("OMP_WAIT_POLICY", None)
    for program in (["-m", "dist_gan"], [str(ROOT / "train.py")]):
        command = [sys.executable, *program, "--dry-run"]
        done = subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (9, "PASSIVE\n"), done.stderr


def test_importing_the_package_or_the_types_of_values_loads_neither_torch_nor_what_only_training_needs() -> None:
    code = (
        "import sys, dist_gan, dist_gan.config.values\n"
        "heavy = {'torch', 'accelerate', 'deepspeed', 'webdataset', 'tensorboard', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- the checker itself: each rule sees its offence ---------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import dist_gan.trainer",
        "from dist_gan import trainer",
        "from dist_gan.trainer import fit",
        "def f():\n    from dist_gan.trainer import fit",
        "from . import trainer",
        "from .trainer import fit",
        "try:\n    import dist_gan.trainer as t\nexcept ImportError:\n    t = None",
        "if TYPE_CHECKING:\n    import dist_gan.trainer",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import dist_gan.trainer",
        "class A:\n    import dist_gan.trainer",
        "import dist_gan\ndist_gan.trainer.fit",
    ],
)
def test_the_checker_sees_an_import_from_above_however_it_is_written(source: str) -> None:
    seen = ours(names_used(ast.parse(source), module="draws"), known=set(modules()))
    assert layering_mistakes({"draws": seen}) == ["draws (L1) imports trainer (L3), which is above it"]


def test_the_checker_counts_imports_for_types_alone() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dist_gan.trainer import fit"
    assert ours(names_used(ast.parse(source), module="draws"), known=set(modules())) == {"trainer"}


def test_the_checker_sees_a_wall_walked_through() -> None:
    assert door_mistakes({"packing.pack": {"data.manifest", "data.manifest_types", "storage"}}) == []
    assert len(door_mistakes({"packing.pack": {"data.pieces"}, "data.plan": {"packing.pack"}})) == 2
    assert len(door_mistakes({"data.manifest": {"data.plan"}})) == 1


def test_the_checker_holds_the_ladder_of_l3_and_finds_circles() -> None:
    assert layering_mistakes({"trainer": {"step", "state"}}) == []
    assert layering_mistakes({"step": {"trainer"}}) == ["step imports trainer, which comes after it inside L3"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize(
    ("source", "library"),
    [
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("import torch.distributed as d", "torch.distributed"),
        ("from torch.nn import parallel", "torch.nn.parallel"),
        ("from torch import nn\nnn.parallel.DistributedDataParallel", "torch.nn.parallel"),
        ("def f():\n    import fsspec", "fsspec"),
        ("from fsspec.core import url_to_fs", "fsspec"),
    ],
)
def test_the_checker_sees_an_outside_library_however_it_is_reached(source: str, library: str) -> None:
    assert any(uses(name, library) for name in names_used(ast.parse(source), module="trainer"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch as t\nt.load('x')",
        "import os\nos.system('x')",
        "import os\nos.execvp('x', [])",
        "from os import system as s",
        "eval('1')",
        "f = exec",
        "def f():\n    import subprocess",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "import yaml\nyaml.load('x')",
        "import yaml\nclass Mine(yaml.Loader): ...\nyaml.load('x', Loader=Mine)",
        "import yaml\nyaml.load('x', Loader=theirs)",
        "from yaml import unsafe_load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "__import__('pickle')",
    ],
)
def test_the_checker_sees_what_is_banned(source: str) -> None:
    assert banned_in(ast.parse(source), module="m")


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "net.eval()",
        "import yaml\nyaml.safe_load('x')",
        "import yaml\nclass Mine(yaml.SafeLoader): ...\nyaml.load('x', Loader=Mine)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
    ],
)
def test_the_checker_lets_the_innocent_pass(source: str) -> None:
    assert not banned_in(ast.parse(source), module="m")
