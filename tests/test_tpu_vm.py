"""experiments/tpu_vm.sh: what it prints is what it executes, and what the workers get is sound."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ACTIONS = (
    *("create", "status", "setup", "collect", "run"),
    *("logs", "stop", "lab", "fetch", "delete"),
)
MANY = [action for action in ACTIONS if action != "lab"]

# Answers of the metadata server on worker 3, in its old format and in its new one.
OLD = ",".join(f"gato-w-{i}:{8470 + i}:10.0.0.{i + 2}" for i in range(64))
NEW = ",".join(f"t1v-n-1a2b-w-{i}" for i in range(64))


class Place:
    """A copy of the script beside the real presets, a home, and programs that only take notes."""

    def __init__(self, root: pathlib.Path):
        self.root, self.home, self.bin = root, root / "home of", root / "bin"
        self.notes = root / "notes"
        (root / "experiments").mkdir(parents=True)
        shutil.copy(REPOSITORY / "experiments/tpu_vm.sh", root / "experiments")
        shutil.copytree(REPOSITORY / "experiments/params", root / "experiments/params")
        (root / "README.md").write_text("the code")
        self.home.mkdir()
        self.bin.mkdir()
        self.program("gcloud")

    def program(self, name: str, body: str = "", path: pathlib.Path | None = None) -> None:
        """A program that notes its words, NUL between them, and then does `body`."""
        path = path or self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        note = f"{{ printf '%s\\0' {name} \"$@\"; echo; }} >>{shlex.quote(str(self.notes))}"
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def noted(self) -> list[list[str]]:
        """Every call so far."""
        text = self.notes.read_text() if self.notes.exists() else ""
        return [line.split("\0")[:-1] for line in text.splitlines()]

    def bash(self, *words: str, path: str = "", **variables: str) -> subprocess.CompletedProcess:
        given = {"PATH": path or f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        return subprocess.run(
            ["bash", *words],
            cwd=self.root,
            env=given | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def script(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        variables = {"GATO_TPU_ZONE": "us-west4-a", "GATO_TPU_BUCKET": "its-bucket"} | variables
        return self.bash("experiments/tpu_vm.sh", *words, **variables)

    def lines(self, *words: str) -> list[str]:
        """What a dry run prints, without remarks."""
        done = self.script(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return [line for line in done.stdout.splitlines() if not line.startswith("# ")]

    def commands(self, *words: str) -> list[list[str]]:
        """The gcloud commands of a dry run, word by word; of `a || b`, both."""
        found = []
        for line in self.lines(*words):
            line = shlex.split(line.replace(" >/dev/null 2>&1", ""))
            for either, part in itertools.groupby(line, lambda word: word == "||"):
                found += [] if either else [list(part)]
        return [command for command in found if command[0] == "gcloud"]

    def remote(self, *words: str) -> list[str]:
        """What a dry run sends to the workers."""
        flags = [word for command in self.commands(*words) for word in command]
        return [flag.removeprefix("--command=") for flag in flags if flag.startswith("--command=")]

    def worker(self, endpoints: str = NEW) -> None:
        """Make the home that of worker 3, as setup leaves it."""
        self.program("mountpoint")
        self.program(
            "curl", f'case "$*" in *agent-worker-number) echo 3;; *) echo {endpoints};; esac'
        )
        body = 'env | grep ^JAX_ | sort >"$HOME/environment"; echo trained'
        self.program("python", body, self.home / "gato/.venv/bin/python")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "work book")


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        *(("v2-8", 1), ("v3-8", 1), ("v3-32", 4), ("v3-512", 64), ("v4-8", 1), ("v4-16", 2)),
        *(("v5p-8", 1), ("v5p-128", 16), ("v5litepod-1", 1), ("v5litepod-4", 1)),
        *(("v5litepod-8", 1), ("v5litepod-16", 4), ("v5litepod-256", 64), ("v6e-8", 1)),
        ("v6e-16", 4),
    ],
)
def test_number_of_workers(place, kind, workers):
    assert f"workers of {kind}: {workers};" in place.script("run", "--type", kind).stdout
    (command,) = place.remote("run", "--type", kind)
    many = workers > 1
    assert ("--distributed" in command) == ("JAX_COORDINATOR_ADDRESS" in command) == many
    assert (f"workers={workers};" in command) == many


@pytest.mark.parametrize("kind", ["v5litepod-8", "v3-512"])
def test_every_command_is_sound_and_a_dry_run_calls_nothing(place, kind):
    for action in ACTIONS if kind == "v5litepod-8" else MANY:
        commands = place.commands(action, "--type", kind)
        assert commands, action
        for command in commands:
            assert ("tpus" in command) == ("--zone=us-west4-a" in command)
        for command in place.remote(action, "--type", kind):
            done = place.bash("-n", "-c", command)
            assert (done.returncode, done.stderr) == (0, ""), command
            assert "\n" not in command
    assert place.noted() == []
    assert sorted(os.listdir(place.root / "experiments")) == ["params", "tpu_vm.sh"]


@pytest.mark.parametrize(("kind", "there"), [("v5litepod-8", 0), ("v3-512", 1)])
def test_go_executes_what_was_printed(place, kind, there):
    """`describe` succeeds where the bucket and the request exist; then none is created."""
    place.program("gcloud", f'case "$*" in *--format*) ;; *describe*) exit {there};; esac')
    for action in ACTIONS if kind == "v5litepod-8" else MANY:
        words = (action, "--type", kind, "--spot", "--project", "mine")
        printed = place.commands(*words)
        dry, done = place.script(*words), place.script(*words, "--go")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "".join(dry.stdout.splitlines(keepends=True)[1:])
        if not there:
            printed = [c for c in printed if "create" not in c]
        assert place.noted() == printed
        place.notes.unlink()


def test_what_is_asked_for(place):
    create = [" ".join(c) for c in place.commands("create", "--type=v3-512", "--spot")]
    assert "buckets create gs://its-bucket --location=us-west4" in create[2]
    assert "--uniform-bucket-level-access --enable-hierarchical-namespace" in create[2]
    assert create[4].endswith("--runtime-version=tpu-ubuntu2204-base --spot")
    assert "gs://mine-gato-us-west4" in place.script("delete", "--project=mine", "--bucket=").stdout
    create = [" ".join(c) for c in place.commands("create", "--version=other", "--name=mine")]
    assert "create mine --node-id=mine" in create[4] and create[4].endswith("-version=other")
    for kind, version in [("v5litepod-8", "v5-lite"), ("v5p-8", "v5"), ("v6e-8", "v6e")]:
        (line,) = [x for x in place.lines("create", "--type", kind) if "--node-id" in x]
        assert line.endswith(f"--runtime-version=v2-alpha-tpu{version}")
    assert "--worker=0" in place.commands("collect", "--type=v3-512")[0]
    assert "--worker=all" in place.commands("run", "--type=v3-512")[0]
    (lab,) = place.commands("lab")
    assert "--ssh-flag=-L 8888:localhost:8888" in lab
    assert not any("rm" in c for c in place.commands("delete"))
    assert "# gcloud storage rm --recursive gs://its-bucket" in place.script("delete").stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "which subcommand? known: create"),
        (["crate"], "unknown subcommand 'crate'; known: create"),
        (["create", "delete"], "one subcommand at a time"),
        (["run", "--typo", "x"], "unknown option '--typo'; known: --zone"),
        (["run", "--preset"], "--preset needs a value"),
        (["run", "--type", "v7-8"], "unknown type 'v7-8'; known: v2-N, v3-N"),
        (["run", "--type", "v3-12"], "unknown type 'v3-12'"),
        (["run", "--type", "v5litepod-12"], "unknown type 'v5litepod-12'"),
        (["run", "--type", "v4-8; id"], "unknown type"),
        (["run", "--preset", "papre"], "unknown preset 'papre'; known: ablation accelerator"),
        (["run", "--preset", "laptop paper"], "unknown preset"),
        (["run", "--zone", ""], "--zone is needed"),
        (["run", "--zone", "$(id)"], "--zone: expected a zone"),
        (["run", "--bucket", ""], "--bucket or --project is needed"),
        (["run", "--bucket", "a b"], "--bucket: expected"),
        (["run", "--project", "A"], "--project: expected"),
        (["run", "--name", "Gato"], "--name: expected"),
        (["setup", "--repo", "a b"], "--repo: expected"),
        (["lab", "--type", "v3-512"], "lab needs a slice of one worker, and v3-512 has 64"),
    ],
)
@pytest.mark.parametrize("go", [[], ["--go"]])
def test_mistakes_are_told_before_anything_runs(place, words, expected, go):
    done = place.script(*words, *go)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"tpu_vm: {expected}")
    assert place.noted() == []


def test_without_gcloud(place):
    tools = place.root / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    done = place.script("run", "--go", path=str(tools))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cloud.google.com/sdk/docs/install" in done.stderr
    assert place.script("run", path=str(tools)).returncode == 0


def test_a_failure_stops(place):
    place.program("gcloud", "exit 7")
    done = place.script("setup", "--go")
    assert done.returncode == 1 and len(place.noted()) == 1
    assert done.stderr.startswith("tpu_vm: that failed with status 7")


def test_quotes_survive(place):
    """A URL full of what shells react to is one word on the workers."""
    place.program("git")
    url = "https://example.org/$(id)'\";&|<>`x`*"
    command = next(c for c in place.remote("setup", "--repo", url) if "git clone" in c)
    assert place.bash("-c", f"cd; {command}").returncode == 0
    assert place.noted() == [["git", "clone", url, "gato"]]


@pytest.mark.parametrize(("endpoints", "first"), [(OLD, "10.0.0.2"), (NEW, "t1v-n-1a2b-w-0")])
def test_a_worker_of_many_starts(place, endpoints, first):
    place.worker(endpoints)
    (command,) = place.remote("run", "--type=v3-512", "--preset=paper")
    done = place.bash("-c", command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")
    runs = str(place.home / "runs/its-bucket")
    assert place.noted()[-1] == [
        *("python", "experiments/run.py", "--preset", "paper", "--notebook", "04_training"),
        *("--runs", runs, "--distributed"),
    ]
    assert (place.home / "environment").read_text().splitlines() == [
        f"JAX_COORDINATOR_ADDRESS={first}:8476",
        "JAX_NUM_PROCESSES=64",
        "JAX_PROCESS_ID=3",
    ]


def test_a_single_worker_starts(place):
    place.worker()
    for action, notebook in [("collect", "02_datasets"), ("run", "04_training")]:
        (command,) = place.remote(action)
        assert place.bash("-c", command).returncode == 0
        assert place.noted()[-1][3:6] == ["accelerator", "--notebook", notebook]
        assert "--distributed" not in place.noted()[-1]
        expected = "JAX_PLATFORMS=cpu\n" if action == "collect" else ""
        assert (place.home / "environment").read_text() == expected


def test_a_worker_that_cannot_start_says_why(place):
    (command,) = place.remote("run", "--type=v3-32")
    place.worker()
    done = place.bash("-c", command)
    assert done.returncode == 1 and "the slice has 64 workers, not 4" in done.stderr
    (command,) = place.remote("run")
    place.program("python", "echo no such thing; exit 2", place.home / "gato/.venv/bin/python")
    done = place.bash("-c", command)
    assert (done.returncode, done.stdout) == (2, "no such thing\n")
    with (place.home / "gato.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = place.bash("-c", command)
        assert done.returncode == 1 and "busy" in done.stderr
    place.program("mountpoint", "exit 1")
    done = place.bash("-c", command)
    assert done.returncode == 1 and "is not mounted; repeat setup" in done.stderr


def test_a_run_outlives_the_connection_until_it_is_stopped(place):
    place.worker()
    place.program("sleep", "exec /bin/sleep 0.1")  # start looks at it five times
    wait = "import signal, time; signal.signal(2, signal.SIG_DFL); print('on'); time.sleep(60)"
    wait = f'exec {shlex.quote(sys.executable)} -uc "{wait}"'
    place.program("python", wait, place.home / "gato/.venv/bin/python")
    (start,), (stop,), (status,) = (place.remote(a) for a in ("run", "stop", "status"))

    def until(text: str) -> bool:
        deadline = time.monotonic() + 20
        while not (found := place.bash("-c", status).stdout.endswith(text)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return found

    assert "nothing to stop" in place.bash("-c", stop).stdout
    assert "running; its log is gato.log" in place.bash("-c", start).stdout
    pid = int((place.home / "gato.pid").read_text())
    try:
        assert until(": running; on\n")
        assert "busy" in place.bash("-c", start).stderr
        assert "stopping" in place.bash("-c", stop).stdout
        assert until(": idle; on\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_mounting(place):
    mount = next(c for c in place.remote("setup") if "gcsfuse --" in c)
    there = place.root / "there"
    place.program("mountpoint", f'test -e "{there}"')
    place.program("gcsfuse", "exit 1")
    place.program("curl", "echo robot@example.org")
    done = place.bash("-c", mount)
    assert done.returncode == 1
    assert "--member=serviceAccount:robot@example.org --role=roles/storage" in done.stderr
    place.program("gcsfuse", f'touch "{there}"')
    for _ in range(2):
        assert place.bash("-c", mount).returncode == 0
    calls = [words for words in place.noted() if words[0] == "gcsfuse"]
    assert len(calls) == 2  # the one that failed, and one
    assert calls[1][-2:] == ["its-bucket", str(place.home / "runs/its-bucket")]
    assert "--metadata-cache-ttl-secs=0" in calls[1]
    assert os.listdir(place.home / "runs/its-bucket") == []


def test_the_code_arrives(place):
    for left_out in (".venv/bin/python", "experiments/runs/laptop/data", "a/__pycache__/b.pyc"):
        (place.root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (place.root / left_out).touch()
    assert place.script("setup", "--go").returncode == 0
    shutil.move(place.root / "experiments/runs/gato.tgz", place.home)
    unpack = next(c for c in place.remote("setup") if "tar -xzf" in c)
    assert place.bash("-c", f"cd; {unpack}").returncode == 0
    arrived = {str(p.relative_to(place.home)) for p in place.home.rglob("*") if p.is_file()}
    assert {"gato/README.md", "gato/experiments/tpu_vm.sh"} <= arrived
    assert not any("venv" in p or "runs" in p or p.endswith((".pyc", ".tgz")) for p in arrived)


def test_help_names_every_subcommand_and_option(place):
    text = place.script("--help").stdout
    assert all(f"tpu_vm.sh {action} " in text for action in ACTIONS)
    known = place.script("x", "--y").stderr.split("known: ")[1].split()
    assert all(f"  {option} " in text for option in known)
