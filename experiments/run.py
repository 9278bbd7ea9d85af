"""Run the workbook's notebooks with the parameters of a preset.

    python experiments/run.py --preset laptop                         # all of them, in order
    python experiments/run.py --preset laptop --notebook 04_training  # this one and what it needs
    python experiments/run.py --preset laptop --notebook 04_training --set steps=500

experiments/notebooks.yaml lists the notebooks, experiments/params/<preset>.yaml says what differs
from the smoke-sized defaults that stand in each notebook. Everything is checked before anything
runs. A notebook whose code, parameters, library and inputs (the runs of the notebooks it needs, and
committed files) are those of its last finished run is not run again, so the same command continues
after an interruption. --publish copies what the preset `publishes` to where git keeps it.

A run lives in <runs>/<preset>/:

    data/  agents/  results/  figures/   what the notebooks write
    notebooks/<name>.ipynb               executed copies
    state/<name>.json                    what the copy was made from; absent until it is finished

With --distributed this is one of several processes that train together, one a host, all started
with the same command and run folder, and with JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID in their environments. It runs one notebook, whatever its
state. Process 0 writes the run's files and records it; the others' executed copies are
notebooks/<name>.worker<id>.ipynb. experiments/tpu_vm.sh starts it so on TPU VMs.

Exit status: 0 done, 1 a notebook failed, 2 a mistake in the command or in a file it reads (nothing
has run), 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nbformat
import rich.box
import rich.console
import rich.table
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake to be told in one line: in the command, a preset, the table or a notebook."""


class NotebookError(Exception):
    """A notebook stopped, or ended without what it should have written."""


# --- what there is to run ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One entry of experiments/notebooks.yaml, where the fields are explained."""

    name: str
    title: str
    section: str
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    minutes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paper: str = ""
    state: str = ""

    @property
    def path(self) -> pathlib.Path:
        return ROOT / "notebooks" / f"{self.name}.ipynb"


