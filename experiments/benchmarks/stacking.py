"""RGB Stacking: speed of the environment, and what share the scripted expert solves.

On one core: control steps a second with random actions, with both cameras at 64 and at 128 pixels
and for the variant that tells the state; then seconds of an expert's episode with images, and the
expert's success at every task of the two worlds, clean as the labels are, with 95 % Wilson
intervals. Success does not depend on the images, so those episodes are played without. Times are
CPU time, which others on the same machine disturb little. Writes
experiments/results/benchmark_stacking.csv: `make benchmarks`.
"""

from __future__ import annotations

import argparse
import os
import time

from scipy.stats import binomtest

from gato_lib import domains, results
from gato_lib.domains.rgb_stacking import TASKS, RGBStacking, StateMachine, make_env

STEPS_WANTED = 150  # a second, both cameras at 64 x 64
EPISODE_WANTED = 3.0  # s, the same
SIZES = {"64 x 64": 64, "128 x 128": 128, "state": 0}


def steps_per_second(image: int, seconds: float) -> tuple[float, int]:
    """Steps with random actions a CPU second, resets left out, the best of three goes."""
    env = make_env("red-on-blue", image=image)
    env.action_space.seed(0)
    env.reset(seed=0)
    rates, total = [], 0
    for _ in range(3):
        spent, count = 0.0, 0
        while spent < seconds:
            action = env.action_space.sample()
            begin = time.process_time()
            _, _, terminated, truncated, _ = env.step(action)
            spent += time.process_time() - begin
            count += 1
            if terminated or truncated:
                env.reset()
        rates.append(count / spent)
        total += count
    env.close()
    return max(rates), total


def play(env: RGBStacking, expert: StateMachine, seed: int) -> tuple[bool, int]:
    """Whether the expert solved the episode, and its steps."""
    observation, _ = env.reset(seed=seed)
    expert.reset(env)
    steps, over = 0, False
    while not over:
        action = expert.act(observation, None)
        observation, _, terminated, truncated, info = env.step(action)
        steps, over = steps + 1, terminated or truncated
    return info["success"], steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(results.COMMITTED / "benchmark_stacking.csv"))
    parser.add_argument("--episodes", type=int, default=200, help="of each task")
    parser.add_argument("--timed", type=int, default=20, help="episodes with images")
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps, each of three times")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    rows = []

    def add(run: str, task: str, metric: str, value: float, n: int) -> None:
        rows.append(results.row(run, 0, 0, task.split("/")[0], task, metric, value, n))

    for name, image in SIZES.items():
        task = f"rgb_stacking{'' if image else '_state'}/red-on-blue"
        rate, count = steps_per_second(image, args.seconds)
        print(f"{name:36} {rate:7.0f} steps a CPU-second")
        add(name, task, "steps_per_second", rate, count)
        env = make_env("red-on-blue", image=image)
        play(env, StateMachine(), 0)  # the first makes the renderer
        begin = time.process_time()
        for seed in range(args.timed):
            play(env, StateMachine(), seed)
        seconds = (time.process_time() - begin) / args.timed
        env.close()
        print(f"{name:36} {seconds:7.3f} CPU-seconds an episode of the expert")
        add(name, task, "seconds_per_expert_episode", seconds, args.timed)

    for domain in ("rgb_stacking", "rgb_stacking_shifted"):
        expected = {f"{domain}/{name}" for name in TASKS}
        assert set(domains.DOMAINS[domain].tasks) == expected, "tasks that are not played here"
        for name in TASKS:
            env = make_env(name, shifted=domain == "rgb_stacking_shifted", image=0)
            # Far from the seeds that anybody looked at while the expert was written.
            played = [play(env, StateMachine(), 10**6 + k) for k in range(args.episodes)]
            solved = sum(success for success, _ in played)
            steps = sum(count for _, count in played) / args.episodes
            interval = binomtest(solved, args.episodes).proportion_ci(0.95, method="wilson")
            share, low, high = solved / args.episodes, interval.low, interval.high
            task = f"{domain}/{name}"
            print(f"{task:36} {share:7.1%} ({low:.1%} to {high:.1%}), {steps:.0f} steps")
            for metric, value in (
                ("success", share),
                ("success_low", low),
                ("success_high", high),
                ("steps", steps),
            ):
                add("expert", task, metric, value, args.episodes)
    results.write_rows(args.out, rows)
    value = {(r["run"], r["metric"]): r["value"] for r in rows}
    print(
        f"wanted at 64 x 64: {STEPS_WANTED} steps a second "
        f"(here {value['64 x 64', 'steps_per_second']:.0f}), at most {EPISODE_WANTED:.0f} s an "
        f"episode (here {value['64 x 64', 'seconds_per_expert_episode']:.2f})"
    )


if __name__ == "__main__":
    main()
