"""Milliseconds of one step of acting on one core, with a cache and without: `make benchmarks`.

Width 256, 4 layers, 8 heads, the paper's 33,025 table rows, context 1,024, 39 observations and 4
actions, float32, random parameters. A step in a nearly full window, and the mean over episodes of
100, 500 and 2,000 steps, in which the window is full again and again and half of it is computed
anew; several environments in a batch; all action tokens from one pass; Transformer-XL's memory in
place of computing anew; and the same without a cache. Beside them the least that the core needs for
the operations and bytes of a step (`latency.step_cost`). Other work on the machine slows it. Writes
experiments/results/benchmark_acting.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

EPISODES = (100, 500, 2000)  # steps
FILLED = 69  # steps in which a window of 23 is filled and, three times, half of it computed anew
VARIANTS = {
    "one environment": {},
    "4 environments": {"rows": 4},
    "10 environments": {"rows": 10},
    "parallel actions": {"parallel": True},
    "memory": {"memory": 1024},
}


def measure() -> list[tuple[str, str, float, int]]:
    """Name, metric, value and number of steps for each variant, and for this core."""
    from gato_lib import latency
    from gato_lib.config import ModelConfig

    config, sizes = ModelConfig(4, 8, 256, 1024, 32), {"context": 1024, "actions": 4}
    rates, out = latency.machine_rates(), []
    add = lambda *row: out.append(row)  # noqa: E731
    add("this core", "GFLOP/s in a product", rates.operations / 1e9, 8)
    add("this core", "GB/s read", rates.bytes / 1e9, 8)
    for name, settings in VARIANTS.items():
        arguments = {**sizes, "observations": 39, **settings}
        timing = latency.measure(config, steps=FILLED, **arguments)
        rows = settings.get("rows", 1)
        add(name, "ms a step, full", 1e3 * timing.full, FILLED)
        add(name, "ms a step and environment, full", 1e3 * timing.full / rows, FILLED)
        add(name, "ms a step and environment, amortised", 1e3 * timing.mean / rows, FILLED)
        arguments.pop("memory", None)
        cost = latency.step_cost(config, **arguments)
        add(name, "GFLOP a step", cost["operations"] / 1e9, FILLED)
        add(name, "MB read a step", cost["bytes"] / 1e6, FILLED)
        add(name, "ms a step, at least", 1e3 * rates.bound(cost), FILLED)
    for steps in EPISODES:
        timing = latency.measure(config, **sizes, observations=39, steps=steps)
        add("one environment", f"ms a step, {steps} steps", 1e3 * timing.mean, steps)
    last = timing.seconds[-EPISODES[0] * 5 :]
    add("one environment", f"ms a step, last {len(last)} of {steps}", 1e3 * last.mean(), len(last))
    seconds = latency.measure_uncached(config, **sizes)
    add("uncached", "ms a step, full", 1e3 * seconds, 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        print(json.dumps(measure()))
        return
    from gato_lib import results

    # A process of its own: how many threads XLA starts is decided when it starts.
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for name, metric, value, n in json.loads(done.stdout.splitlines()[-1]):
        print(f"{name:20} {metric:40} {value:12,.2f}")
        rows.append(results.row(name, 0, 0, "random", "39 + 4", metric, value, n))
    results.write_rows(args.out or results.COMMITTED / "benchmark_acting.csv", rows)


if __name__ == "__main__":
    main()