def load_table() -> dict[str, Notebook]:
    """The notebooks by name, in the order they run; raises UserError."""
    path = ROOT / "experiments" / "notebooks.yaml"
    table: dict[str, Notebook] = {}
    for name, fields in _read_yaml(path).items():
        try:
            lists = ("needs", "inputs", "outputs")
            fields = fields | {k: tuple(fields.get(k) or ()) for k in lists}
            notebook = Notebook(name=name, **fields | {"section": str(fields["section"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{_shown(path)}: {name}: {error}") from error
        if later := [n for n in notebook.needs if n not in table]:
            raise UserError(f"{_shown(path)}: {name} needs {later[0]}, which must stand above it")
        table[name] = notebook
    return table


def load_preset(name: str) -> dict[str, dict[str, Any]]:
    """The parameters a preset gives to each notebook; raises UserError."""
    path, content = _read_preset(name)
    table = load_table()
    shared, special = content["shared"], content["notebooks"]
    _reject_unknown(_shown(path), "notebook", special, list(table))
    return {n: shared | special.get(n, {}) for n in table}


def all_parameters(notebook: str, preset: str) -> dict[str, Any]:
    """A notebook's parameters with a preset, defaults included; raises UserError."""
    path, values = load_table()[notebook].path, load_preset(preset)[notebook]
    defaults = {name: default for name, (_, default) in _declared_parameters(path).items()}
    return defaults | validate_parameters(path, values)


# Where publishing puts the files of a run's folder.
PUBLISHED = {"results": "experiments/results", "figures": "figures"}


def load_publishes(name: str) -> tuple[str, ...]:
    """What a preset publishes: file patterns, and the word `notebooks`; raises UserError."""
    path, content = _read_preset(name)
    patterns = content["publishes"]
    if not isinstance(patterns, list | None):
        raise UserError(f"{_shown(path)}: publishes: expected a list, got {patterns!r}")
    for pattern in patterns or ():
        if not re.fullmatch(rf"notebooks|({'|'.join(PUBLISHED)})/[^/]+", str(pattern)):
            text = f"{_shown(path)}: publishes: {pattern!r}: expected 'notebooks' or a pattern in "
            raise UserError(text + " or ".join(f"{folder}/" for folder in PUBLISHED))
    return tuple(patterns or ())


def _read_preset(name: str, above: tuple[str, ...] = ()) -> tuple[pathlib.Path, dict[str, Any]]:
    """A preset's file and its sections, with those of the presets it `extends` underneath.

    `above` are the presets that this one is read for, of which none may come again.
    """
    folder = ROOT / "experiments" / "params"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown preset {name!r}; {_nearest(name, known)}")
    path = folder / f"{name}.yaml"
    content = _read_yaml(path)
    sections = ("extends", "shared", "notebooks", "publishes")
    _reject_unknown(_shown(path), "section", content, sections)
    shared, special = content.get("shared") or {}, content.get("notebooks") or {}
    for section in (shared, special, *(special.values() if isinstance(special, dict) else ())):
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{_shown(path)}: expected 'key: value' lines, got {section!r}")
    special = {n: values or {} for n, values in special.items()}
    if (base := content.get("extends")) is not None:
        if base not in known:
            raise UserError(f"{_shown(path)}: extends {base!r}; {_nearest(str(base), known)}")
        above = (*above, name)
        if base in above:
            raise UserError(f"{_shown(path)}: extends {base!r}, which extends it in turn")
        below = _read_preset(base, above)[1]
        shared = below["shared"] | shared
        special = below["notebooks"] | {
            n: below["notebooks"].get(n, {}) | values for n, values in special.items()
        }
    return path, {"shared": shared, "notebooks": special, "publishes": content.get("publishes")}


def validate_parameters(
    path: pathlib.Path, values: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Check values against a notebook's `parameters` cell, whose defaults give names and types.

    An annotation (`rate: float = 1`) wins over the type of the default. Returns the values, whole
    numbers made floats where a float is expected. Raises UserError naming `where` (the file or
    option they came from) for a name the notebook does not have or a value of another type.
    """
    where = where or _shown(path)
    declared = _declared_parameters(path)
    _reject_unknown(f"{where}: {path.stem}", "parameter", values, list(declared))
    checked = {}
    for key, value in values.items():
        kind, default = declared[key]
        if kind is float and type(value) is int:
            value = float(value)
        fits = type(value) is kind or (value is None and default is None)
        if kind is type(None):  # no type is known: any plain value
            fits = isinstance(value, bool | int | float | str | list | None)
        elif fits and kind is list and default:
            fits = all(type(v) is type(default[0]) for v in value)
        if not fits:
            raise UserError(f"{where}: {path.stem}: {key}: {_mismatch(kind, default, value)}")
        checked[key] = value
    return checked


def _declared_parameters(path: pathlib.Path) -> dict[str, tuple[type, Any]]:
    """Name -> (type, default) of a notebook's parameters, as papermill sees them."""
    if not path.is_file():
        raise UserError(f"{_shown(path)}: there is no such notebook")
    import papermill

    cells = [c for c in _code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    found = papermill.inspect_notebook(str(path))
    # papermill reads line by line and passes over what it cannot parse: never lose one silently.
    for name in re.findall(r"^(\w+) *[:=]", cells[0].source if cells else "", re.MULTILINE):
        if name not in found:
            raise UserError(
                f"{_shown(path)}: papermill cannot read the parameter {name!r}: write "
                "'name: type = literal  # comment', with a plain type and no second '='"
            )
    kinds = {k.__name__: k for k in (bool, int, float, str, list, dict)}
    declared = {}
    for name, entry in found.items():
        try:
            default = ast.literal_eval(entry["default"])
        except (ValueError, SyntaxError) as error:
            text = f"{_shown(path)}: the default of {name} is not a literal: {entry['default']}"
            raise UserError(text) from error
        annotation = re.split(r"[\[ ]", entry["inferred_type_name"])[0]
        declared[name] = kinds.get(annotation, type(default)), default
    if "run_dir" not in declared:
        raise UserError(f"{_shown(path)}: its 'parameters' cell has no run_dir: str = \"\"")
    return declared


def _mismatch(kind: type, default: Any, value: Any) -> str:
    text = f"expected {kind.__name__} (the default is {default!r}), "
    text += f"got {type(value).__name__} {value!r}"
    with contextlib.suppress(TypeError, ValueError):
        if kind in (int, float) and isinstance(value, str) and kind(float(value)) == float(value):
            plain = repr(kind(float(value)))
            plain = plain if "e" not in plain or "." in plain else plain.replace("e", ".0e")
            text += f"; YAML takes {value} for text, write {plain}"
    return text


def _reject_unknown(where: str, what: str, names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: unknown {what} {name!r}; {_nearest(str(name), known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{guess}known: {', '.join(known) or 'none'}"


def _read_yaml(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{_shown(path)}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{_shown(path)}: expected 'key: value' lines, got {content!r}")
    return content


def _code_cells(path: pathlib.Path) -> list[Any]:
    try:
        return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    except Exception as error:  # whatever a damaged file makes nbformat raise
        raise UserError(f"{_shown(path)}: not a readable notebook: {error}") from error


def _shown(path: pathlib.Path) -> str:
    """A path the way a reader would type it."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(pathlib.Path.cwd()))
    return str(path)


# --- what is up to date -----------------------------------------------------------------------


def library_digest() -> str:
    """sha256 of gato_lib: modules as syntax trees, so that comments do not count, and assets."""
    digest = hashlib.sha256()
    folder = ROOT / "gato_lib"
    for path in sorted([*folder.rglob("*.py"), *folder.glob("assets/*")]):
        content = path.read_bytes()
        if path.suffix == ".py":
            with contextlib.suppress(SyntaxError):
                content = ast.dump(ast.parse(content)).encode()
        digest.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


@dataclasses.dataclass
class Run:
    """A preset's folder, and the parameters to run its notebooks with."""

    folder: pathlib.Path
    table: dict[str, Notebook]
    parameters: dict[str, dict[str, Any]]
    publishes: tuple[str, ...] = ()
    worker: int = 0  # above 0: a process of a distributed run that records nothing

    def state_path(self, name: str) -> pathlib.Path:
        return self.folder / "state" / f"{name}.json"

    def state(self, name: str) -> dict[str, Any]:
        """What is known of the last finished run; empty where there is none."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.state_path(name).read_text())
        return {}

    def fingerprint(self, name: str) -> str:
        """sha256 of everything a finished run of the notebook depends on."""
        parts = [
            [cell.source for cell in _code_cells(self.table[name].path)],
            self.parameters[name],
            library_digest(),
            [self.state(n) for n in self.table[name].needs],
            {i: self._digest(i) for i in self.table[name].inputs},
            self._other_agents(name),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _other_agents(self, name: str) -> list[str | None]:
        """Which agents of other runs the notebook is about, where it is about some."""
        values = self.parameters[name]
        named = [other.split()[:2] for other in values.get("others", [])]
        if values.get("agents_run"):
            named.append([values["agents_run"], values.get("agent_name", "generalist")])
        found = []
        for run, agent in named:
            pointer = ROOT / pathlib.Path(run).expanduser() / "agents" / f"{agent}.json"
            found.append(pointer.read_text() if pointer.is_file() else None)
        return found

    def _digest(self, name: str) -> str | None:
        """sha256 of a committed file; None where there is none.

        What this preset itself publishes is its product, not its input: publishing would make the
        run that wrote it out of date.
        """
        path = ROOT / name
        for pattern in map(pathlib.PurePath, self.publishes):
            same_folder = path.parent == ROOT / PUBLISHED.get(pattern.parent.name, "notebooks")
            if same_folder and path.match(pattern.name):
                return None
        if not path.is_file():
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def missing(self, name: str) -> list[str]:
        """Declared outputs that are not there."""
        outputs = (*self.table[name].outputs, f"notebooks/{name}.ipynb")
        return [o for o in outputs if not self._is_there(self.folder / o)]

    def _is_there(self, path: pathlib.Path) -> bool:
        """Whether an output exists; a pointer to an agent, agents/<any>.json, if the agent does."""
        if path.suffix != ".json" or path.parent != self.folder / "agents":
            return path.exists()
        try:
            folder = path.parent / json.loads(path.read_text())["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return (folder / "meta.json").is_file()

    def stale(self, names: Sequence[str], forced: Sequence[str]) -> set[str]:
        """Which of `names`, in order, have to run."""
        out: set[str] = set()
        for name in names:
            if (
                name in forced
                or out & set(self.table[name].needs)
                or self.state(name).get("fingerprint") != self.fingerprint(name)
                or self.missing(name)
            ):
                out.add(name)
        return out

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folders and keep a second driver out; raises UserError when one is at work."""
        for sub in ("data", "agents", "results", "figures", "notebooks", "state"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        if self.worker:  # process 0 holds the lock
            yield
            return
        with open(self.folder / "state" / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = f"{_shown(self.folder)}: another run.py is at work in this folder"
                raise UserError(text) from error
            yield

    # --- running ------------------------------------------------------------------------------

    def execute(self, name: str) -> float:
        """Run one notebook and record it, whole or not at all; returns the minutes it took."""
        import papermill

        copy = f"{name}.worker{self.worker}" if self.worker else name
        final = self.folder / "notebooks" / f"{copy}.ipynb"
        partial = final.with_name(f".{copy}.partial.ipynb")
        fingerprint = self.fingerprint(name)  # of the sources as they are when the kernel starts
        if not self.worker:
            self.state_path(name).unlink(missing_ok=True)
        begin = time.monotonic()
        try:
            papermill.execute_notebook(
                str(self.table[name].path),
                str(partial),
                self.parameters[name] | {"run_dir": str(self.folder)},
                cwd=str(ROOT / "notebooks"),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,  # the notebook's progress lines
                autosave_cell_every=30,
                extra_arguments=["--log-level=CRITICAL"],  # no traces of the kernel's own on Ctrl-C
            )
        except papermill.PapermillExecutionError as error:
            trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).splitlines()
            lines = [line for line in trace if line.strip()][-8:] or [error.ename]
            raise NotebookError(
                f"{name} stopped in cell [{error.exec_count}]:\n    "
                + "\n    ".join(lines)
                + f"\n  executed so far: {_shown(partial)}"
            ) from error
        except Exception as error:  # the kernel died or could not start
            text = f"{name} stopped: {type(error).__name__}: {error}"
            raise NotebookError(f"{text}\n  executed so far: {_shown(partial)}") from error
        minutes = (time.monotonic() - begin) / 60
        os.replace(partial, final)
        if self.worker:
            return minutes
        if missing := self.missing(name):
            raise NotebookError(f"{name} ended without writing {', '.join(missing)}")
        state = {"fingerprint": fingerprint, "finished": time.time(), "minutes": round(minutes, 2)}
        _write(self.state_path(name), json.dumps(state))
        return minutes

    def publish(self, names: Sequence[str] = ()) -> list[str]:
        """Copy what the preset publishes to where git keeps it: all of it, or NotebookError.

        With `names`, of a preset that publishes notebooks: these, the files that they declare, the
        figures that say they come from them, and rows whose names begin with a notebook's number.
        A notebook's cells stay as they are in the source, smoke-sized defaults included; only
        outputs and execution counts come from the run.
        """
        out: dict[str, bytes | str] = {}
        whole = not names or "notebooks" not in self.publishes
        declared = {
            pathlib.PurePath(o).with_suffix("") for n in names for o in self.table[n].outputs
        }
        for pattern in self.publishes:
            if pattern == "notebooks":
                continue
            found = sorted(p for p in self.folder.glob(pattern) if _is_publishable(p))
            if whole and not found:
                raise NotebookError(f"published nothing: the run wrote no {pattern}")
            for path in found:
                known = path.relative_to(self.folder).with_suffix("") in declared
                if whole or known or _made_by(path) & {s for n in names for s in (n, n[:3])}:
                    out[f"{PUBLISHED[path.parent.name]}/{path.name}"] = path.read_bytes()
        if "notebooks" in self.publishes:
            for notebook in [self.table[name] for name in names or self.table]:
                source = nbformat.read(notebook.path, 4)
                executed = _code_cells(self.folder / "notebooks" / f"{notebook.name}.ipynb")
                text = nbformat.writes(_with_outputs(source, executed)) + "\n"
                out[f"notebooks/{notebook.path.name}"] = text
        for target, content in out.items():
            _write(ROOT / target, content)
        return list(out)


def result_of(path: pathlib.Path) -> str:
    """What an executed notebook printed behind "Result:", or nothing."""
    outputs = [o for cell in _code_cells(path) for o in cell.outputs] if path.is_file() else []
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    found = re.findall(r"^Result: (.+)$", printed, re.MULTILINE)
    return found[-1] if found else ""


def _made_by(path: pathlib.Path) -> set[str]:
    """The notebook that a figure's provenance names; how the names of rows begin."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return {json.loads(path.with_suffix(".json").read_text())["notebook"]}
    return {path.name[:3]}


def _is_publishable(path: pathlib.Path) -> bool:
    """A file, and not one that a killed process left half written."""
    return path.is_file() and not path.name.startswith(".") and path.suffix != ".partial"


def _with_outputs(source: Any, executed: Sequence[Any]) -> Any:
    """`source` with the outputs of the executed code cells, counted 1 to n."""
    ran = [c for c in executed if "injected-parameters" not in c.metadata.get("tags", [])]
    count = 0
    cells = [c for c in source.cells if c.cell_type == "code"]
    for cell, run in zip(cells, ran, strict=True):
        count += run.execution_count is not None
        cell.execution_count = None if run.execution_count is None else count
        cell.outputs = run.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = cell.execution_count
    return source


def _write(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


# --- the command ------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> tuple[Run, list[str], list[str]]:
    """The run, the notebooks asked for, and these with all they need in order; raises UserError.

    Every parameter of every notebook in the plan has been checked.
    """
    table, parameters = load_table(), load_preset(options.preset)
    _reject_unknown("--notebook", "notebook", options.notebook, list(table))
    publishes = load_publishes(options.preset)
    if options.publish and not publishes:
        where = f"experiments/params/{options.preset}.yaml"
        raise UserError(f"--publish: {where} has no list 'publishes': there is nothing to publish")
    if options.publish and options.set:
        raise UserError("--publish takes a preset as it is: leave out --set")
    asked = options.notebook or list(table)
    overrides = dict(_parse_set(text) for text in options.set)
    for name, values in parameters.items():  # of another run's agent nothing is made here
        if (values | (overrides if name in asked else {})).get("agents_run"):
            table[name] = dataclasses.replace(table[name], needs=())
    wanted = set(asked)
    for name in reversed(table):
        wanted.update(table[name].needs if name in wanted else ())
    names = [n for n in table if n in wanted]
    for name in names:
        where = f"experiments/params/{options.preset}.yaml"
        values = validate_parameters(table[name].path, parameters[name], where)
        if name in asked:
            values |= validate_parameters(table[name].path, overrides, "--set")
        if "run_dir" in values:
            raise UserError("run_dir is set by run.py: use --runs")
        parameters[name] = values
    run = Run(options.runs.absolute() / options.preset, table, parameters, publishes)
    if options.distributed:
        if len(options.notebook) != 1 or options.publish:
            raise UserError("--distributed runs one --notebook, without --publish")
        code = "".join(cell.source for cell in _code_cells(table[asked[0]].path))
        if "distributed.start()" not in code:
            raise UserError(f"--distributed: {asked[0]} is not made for several processes")
        run.worker = _process_id()
        if not run.worker and (stale := run.stale(names[:-1], ())):
            first = next(n for n in names if n in stale)
            raise UserError(f"--distributed: {asked[0]} needs {first}; run that first, without it")
        names = asked
    else:  # left over in the environment it would make every notebook wait for others
        os.environ.pop("JAX_NUM_PROCESSES", None)
    return run, asked, names


def _process_id() -> int:
    """This process's number in a distributed run; raises UserError."""
    wanted = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if missing := [name for name in wanted if not os.environ.get(name)]:
        raise UserError(f"--distributed: {', '.join(missing)} must be set in the environment")
    count, number = (os.environ[name] for name in wanted[1:])
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UserError(
            f"--distributed: JAX_PROCESS_ID is {number!r} and JAX_NUM_PROCESSES {count!r}: "
            "expected whole numbers, the first below the second"
        )
    return int(number)


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: {' '.join(str(error).split())}") from error


def run_all(run: Run, preset: str, names: Sequence[str], forced: Sequence[str]) -> None:
    """Run what is not up to date, in order, and print a summary; raises NotebookError."""
    stale = run.stale(names, forced)
    width = max(map(len, names))
    estimates = {n: run.table[n].minutes.get(preset) for n in names}
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in ("notebook", "section", "result", "the paper", "state"):
        table.add_column(column, overflow="fold")
    table.add_column("minutes", justify="right")
    for number, name in enumerate(names, 1):
        label = f"[{number}/{len(names)}] {name:{width}}"
        if name in stale:
            left = [estimates[n] for n in names[number - 1 :] if n in stale]
            print(f"{label}  section {run.table[name].section}, {_expected(left)}", flush=True)
            minutes = run.execute(name)
            print(f"{label}  done in {minutes:.1f} min", flush=True)
        else:
            minutes = run.state(name)["minutes"]
            print(f"{label}  up to date", flush=True)
        of = run.table[name]
        took = f"{minutes:.1f}" if name in stale else f"({minutes:.1f})"
        result = result_of(run.folder / "notebooks" / f"{name}.ipynb")
        table.add_row(of.title, of.section, result, of.paper, of.state, took)
    # A pipe has no width: there the lines are as long as most terminals'.
    width = None if sys.stdout.isatty() else 120
    rich.console.Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)
    if len(stale) < len(names):
        print("minutes in brackets: up to date, from an earlier run")
    print(f"everything is in {_shown(run.folder)}")


def _expected(minutes: Sequence[float | None]) -> str:
    """Words for the estimates of a notebook and of those after it."""
    if minutes[0] is None:
        return "time unknown"
    total = f"{sum(m or 0 for m in minutes):g} min left in all"
    return f"about {minutes[0]:g} min; {'more than ' if None in minutes else ''}{total}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop", help="a file in experiments/params")
    parser.add_argument(
        "--notebook",
        action="append",
        default=[],
        help="run this and what it needs (repeatable)",
    )
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "experiments" / "runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter"
    )
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    parser.add_argument(
        "--publish", action="store_true", help="then update committed rows, figures, outputs"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="be one of several processes (see above)"
    )
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            for n in load_table().values():
                minutes = n.minutes.get(options.preset)
                about = "" if minutes is None else f"  (about {minutes:g} min, {options.preset})"
                print(f"{n.name:24} section {n.section:8} {n.title}{about}")
            return 0
        run, asked, names = plan(options)
        with run.locked():
            forced = asked if options.force or options.distributed else ()
            run_all(run, options.preset, names, forced)
            if options.publish:
                done = run.publish(names if options.notebook else ())
                print(f"published {len(done)} files: {', '.join(done)}")
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except NotebookError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # End the kernel too. A shell starts background jobs with SIGINT ignored, where kill -INT should
    # still work; nohup ignores SIGHUP, and means it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.exit(main())
