"""Collect a preset's demonstrations on several machines.

    python experiments/collect.py --preset accelerator --shard 1/4   # on the first of four
    python experiments/collect.py --preset accelerator               # when all are done: merge

What is collected, and where, is what 02_datasets would collect there. Machines without a common
disk: copy their folders `experiments/runs/<preset>/data/*.shards` into one before merging.
"""

from __future__ import annotations

import argparse
import dataclasses
import re

import run as driver

from gato_lib import workbook
from gato_lib.config import ConfigError, DataConfig
from gato_lib.episodes import DataError

NOTEBOOK = "02_datasets"


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (1, 4); raises ArgumentTypeError."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected i/n with i from 1 to n, as in 2/4")
    return int(match[1]) - 1, int(match[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--run-dir", default="", help="by default experiments/runs/<preset>")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N")
    args = parser.parse_args(arguments)
    try:
        wanted = {"mixture", *(field.name for field in dataclasses.fields(DataConfig))}
        settings = driver.all_parameters(NOTEBOOK, args.preset)
        settings = {name: value for name, value in settings.items() if name in wanted}
        if args.run_dir:
            run = workbook.Run.at(args.run_dir, args.preset)
        else:
            run = workbook.Run.named(args.preset)
        workbook.collect(run, workbook.data_config(**settings), args.shard)
    except (driver.UserError, ConfigError, DataError) as error:
        raise SystemExit(f"collect.py: {error}") from None


if __name__ == "__main__":
    main()
