"""The results site: links, task pages, and every page in a browser."""

import functools
import html.parser
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import urllib.parse

import av
import numpy as np
import pytest

from gato_lib import domains, evaluation, results

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "site"))
import build  # noqa: E402
import films  # noqa: E402

# --- links ------------------------------------------------------------------------------------


def test_links_to_files_are_copied_and_hold(tmp_path):
    text = "[code](../gato_lib/model.py) and [rows](../experiments/results/references.csv)"
    assert build.with_links(text, ROOT / "notebooks", tmp_path) == text
    copy = tmp_path / "gato_lib" / "model.py"
    assert copy.read_bytes() == (ROOT / "gato_lib" / "model.py").read_bytes()
    assert (tmp_path / "experiments" / "results" / "references.csv").is_file()


def test_other_links(tmp_path):
    links = functools.partial(build.with_links, folder=ROOT, source=tmp_path)
    assert links("[all](experiments/params), ") == "all, "  # a folder is no page
    assert links("[log](experiments/LOG.md)") == "[log](experiments/LOG.txt)"
    assert (tmp_path / "experiments" / "LOG.txt").is_file()
    assert links("[log](experiments/LOG.md#two)") == "[log](experiments/LOG.txt#two)"
    for kept in ("[a](https://x.org/a.md)", "[04](notebooks/04_training.ipynb)", "[b](#two)"):
        assert links(kept) == kept
    assert not (tmp_path / "notebooks").exists()  # written as pages of their own


def test_a_link_to_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        build.with_links("[rows](experiments/results/no.csv)", ROOT, tmp_path)


# --- tasks ------------------------------------------------------------------------------------


def test_a_page_for_every_task(tmp_path):
    scores = build.read_scores(None)
    entries = build.write_tasks(tmp_path, scores)
    pages = {p.relative_to(tmp_path / "tasks") for p in (tmp_path / "tasks").rglob("*.md")}
    assert {pathlib.Path(f"{task}.md") for task in domains.TASKS} <= pages
    assert sum(e["tasks"] for e in entries) == len(domains.TASKS)
    assert sum(e["played"] for e in entries) == scores.normalized.notna().sum() > 0


def test_what_a_task_page_says(tmp_path):
    scores = build.read_scores(None)
    build.write_tasks(tmp_path, scores)
    references = evaluation.read_references(results.COMMITTED / "references.csv")
    task = scores.index[0]
    page = (tmp_path / "tasks" / f"{task}.md").read_text()
    assert f"**{100 * scores.normalized[task]:.0f} % of the expert's score**" in page
    assert f"{references.expert[task]:.4g}" in page and scores.git_sha[task] in page
    assert f"Solved: {100 * scores.success[task]:.0f} %." in page
    no_scale = scores.assign(normalized=scores.normalized.where(scores.index != task))
    build.write_tasks(tmp_path, no_scale)
    page = (tmp_path / "tasks" / f"{task}.md").read_text()
    assert f"Score {scores.score[task]:.4g}, the mean of 20 episodes; the expert gives" in page
    held = (tmp_path / "tasks" / "atari" / "Boxing.md").read_text()
    assert "Held out" in held and "% of the expert's score**" not in held


def test_a_task_without_a_scale_was_played_all_the_same(tmp_path):
    for name in ("06_simulated_control.csv", "06_episodes.csv", "06_set_aside.csv"):
        rows = results.read_rows(results.COMMITTED / name)
        if name == "06_simulated_control.csv":
            rows = rows[rows.task != "babyai/Open"]
        results.write_rows(tmp_path / "results" / name, rows.to_dict("records"))
    before, scores = build.read_scores(None), build.read_scores(tmp_path)
    assert set(scores.index) == set(before.index)
    now, then = scores.loc["babyai/Open"], before.loc["babyai/Open"]
    assert now.score == pytest.approx(then.score) and now.success == then.success
    assert (now.run, now.n) == (then.run, then.n)
    assert np.isnan(scores.normalized["babyai/Open"])
    assert build.summary(scores)["tasks"] == str(before.normalized.notna().sum() - 1)


