"""The project's own rules: pins, the direction of imports, presets, and the notebook driver."""

from __future__ import annotations

import argparse
import ast
import csv
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import nbformat
import psutil
import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def load_driver(root: pathlib.Path):
    """experiments/run.py of the workbook in `root`, as a module."""
    spec = importlib.util.spec_from_file_location("run_driver", root / "experiments" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


driver = load_driver(REPOSITORY)
README = (REPOSITORY / "README.md").read_text()


# --- pins -----------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_environment_yml_has_the_pins_of_pyproject():
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip[-1] == "-e ."
    assert pip[:-1] == project()["dependencies"] + project()["optional-dependencies"]["dev"]
    assert "python=3.11" in conda
    assert project()["requires-python"] == ">=3.11,<3.12"


def test_every_dependency_is_pinned_exactly():
    extras = project()["optional-dependencies"].values()
    for line in [*project()["dependencies"], *(line for extra in extras for line in extra)]:
        assert line.count("==") == 1 and "*" not in line, line


# --- imports --------------------------------------------------------------------------------------

# A module may import only modules above it. `domains` is a package: one entry for all its modules.
ORDER = (
    "config",
    "distributed",
    "exchanges",
    "files",
    "tokenizers",
    "episodes",
    "prompts",
    "domains",
    "collection",
    "set_aside",
    "sequence",
    "importing",
    "vision_language",
    "mixture",
    "embedding",
    "attention",
    "transformer",
    "model",
    "checkpoint",
    "training",
    "inspection",
    "sampling",
    "agent",
    "cloning",
    "evaluation",
    "dagger",
    "films",
    "aggregation",
    "scaling",
    "latency",
    "results",
    "plotting",
    "workbook",
)
LEAVES = {  # and these only what is named here
    "files": set(),
    "exchanges": set(),
    "results": {"config", "distributed", "files"},
    "plotting": {"config", "distributed", "files"},
}
PLOTS = {"matplotlib", "seaborn"}  # only in plotting
NEVER = {"papermill", "nbformat", "nbclient", "notebooks", "experiments", "tests"}

MODULES = sorted((REPOSITORY / "gato_lib").rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names imported anywhere in a file; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_in_one_direction(path):
    module = path.relative_to(REPOSITORY / "gato_lib").parts[0].removesuffix(".py")
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("gato_lib.")}
    others = {name.split(".")[0] for name in names}
    assert not others & NEVER
    assert module == "plotting" or not others & PLOTS
    if module == "__init__":
        assert not ours
        return
    assert module in ORDER, f"give {module} its place in ORDER"
    allowed = set(ORDER[: ORDER.index(module)])
    allowed &= LEAVES.get(module, allowed)
    if module in ("domains", "importing", "vision_language"):  # packages
        allowed |= {module}
    assert ours <= allowed, f"{module} imports {sorted(ours - allowed)}, which stand below it"


def test_third_party_imports_are_declared():
    procgen = REPOSITORY / "experiments" / "procgen-requirements.txt"  # optional, `make procgen`
    lines = project()["dependencies"]
    lines += [
        line
        for extra in ("lerobot", "rlds", "embed")
        for line in project()["optional-dependencies"][extra]
    ]
    lines += [line for line in procgen.read_text().splitlines() if "==" in line]
    declared = {line.split("==")[0].split("[")[0].lower().replace("_", "-") for line in lines}
    providers = importlib.metadata.packages_distributions()
    scripts = {path.stem for path in (REPOSITORY / "experiments").glob("*.py")}
    for path in [*MODULES, *(REPOSITORY / "experiments").glob("*.py")]:
        for name in {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names):
            if name in ("gato_lib", "__future__", *scripts):
                continue
            found = {p.lower().replace("_", "-") for p in providers.get(name, [name])}
            found |= {"procgen-mirror"} if name == "procgen" else set()
            assert found & declared, f"{path.name} imports {name}, which pyproject.toml lacks"


# --- presets and notebooks ------------------------------------------------------------------------

PRESETS = sorted(p.stem for p in (REPOSITORY / "experiments" / "params").glob("*.yaml"))


def test_the_table_lists_every_notebook():
    assert {"smoke", "laptop", "accelerator", "paper"} <= set(PRESETS)
    files = {p.stem for p in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert set(driver.load_table()) == files


def test_readme_and_table_agree_on_what_each_notebook_is():
    rows = re.findall(r"^\| \[(\w+)\]\(notebooks/\w+\.ipynb\) \|(.+)\|$", README, re.MULTILINE)
    cells = {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}
    table = driver.load_table()
    assert list(cells) == list(table)
    for name, entry in table.items():
        assert entry.paper and entry.state, name
        assert cells[name][-1] == entry.state, name


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_every_notebook_says_its_result_once(path):
    code = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    assert code.count('print(f"Result: ') == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_their_notebooks(preset):
    table = driver.load_table()
    for name, values in driver.load_preset(preset).items():
        assert driver.validate_parameters(table[name].path, values).get("preset") == preset


def test_what_presets_publish():
    published = {preset: driver.load_publishes(preset) for preset in PRESETS}
    assert {preset for preset, patterns in published.items() if patterns} == {
        "laptop",
        "ablation",
        "distillation",
        "questions",
        "acting",
        "choices",
        "released",
        "ood",
        "scaling",
        "specialists",
        "stacking",
    }
    assert "notebooks" in published["laptop"] and "notebooks" not in published["ablation"]
    rows = pathlib.PurePath("results/16_ablations.csv")
    assert [p for p in published["laptop"] if rows.match(p)] == []
    assert [p for p in published["ablation"] if rows.match(p)] == [str(rows)]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ([], '--preset "laptop" --publish'),
        (["PRESET=ablation"], '--preset "ablation" --notebook 16_ablations --publish'),
        (["PRESET=stacking"], "07_rgb_stacking --notebook 11_finetune_stacking --publish"),
        (["PRESET=x", "NOTEBOOK=a b"], '--preset "x" --notebook a --notebook b --publish'),
    ],
)
def test_make_results(variables, expected):
    ours = ("MAKE", "MFLAGS", "PRESET", "NOTEBOOK")  # of a make that runs these tests
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    out = subprocess.run(
        ["make", "--dry-run", "results", *variables],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert expected in " ".join(out.split())


# --- the driver, on a workbook of two small notebooks ---------------------------------------------

FIRST = """
run_dir: str = ""
preset: str = "smoke"
steps: int = 2
rate: float = 0.5  # an explanation
label: str = "x"
quick: bool = True
limit: int = None
names: list[str] = ["a", "b"]
"""
SECOND = 'run_dir: str = ""\npreset: str = "smoke"\nfail: bool = False\nsleep: float = 0.0'
WRITE = """
import csv, pathlib
folder = pathlib.Path(run_dir)
print("working at", steps)
print("Result: score", steps / 4)
row = {"domain": "all", "metric": "score", "value": steps / 4}
with open(folder / "results/first.csv", "w") as file:
    writer = csv.DictWriter(file, row)
    writer.writeheader()
    writer.writerow(row)
(folder / "figures/plot.png").write_bytes(b"picture")
"""
READ = """
import os, pathlib, time
folder = pathlib.Path(run_dir)
assert (folder / "results/first.csv").is_file()
(folder / "data/pid").write_text(str(os.getpid()))
time.sleep(sleep)
if fail:
    raise RuntimeError("no luck today")
(folder / "data/done").touch()
"""
TABLE = {
    "first": {
        "title": "One",
        "section": 2.1,
        "paper": "450 of 604",
        "state": "complete",
        "outputs": ["results/first.csv", "figures/plot.png"],
        "minutes": {"tiny": 1, "other": 2},
    },
    "second": {
        "title": "Two",
        "section": "3",
        "needs": ["first"],
        "outputs": ["data/done"],
    },
}

# The globs leave out what another preset would publish.
PRESET = "{shared: {preset: tiny}, publishes: [results/f*.csv, figures/*, notebooks]}"
ROWS_ONLY = "{shared: {preset: tiny}, publishes: [results/f*.csv]}"


def write_notebook(path: pathlib.Path, parameters: str, code: str) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# Title", id="title"),
        nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}, id="p"),
        nbformat.v4.new_code_cell(code.strip(), id="code"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


class Workbook:
    """A throw-away workbook: a copy of run.py among two notebooks, a preset and a library."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        for folder in ("experiments/params", "notebooks", "gato_lib/assets"):
            (root / folder).mkdir(parents=True)
        shutil.copy(REPOSITORY / "experiments" / "run.py", root / "experiments")
        (root / "gato_lib/module.py").write_text("x = 1\n")
        (root / "gato_lib/assets/table").write_text("1")
        write_notebook(root / "notebooks/first.ipynb", FIRST, WRITE)
        write_notebook(root / "notebooks/second.ipynb", SECOND, READ)
        self.table()
        self.preset()
        self.driver = load_driver(root)
        self.folder = root / "experiments/runs/tiny"

    def table(self, **second) -> None:
        content = TABLE | {"second": TABLE["second"] | second}
        (self.root / "experiments/notebooks.yaml").write_text(yaml.safe_dump(content))

    def preset(self, text: str = PRESET) -> None:
        (self.root / "experiments/params/tiny.yaml").write_text(text)

    def main(self, *arguments: str) -> int:
        return self.driver.main(["--preset", "tiny", *arguments])

    def plan(self, **options):
        defaults = {
            "preset": "tiny",
            "notebook": [],
            "set": [],
            "publish": False,
            "distributed": False,
        }
        runs = self.root / "experiments/runs"
        return self.driver.plan(argparse.Namespace(**defaults | {"runs": runs} | options))

    def stale(self, **options) -> list[str]:
        """What a run with these options would execute."""
        run, _, names = self.plan(**options)
        return sorted(run.stale(names, ()))

    def start(self, *arguments: str) -> subprocess.Popen:
        """The driver as a process of its own, its second notebook asleep."""
        command = [sys.executable, "experiments/run.py", "--preset", "tiny", *arguments]
        process = subprocess.Popen(command, cwd=self.root, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (self.folder / "data/pid").is_file() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        return process

    def kernel_is_gone(self, seconds: float = 10) -> bool:
        try:
            psutil.Process(int((self.folder / "data/pid").read_text())).wait(seconds)
        except psutil.NoSuchProcess:
            pass
        except psutil.TimeoutExpired:
            return False
        return True


@pytest.fixture
def workbook(tmp_path):
    # A name that needs quoting everywhere.
    return Workbook(tmp_path / "my work book")


@pytest.mark.parametrize(
    ("arguments", "preset", "expected"),
    [
        (["--preset", "lapptop"], None, ["unknown preset 'lapptop'", "known: tiny"]),
        (["--notebook", "frist"], None, ["unknown notebook 'frist'", "did you mean first"]),
        (["--set", "steps"], None, ["--set steps", "KEY=VALUE"]),
        (["--notebook", "first", "--set", "stepps=3"], None, ["'stepps'", "did you mean steps"]),
        (["--notebook", "first", "--set", "rate=1e-4"], None, ["rate", "write 0.0001"]),
        (["--publish", "--set", "steps=3"], ROWS_ONLY, ["--publish", "leave out --set"]),
        (["--publish"], "shared: {preset: tiny}", ["tiny.yaml has no list 'publishes'"]),
        ([], "publishes: notebooks", ["tiny.yaml: publishes: expected a list"]),
        ([], "publishes: [../x]", ["tiny.yaml: publishes: '../x'", "results/ or figures/"]),
        ([], "publishes: [results/a/b]", ["tiny.yaml: publishes: 'results/a/b'"]),
        ([], "shared: {presett: tiny}", ["tiny.yaml", "'presett'", "did you mean preset"]),
        ([], "notebooks: {frist: {}}", ["tiny.yaml", "unknown notebook 'frist'"]),
        ([], "share: {}", ["tiny.yaml", "unknown section 'share'"]),
        ([], "notebooks: {first: {steps: true}}", ["steps: expected int", "got bool True"]),
        ([], "notebooks: {first: {steps: 2.5}}", ["steps: expected int", "got float 2.5"]),
        ([], "notebooks: {first: {steps: null}}", ["steps: expected int", "NoneType"]),
        ([], "notebooks: {first: {quick: 1}}", ["quick: expected bool", "got int 1"]),
        ([], "notebooks: {first: {rate: 1e-4}}", ["tiny.yaml: first: rate", "write 0.0001"]),
        ([], "notebooks: {first: {label: 3}}", ["label: expected str", "got int 3"]),
        ([], "notebooks: {first: {names: [1]}}", ["names: expected list", "[1]"]),
        ([], "notebooks: {first: {run_dir: x}}", ["run_dir is set by run.py"]),
        ([], "notebooks: {second: {fail: maybe}}", ["second: fail: expected bool"]),
        ([], "shared: [", ["tiny.yaml"]),
        ([], "extends: tiny", ["tiny.yaml: extends 'tiny'"]),
        ([], "extends: huge", ["tiny.yaml: extends 'huge'", "known: tiny"]),
        (["--distributed"], None, ["--distributed runs one --notebook"]),
        (["--distributed", "--notebook", "first"], None, ["not made for several processes"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(workbook, capsys, arguments, preset, expected):
    if preset is not None:
        workbook.preset(preset)
    assert workbook.main(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in expected:
        assert part in error
    assert not workbook.folder.exists()


def test_a_preset_extends_another(workbook, capsys):
    base = "shared: {label: base}\nnotebooks: {first: {steps: 5, rate: 2.0}}\n"
    (workbook.root / "experiments/params/base.yaml").write_text(base)
    workbook.preset("extends: base\nshared: {preset: tiny}\nnotebooks: {first: {steps: 7}}")
    values = workbook.driver.load_preset("tiny")["first"]
    assert values == {"label": "base", "steps": 7, "rate": 2.0, "preset": "tiny"}
    assert workbook.driver.load_publishes("tiny") == ()
    params = workbook.root / "experiments/params"
    (params / "lowest.yaml").write_text("shared: {label: lowest, names: [one]}")
    (params / "base.yaml").write_text(f"extends: lowest\n{base}")
    assert workbook.driver.load_preset("tiny")["first"] == values | {"names": ["one"]}
    (params / "lowest.yaml").write_text("extends: tiny")
    assert workbook.main() == 2
    assert "lowest.yaml: extends 'tiny', which extends it in turn" in capsys.readouterr().err


def test_one_of_several_processes(workbook, capsys, monkeypatch):
    """Process 0 wants the needs done and records; others run one notebook and record nothing."""
    for name, value in (("COORDINATOR_ADDRESS", "localhost:1"), ("NUM_PROCESSES", "2")):
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    second = ("--distributed", "--notebook", "second")
    assert workbook.main(*second) == 2
    assert "second is not made for several processes" in capsys.readouterr().err
    path = workbook.root / "notebooks/second.ipynb"
    write_notebook(path, SECOND, "# distributed.start()\n" + READ)
    assert workbook.main(*second) == 2 and "the first below the second" in capsys.readouterr().err
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert workbook.main(*second) == 2 and "second needs first" in capsys.readouterr().err
    assert workbook.main("--notebook", "first") == 0
    assert "JAX_NUM_PROCESSES" not in os.environ, "left over, it would join others"
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert workbook.main(*second) == 0
    recorded = sorted(p.name for p in (workbook.folder / "state").glob("*.json"))
    assert recorded == ["first.json", "second.json"]
    before = (workbook.folder / "state/second.json").read_text()
    with workbook.plan()[0].locked():  # process 0 is at work
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "1")
        assert workbook.main(*second) == 0
    assert (workbook.folder / "state/second.json").read_text() == before
    assert (workbook.folder / "notebooks/second.worker1.ipynb").is_file()


def test_parameters_that_fit(workbook):
    values = {"steps": 3, "rate": 1, "limit": None, "names": ["c"], "quick": False}
    path = workbook.root / "notebooks/first.ipynb"
    checked = workbook.driver.validate_parameters(path, values)
    assert checked == values
    assert isinstance(checked["rate"], float)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('steps: int = 2\nrun_dir = ""\nrate = 0.5  # a = b', "cannot read the parameter 'rate'"),
        ('run_dir = ""\nsteps = 2 * 3', "the default of steps is not a literal"),
        ("steps = 2", "no run_dir"),
    ],
)
def test_parameter_cells_that_cannot_be_checked(workbook, cell, message):
    path = workbook.root / "notebooks/first.ipynb"
    write_notebook(path, cell, "")
    with pytest.raises(workbook.driver.UserError, match=message):
        workbook.driver.validate_parameters(path, {})


def test_runs_what_is_not_up_to_date(workbook, capsys):
    assert workbook.main("--notebook", "second") == 0  # and what it needs
    out = capsys.readouterr().out
    assert "[1/2] first   section 2.1, about 1 min" in out
    assert "working at 2\n" in out  # the notebook's own progress lines
    (line,) = (line for line in out.splitlines() if line.strip().startswith("One "))
    assert re.fullmatch(r"One +2\.1 +score 0\.5 +450 of 604 +complete +0\.\d", line.strip())
    state = workbook.folder / "state/second.json"
    assert (workbook.folder / "data/done").is_file()
    assert sorted(p.name for p in (workbook.folder / "notebooks").iterdir()) == [
        "first.ipynb",
        "second.ipynb",
    ]

    before = state.read_bytes()
    assert workbook.main() == 0
    out = capsys.readouterr().out
    assert out.count("up to date") == 3  # while running, two notebooks, and under the summary
    assert "score 0.5" in out and "(0." in out
    assert state.read_bytes() == before

    # What counts as a change, and for which notebooks.
    assert workbook.stale() == []
    assert workbook.stale(notebook=["first"], set=["steps=3"]) == ["first"]
    workbook.preset("{shared: {preset: tiny}, notebooks: {second: {sleep: 0.1}}}")
    assert workbook.stale() == ["second"]
    workbook.preset("{shared: {preset: tiny}, notebooks: {first: {steps: 3}}}")
    assert workbook.stale() == ["first", "second"]
    workbook.preset()
    module = workbook.root / "gato_lib/module.py"
    module.write_text("x = 1  # a comment\n")
    assert workbook.stale() == []
    module.write_text("x = 2\n")
    assert workbook.stale() == ["first", "second"]
    module.write_text("x = 1\n")
    (workbook.root / "gato_lib/assets/table").write_text("2")
    assert workbook.stale() == ["first", "second"]
    (workbook.root / "gato_lib/assets/table").write_text("1")
    path = workbook.root / "notebooks/second.ipynb"
    write_notebook(path, SECOND, READ + "# changed")
    assert workbook.stale() == ["second"]
    write_notebook(path, SECOND, READ)
    (workbook.folder / "figures/plot.png").unlink()
    assert workbook.stale() == ["first", "second"]
    (workbook.folder / "figures/plot.png").write_bytes(b"picture")
    assert workbook.stale() == []

    # Publishing changes committed files but not what is up to date.
    for name in ("results/other.csv", "figures/plot.png.partial", "figures/.plot.png.1.partial"):
        (workbook.folder / name).touch()
    source = workbook.root / "notebooks/first.ipynb"
    cells = json.loads(source.read_text())["cells"]
    assert workbook.main("--publish") == 0
    assert (workbook.root / "figures/plot.png").read_bytes() == b"picture"
    assert os.listdir(workbook.root / "figures") == ["plot.png"]
    assert os.listdir(workbook.root / "experiments/results") == ["first.csv"]
    with (workbook.root / "experiments/results/first.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["value"] == "0.5"
    published = json.loads(source.read_text())["cells"]
    assert [c["execution_count"] for c in published[1:]] == [1, 2]
    assert published[2]["outputs"][0]["text"][0] == "working at 2\n"
    for cell in (*cells, *published):
        cell.update(execution_count=None, outputs=[])
    assert published == cells  # no injected cell, no papermill metadata
    assert not json.loads(path.read_text())["cells"][2]["outputs"]
    assert workbook.stale() == []


def test_of_another_runs_agent_nothing_is_made_but_it_is_watched(workbook):
    write_notebook(
        workbook.root / "notebooks/second.ipynb", SECOND + '\nagents_run: str = ""', "x = 1"
    )
    assert workbook.plan(notebook=["second"])[2] == ["first", "second"]
    options = {"notebook": ["second"], "set": ["agents_run=experiments/runs/big"]}
    run, _, names = workbook.plan(**options)
    assert names == ["second"]
    before = run.fingerprint("second")
    pointer = workbook.root / "experiments/runs/big/agents/generalist.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text('{"folder": "generalist-1"}')
    assert run.fingerprint("second") != before


def test_committed_inputs_count(workbook):
    workbook.table(inputs=["experiments/results/input.csv"])
    (run, _, _), seen = workbook.plan(), []
    path = workbook.root / "experiments/results/input.csv"
    path.parent.mkdir()
    seen.append(run.fingerprint("second"))
    first = run.fingerprint("first")
    for content in ("1", "2"):
        path.write_text(content)
        seen.append(run.fingerprint("second"))
    assert len(set(seen)) == 3
    assert run.fingerprint("first") == first
    workbook.preset("publishes: [notebooks, results/in*.csv]")  # its own product
    fingerprint = workbook.plan()[0].fingerprint("second")
    path.write_text("3")
    assert workbook.plan()[0].fingerprint("second") == fingerprint


def test_committed_inputs_of_the_table():
    """A notebook that reads a committed file says so."""
    for notebook in driver.load_table().values():
        source = "".join(c.source for c in nbformat.read(notebook.path, 4).cells)
        read = re.findall(r'results\.COMMITTED / "([^"]+)"', source)
        assert set(notebook.inputs) == {f"experiments/results/{name}" for name in read}


@pytest.mark.parametrize("pointer", ['{"folder": "able-1"}', "{}", "[]", "{", '{"folder": 1}'])
def test_a_pointer_counts_with_its_agent(workbook, pointer):
    workbook.table(outputs=["agents/able.json"])
    run, _, _ = workbook.plan()
    (run.folder / "agents/able-1").mkdir(parents=True)
    assert "agents/able.json" in run.missing("second")
    (run.folder / "agents/able.json").write_text(pointer)
    assert "agents/able.json" in run.missing("second")
    (run.folder / "agents/able-1/meta.json").touch()
    assert ("agents/able.json" not in run.missing("second")) == ("able-1" in pointer)


def test_publishing_after_some_notebooks(workbook, capsys):
    workbook.preset("publishes: [results/f*.csv, figures/never.*]")
    before = (workbook.root / "notebooks/first.ipynb").read_bytes()
    for name in ("results/first.csv", "figures/plot.png", "notebooks/first.ipynb"):
        (workbook.folder / name).parent.mkdir(parents=True)
        (workbook.folder / name).write_text(name)
    (workbook.folder / "notebooks/first.ipynb").write_bytes(before)
    (workbook.folder / "state").mkdir()
    run, _, _ = workbook.plan()
    state = {"fingerprint": run.fingerprint("first"), "minutes": 1}
    run.state_path("first").write_text(json.dumps(state))
    (workbook.folder / "results/first.csv").write_text("domain,metric,value\n")
    assert workbook.main("--publish", "--notebook", "first") == 1
    assert "the run wrote no figures/never.*" in capsys.readouterr().err
    assert not (workbook.root / "experiments/results").exists()
    # Of a preset that publishes notebooks too, those asked for, and the files that they declare.
    workbook.preset("publishes: [results/*.csv, figures/never.*, notebooks]")
    (workbook.folder / "results/second.csv").write_text("domain,metric,value\n")
    source = workbook.root / "notebooks/first.ipynb"
    (workbook.folder / "notebooks/first.ipynb").write_bytes(source.read_bytes())
    assert workbook.main("--publish", "--notebook", "first") == 0
    out = capsys.readouterr().out
    assert out.endswith("files: experiments/results/first.csv, notebooks/first.ipynb\n")
    source.write_bytes(before)
    workbook.preset("publishes: [results/f*.csv]")
    assert workbook.main("--publish", "--notebook", "first") == 0
    assert "published 1 files: experiments/results/first.csv" in capsys.readouterr().out
    assert (workbook.root / "notebooks/first.ipynb").read_bytes() == before
    assert not (workbook.root / "figures").exists()


def test_failing_notebook_is_named_and_run_again(workbook, capsys):
    workbook.table(outputs=["data/never"])
    assert workbook.main("--set", "preset=other") == 1
    assert "second ended without writing data/never" in capsys.readouterr().err
    assert workbook.main("--notebook", "second", "--set", "fail=true") == 1
    captured = capsys.readouterr()
    assert "second stopped in cell [3]" in captured.err
    assert "RuntimeError: no luck today" in captured.err
    assert ".second.partial.ipynb" in captured.err
    assert (workbook.folder / "notebooks/.second.partial.ipynb").is_file()
    assert not (workbook.folder / "state/second.json").exists()
    assert "second" in workbook.stale()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_interrupted_notebook_leaves_nothing_half_done(workbook, number):
    process = workbook.start("--notebook", "second", "--set", "sleep=600.0")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert workbook.kernel_is_gone()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; run the same command to continue" in error
        assert "Traceback" not in error
    assert not (workbook.folder / "notebooks/second.ipynb").exists()
    assert not (workbook.folder / "data/done").exists()
    assert workbook.stale() == ["second"]


def test_one_driver_at_a_time(workbook, capsys):
    (workbook.folder / "state").mkdir(parents=True)
    with (workbook.folder / "state/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert workbook.main() == 2
    assert "another run.py is at work" in capsys.readouterr().err


def test_list(workbook, capsys):
    assert workbook.main("--list") == 0
    out = capsys.readouterr().out
    assert "first" in out and "section 2.1" in out and "about 1 min, tiny" in out
    assert os.listdir(workbook.root / "experiments").count("runs") == 0


# --- the environment ------------------------------------------------------------------------------


class Environment:
    """A copy of setup.sh, with programs that only pretend."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        (root / "experiments").mkdir(parents=True)
        shutil.copy(REPOSITORY / "experiments/setup.sh", root / "experiments")
        for name in ("pyproject.toml", "environment.yml"):
            (root / name).touch()
        self.stamp = root / ".venv/.gato-stamp"
        self.mine = root / ".venv/mine"
        self.program(root / "bin/python3.11", "-m venv")
        self.mine.parent.mkdir()
        self.mine.touch()

    def program(self, path: pathlib.Path, fails: str = "nothing") -> None:
        """A python that does nothing, but fails when its arguments begin with `fails`."""
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f'#!/bin/sh\ncase "$*" in "{fails}"*) exit 1;; esac\n')
        path.chmod(0o755)

    def setup(self, fails: str = "nothing") -> subprocess.CompletedProcess:
        """Run setup.sh where the environment, if any, has a python that fails at this."""
        if self.mine.exists():
            self.program(self.root / ".venv/bin/python", fails)
        variables = {"USE_CONDA": "0", "GATO_NO_APT": "1", "GATO_ENV": "", "EXTRAS": "dev"}
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "experiments/setup.sh"],
            cwd=self.root,
            env=os.environ | variables | {"PATH": path, "TMPDIR": str(self.root)},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "my work book")


