"""Frames of pixel control a second of one core, drawn without a GPU: `make benchmarks`.

Every task of the domain `dmc_pixels`, 64 x 64: whole environment steps with random actions
(physics, reward and picture), and pictures alone beside MuJoCo's renderer as it comes, with shadows
and multisampling, for a ratio that depends less on the machine. Writes
experiments/results/benchmark_rendering.csv.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from gato_lib import domains, results
from gato_lib.domains.dmc import IMAGE
from gato_lib.domains.rendering import Renderer

WANTED = 400  # steps a second of one core


def per_second(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Calls a CPU second, the best of three goes."""
    rates = []
    for _ in range(3):
        begin, count = time.process_time(), 0
        while time.process_time() - begin < seconds:
            work()
            count += 1
        rates.append(count / (time.process_time() - begin))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(results.COMMITTED / "benchmark_rendering.csv"))
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    import mujoco

    rows = []
    for task in domains.DOMAINS["dmc_pixels"].tasks:
        env = domains.make_env(task)
        env.reset(seed=0)
        env.action_space.seed(0)

        def act(env=env):
            if env.step(env.action_space.sample())[3]:
                env.reset(seed=0)

        steps = per_second(act)
        env.close()
        sim = domains.make_env(task.replace("dmc_pixels", "dmc")).unwrapped
        sim.reset(seed=0)
        plain = mujoco.Renderer(sim.model, IMAGE, IMAGE)  # before ours changes the model's settings

        def draw(plain=plain, data=sim.data):
            plain.update_scene(data, 0)
            plain.render()

        slow = per_second(draw)
        plain.close()
        ours = Renderer(sim.model, IMAGE)
        fast = per_second(lambda ours=ours, data=sim.data: ours(data))
        ours.close()
        ratio = fast / slow
        print(f"{task:34} {steps:5.0f} steps, {fast:5.0f} pictures, {ratio:5.1f} x MuJoCo's own")
        for metric, value in (
            ("steps_per_second", steps),
            ("pictures_per_second", fast),
            ("ratio_to_mujocos_own", ratio),
        ):
            rows.append(results.row("rendering", 0, 0, "dmc_pixels", task, metric, value, 1))
    slowest = min(row["value"] for row in rows if row["metric"] == "steps_per_second")
    rows.append(results.row("rendering", 0, 0, "all", "all", "slowest_steps", slowest, 1))
    results.write_rows(args.out, rows)
    print(f"slowest: {slowest:.0f} steps a CPU-second, wanted {WANTED}")


if __name__ == "__main__":
    main()
