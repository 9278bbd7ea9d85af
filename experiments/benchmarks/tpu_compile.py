"""The train step compiled by Google's TPU compiler, for slices that need not be there.

The compiler is a library for the CPU, libtpu, and JAX can hand it a program for any slice by name
(`jax.experimental.topologies`). It says what a device would hold and exchange, and refuses what
does not fit; nothing is run and nothing is timed on a TPU. Needs the `tpu` extra, a few GB of
memory and, for all configurations, about ten minutes on two cores:

    EXTRAS=dev,tpu make setup
    python experiments/benchmarks/tpu_compile.py

Batches are the worst case: every position a target, one distinct patch for every two tokens, rows
packed. Layers are scanned and rematerialised, products bfloat16, parameters float32. Each
configuration is compiled in a process of its own, and what it answered is kept in
experiments/runs/tpu_compile until the code or a version changes, so an interrupted run goes on.
When all have answered, experiments/results/tpu_compile.csv is written. Its rows:

    domain   the slice, as the compiler names it        task   the network
    run      mesh (data x fsdp x tensor), attention, sequences of 1,024 tokens, "text" if without
             patches; "unrolledN" has N layers and no loop
    n        devices: two a chip on v3, one on the others
    metric   compiled   1, or 0 where the compiler refused for another reason than memory
             fits       1, or 0 where HBM is too small; "used" and "capacity" are then what it named
             ... bytes  by `memory_analysis`, for one device; "alias" is output written over
                        arguments, "code" the program
             flops, bytes accessed   by `cost_analysis`. It counts the body of the loop over layers
                        once, not depth times, and flops of matrix products and others alike
             KIND inside|outside, count|bytes   collectives a step, inside loops (times their turns;
                        the loop over layers, and on few devices smaller ones that overlap a product
                        with its exchange) and outside, and the bytes a device sends for them

The library chooses the kernel of "flash" attention by the backend that JAX runs on, a CPU here;
this script tells it "tpu".
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

LENGTH = 1024

# --- what is compiled -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """A network on a slice."""

    size: str
    slice: str
    mesh: tuple[int, int, int]
    sequences: int
    attention: str = "dot_product"
    images: bool = True  # one distinct patch for every two tokens, or none
    unrolled: int = 0  # so many layers and no loop, to count; 0 is all of them, in a loop

    @property
    def name(self) -> str:
        other = "" if self.images else " text"
        other += f" unrolled{self.unrolled}" if self.unrolled else ""
        return f"{'x'.join(map(str, self.mesh))} {self.attention} {self.sequences}{other}"

    @property
    def file(self) -> str:
        return re.sub("[^a-zA-Z0-9.]+", "_", f"{self.slice} {self.size} {self.name}") + ".json"


# The code that a compiled step is made of, and that reads it.
COMPILED = ("config.py", "distributed.py", "embedding.py", "attention.py", "transformer.py")
COMPILED += ("model.py", "training.py", "exchanges.py")

# Slices of 256 chips and their devices.
WHOLE = {"v3:16x16": 512, "v4:4x8x8": 256, "v5e:16x16": 256, "v5p:4x8x8": 256}

SETUPS = (
    # The paper's slice: 16 x 16 chips, two devices each.
    Setup("1.18B", "v3:16x16", (1, 512, 1), 512),
    Setup("1.18B", "v3:16x16", (1, 512, 1), 512, images=False),
    Setup("1.18B", "v3:16x16", (16, 32, 1), 512),
    Setup("1.18B", "v3:16x16", (1, 128, 4), 512),
    Setup("1.18B", "v3:16x16", (512, 1, 1), 512),
    Setup("364M", "v3:16x16", (1, 512, 1), 512),
    Setup("79M", "v3:16x16", (1, 512, 1), 512),
    # 256 chips of later generations.
    Setup("1.18B", "v4:4x8x8", (1, 256, 1), 512),
    Setup("1.18B", "v5e:16x16", (1, 256, 1), 512),
    Setup("1.18B", "v5e:16x16", (1, 256, 1), 512, "flash"),
    Setup("1.18B", "v5p:4x8x8", (1, 256, 1), 512),
    # One host of eight chips.
    Setup("79M", "v5e:2x4", (1, 8, 1), 64),
    Setup("364M", "v5e:2x4", (1, 8, 1), 32),
    Setup("1.18B", "v5e:2x4", (1, 8, 1), 64),
    # Two and three layers without a loop: their difference is what one layer adds to the counts.
    *(
        Setup("1.18B", name, (1, devices, 1), 512, unrolled=depth)
        for name, devices in WHOLE.items()
        for depth in (2, 3)
    ),
)


def answer(setup: Setup) -> dict[str, float]:
    """Compile one configuration and say what the compiler said."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    from gato_lib import attention, distributed
    from gato_lib.config import TrainConfig, model_config
    from gato_lib.exchanges import KINDS, collectives
    from gato_lib.training import abstract_batch, lower_step

    kernel = attention._flash  # called with arrays, the backend, segments
    attention._flash = lambda *a: kernel(*a[:5], "tpu", *a[6:])
    # On v4 the two halves of a chip are joined only when that is asked for; later they always are.
    joined = {"chip_config_name": "megacore"} if setup.slice.startswith("v4") else {}
    slice_ = topologies.get_topology_desc(setup.slice, "tpu", **joined)
    mesh = distributed.make_mesh(*setup.mesh, devices=slice_.devices)
    model = model_config(
        setup.size,
        **({"depth": setup.unrolled} if setup.unrolled else {}),
        scan_layers=not setup.unrolled,
        remat=True,
        compute_dtype="bfloat16",
        attention=setup.attention,
    )
    patches = setup.sequences * LENGTH // 2 * setup.images
    batch = abstract_batch(setup.sequences, LENGTH, LENGTH, patches, packed=True)
    numbers: dict[str, float] = {"devices": mesh.size}
    begin = time.perf_counter()
    try:
        compiled = lower_step(model, TrainConfig(), batch, mesh).compile()
    except Exception as error:
        text = str(error)
        print(text[:2000], file=sys.stderr)
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        number = r"([\d.]+)([KMGT]?)\w*"
        named = re.search(rf"Used {number} of {number} hbm", text) or re.search(
            rf"temporaries \({number}\) exceeds available HBM \({number}\)", text
        )
        numbers |= {"compiled": 1.0 if named else 0.0, "seconds": time.perf_counter() - begin}
        if named:
            numbers |= {
                "fits": 0.0,
                "used bytes": float(named[1]) * units[named[2]],
                "capacity bytes": float(named[3]) * units[named[4]],
            }
        return numbers
    numbers |= {"compiled": 1.0, "fits": 1.0, "seconds": time.perf_counter() - begin}
    memory = compiled.memory_analysis()
    for part, field in (
        ("argument", "argument"),
        ("output", "output"),
        ("alias", "alias"),
        ("temporary", "temp"),
        ("code", "generated_code"),
    ):
        numbers[f"{part} bytes"] = float(getattr(memory, f"{field}_size_in_bytes"))
    cost = compiled.cost_analysis()
    numbers |= {"flops": cost["flops"], "bytes accessed": cost["bytes accessed"]}
    found = collectives(compiled.as_text(), mesh.size)
    # A check: the loops over layers, forward and backward, turn as often as there are layers.
    turns = {c.times for c in found if c.inside}
    if turns and not setup.unrolled and model.depth not in turns:
        raise ValueError(f"loops turn {turns} times, expected {model.depth} among them")
    for kind in KINDS:
        for where in ("inside", "outside"):
            some = [c for c in found if c.kind == kind and c.inside == (where == "inside")]
            numbers[f"{kind} {where}, count"] = float(sum(c.times for c in some))
            numbers[f"{kind} {where}, bytes"] = float(sum(c.times * c.sent for c in some))
    numbers["largest result bytes"] = float(max((c.result for c in found), default=0))
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--only", default="", help="compile those whose slice and name hold this")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a configuration")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        numbers = answer(SETUPS[args.child])
        numbers["peak GiB of the compiling process"] = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
        print(json.dumps(numbers))
        return 0
    package = importlib.util.find_spec("libtpu")
    if package is None:
        print("the TPU compiler is not installed: EXTRAS=dev,tpu make setup", file=sys.stderr)
        return 2
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is there to compile; no TPU is looked for
    from gato_lib import results
    from gato_lib.config import source_digest
    from gato_lib.files import write_text

    versions = f"{results.versions()} libtpu={importlib.metadata.version('libtpu')}"
    key = "-".join(
        [
            source_digest(*COMPILED),
            hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:8],
            hashlib.sha256(versions.encode()).hexdigest()[:8],
        ]
    )
    kept = results.REPOSITORY / "experiments/runs/tpu_compile" / key
    # The compiler takes the machine for a worker of a slice; it only wants to be told which.
    environment = os.environ | {
        "TPU_LIBRARY_PATH": str(pathlib.Path(package.origin).parent / "libtpu.so"),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so there is nothing to lock
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the seconds are to mean something
        "PYTHONPATH": os.pathsep.join(
            [str(results.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    failed = []
    for i, setup in enumerate(SETUPS):
        label = f"{setup.slice:10} {setup.size:6} {setup.name:28}"
        path = kept / setup.file
        if args.only not in f"{setup.slice} {setup.size} {setup.name}":
            continue
        if not path.is_file():
            command = [sys.executable, __file__, "--child", str(i)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=args.timeout, env=environment
                )
                lines, why = done.stdout.splitlines(), done.stderr.strip()[-2000:]
                code = done.returncode
            except subprocess.TimeoutExpired:
                lines, why, code = [], f"not done in {args.timeout:.0f} s", 1
            if code or not lines:
                print(f"{label} FAILED\n{why}", flush=True)
                failed.append(label)
                continue
            if why:
                write_text(path.with_suffix(".log"), why)
            write_text(path, lines[-1])
        print(f"{label} {_line(json.loads(path.read_text()))}", flush=True)
    paths = [kept / s.file for s in SETUPS]
    if not all(p.is_file() for p in paths):
        print(f"{len(failed)} failed; no rows written until every configuration has answered")
        return 1 if failed else 0
    rows = []
    for setup, path in zip(SETUPS, paths, strict=True):
        numbers = json.loads(path.read_text())
        devices = int(numbers.pop("devices"))
        for metric, value in numbers.items():
            row = results.row(setup.name, 0, 0, setup.slice, setup.size, metric, value, devices)
            rows.append(row | {"versions": versions})
    results.write_rows(args.out or results.COMMITTED / "tpu_compile.csv", rows)
    return 0


def _line(numbers: dict[str, float]) -> str:
    gib, seconds = 2**30, f"{numbers['seconds']:4.0f} s"
    if not numbers["compiled"]:
        return f"{seconds}  refused"
    if not numbers["fits"]:
        used, capacity = numbers["used bytes"] / gib, numbers["capacity bytes"] / gib
        return f"{seconds}  does not fit: {used:.2f} of {capacity:.2f} GiB"
    sent = sum(v for k, v in numbers.items() if k.endswith(", bytes"))
    return (
        f"{seconds}  arguments {numbers['argument bytes'] / gib:.3f}, temporaries "
        f"{numbers['temporary bytes'] / gib:.2f} GiB, {sent / gib:.2f} GiB sent a step"
    )


if __name__ == "__main__":
    sys.exit(main())