def test_setup_never_removes_an_environment_it_did_not_make(environment):
    for _ in range(2):  # an installation that ends early is taken up again
        assert environment.setup("-m pip").returncode == 1
        assert environment.stamp.read_text().strip() == "adopted"
    assert environment.setup().returncode == 0
    assert environment.stamp.read_text().startswith("adopted ")
    assert "is up to date" in environment.setup().stdout
    (environment.root / "pyproject.toml").write_text("# changed")
    assert "bringing .venv up to date" in environment.setup().stdout
    broken = environment.setup("-c import sys; sys.exit")
    assert broken.returncode == 1 and "move it away" in broken.stderr
    environment.stamp.unlink()
    assert environment.setup("-c import sys; sys.exit").returncode == 1
    assert environment.mine.exists()


def test_setup_and_the_environment_it_made(environment):
    environment.stamp.write_text("an older key")
    assert environment.setup("-m pip").returncode == 1
    assert environment.stamp.read_text().strip() == "updating"
    assert environment.setup().returncode == 0
    assert "adopted" not in environment.stamp.read_text()
    assert "is up to date" in environment.setup().stdout
    assert environment.mine.exists()
    environment.stamp.write_text("building")  # never finished
    assert "starting again" in environment.setup().stdout
    assert not environment.mine.exists()
    assert environment.stamp.read_text().strip() == "building"
