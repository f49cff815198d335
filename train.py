"""Trains a GAN.

    accelerate launch train.py                                    the embedded run: shapes that the program draws
    accelerate launch train.py configs/NAME.yaml [section.key=value ...]
    python train.py --dry-run [configs/NAME.yaml] [section.key=value ...]
    python train.py --help

The same command again resumes. Exit code: 0 finished; 2 the configuration is wrong; 3 training failed and starting
again would not help; anything else is a crash. A launcher turns every failure into 1: read outcome.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read once, when torch is imported: waiting threads sleep instead of spinning. With spinning, one other busy process
# on the machine (or our own decoder) made a step of small networks seven times slower; measured on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dist_gan.config import RunConfig
from dist_gan.config_reader import load_config, run_dir_of, schema_help, to_yaml
from dist_gan.types import UserError
from dist_gan.wording import report, safe

EMBEDDED = Path(__file__).resolve().parent / "configs" / "shapes.yaml"


def main(arguments: list[str]) -> int:
    """Reads the command line, and trains or shows what would be trained."""
    flags = [a for a in arguments if a.startswith("-")]
    files = [a for a in arguments if not a.startswith("-") and "=" not in a]
    overrides = [a for a in arguments if not a.startswith("-") and "=" in a]
    if "--help" in flags or "-h" in flags:
        print(help_text())
        return 0
    path = files[0] if files else EMBEDDED
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        unknown = [f for f in flags if f != "--dry-run"]
        if unknown or len(files) > 1:
            raise UserError(
                f"{' '.join(unknown or files[1:])}: not understood; give one YAML file, settings as section.key=value, "
                f"--dry-run or --help"
            )
        config = load_config(path, overrides, world_size=world_size)
    except UserError as error:
        return refused(str(error), run_dir_of(path, overrides))
    if "--dry-run" in flags:
        for line in dry_run(config, world_size=world_size).splitlines():
            print(safe(line))
        return 0
    from dist_gan.launch import run

    return run(config)


def help_text() -> str:
    """How to call it, and every setting."""
    return f"{__doc__}\nSettings, with their defaults:\n\n{schema_help()}"


def refused(reason: str, run_dir: str | None) -> int:
    """One report from one rank, and outcome.json where the run folder is known."""
    if int(os.environ.get("RANK", "0")) == 0:
        from dist_gan.run_folder import refuse

        print(report(f"dist_gan: {reason}"), flush=True)
        if run_dir is not None:
            refuse(Path(run_dir), reason=reason)
    return 2


def dry_run(config: RunConfig, *, world_size: int) -> str:
    """The resolved settings, the networks' sizes, and what each process would do."""
    from dist_gan.models import build_networks, count_parameters

    networks = build_networks(config.networks, seed=config.run.seed)
    share = config.run.batch // world_size
    micro = config.runtime.micro_batch or share
    steps = -(-config.run.images // (config.run.batch * config.run.d_updates))
    return "\n".join(
        [
            to_yaml(config),
            f"# generator      {count_parameters(networks.generator):,} parameters",
            f"# discriminator  {count_parameters(networks.discriminator):,} parameters",
            f"# batch          {config.run.batch} images = {world_size} processes x {share // micro} micro-batches x {micro}",
            f"# steps          {steps:,}, each {config.run.d_updates} discriminator updates and 1 generator update",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
