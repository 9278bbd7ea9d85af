"""Measure random and expert scores of every task: `make references`.

Writes experiments/results/references.csv, the two numbers a task that all scores are normalised by.
Rows that the present code and as many episodes made are kept: an interrupted call goes on, and a
changed domain is measured anew.
"""

from __future__ import annotations

import argparse
import pathlib

import pandas as pd

from gato_lib import domains, results
from gato_lib.evaluation import measure_references
from gato_lib.files import write_text
from gato_lib.workbook import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=20, help="a task and policy, at least")
    names = [*domains.DOMAINS, *domains.TASKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="domains or tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=results.COMMITTED / "references.csv")
    args = parser.parse_args()

    rows = {}
    if args.out.is_file():
        for row in pd.read_csv(args.out).to_dict("records"):
            if row["task"] in domains.TASKS:
                rows[row["task"], row["policy"]] = row
    wanted = []
    for task, spec in domains.TASKS.items():
        domain = domains.DOMAINS[spec.domain]
        if not domain.installed or (args.only and not {task, domain.name} & set(args.only)):
            continue
        for policy in ("random", "expert"):
            row = rows.get((task, policy), {})
            same = row.get("code") == domain.code and row.get("seed") == args.seed
            if not same or row["n"] < args.episodes:
                wanted.append((task, policy, args.episodes))
    progress = Progress()
    for number, row in enumerate(measure_references(wanted, args.seed), 1):
        rows[row["task"], row["policy"]] = row | {"versions": results.versions()}
        frame = pd.DataFrame([rows[key] for key in sorted(rows)])
        write_text(args.out, frame.to_csv(index=False, float_format="%.6g"))
        line = f"{row['task']} {row['policy']} {row['mean']:.3f} +- {row['standard_error']:.3f}"
        progress(f"{number} of {len(wanted)}: {line}")
    print(f"{len(wanted)} measured, {len(rows)} rows in {args.out.name}")


if __name__ == "__main__":
    main()
