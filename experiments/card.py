"""Write the model card of the agent that comes with the repository (paper App. A).

    python experiments/card.py

The fields are those of the paper's card (Mitchell et al. 2019), the words those of
agents/card.template.md. Numbers come from the agent's own meta.json and metrics.csv, and from the
committed rows of 06 that tell of this agent; where there are none, it says so. A test holds the
committed card to what this writes.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections import Counter

import pandas as pd

from gato_lib import dagger, model, plotting, results, workbook
from gato_lib.checkpoint import read_meta
from gato_lib.config import ModelConfig, count_of
from gato_lib.files import write_text

TEMPLATE = results.REPOSITORY / "experiments" / "agents" / "card.template.md"


def card(run: workbook.Run, name: str, rows: pathlib.Path) -> str:
    """The card of the agent `name` in `run`, with the scores that lie in `rows` if they are its."""
    folder = workbook.find_agent(run, name)
    if folder is None:
        raise FileNotFoundError(f"{run}: no finished agent {name!r} there")
    meta, trained = read_meta(folder), workbook.trained_on(folder)
    network = ModelConfig.from_dict(meta["model"])
    held_out = sorted({t.split("/")[1] for t in workbook.domains.HELD_OUT if "stacking" not in t})
    before = meta.get("before", {"steps": 0, "tokens": 0})
    whole = workbook.trained_before(folder)
    return TEMPLATE.read_text().format(
        date=meta["released"]["date"],
        folder=folder.name,
        parameters=model.count_parameters(network),
        width=network.width,
        depth=network.depth,
        context=trained.data.context_length,
        steps=whole["steps"],
        tokens=whole["tokens"] / 1e6,
        last_steps=whole["steps"] - before["steps"],
        last_tokens=(whole["tokens"] - before["tokens"]) / 1e6,
        hardware=meta["released"]["hardware"],
        megabytes=(folder / workbook.RELEASED).stat().st_size / 1e6,
        all_megabytes=sum(
            p.stat().st_size for p in folder.iterdir() if not p.name.startswith("episodes-")
        )
        / 1e6,
        sha256=meta["released"]["sha256"],
        episodes=_episodes(folder.name, rows) or "20 or more",
        table=_data(trained.data),
        led=dagger.LED,
        held_out=", ".join(held_out) + ", and all stacking but red on blue",
        scores=_scores(folder.name, rows),
    )


def _data(data: workbook.DataConfig) -> str:
    """What was learned from, a line a domain."""
    tasks, documents = Counter(t.split("/")[0] for t in data.tasks), Counter()
    for document in data.documents:
        documents[document.split("/")[0]] += 1
    weights = data.domain_weights
    whole = sum(weights.values())
    lines = ["| domain | tasks | demonstrations of each, before the filter | led | weight |"]
    lines += ["|---|---|---|---|---|"]
    for domain in plotting.in_order(weights):
        if domain in tasks:
            own = [t for t in data.tasks if t.split("/")[0] == domain]
            led = [sum(count_of(counts, t) for _, counts in data.practice) for t in own]
            made = [count_of(data.episodes, t) for t in own]
            many = f"{tasks[domain]} | {_span(made)} | {_span(led)}"
        else:
            sets = ", ".join(d.split("/")[1] for d in data.documents if d.startswith(f"{domain}/"))
            many = f"{documents[domain]} sets | {sets} | "
        name = plotting.DOMAIN_NAMES[domain]
        lines.append(f"| {name} | {many} | {100 * weights[domain] / whole:.0f} |")
    return "\n".join(lines)


def _span(counts: list[int]) -> str:
    """Smallest and largest number; nothing where all are 0."""
    low, high = min(counts), max(counts)
    return (f"{low} to {high}" if low < high else f"{high}") if high else ""


def _rows(path: pathlib.Path, agent: str) -> pd.DataFrame:
    """The rows in `path` that are about the agent: none, where there is no such file."""
    if not path.is_file():
        return pd.DataFrame(columns=list(results.COLUMNS))
    frame = results.read_rows(path)
    return frame[frame.run == agent]


def _episodes(agent: str, folder: pathlib.Path) -> int:
    """How many were played of a task, at least."""
    rows = _rows(folder / "06_simulated_control.csv", agent)
    played = rows[rows.metric == "score"]
    return int(played.n.min()) if len(played) else 0


def _scores(agent: str, folder: pathlib.Path) -> str:
    rows = _rows(folder / "06_simulated_control.csv", agent)
    if rows.empty:
        return "Not measured yet."
    found = rows[(rows.metric == "normalized")]
    above = found.assign(above=found.value >= 0.5).groupby("domain").above.agg(["sum", "count"])
    means = rows[(rows.task == "all") & rows.metric.isin(["mean", "low", "high"])]
    means = means.pivot(index="domain", columns="metric", values="value")
    lines = [
        f"{above['sum'].sum()} of {above['count'].sum()} trained tasks whose expert is sound reach "
        f"half of the expert's score, {above['sum'].sum() / above['count'].sum():.0%}; the paper: "
        "over 450 of 604.",
        "",
        "| domain | tasks | at half of the expert | mean, % of expert (95 % interval) |",
        "|---|---|---|---|",
    ]
    for domain in plotting.in_order(above.index):
        mean, low, high = 100 * means.loc[domain, ["mean", "low", "high"]]
        count = above.loc[domain]
        name = plotting.DOMAIN_NAMES[domain]
        lines.append(
            f"| {name} | {count['count']} | {count['sum']} | {mean:.0f} ({low:.0f} to {high:.0f}) |"
        )
    aside = _rows(folder / "06_set_aside.csv", agent)
    aside = aside[aside.domain == "aside"].pivot(index="task", columns="metric", values="value")
    for part, r in (100 * aside).iterrows():
        lines += ["", f"{part.capitalize()} set aside: {r.aside:.0f} % of the expert, others "]
        lines[-1] += (
            f"{r.known:.0f} %; lost {r['drop']:+.0f} points ({r.low:+.0f} to {r.high:+.0f})."
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=pathlib.Path, default=None, help="agents/released")
    options = parser.parse_args(arguments)
    home = options.agents or results.REPOSITORY / "experiments" / "agents" / "released"
    run = workbook.Run(home, "released")
    try:
        write_text(home / "README.md", card(run, "generalist", results.COMMITTED))
    except FileNotFoundError as error:
        print(f"card.py: {error}")
        return 2
    print(f"written: {home / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
