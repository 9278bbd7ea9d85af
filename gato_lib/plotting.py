"""Figures: one theme, one colour for one meaning, provenance beside every file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gato_lib import distributed
from gato_lib.files import write_bytes

NARROW, WIDE = 3.3, 6.8  # inches: one column and two

_colorblind = sns.color_palette("colorblind")


class _Colors(dict):
    """A user's own domain is grey."""

    def __missing__(self, domain: str) -> tuple[float, ...]:
        return (0.45, 0.45, 0.45)


class _Names(dict):
    """A user's own domain has the name it has."""

    def __missing__(self, domain: str) -> str:
        return domain


def _shades(color: tuple[float, ...], n: int) -> list[tuple[float, ...]]:
    """From the colour itself to a light one: domains of one simulator."""
    return sns.light_palette(color, n + 1)[:0:-1]


# In the order in which figures list them.
DOMAIN_NAMES = _Names(
    babyai="BabyAI",
    metaworld="Meta-World",
    dmc="DM Control",
    dmc_pixels="DM Control, pixels",
    dmc_random_small="DM Control, random small",
    dmc_random_large="DM Control, random large",
    atari="Atari",
    atari_extended="Atari, extended",
    dmlab="MiniWorld",
    sokoban="Sokoban",
    procgen="Procgen",
    modular_rl="Modular RL",
    manipulation="DM Manipulation",
    rgb_stacking="RGB stacking",
    rgb_stacking_shifted="RGB stacking, shifted",
    rgb_stacking_state="RGB stacking, from state",
    captions="Captions",
    vqa="Visual questions",
    text="Text",
)
DOMAIN_COLORS = _Colors(
    zip(
        DOMAIN_NAMES,
        [
            *(_colorblind[1], _colorblind[0]),
            *_shades(_colorblind[2], 4),
            *_shades(_colorblind[3], 2),
            *(_colorblind[i] for i in (4, 5, 6, 8, 9)),
            *_shades(_colorblind[7], 3),
            *((grey, grey, grey) for grey in (0.2, 0.5, 0.7)),  # what is not control
        ],
        strict=True,
    )
)
KIND_COLORS = dict(
    zip(
        ("text", "image", "discrete", "continuous", "separator", "action", "padding", "given text"),
        [_colorblind[i] for i in (4, 2, 9, 0, 7, 3, 7, 7)],
        strict=True,
    )
)


def in_order(domains: Iterable[str]) -> list[str]:
    """Each domain once, in the order of the figures, a user's own ones last."""
    present = set(domains)
    return [d for d in DOMAIN_NAMES if d in present] + sorted(present - set(DOMAIN_NAMES))


