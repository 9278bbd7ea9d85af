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
    "tokenizers",
    "episodes",
    "domains",
    "collection",
    "sequence",
    "mixture",
    "embedding",
    "transformer",
    "model",
    "checkpoint",
    "training",
    "agent",
    "evaluation",
    "results",
    "plotting",
    "workbook",
)
LEAVES = ("config", "results", "plotting")  # import nothing of gato_lib but config
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
    if module in LEAVES:
        allowed &= {"config"}
    if module == "domains":
        allowed |= {"domains"}
    assert ours <= allowed, f"{module} imports {sorted(ours - allowed)}, which stand below it"


def test_third_party_imports_are_declared():
    lines = project()["dependencies"]
    declared = {line.split("==")[0].split("[")[0].lower().replace("_", "-") for line in lines}
    providers = importlib.metadata.packages_distributions()
    for path in [*MODULES, *(REPOSITORY / "experiments").glob("*.py")]:
        for name in {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names):
            if name in ("gato_lib", "__future__"):
                continue
            found = {p.lower().replace("_", "-") for p in providers.get(name, [])}
            assert found & declared, f"{path.name} imports {name}, which pyproject.toml lacks"


# --- presets and notebooks ------------------------------------------------------------------------

PRESETS = sorted(p.stem for p in (REPOSITORY / "experiments" / "params").glob("*.yaml"))


def test_the_table_lists_every_notebook():
    assert {"smoke", "laptop", "accelerator", "paper"} <= set(PRESETS)
    files = {p.stem for p in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert set(driver.load_table()) == files


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_their_notebooks(preset):
    table = driver.load_table()
    for name, values in driver.load_preset(preset).items():
        assert driver.validate_parameters(table[name].path, values).get("preset") == preset


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
        "outputs": ["results/first.csv", "figures/plot.png"],
        "minutes": {"tiny": 1, "other": 2},
        "commit_outputs": True,
    },
    "second": {
        "title": "Two",
        "section": "3",
        "needs": ["first"],
        "outputs": ["data/done"],
    },
}


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

    def preset(self, text: str = "shared: {preset: tiny}") -> None:
        (self.root / "experiments/params/tiny.yaml").write_text(text)

    def main(self, *arguments: str) -> int:
        return self.driver.main(["--preset", "tiny", *arguments])

    def stale(self, **options) -> list[str]:
        """What a run with these options would execute."""
        defaults = {"preset": "tiny", "notebook": [], "set": [], "publish": False}
        runs = self.root / "experiments/runs"
        chosen = argparse.Namespace(**defaults | {"runs": runs} | options)
        run, _, names = self.driver.plan(chosen)
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
        (["--publish", "--notebook", "first"], None, ["--publish takes the whole workbook"]),
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
    assert "score 0.5" in out
    state = workbook.folder / "state/second.json"
    assert (workbook.folder / "data/done").is_file()
    assert sorted(p.name for p in (workbook.folder / "notebooks").iterdir()) == [
        "first.ipynb",
        "second.ipynb",
    ]

    before = state.read_bytes()
    assert workbook.main() == 0
    out = capsys.readouterr().out
    assert out.count("up to date") == 4  # while running and in the table, two notebooks
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
    source = workbook.root / "notebooks/first.ipynb"
    cells = json.loads(source.read_text())["cells"]
    assert workbook.main("--publish") == 0
    assert (workbook.root / "figures/plot.png").read_bytes() == b"picture"
    with (workbook.root / "experiments/results/first.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["value"] == "0.5"
    published = json.loads(source.read_text())["cells"]
    assert [c["execution_count"] for c in published[1:]] == [1, 2]
    assert published[2]["outputs"][0]["text"] == ["working at 2\n"]
    for cell in (*cells, *published):
        cell.update(execution_count=None, outputs=[])
    assert published == cells  # no injected cell, no papermill metadata
    assert not json.loads(path.read_text())["cells"][2]["outputs"]
    assert workbook.stale() == []


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
