"""Training tokens a CPU-second, and the share of the matrix-product peak: `make benchmarks`.

Width 256, 4 layers, 8 heads, batches of 8 rows of up to 256 tokens, the paper's 33,025 table rows
with a tied head, relative attention, float32: forward, backward and AdamW on real Meta-World
episodes, on one core. Then widths 512 and 1,024 on two cores, where the share of the peak is what
counts. The peak is a product of two 2048 x 2048 matrices, measured in turns with the updates, and
the share a median over turns: other work on the machine slows both. Writes
experiments/results/benchmark_training.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np


def measure(width: int, seconds: float) -> dict[str, float]:
    """Tokens a second of CPU time and of wall time, and the share of the peak."""
    import jax
    import jax.numpy as jnp

    from gato_lib import collection, domains
    from gato_lib import sequence as sq
    from gato_lib.config import DataConfig, ModelConfig, TrainConfig
    from gato_lib.mixture import build_group, group_batch
    from gato_lib.training import Now, initial_state, make_step

    task = "metaworld/drawer-open"
    env, expert = domains.make_env(task), domains.make_expert(task)
    rng = np.random.default_rng(0)
    episodes = [collection.rollout(env, expert, task, i, 0.1, rng) for i in range(8)]
    tokenizer = sq.Tokenizer(env.observation_space, env.action_space)
    data = DataConfig(
        tasks=(task,),
        episodes=(("metaworld", 8),),
        context_length=256,
        batch_tokens=8 * 220,
        prompt_fraction=0.0,
    )
    group = build_group("metaworld", {task: [tokenizer.episode(e) for e in episodes]}, data)
    batches = [group_batch(group, data, i).batch for i in range(16)]
    model = ModelConfig(4, 8, width, 4 * width, width // 8, stochastic_depth=0.0)
    fit = TrainConfig()
    step, state = make_step(model, fit), initial_state(model, fit)
    for i in range(3):
        state, report = step(state, Now(np.int32(i)), batches[i])
    jax.block_until_ready(report)
    # From the compiled program: what it counts is within 5 % of a count by hand (notebook 03).
    flops = step.lower(state, Now(), batches[0]).compile().cost_analysis()["flops"]
    side = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    product(side, side).block_until_ready()
    tokens, steps, wall, cpu, shares, peaks = 0, 0, 0.0, 0.0, [], []
    while wall < seconds:
        # The fastest product of a turn, and the fastest of its updates.
        peak = max(2 * 2048**3 / elapsed(lambda: product(side, side))[0] for _ in range(4))
        fastest = np.inf
        for _ in range(3):

            def update():
                nonlocal state
                state, report = step(state, Now(np.int32(steps)), batches[steps % 16])  # noqa: B023
                return report

            spent = elapsed(update)
            tokens += sq.count_tokens(batches[steps % 16])
            steps, wall, cpu = steps + 1, wall + spent[0], cpu + spent[1]
            fastest = min(fastest, spent[0])
        shares.append(flops / fastest / peak)
        peaks.append(peak)
    return {
        "tokens per CPU-second": tokens / cpu,
        "tokens per second": tokens / wall,
        "share of the matmul peak": float(np.median(shares)),
        "peak (GFLOP/s)": float(np.median(peaks)) / 1e9,
        "steps": steps,
    }


def elapsed(call) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    import jax

    begin, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - begin, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        print(json.dumps(measure(args.measure, args.seconds)))
        return
    from gato_lib import results

    rows = []
    for width, cores in ((256, 1), (512, 2), (1024, 2)):
        command = [sys.executable, __file__, "--measure", str(width)]
        command += ["--cores", str(cores), "--seconds", str(args.seconds)]
        # A process of its own: how many threads XLA starts is decided when it starts.
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers = json.loads(done.stdout.splitlines()[-1])
        name = f"width {width}, {cores} core{'s' * (cores > 1)}"
        for what, value in numbers.items():
            print(f"{name:20} {what:26} {value:12,.2f}")
            rows.append(results.row(name, 0, 0, "metaworld", "all", what, value, numbers["steps"]))
    results.write_rows(args.out or results.COMMITTED / "benchmark_training.csv", rows)


if __name__ == "__main__":
    main()