def use_theme() -> None:
    """Set the workbook's look; call once at the top of a notebook."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.05)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "gato",  # byte-stable files
            "svg.fonttype": "none",
        }
    )


def save(
    fig: Figure,
    name: str,
    folder: str | os.PathLike,
    notebook: str,
    inputs: Sequence[str | os.PathLike] = (),
) -> pathlib.Path:
    """Write `name`.png, .svg and .json (where the figure came from) into `folder`.

    Only process 0 of a run on several hosts writes.

    `inputs` are the files the numbers were read from; their sha256 go into the JSON, and nothing
    that changes between runs does, so the same rows give the same bytes.
    """
    path = pathlib.Path(folder) / f"{name}.png"
    if not distributed.is_writer():
        return path
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        data = io.BytesIO()
        fig.savefig(data, format=suffix, metadata=metadata, bbox_inches="tight")
        write_bytes(path.with_suffix(f".{suffix}"), data.getvalue())
    _write_provenance(path, notebook, inputs, ("matplotlib", "seaborn"))
    return path


def save_video(
    frames: np.ndarray,
    name: str,
    folder: str | os.PathLike,
    notebook: str,
    fps: float = 10.0,
) -> IPython.display.Image:
    """Write frames uint8 (T, H, W, 3) as `name`.gif, and .json, and return them to be shown.

    The last frame stands for a second longer.
    """
    images = [PIL.Image.fromarray(frame).quantize(64, dither=0) for frame in frames]
    durations = [round(1000 / fps)] * len(images)
    durations[-1] += 1000
    data = io.BytesIO()
    images[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
    )
    path = pathlib.Path(folder) / f"{name}.gif"
    if distributed.is_writer():
        write_bytes(path, data.getvalue())
        _write_provenance(path, notebook, (), ("pillow",))
    return IPython.display.Image(data.getvalue(), format="gif")


def _write_provenance(
    path: pathlib.Path, notebook: str, inputs: Sequence[str | os.PathLike], made_by: Sequence[str]
) -> None:
    provenance = {
        "figure": path.stem,
        "notebook": notebook,
        "inputs": {
            pathlib.Path(p).name: hashlib.sha256(pathlib.Path(p).read_bytes()).hexdigest()
            for p in inputs
        },
        "versions": {k: importlib.metadata.version(k) for k in made_by},
    }
    write_bytes(path.with_suffix(".json"), (json.dumps(provenance, indent=1) + "\n").encode())


def threshold_curve(scores: pd.DataFrame, ax: Axes) -> Axes:
    """Fig. 5: tasks at or above each share of the expert's score, stacked by domain.

    `scores` has columns domain and normalized (1.0 = expert).
    """
    thresholds = np.linspace(0.0, 1.0, 101)
    domains = in_order(scores.domain)
    counts = [
        [(scores.normalized[scores.domain == d] >= t).sum() for t in thresholds] for d in domains
    ]
    ax.stackplot(
        100 * thresholds,
        counts,
        colors=[DOMAIN_COLORS[d] for d in domains],
        labels=[DOMAIN_NAMES[d] for d in domains],
        alpha=0.85,
    )
    total = len(scores)
    above = int((scores.normalized >= 0.5).sum())
    ax.axvline(50, color="0.2", lw=0.8, ls=":")
    ax.set_title(f"{above} of {total} tasks at 50 % of expert or more", fontsize=9, loc="left")
    # The paper's statement, scaled to our number of tasks: over 450 of 604 above 50 %.
    paper = 450 / 604 * total
    ax.plot(50, paper, "o", mfc="white", mec="0.25", ms=7)
    ax.annotate(
        "paper:\nover 450 of 604",
        (50, paper),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1.0},
    )
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(
        xlim=(0, 100),
        ylim=(0, total),
        xlabel="Score threshold (% of expert, 0 = random)",
        ylabel="Tasks at or above",
    )
    handles, labels = ax.get_legend_handles_labels()
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "labelspacing": 0.3}
    ax.legend(handles[::-1], labels[::-1], fontsize=7, **beside)
    return ax


def interval_points(table: pd.DataFrame, ax: Axes) -> Axes:
    """Aggregates as points with intervals, the first on top.

    `table` has columns statistic, value, low and high (1.0 = expert).
    """
    y = np.arange(len(table))[::-1]
    ax.hlines(y, 100 * table.low, 100 * table.high, color=_colorblind[0], lw=5, alpha=0.4)
    ax.plot(100 * table.value, y, "|", ms=11, mew=1.8, color=_colorblind[0])
    ax.set_yticks(y, table.statistic)
    ax.tick_params(axis="y", length=0)
    ends = 100 * np.array([0.0, 1.0, table.low.min(), table.high.max()])
    ax.set(xlim=(np.nanmin(ends), np.nanmax(ends)), ylim=(-0.6, len(table) - 0.4))
    ax.set(xlabel="% of expert, or of tasks")
    return ax


def performance_profiles(profiles: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Share of tasks at or above each score, a curve with its interval for each agent.

    Each table has columns threshold, share, low and high.
    """
    for i, (name, table) in enumerate(profiles.items()):
        x = 100 * table.threshold
        ax.fill_between(
            x, 100 * table.low, 100 * table.high, color=_colorblind[i], alpha=0.25, step="mid", lw=0
        )
        ax.step(x, 100 * table.share, where="mid", color=_colorblind[i], lw=1.5, label=name)
    ax.set(xlim=(0, None), ylim=(0, 103), xlabel="Score threshold (% of expert)")
    ax.set_ylabel("Tasks at or above (%)")
    if len(profiles) > 1:
        ax.legend(loc="lower left")
    return ax


