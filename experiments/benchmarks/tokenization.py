"""Timesteps and images to tokens, per second of one core: `make benchmarks`.

Real episodes: Meta-World (39 numbers, 4 actions) and BabyAI (one 64 x 64 image, words), and images
of noise, the worst case, as no patch repeats. "Packed" is all the way to training batches of 1,024
tokens a row. The naive tokenizer is the same rule written as a Python loop over numbers, for a
ratio that depends less on the machine. Writes experiments/results/benchmark_tokenization.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np

from gato_lib import collection, domains, results
from gato_lib import sequence as sq
from gato_lib.episodes import Episode
from gato_lib.tokenizers import TextTokenizer

LENGTH = 1024
WANTED = {"timesteps, tokens": 250_000, "images 64 x 64, noise": 15_000}  # a second of one core


def per_second(work: Callable[[], object], count: int, repeats: int = 7) -> float:
    """`count` over the CPU seconds of the fastest of several calls."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return count / min(seconds)


def demonstrations(task: str, number: int) -> tuple[sq.Tokenizer, list[Episode]]:
    env, expert = domains.make_env(task), domains.make_expert(task)
    noise = np.random.default_rng(0)
    episodes = [collection.rollout(env, expert, task, i, 0.1, noise) for i in range(number)]
    tokenizer = sq.Tokenizer(env.observation_space, env.action_space, TextTokenizer())
    env.close()
    return tokenizer, episodes


def packed(tokenizer: sq.Tokenizer, episodes: list[Episode]) -> list[sq.Batch]:
    """Each episode cut into rows of whole timesteps, at most 1,024 tokens long."""
    batches = []
    for episode in episodes:
        seq = tokenizer.episode(episode)
        at, windows = seq.offsets, []
        while (first := windows[-1][0][1] if windows else 0) < len(seq):
            last = at[np.searchsorted(at, first + LENGTH, side="right") - 1]
            windows.append([(first, int(last))])
        targets = int(seq.loss_mask().sum())
        batches.append(sq.make_batch(seq, windows, LENGTH, targets, len(seq.patches)))
    return batches


def naive(episode: Episode) -> list[int]:
    """The ids of a Meta-World episode, one number at a time."""
    ids = []
    for observation, action in zip(episode.observations, episode.actions, strict=False):
        for x in observation:
            y = math.copysign(math.log(abs(x) * 100 + 1) / math.log(256 * 100 + 1), x)
            ids.append(32000 + max(0, min(1023, math.floor((y + 1) / 2 * 1024))))
        ids.append(33024)
        for x in action:
            y = max(-1.0, min(1.0, float(x)))
            ids.append(32000 + min(1023, math.floor((y + 1) / 2 * 1024)))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(results.COMMITTED / "benchmark_tokenization.csv"))
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core

    arm, episodes = demonstrations("metaworld/drawer-open", 40)
    steps = sum(e.steps for e in episodes)
    same = arm.episode(episodes[0]).ids == naive(episodes[0])
    assert same.mean() > 0.999, "the naive tokenizer is another one"  # sums may round differently
    speeds = {
        ("metaworld", "timesteps, tokens"): (
            per_second(lambda: [arm.episode(e) for e in episodes], steps),
            steps,
        ),
        ("metaworld", "timesteps, packed"): (
            per_second(lambda: packed(arm, episodes), steps),
            steps,
        ),
        ("metaworld", "timesteps, naive"): (
            per_second(lambda: naive(episodes[0]), episodes[0].steps),
            1,
        ),
    }
    baby, episodes = demonstrations("babyai/GoToLocal", 100)
    steps = sum(e.steps for e in episodes)
    speeds["babyai", "timesteps, packed"] = per_second(lambda: packed(baby, episodes), steps), steps
    space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    only = sq.Tokenizer(space, gym.spaces.Discrete(7))
    frames = [e.observations["image"][: e.steps] for e in episodes]
    noise = np.random.default_rng(0)
    for name, images in (
        ("images 64 x 64, BabyAI", frames),
        (
            "images 64 x 64, noise",
            [noise.integers(0, 255, (100, 64, 64, 3), dtype=np.uint8) for _ in range(10)],
        ),
    ):
        n = sum(map(len, images))
        shown = [
            Episode("x", x, *[np.zeros(len(x), int)] * 2, np.zeros(len(x)), True, 0) for x in images
        ]
        speeds["images", name] = per_second(lambda s=shown: [only.episode(e) for e in s], n), n

    rows = []
    for (domain, what), (speed, n) in speeds.items():
        wanted = f", wanted {WANTED[what]:,}" if what in WANTED and domain != "babyai" else ""
        print(f"{domain:10} {what:24} {speed:12,.0f} a second of one core{wanted}")
        rows.append(
            results.row("tokenization", 0, 0, domain, "all", f"{what}, per second", speed, n)
        )
    ratio = speeds["metaworld", "timesteps, tokens"][0] / speeds["metaworld", "timesteps, naive"][0]
    print(f"{ratio:.0f} times the naive loop")
    rows.append(
        results.row("tokenization", 0, 0, "metaworld", "all", "tokens over naive", ratio, 1)
    )
    results.write_rows(args.out, rows)


if __name__ == "__main__":
    main()
