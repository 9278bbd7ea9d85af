"""Build the results site: executed notebooks, tasks and figures as static HTML.

    python experiments/site/build.py                  # from what is committed
    python experiments/site/build.py --preset laptop  # with your own run's notebooks and scores

Pages are Markdown from templates/, laid out like the repository so that links between its files
hold, and rendered by Sphinx with MyST-NB. The site opens from experiments/runs/site/html without a
server. Exit status: 0 done, 1 Sphinx found a fault (any warning is one), 2 there is no such run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import nbformat
import numpy as np
import pandas as pd
import yaml

from gato_lib import domains, evaluation, results

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from run import result_of  # noqa: E402

FILMS = ROOT / "figures" / "films"
RUNS = ROOT / "experiments" / "runs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="", help="a run's; empty: what is committed")
    parser.add_argument("--out", type=pathlib.Path, default=RUNS / "site")
    options = parser.parse_args(arguments)
    run = RUNS / options.preset if options.preset else None
    if run is not None and not (run / "notebooks").is_dir():
        print(f"{run.relative_to(ROOT)}: there is no such run; make reproduce first")
        return 2
    source, html = options.out / "source", options.out / "html"
    for folder in (source, html):
        shutil.rmtree(folder, ignore_errors=True)
    lay_out(source, run)
    from sphinx.cmd.build import main as sphinx

    # Sphinx looks for conf.py beside the pages; its cache goes with them.
    flags = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(options.out / "cache")]
    if status := sphinx([*flags, str(source), str(html)]):
        return int(status)
    pages = len(list(html.rglob("*.html")))
    print(f"site: {pages} pages, open {os.path.relpath(html / 'index.html')}")
    return 0


def lay_out(source: pathlib.Path, run: pathlib.Path | None) -> None:
    """Write Sphinx's source folder: pages and all that they show or link to."""
    (source / "_static").mkdir(parents=True)
    shutil.copy(HERE / "conf.py", source)
    for name in ("site.css", "icon.svg"):
        shutil.copy(HERE / name, source / "_static")
    shutil.copytree(ROOT / "figures", source / "figures")
    if run is not None:
        shutil.copytree(run / "figures", source / "figures", dirs_exist_ok=True)
    if FILMS.is_dir():
        shutil.copytree(FILMS, source / "_static" / "films")
    scores = read_scores(run)
    table = yaml.safe_load((ROOT / "experiments" / "notebooks.yaml").read_text())
    figures = list(read_figures(source / "figures"))
    notebooks = [notebook_entry(name, fields, figures, run) for name, fields in table.items()]
    for name in table:
        write_notebook(source, name, run)
    write_page(source / "README.md", (ROOT / "README.md").read_text(), source)
    by_domain = write_tasks(source, scores)
    overall = summary(scores)
    render(
        source / "index.md",
        "index.md",
        headline="fig05_thresholds",
        overall=overall,
        domains=by_domain,
        notebooks=notebooks,
    )
    render(source / "tasks" / "index.md", "tasks.md", domains=by_domain)
    render(source / "figures.md", "figures.md", figures=figures)


def render(path: pathlib.Path, template: str, **values: Any) -> None:
    """Write one page from a template."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(**values))


# --- notebooks --------------------------------------------------------------------------------


def executed(name: str, run: pathlib.Path | None) -> pathlib.Path:
    """The run's copy of a notebook, if it has one; otherwise the committed one."""
    copy = None if run is None else run / "notebooks" / f"{name}.ipynb"
    return copy if copy is not None and copy.is_file() else ROOT / "notebooks" / f"{name}.ipynb"


def notebook_entry(
    name: str, fields: dict[str, Any], figures: list[dict[str, str]], run: pathlib.Path | None
) -> dict[str, str]:
    """What the index says of a notebook."""
    own = [f for f in figures if f["notebook"] == name]
    return {
        "name": name,
        "number": name.split("_")[0],
        "title": fields["title"],
        "section": str(fields["section"]),
        "result": result_of(executed(name, run)),
        "paper": fields["paper"],
        "state": fields["state"],
        "minutes": f"{fields.get('minutes', {}).get('laptop', '')}",
        "figures": ", ".join(f"[{i}](figures.md#{f['name']})" for i, f in enumerate(own, 1)),
    }