def score_bars(scores: pd.DataFrame, axes: Axes | Sequence[Axes]) -> None:
    """Normalised score of each task with its interval: a block a domain, the best first.

    The blocks follow each other down the first of `axes`, then down the next. `scores` has columns
    domain, task, normalized, low and high (1.0 = expert).
    """
    columns, blocks = np.ravel(axes), {d: scores[scores.domain == d] for d in scores.domain}
    length = -(-(len(scores) + 2 * len(blocks)) // len(columns))
    parts: list[list[tuple[str, Any]]] = [[]]  # for each of the axes: a domain's name, or a row
    for domain in in_order(blocks):
        if len(parts[-1]) + 2 > length:  # a name stands above a task, not alone
            parts.append([])
        parts[-1].append((DOMAIN_NAMES[domain], None))
        for row in blocks[domain].sort_values("normalized", ascending=False).itertuples():
            if len(parts[-1]) == length:
                parts.append([])
            parts[-1].append((row.task.split("/")[1], row))
    ends = 100 * np.array([0.0, 1.0, scores.low.min(), scores.high.max()])
    for ax, part in itertools.zip_longest(columns, parts, fillvalue=[]):
        ax.set_yticks(range(len(part)), [label for label, _ in part], fontsize=7)
        for y, (_, row) in enumerate(part):
            if row is None:
                ax.get_yticklabels()[y].set_fontweight("bold")
                continue
            ax.barh(y, 100 * row.normalized, color=DOMAIN_COLORS[row.domain], height=0.7)
            ax.plot([100 * row.low, 100 * row.high], [y, y], color="0.25", lw=0.8)
        ax.axvline(0, color="0.2", lw=0.8)
        ax.axvline(100, color="0.5", lw=0.8, ls=":")
        ax.set(xlim=(1.05 * min(ends), 1.05 * max(ends)), ylim=(length - 0.4, -0.6))
        ax.set_xlabel("% of expert (random: 0)")
        ax.tick_params(axis="y", length=0)


def loss_curves(metrics: pd.DataFrame, ax: Axes) -> Axes:
    """Training loss by domain over tokens, and validation loss as circles where it was measured.

    `metrics` has the columns tokens, domain, loss and validation_loss.
    """
    ends = []
    for domain, group in metrics.groupby("domain"):
        smooth = group.loss.ewm(span=10).mean()
        x = group.tokens / 1e6
        ax.plot(x, group.loss, color=DOMAIN_COLORS[domain], lw=0.5, alpha=0.35)
        ax.plot(x, smooth, color=DOMAIN_COLORS[domain], lw=1.5)
        ax.plot(x, group.validation_loss, "o", color=DOMAIN_COLORS[domain], ms=3, mfc="white")
        ends.append((smooth.iloc[-1], domain))
    apart, below = 0.075 * np.ptp(ax.get_ylim()), -np.inf  # of two names, so that both can be read
    for end, domain in sorted(ends):
        below = max(end, below + apart)
        ax.annotate(
            DOMAIN_NAMES[domain],
            (metrics.tokens.max() / 1e6, below),
            xytext=(4, 0),
            textcoords="offset points",
            color=DOMAIN_COLORS[domain],
            va="center",
            annotation_clip=False,
        )
    ax.set(xlabel="Tokens seen (millions)", ylabel="Masked loss (nats per target)")
    ax.set_title(
        "lines: training; circles: held-out episodes and texts", fontsize="small", color="0.4"
    )
    return ax


def token_grid(
    ax: Axes,
    labels: Sequence[str | np.ndarray],
    kinds: Sequence[str],
    local: Sequence[int],
    mask: Sequence[bool],
    columns: int = 11,
) -> Axes:
    """A timestep drawn token by token: colour is the kind, a bold frame marks a target.

    `labels` are written in the cells, or shown where they are images; `local` stands below them
    (blank where negative).
    """
    count = len(labels)
    rows = -(-count // columns)
    box = ax.get_position()
    inches = ax.figure.get_size_inches()
    wide, high = box.width * inches[0] / columns, box.height * inches[1] / rows  # of a cell
    side = min(0.8 * wide, 0.52 * high)  # of a picture in it
    for i in range(count):
        r, c = divmod(i, columns)
        color = KIND_COLORS[kinds[i]]
        ax.add_patch(
            plt.Rectangle(
                (c + 0.04, -r - 0.9),
                0.92,
                0.8,
                facecolor=(*color, 0.28),
                edgecolor="0.1" if mask[i] else (*color, 0.9),
                lw=1.6 if mask[i] else 0.6,
            )
        )
        if isinstance(labels[i], str):
            size = min(6.5, 6.5 * wide / (0.065 * max(len(labels[i]), 1)))
            ax.text(c + 0.5, -r - 0.42, labels[i], ha="center", va="center", fontsize=size)
        else:
            x, y, w, h = c + 0.5, -r - 0.42, side / wide / 2, side / high / 2
            extent = (x - w, x + w, y - h, y + h)
            ax.imshow(labels[i], extent=extent, aspect="auto", interpolation="nearest", zorder=2)
        if local[i] >= 0:
            ax.text(
                c + 0.5,
                -r - 0.75,
                f"{local[i]}",
                ha="center",
                va="center",
                fontsize=5,
                color="0.35",
            )
    ax.set(xlim=(0, columns), ylim=(-rows, 0))
    ax.axis("off")
    used = [k for k in KIND_COLORS if k in set(kinds)]
    handles = [
        plt.Rectangle((0, 0), 1, 1, fc=(*KIND_COLORS[k], 0.28), ec=KIND_COLORS[k]) for k in used
    ]
    ax.legend(
        handles, used, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(used), fontsize=7
    )
    return ax
