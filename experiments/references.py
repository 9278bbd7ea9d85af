"""Measure random and expert scores of every task: `make references`.

Writes experiments/results/references.csv, the two numbers a task that all scores are normalised by.
"""

from __future__ import annotations

import argparse

import pandas as pd

from gato_lib import domains, results
from gato_lib.evaluation import measure_references
from gato_lib.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=50, help="episodes a task and policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(results.COMMITTED / "references.csv"))
    args = parser.parse_args()
    tasks = [t for t in domains.TASKS]
    rows = []
    for row in measure_references(tasks, args.episodes, args.seed):
        rows.append(row)
        print(f"{len(rows)} of {2 * len(tasks)}: {row['task']} {row['policy']} {row['mean']:.3f}")
    frame = pd.DataFrame(rows).sort_values(["task", "policy"])
    frame["versions"] = results.versions()
    write_text(args.out, frame.to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
