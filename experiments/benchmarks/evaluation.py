"""Minutes to evaluate 50 full episodes of one Meta-World task on all cores: `make benchmarks`.

Width 128, 4 layers, context 1,024, random parameters, which never solve the task: every episode has
500 steps. First the same 20 episodes in batches of different sizes, by one process that computes on
all cores or by one process a core, to see what helps; then all 50 in the best way. Each way is
timed from its first finished batch on, so that what is compiled, once, is left out; the 50 are
timed from the start. Writes experiments/results/benchmark_evaluation.csv.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator

TASK = "metaworld/assembly"
WAYS = [(lanes, workers) for workers in (1, 0) for lanes in (1, 5, 10)]  # 0 workers: a core each


def random_agent():
    """An agent that has learned nothing."""
    import jax

    from gato_lib.agent import Agent
    from gato_lib.config import TrainConfig, model_config
    from gato_lib.training import initial_state

    config = model_config("w128d4", stochastic_depth=0.0)
    params = jax.jit(lambda: initial_state(config, TrainConfig())["params"])()
    return Agent(config, params, None, 1024, continuous="sample")


def play(episodes: int, lanes: int, workers: int) -> Iterator[tuple[int, float]]:
    """Episodes finished and seconds since the start, batch by batch."""
    from gato_lib.evaluation import Evaluation, rollouts

    begin = time.perf_counter()
    how = Evaluation(random_agent, 0)
    for table in rollouts(how, (TASK,), episodes, lanes=lanes, workers=workers):
        assert (table.steps == 500).all(), "an episode ended early"
        yield len(table), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args()
    from gato_lib import results

    cores = os.cpu_count() or 1
    rows, rates = [], {}
    add = lambda name, metric, value, n: rows.append(  # noqa: E731
        results.row(name, 0, 0, "metaworld", TASK, metric, value, n)
    )
    for lanes, workers in WAYS:
        workers = workers or cores
        # Every worker has finished a first batch before the clock starts.
        count = lanes * workers * max(1, 20 // (lanes * workers)) + lanes * workers
        done = list(itertools.islice(play(count, lanes, workers), None))
        (first, begin), (last, end) = done[workers - 1], done[-1]
        name = f"{lanes} in a batch, {workers} process{'es' * (workers > 1)}"
        rates[lanes, workers] = (last - first) * 500 / (end - begin)
        print(f"{name:28} {rates[lanes, workers]:8.0f} steps a second")
        add(name, "steps a second", rates[lanes, workers], last - first)
    lanes, workers = max(rates, key=rates.get)
    *_, (count, seconds) = play(args.episodes, lanes, workers)
    name = f"{lanes} in a batch, {workers} process{'es' * (workers > 1)}"
    print(f"{name:28} {seconds / 60:8.2f} minutes for {count} episodes")
    add(name, f"minutes for {count} episodes", seconds / 60, count)
    results.write_rows(args.out or results.COMMITTED / "benchmark_evaluation.csv", rows)


if __name__ == "__main__":
    main()
