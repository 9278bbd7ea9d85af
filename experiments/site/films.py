"""Film an agent in every task that it was trained on, for the site's task pages.

    python experiments/site/films.py experiments/agents/released

Each film is the evaluation episode with number 0, whatever it shows, as an MP4 of some ten
kilobytes in figures/films, with films.json beside it: the agent, the seed, and what each episode
reached. What is there is not filmed again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import av
import numpy as np
from build import read_films

from gato_lib import films, results, workbook
from gato_lib.files import atomic_path, write_text

FOLDER = results.REPOSITORY / "figures" / "films"
RATE = 8  # frames a second
SIDE = 160  # pixels that a film's shorter side has at least


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of the run with the agent")
    parser.add_argument("--agent", default="generalist", help="its name there")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--tasks", default="", help="some of its tasks; empty: all")
    parser.add_argument("--prompt", default="end", choices=["none", "start", "end"])
    parser.add_argument("--continuous", default=workbook.LEADING, help="as in 06")
    parser.add_argument("--keep", type=float, default=1.0, help="as in 06")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run = workbook.Run.of(str(options.run), workbook.Run.at("", "smoke"))
    folder = workbook.find_agent(run, options.agent)
    if folder is None:
        print(f"{options.run}: no finished agent {options.agent!r} there")
        return 2
    trained = workbook.trained_on(folder)
    choices = {"prompt": options.prompt, "keep": options.keep}
    shown = workbook.prompts_for(run, folder, options.prompt)
    agent = workbook.load_agent(folder, continuous=options.continuous, keep=options.keep)
    tasks = workbook.select_tasks(options.tasks) or trained.tasks
    for number, task in enumerate(tasks, 1):
        path = options.out / f"{task.replace('/', '-')}.mp4"
        told = read_films(options.out)
        whose = {"agent": folder.name, "seed": options.seed, **choices}
        if path.is_file() and told.get(path.stem, {}).items() >= whose.items():
            continue
        film = films.film(
            agent, task, options.seed, prompt=options.prompt, demonstrations=shown, most=64
        )
        write_film(path, film.frames)
        reached = {"score": round(film.score, 4), "success": film.success, "steps": film.steps}
        told[path.stem] = whose | reached
        write_text(options.out / "films.json", json.dumps(told, indent=1, sort_keys=True) + "\n")
        print(f"[{number}/{len(tasks)}] {task}: {film.steps} steps, score {film.score:.4g}")
    return 0


def write_film(path: pathlib.Path, frames: np.ndarray) -> None:
    """Write images, uint8 (N, H, W, 3), as an MP4 that browsers play (H.264, 4:2:0)."""
    times = max(1, -(-SIDE // min(frames.shape[1:3])))
    large = frames.repeat(times, axis=1).repeat(times, axis=2)
    large = large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2]  # even, for 4:2:0
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"crf": "28", "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = *large.shape[1:3], "yuv420p"
        for image in large:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


if __name__ == "__main__":
    sys.exit(main())