def test_a_task_that_was_never_trained_on(tmp_path):
    scores = build.read_scores(None)
    unseen = scores[scores.unseen]
    assert len(unseen) == 4 and not set(unseen.index) & domains.HELD_OUT
    said = build.summary(scores)
    assert int(said["tasks"]) == int(said["trained"]) + 4
    build.write_tasks(tmp_path, scores)
    page = (tmp_path / "tasks" / f"{unseen.index[0]}.md").read_text()
    score = f"**{100 * unseen.normalized.iloc[0]:.0f} % of the expert's score**, 20 episodes."
    assert f"{score} The agent was never trained on this task." in page and "nan" not in page
    for name in ("06_simulated_control.csv", "06_episodes.csv"):
        rows = results.read_rows(results.COMMITTED / name).assign(run="another")
        results.write_rows(tmp_path / "results" / name, rows.to_dict("records"))
    shutil.copy(results.COMMITTED / "06_set_aside.csv", tmp_path / "results")
    assert set(build.read_scores(tmp_path).index) == set(scores[~scores.unseen].index)


def test_films_of_tasks(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 65, 3), np.uint8)
    films.write_film(tmp_path / "films" / "babyai-Open.mp4", frames)
    with av.open(str(tmp_path / "films" / "babyai-Open.mp4")) as file:
        shapes = [(f.height, f.width) for f in file.decode(video=0)]
    assert shapes == [(192, 194)] * 5  # thrice as large, cut to even sides
    scores = build.read_scores(None)
    whose = {"agent": scores.run["babyai/Open"]}
    told = {"babyai-Open": whose | {"seed": 0, "steps": 9, "score": 0.5, "success": True}}
    (tmp_path / "films" / "films.json").write_text(json.dumps(told))
    monkeypatch.setattr(build, "FILMS", tmp_path / "films")
    build.write_tasks(tmp_path, scores)
    page = (tmp_path / "tasks" / "babyai" / "Open.md").read_text()
    assert 'src="../../_static/films/babyai-Open.mp4"' in page
    assert "seed 0: 9 steps, score 0.5, solved." in page
    assert "<video" not in (tmp_path / "tasks" / "babyai" / "GoTo.md").read_text()
    build.write_tasks(tmp_path / "another", scores.assign(run="another agent"))
    page = (tmp_path / "another" / "tasks" / "babyai" / "Open.md").read_text()
    assert "<video" not in page, "a film beside another agent's score"


# --- the whole site ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    program = ROOT / "experiments" / "site" / "build.py"
    subprocess.run([sys.executable, program, "--out", out], check=True, cwd=ROOT)
    return out / "html"


class Page(html.parser.HTMLParser):
    """What a page points to, and the places in it that can be pointed to."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.places = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places.add(values.get("id"))
        self.targets += [values[k] for k in ("href", "src") if values.get(k)]


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > len(domains.TASKS)
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            file = (path.parent / urllib.parse.unquote(parts.path)) if parts.path else path
            file = file.resolve()
            missing = (
                parts.fragment
                and file in pages
                and (urllib.parse.unquote(parts.fragment) not in pages[file].places)
            )
            if not file.exists() or missing:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, broken[:10]


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "window-size=400,800",  # a phone's
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(service=service, options=options)
    yield driver
    driver.quit()


FAULTS = """
const missing = [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src);
const wide = document.documentElement.scrollWidth > window.innerWidth;
return [missing, wide];
"""


def faults(browser, url):
    """What is wrong with a page as it is shown."""
    browser.get(url)
    missing, wide = browser.execute_script(FAULTS)
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    return [*missing, *errors, *(["wider than a phone"] if wide else [])]


@pytest.mark.slow
def test_every_page_in_a_browser(site, browser):
    pages = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    found = {p.relative_to(site): faults(browser, p.as_uri()) for p in pages}
    assert not {p: f for p, f in found.items() if f}


@pytest.mark.slow
def test_the_site_from_a_static_server(site, browser):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for page in ("index.html", "notebooks/13_attention.html", "tasks/atari/index.html"):
            assert faults(browser, f"http://127.0.0.1:{server.server_port}/{page}") == []
        server.shutdown()