def write_notebook(source: pathlib.Path, name: str, run: pathlib.Path | None) -> None:
    """Put a notebook among the pages, with links that hold there."""
    notebook = nbformat.read(executed(name, run), 4)
    target = source / "notebooks" / f"{name}.ipynb"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, ROOT / "notebooks", source)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def write_page(path: pathlib.Path, text: str, source: pathlib.Path) -> None:
    """Put a Markdown file of the repository among the pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(with_links(text, ROOT, source))


def with_links(text: str, folder: pathlib.Path, source: pathlib.Path) -> str:
    """Text of a file in `folder` whose links hold on the site.

    What they point to is copied to the same place there, unless a page will stand there; a folder
    is no page, and its link becomes its text.
    """

    def follow(match: re.Match[str]) -> str:
        image, words, target, place_in_it = match.groups(default="")
        if "://" in target:
            return match[0]
        path = (folder / target).resolve()
        place = source / path.relative_to(ROOT)
        if path.is_dir():
            return words
        if path.suffix == ".md" and path != ROOT / "README.md":
            place = place.with_suffix(".txt")  # no page of the site, but to be read
            target = target.removesuffix(".md") + ".txt"
        if path.suffix != ".ipynb" and path != ROOT / "README.md" and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return f"{image}[{words}]({target}{place_in_it})"

    return LINK.sub(follow, text)


# --- figures ----------------------------------------------------------------------------------


def read_figures(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Every figure with its notebook and the files that it was drawn from."""
    for path in sorted(folder.glob("*.json")):
        origin = json.loads(path.read_text())
        (file,) = (
            p.name for k in ("png", "gif") for p in [path.with_suffix(f".{k}")] if p.exists()
        )
        inputs = [f"`{n}` (sha256 {digest[:12]})" for n, digest in origin["inputs"].items()]
        yield {
            "name": path.stem,
            "file": file,
            "notebook": origin["notebook"],
            "inputs": "from " + ", ".join(inputs) if inputs else "from no stored rows",
        }


# --- tasks ------------------------------------------------------------------------------------


def read_scores(run: pathlib.Path | None) -> pd.DataFrame:
    """One line a task that was played: normalised score, interval, episodes, provenance.

    Without the normalised ones where there is no scale: the expert is weak or not sound. `unseen`
    are tasks that the agent was not trained on, of which 06 keeps the normalised score alone.
    """
    names = ["06_simulated_control.csv", "06_episodes.csv"]
    own = run is not None and all((run / "results" / name).is_file() for name in names)
    folder = run / "results" if own else results.COMMITTED
    rows, single = (results.read_rows(folder / name) for name in names)
    rows = rows[rows.task.isin(domains.TASKS)]
    for task in sorted(set(single.task) - set(rows.task)):
        of_task = single[single.task == task]
        episodes = evaluation.episodes_of(of_task)
        more = of_task.head(1).assign(n=len(episodes))
        means = {"score": episodes.score.mean(), "success": episodes.success.mean()}
        rows = pd.concat([rows, *(more.assign(metric=k, value=v) for k, v in means.items())])
    table = rows.pivot(index="task", columns="metric", values="value")
    origin = ["run", "git_sha", "hardware", "step", "n"]
    table = table.join(rows.groupby("task").first()[origin]).assign(unseen=False)
    aside = folder / "06_set_aside.csv"
    unseen = results.read_rows(aside) if aside.is_file() else rows.head(0)
    unseen = unseen[(unseen.metric == "normalized") & (unseen.run == table.run.iloc[0])]
    if unseen.empty:
        return table
    unseen = unseen.set_index("task").rename(columns={"value": "normalized"})
    return pd.concat([table, unseen[["normalized", *origin]].assign(unseen=True)])


