"""What devices exchange in a step, read from the text of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective instruction of a compiled program.

    Attributes:
      times: how often a step executes it; inside: in a loop's body.
      result: bytes of its result on a device. sent: bytes that a device sends for one execution,
        in a ring of `group` devices. For an all-gather of R bytes in all that is R (g - 1) / g,
        for an all-reduce twice as much.
      source: the line of Python's trace that it came from, shortened.
    """

    kind: str
    times: int
    inside: bool
    group: int
    result: int
    sent: float
    types: str
    source: str


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
WIDTHS |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8, "token": 0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(body|condition|calls|async_wrapped)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


def collectives(program: str, devices: int) -> list[Collective]:
    """Every collective in the text of a compiled program (`compiled.as_text()`).

    The text is a list of computations; those of a loop's body are executed once a turn. How many
    turns there are is read from the loop's annotation, or from the constant that its counter is
    compared with.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    found: dict[str, Collective] = {}

    def visit(computation: str, times: int, inside: bool) -> None:
        for line in bodies.get(computation, ()):
            if hit := _COLLECTIVE.search(line):
                # A TPU program starts, continues and ends an overlapped exchange in several
                # computations (the channel says that they are one),
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{computation} {len(found)}"
                # and it writes a reduce-scatter as a fusion of an all-reduce and a slice.
                scatter = computation.startswith("all-reduce-scatter")
                found.setdefault(key, _collective(line, hit, times, inside, devices, scatter))
            loop = re.search(r"\bwhile\(.*body=", line)
            turns = _turns(line, bodies) if loop else 1
            called = [c for _, c in _CALLED.findall(line)]
            if re.search(r"\bcall\(", line):
                called += re.findall(r"to_apply=%?([\w.\-]+)", line)
            for group in _BRANCHES.findall(line):
                called += [c.strip().lstrip("%") for c in group.split(",")]
            for c in called:
                visit(c, times * turns, inside or bool(loop))

    visit(entry, 1, False)
    return list(found.values())


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop's body is executed."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = bodies[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    constant = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
    constants = [hit[1] for x in condition if (hit := constant.search(x))]
    if len(constants) != 1 or not any("direction=LT" in x for x in condition):
        raise ValueError(f"cannot tell how often this loop turns: {line[:200]}")
    return int(constants[0])


def _collective(
    line: str, hit: re.Match, times: int, inside: bool, devices: int, scatter: bool
) -> Collective:
    types, kind, start = hit.groups()
    group = _group_size(line, devices)
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    if unknown := sorted({t for t, _ in arrays} - set(WIDTHS)):
        raise ValueError(f"bytes of {unknown} are not known, in: {line.strip()[:200]}")
    arrays = [(t, [int(n) for n in s.split(",") if n]) for t, s in arrays]
    size = sum(WIDTHS[t] * math.prod(s) for t, s in arrays)
    if start and kind == "all-gather":  # operands and results
        size = round(size * group / (group + 1))
    elif start and kind == "collective-permute":
        size = size // 2
    elif scatter and kind == "all-reduce":
        kind, size = "reduce-scatter", size // group
    sent = {
        "all-gather": size * (group - 1) / group,
        "all-reduce": 2 * size * (group - 1) / group,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * (group - 1) / group,
        "collective-permute": size,
    }[kind]
    source = re.search(r'op_name="([^"]*)"', line)
    source = "" if source is None else source[1].removeprefix("jit(step_fn)/")
    types = ", ".join(f"{t} {'x'.join(map(str, s))}".strip() for t, s in arrays)
    return Collective(kind, times, inside, group, size, sent, types, source)


def _group_size(line: str, devices: int) -> int:
    """How many devices take part: the replica groups have three ways of being written."""
    if "source_target_pairs" in line:
        return devices
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod([int(part or sizes[axis]) for axis, part in axes])
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return devices
