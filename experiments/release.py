"""Make the agent that comes with the repository from a finished run.

    python experiments/release.py --preset seventh --to experiments/agents/released

Writes that folder: parameters in bfloat16, settings, text pieces, metrics, and of each task, the
levels that 06 plays besides included, the ends of some demonstrations to prompt it with. Prints the
sha256 for its model card. Exit status: 0 done, 1 it is too large or data is damaged, 2 there is no
such agent.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import run as driver

from gato_lib import workbook
from gato_lib.episodes import DataError

MOST = 40e6  # bytes


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", required=True, help="whose run")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="a folder for agents")
    parser.add_argument("--runs", type=pathlib.Path, default=driver.ROOT / "experiments" / "runs")
    parser.add_argument("--checkpoint", default="latest", choices=["latest", "best"])
    parser.add_argument("--prompts", type=int, default=4, help="demonstrations of each task")
    parser.add_argument("--most", type=float, default=MOST, help="bytes")
    options = parser.parse_args(arguments)
    home = workbook.Run(options.runs / options.preset, options.preset)
    folder = workbook.find_agent(home, "generalist")
    if folder is None:
        print(f"{home}: no finished agent; make reproduce PRESET={options.preset} first")
        return 2
    levels = driver.all_parameters("06_simulated_control", options.preset)["levels"]
    levels = [level.strip() for level in levels.split(",") if level.strip()]
    target = workbook.Run(options.to, options.preset)
    what = home, folder, target, "generalist", options.checkpoint, options.prompts, levels
    try:
        given = workbook.release(*what, most=options.most)
    except DataError as error:
        print(f"release.py: {error}")
        return 1
    size = sum(path.stat().st_size for path in given.iterdir())
    sha256 = workbook.read_meta(given)["released"]["sha256"]
    print(f"{target}: {size / 1e6:.1f} MB, {workbook.RELEASED} has sha256 {sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
