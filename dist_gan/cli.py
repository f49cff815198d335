"""The `dist-gan` command: prepares a project folder and image data sets before a run, and uses checkpoints after it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_gan import storage, urls
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import last_resort, print_anything, report, safe

_CLASSES_SHOWN = 1000
"""Largest number of classes that `inspect` lists; ImageNet has as many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 0, or, after one sentence on standard error, 1, 2, 3 or 130.

    1 is a crash, 2 a mistake of the user, 3 a failure of disk or store, 130 an interruption from the keyboard.
    """
    print_anything()
    options = _parser().parse_args(arguments)
    try:
        _settle_places(options)
        return int(options.run(options))
    except UserError as error:
        _say(f"dist-gan: {error}")
        return 2
    except TrainingFailed as error:
        _say(f"dist-gan: {error}")
        return 3
    except Exception as error:
        _say(f"dist-gan: {last_resort(error)}")
        return 1
    except KeyboardInterrupt:
        _say("dist-gan: stopped; the same command goes on")
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with a message about invalid arguments, in which unprintable characters are replaced."""
        super().error(safe(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dist-gan", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="lay train.py, recipes, launch files and the Slurm script into a folder")
    init.add_argument("folder", help="local path of the folder, which may exist; nothing in it is overwritten")
    init.set_defaults(run=_init)

    pack = commands.add_parser(
        "pack", help="write images (folder, bucket, zip or npz) as WebDataset shards with a manifest"
    )
    pack.add_argument(
        "source", help="local folder or URL of a store (s3://...), zip, or npz with `images` and `labels`"
    )
    pack.add_argument("dest", help="new folder for the shards, a local path or a URL")
    pack.add_argument("--resolution", type=int, help="side in pixels, a power of two; default: as the images")
    pack.add_argument("--channels", type=int, choices=(1, 3), help="1 grey, 3 colour; default: as the images")
    pack.add_argument("--upscale", action="store_true", help="enlarge images that are smaller than --resolution")
    pack.add_argument("--pad", action="store_true", help="centre smaller images on black instead of --upscale")
    pack.add_argument("--no-labels", action="store_true", help="write no labels: folders are not classes")
    pack.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and count them")
    pack.add_argument("--samples-per-shard", type=int, default=None, help="images per shard")
    pack.add_argument("--workers", type=int, default=None, help="number of processes; default: number of cores")
    pack.set_defaults(run=_pack)

    index = commands.add_parser("index", help="write a manifest for existing WebDataset shards")
    index.add_argument("url", help="folder of the shards")
    index.add_argument("--label-key", default=None, help="key of the class in each .json member; default: .cls members")
    index.add_argument("--force", action="store_true", help="replace an existing manifest")
    index.set_defaults(run=_index)

    verify = commands.add_parser("verify", help="check every byte of shards or of checkpoints")
    verify.add_argument("url", help="folder of shards, a checkpoint, or a run folder")
    verify.add_argument("--no-decode", action="store_true", help="do not decode the images")
    verify.set_defaults(run=_verify)

    sample = commands.add_parser("sample", help="draw samples from a run, a checkpoint or an exported generator")
    sample.add_argument("url", help="run folder, checkpoint, or exported generator")
    sample.add_argument("dest", help="local path: name of a .png for a grid, otherwise a folder for single PNGs")
    sample.add_argument("--count", type=int, default=64, help="number of samples")
    sample.add_argument("--seed", type=int, default=0, help="random seed of the latents")
    sample.add_argument("--label", default=None, help="class of all samples, by number or by name")
    sample.add_argument(
        "--interpolate", type=int, default=0, metavar="STEPS", help="images per row of an interpolation between latents"
    )
    sample.set_defaults(run=_sample)

    export = commands.add_parser("export", help="write the averaged generator as model.safetensors and config.json")
    export.add_argument("url", help="run folder or checkpoint")
    export.add_argument("dest", help="new folder")
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect", help="describe a run, a checkpoint, a set of shards or an exported generator"
    )
    inspect.add_argument("url", help="run folder, checkpoint, folder of shards, or exported generator")
    inspect.set_defaults(run=_inspect)
    return parser


def _settle_places(options: argparse.Namespace) -> None:
    """Converts every path and URL among the options to its normal form. Raises UserError for an invalid path or URL."""
    for name in ("folder", "source", "dest", "url"):
        if hasattr(options, name):
            # Pillow writes samples to local paths only, and Slurm and launchers read local files.
            local = name == "folder" or (name == "dest" and options.run is _sample)
            settle = urls.local_place_of if local else urls.place_of
            setattr(options, name, settle(getattr(options, name), place=name.upper()))


def _init(options: argparse.Namespace) -> int:
    from dist_gan.project import NAMES, lay_out

    lay_out(Path(options.folder))
    _show(
        f"{options.folder}: {', '.join(NAMES)} are in place. Next:",
        f"  cd {shlex.quote(options.folder)}",
        "  accelerate launch train.py                            # trains on shapes that the program draws, in minutes",
        "  python train.py --dry-run configs/photos-64.yaml      # checks a recipe and prints its settings",
        "  sbatch slurm/train.sh                                 # the same run on two nodes of a Slurm cluster",
    )
    return 0


def _pack(options: argparse.Namespace) -> int:
    from dist_gan.packing.pack import pack
    from dist_gan.packing.sources import open_source

    extra = {} if options.samples_per_shard is None else {"samples_per_shard": options.samples_per_shard}
    manifest = pack(
        open_source(options.source),
        options.dest,
        resolution=options.resolution,
        channels=options.channels,
        upscale=options.upscale,
        pad=options.pad,
        labels=not options.no_labels,
        skip_bad=options.skip_bad,
        workers=options.workers,
        **extra,
    )
    _describe_shards(options.dest, manifest)
    return 0


def _index(options: argparse.Namespace) -> int:
    from dist_gan.packing.indexing import index

    storage.check_url(options.url, place="URL")
    _describe_shards(options.url, index(options.url, label_key=options.label_key, force=options.force))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dist_gan import records
    from dist_gan.checkpoint import reader
    from dist_gan.packing.indexing import verify

    url = storage.check_url(options.url, place="URL")
    names = records.names_in(url, ("checkpoints", "COMMIT", "ABANDONED"))
    if "checkpoints" in names:
        return _verify_run(url)
    if "COMMIT" in names:
        problems = reader.verify(url)
        if "ABANDONED" in names:
            _show(f"{storage.redact(url)}: abandoned, a rollback went back behind it")
    elif reader.is_name(url):
        problems = [f"{storage.redact(url)}: was never committed, so it is no checkpoint"]
    else:
        problems = verify(url, decode=not options.no_decode)
    return _verdict(url, problems)


def _verify_run(url: str) -> int:
    """Verifies every checkpoint of a run: reports damage in committed checkpoints, and lists uncommitted folders."""
    from dist_gan.checkpoint import reader

    problems: list[str] = []
    committed = 0
    for entry in reader.entries(storage.join(url, "checkpoints")):
        place = storage.redact(entry.url)
        if not entry.is_committed:
            _show(f"{place}: never committed, so it is no checkpoint; the next one that is written clears it away")
        elif entry.is_abandoned:
            _show(f"{place}: abandoned, a rollback went back behind it")
        else:
            committed += 1
            found = [entry.problem] if entry.problem else reader.verify(entry.url)
            problems += found
            _show(f"{place}: {f'{len(found)} problems' if found else 'whole'}{', healthy' if entry.is_healthy else ''}")
    if not committed:
        raise UserError(f"{storage.redact(url)}: no committed checkpoint here; give a run folder or a checkpoint")
    return _verdict(url, problems)


def _verdict(url: str, problems: Sequence[str]) -> int:
    for problem in problems:
        _show(problem)
    _show(f"{storage.redact(url)}: {f'{len(problems)} problems' if problems else 'everything is as it should be'}")
    return 3 if problems else 0


def _sample(options: argparse.Namespace) -> int:
    from dist_gan.export import open_generator
    from dist_gan.sampling import check_destination, write_samples

    storage.check_url(options.url, place="URL")
    check_destination(options.dest)
    source = open_generator(options.url)
    _note(source.notes)
    for line in write_samples(
        source,
        options.dest,
        count=options.count,
        seed=options.seed,
        label=options.label,
        steps=options.interpolate,
    ):
        _show(line)
    return 0


def _export(options: argparse.Namespace) -> int:
    from dist_gan.export import export_generator

    storage.check_url(options.url, place="URL")
    _note(export_generator(options.url, options.dest))
    _show(f"{options.dest}: dist_gan.load_generator({options.dest!r}) gives the generator")
    return 0


def _note(notes: Sequence[str]) -> None:
    """Prints notes on standard error, such as damaged checkpoints that were skipped."""
    for note in notes:
        _say(f"dist-gan: {note}")


def _inspect(options: argparse.Namespace) -> int:
    from dist_gan import records
    from dist_gan.checkpoint import reader
    from dist_gan.data.manifest import read_manifest

    url = storage.check_url(options.url, place="URL")
    kinds = ("COMMIT", "checkpoints", "config.yaml", "config.json", "model.safetensors", "manifest.json")
    names = records.names_in(url, kinds)
    if "COMMIT" in names:
        _describe_checkpoint(reader.read_manifest(url))
    elif "config.yaml" in names or "checkpoints" in names:
        _describe_run(url)
    elif "model.safetensors" in names and "config.json" in names:
        content = _exported_facts(url)
        _show(*json.dumps(content, indent=1).splitlines())
    elif "manifest.json" in names:
        _describe_shards(url, read_manifest(url))
    else:
        raise UserError(
            f"{storage.redact(url)}: neither a run, nor a checkpoint, nor shards with a manifest, nor an exported generator"
        )
    return 0


def _exported_facts(url: str) -> dict[str, Any]:
    from dist_gan import records

    try:
        return records.load(storage.join(url, "config.json"), limit=2**20).values
    except FileNotFoundError as error:
        raise UserError(
            f"{storage.redact(url)}/config.json: a link that leads nowhere; export the generator again"
        ) from error


def _describe_shards(url: str, manifest: Any) -> None:
    side = f"{manifest.resolution}x{manifest.resolution}" if manifest.resolution else "of several sizes"
    size = sum(shard.bytes for shard in manifest.shards)
    _show(
        f"{storage.redact(url)}: {manifest.num_samples:,} images {side}, {'colour' if manifest.channels == 3 else 'grey'}"
    )
    _show(f"  {len(manifest.shards)} shards, {size / 2**20:.1f} MiB, fingerprint {manifest.fingerprint[:16]}")
    if manifest.classes is None:
        _show("  no labels")
    else:
        pairs = list(zip(manifest.classes, manifest.class_counts, strict=True))
        more = f", and {len(pairs) - _CLASSES_SHOWN:,} more" if len(pairs) > _CLASSES_SHOWN else ""
        counts = ", ".join(f"{name} {count:,}" for name, count in pairs[:_CLASSES_SHOWN])
        _show(f"  {len(pairs):,} classes: {counts}{more}")


def _describe_checkpoint(manifest: dict[str, Any]) -> None:
    size = sum(f["bytes"] for f in manifest["files"].values())
    by = {name: manifest.get(name, "unknown") for name in ("attempt", "world_size", "dist_gan", "torch")}
    _show(f"checkpoint {manifest['serial']}: {manifest['images']:,} images, attempt {by['attempt']}")
    _show(f"  {len(manifest['tensors'])} tensors in {len(manifest['files'])} files, {size / 2**20:.1f} MiB")
    _show(f"  written by {by['world_size']} ranks, dist_gan {by['dist_gan']}, torch {by['torch']}")
    _show(f"  progress {json.dumps(manifest['values'].get('progress'))}")


def _describe_run(url: str) -> None:
    from dist_gan import records
    from dist_gan.checkpoint import reader

    try:
        facts = records.load(storage.join(url, "outcome.json"), limit=2**20)
        reason = facts.text("reason", longest=2**16)
        line = f"outcome: {facts.text('outcome')} (code {facts.whole('code')}) {reason}".rstrip()
        _show(*report(line).split("\n"))
    except FileNotFoundError:
        _show("outcome: none yet; the run lives, or was killed")
    except records.Damaged as error:
        _show(f"outcome: unknown; {error}")
    try:
        if (last := records.last_line(storage.join(url, "metrics.jsonl"))) is not None:
            _show(f"last line of metrics: {json.dumps(last.values)}")
    except records.Damaged as error:
        _show(f"last line of metrics: unknown; {error}")
    for entry in reader.entries(storage.join(url, "checkpoints")):
        state = "never committed" if not entry.is_committed else "abandoned" if entry.is_abandoned else ""
        _show(f"{storage.redact(entry.url)}{f' ({entry.problem or state})' if entry.problem or state else ''}")
    found = reader.newest(storage.join(url, "checkpoints"))
    for text in found.damaged:
        _show(f"passed over a damaged checkpoint: {text}")
    if found.url is not None:
        _describe_checkpoint(reader.read_manifest(found.url))


def _show(*lines: object) -> None:
    """Prints the result of a command on standard output."""
    for line in lines:
        print(safe(line))


def _say(message: str) -> None:
    """Prints the reason for which a command ended, or a note, on standard error."""
    print(report(message), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