def read_films(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What is told of each film in the folder (films.py), by the task's name."""
    path = folder / "films.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def summary(scores: pd.DataFrame) -> dict[str, str]:
    """Over all tasks that were played, and over those trained on."""
    agent, steps = scores.run.iloc[0].split("-")[0], scores.step.iloc[0]
    trained = scores[~scores.unseen]
    return {
        "agent": f"One agent ({agent}, {steps:,} updates)",
        "tasks": str(scores.normalized.notna().sum()),
        "at_half": str(int((scores.normalized >= 0.5).sum())),
        "trained": str(trained.normalized.notna().sum()),
        "trained_at_half": str(int((trained.normalized >= 0.5).sum())),
        "mean": f"{100 * trained.normalized.mean():.0f}",
    }


def write_tasks(source: pathlib.Path, scores: pd.DataFrame) -> list[dict[str, Any]]:
    """A page a task, and one a domain; returns what is to be said of each domain."""
    references = evaluation.read_references(results.COMMITTED / "references.csv")
    entries = []
    for domain in domains.DOMAINS.values():
        folder, listed = source / "tasks" / domain.name, []
        for task, spec in domain.tasks.items():
            page = spec.name
            reference = references.loc[task] if task in references.index else None
            played = scores.loc[task] if task in scores.index else None
            shown = task_values(task, spec, reference, played)
            render(folder / f"{page}.md", "task.md", **shown)
            notes = [k for k in ("held out",) if shown["held_out"]]
            notes += ["never trained on"] if shown["unseen"] else []
            notes += ["weak expert"] if shown["unsound"] else []
            listed.append(shown | {"name": spec.name, "page": page, "note": ", ".join(notes)})
        render(folder / "index.md", "domain.md", name=domain.name, tasks=listed)
        own = scores[scores.index.isin(list(domain.tasks))].dropna(subset="normalized")
        entries.append(
            {
                "name": domain.name,
                "tasks": len(domain.tasks),
                "played": len(own),
                "mean": f"{100 * own.normalized.mean():.0f}" if len(own) else "",
                "at_half": f"{(own.normalized >= 0.5).sum()} of {len(own)}" if len(own) else "",
            }
        )
    return entries


def task_values(
    task: str, spec: domains.TaskSpec, reference: pd.Series | None, played: pd.Series | None
) -> dict[str, Any]:
    """What a task's page shows."""

    def mean(kind: str) -> str:
        if reference is None:
            return "not measured"
        return f"{reference[kind]:.4g}"

    values = {
        "id": task,
        "film": "",
        "filmed": "",
        "score": "",
        "raw": "",
        "low": "",
        "high": "",
        "solved": "",
        "episodes": "",
        "held_out": task in domains.HELD_OUT,
        "unseen": played is not None and bool(played.unseen),
        "metric": {"return": "the sum of rewards", "success": "whether it was solved"}[spec.metric],
        "measured": "" if reference is None else reference.n,
        "random": mean("random"),
        "expert": mean("expert"),
        "floor": f"{spec.floor:g}",
        "floor_source": spec.floor_source,
        "expert_how": spec.expert,
        "sees": spec.sees,
        "unsound": "",
        "provenance": "",
    }
    if reference is not None and reference.weak:
        values["unsound"] = "below half of its floor"
    if reference is not None and not reference.sound:
        values["unsound"] = "not clear of random actions"
    name = task.replace("/", "-")
    episode = read_films(FILMS).get(name)
    if episode and (played is None or played.run == episode["agent"]):
        values["film"] = f"../../_static/films/{name}.mp4"
        solved = ", solved" if episode["success"] else ""
        values["filmed"] = (
            f"The first evaluation episode of {episode['agent']}, seed {episode['seed']}: "
            f"{episode['steps']} steps, score {episode['score']:.4g}{solved}."
        )
    if played is not None:
        if not played.unseen:
            values["raw"], values["solved"] = f"{played.score:.4g}", f"{100 * played.success:.0f}"
        for key, column in (("score", "normalized"), ("low", "low"), ("high", "high")):
            if not np.isnan(played[column]):
                values[key] = f"{100 * played[column]:.0f}"
        values["episodes"] = f"{played.n:.0f}"
        values["provenance"] = (
            f"{played.run}, {played.step:,} updates, commit {played.git_sha}, {played.hardware}"
        )
    return values


if __name__ == "__main__":
    sys.exit(main())
