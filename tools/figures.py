"""The drawings of report.py, from its rows and logs."""

import math
import re

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from utils import best

METRICS = {"clean": "Clean", "pgd10": "PGD-10", "aa": "AA"}
# Okabe and Ito's colours, with grey for their yellow: colour-blind readers tell them apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


def subplots(columns, width, height=3.2, rows=1, **shared):
    """A figure and its axes (rows, columns), styled for print."""
    plt.switch_backend("agg")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True,
                         "grid.alpha": 0.3, "savefig.dpi": 200, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)


def place_names(ax, points):
    """Write names beside their points, each at the nearest place where it covers no point and no other name.

    points: [(x, y, name, colour)]; without a name it is only kept free. A line joins name and point.
    """
    ax.figure.draw_without_rendering()  # places the axes
    pixel, frame = 72 / ax.figure.dpi, ax.get_window_extent()
    taken = [Bbox([at - 4 / pixel, at + 4 / pixel]) for at in ax.transData.transform([p[:2] for p in points])]
    for x, y, name, colour in sorted(points, key=lambda p: -len(p[2])):  # a short name finds a place anywhere
        if not name:
            continue
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkB": 3}
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7, ha="center",
                           va="center", arrowprops=line, bbox={"color": "w", "alpha": 0.6, "pad": 0})
        text.set_in_layout(False)
        width, height = (pixel * side / 2 for side in text.get_window_extent().size)
        for i in range(24, 24 * 40):  # ring after ring, 3 points apart, of 24 places each
            angle, ring = 2 * math.pi * i / 24, 3 * (1 + i // 24)
            text.set_position(((width + ring) * math.sin(angle), (height + ring) * math.cos(angle)))
            box = Text.get_window_extent(text)  # without the line
            if frame.containsx(box.x0) and frame.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(box)


# ---- Learning curves ---------------------------------------------------------------------------------------


def chosen(log):
    """([the entry of the epoch that best.pt is from], or [], and the split it was chosen on)."""
    split = "val" if any("val_clean" in entry for entry in log) else "test"
    entry = best(log)
    return [entry] if entry else [], split


def plot(ax, entries, key, line, **style):
    """Draw a figure of the log by epoch, where it is known."""
    points = [(e["epoch"], e[key]) for e in entries if e.get(key) is not None]
    if points:
        ax.plot(*zip(*points), line, **style)


def draw_runs(runs):
    """A column a run: training and test accuracy above, robust test accuracy on an axis of its own below.

    runs: [(title, log, epochs of its decays)].
    """
    fig, axes = subplots(len(runs), 2.6 * len(runs) + 1, 5.2, 2, sharex="col", sharey="row")
    for (upper, lower), (title, log, decays) in zip(axes.T, runs):
        entry, split = chosen(log)
        for key, colour, width, name in (("train_clean_acc", COLOURS[1], 0.7, "training, clean"),
                                         ("train_adv_acc", COLOURS[0], 0.7, "training, adversarial"),
                                         (f"{split}_clean", COLOURS[1], 2, f"{split}, clean"),
                                         (f"{split}_pgd10", COLOURS[0], 2, f"{split}, PGD-10")):
            plot(upper, log, key, "-", label=name, color=colour, linewidth=width)
        plot(lower, log, f"{split}_pgd10", ".-", color=COLOURS[0], linewidth=2)
        for ax, key in ((upper, f"{split}_clean"), (lower, f"{split}_pgd10")):
            plot(ax, entry, key, "k*", markersize=9, zorder=3)
            for epoch in decays:
                ax.axvline(epoch, color="0.5", linestyle=":")
        robust = [e[f"{split}_pgd10"] for e in log if e.get(f"{split}_pgd10") is not None]
        about = f"PGD-10: best {max(robust):.2f}, last {robust[-1]:.2f}" if robust else ""
        upper.set(title=title, xlim=(0, 1.02 * len(log)))
        lower.set(title=about, xlabel="epoch")
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("PGD-10 accuracy (%)")
    axes[0, 0].plot([], [], "k*", label="best epoch")
    if any(decays for _, _, decays in runs):
        axes[0, 0].plot([], [], "k:", label="the learning rate decays")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def draw_figure(rows):
    """Clean and PGD-10 accuracy by epoch, a panel each. Of a row's seeds those after the first are faint.

    rows: [(report.Row, [a seed's log])]. The paper's figures are of its best epoch, and stand at the end.
    """
    fig, axes = subplots(2, 9, 4.4)
    # Figure 1 has 14 rows: from the ninth on the lines are dashed and the paper's figures square.
    looks = [(colour, line, marker) for line, marker in (("-", "o"), ("--", "s")) for colour in COLOURS]
    for (row, logs), (colour, line, marker) in zip(rows, looks):
        hollow = {"color": colour, "marker": marker, "markerfacecolor": "none"}
        for ax, metric in zip(axes[0], ("clean", "pgd10")):
            for i, log in enumerate(logs):
                entry, split = chosen(log)
                plot(ax, log, f"{split}_{metric}", line, color=colour, alpha=0.3 if i else 1)
                plot(ax, entry, f"{split}_{metric}", "*", color=colour, markersize=9)
            if row.paper[metric] is not None:
                ax.plot(row.setting["epochs"], row.paper[metric], **hollow)
        name = row.id if logs else f"{row.id} (not run)"
        look = {"color": colour} if row.paper["clean"] is None else hollow
        axes[0, 0].plot([], [], line, label=name, **look)
    epochs = max(row.setting["epochs"] for row, _ in rows)
    for ax, name in zip(axes[0], ("clean", "PGD-10")):
        ax.set(xlabel="epoch", ylabel=f"{name} accuracy (%)", xlim=(0, 1.05 * epochs))
    if any(logs for _, logs in rows):
        axes[0, 0].plot([], [], "k*", label="best epoch")
    if any(row.paper["clean"] is not None for row, _ in rows):
        axes[0, 0].plot([], [], "ko", label="hollow: the paper's best epoch", markerfacecolor="none")
    fig.legend(loc="outside lower center", ncols=3)
    return fig


# ---- Effects -----------------------------------------------------------------------------------------------


def ranks(x):
    """Ranks from 1 along the last axis; equal values share the mean of theirs."""
    a, b = x[..., :, None], x[..., None, :]
    return (a > b).sum(-1) + ((a == b).sum(-1) + 1) / 2


def spearman(x, y):
    """Spearman's rank correlation along the last axis: Pearson's of the ranks."""
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(x), ranks(y)))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def bootstrap_interval(x, y, resamples=10_000):
    """The 95 % interval of spearman(x, y) over resampled points."""
    picks = np.random.default_rng(0).integers(len(x), size=(resamples, len(x)))
    return np.nanpercentile(spearman(x[picks], y[picks]), [2.5, 97.5])


def draw_effects(panels):
    """The paper's effects against ours at laptop scale, a panel each. Those beyond one point have a name.

    panels: {title: [(name, table, the paper's effect, ours, its standard error or None, hollow)]}.
    """
    tables = list(dict.fromkeys(point[1] for points in panels.values() for point in points))
    looks = {table: {"color": colour, "marker": marker, "markeredgecolor": "k", "markeredgewidth": 0.4}
             for table, colour, marker in zip(tables, 3 * COLOURS, "os^Dv<>Ps^Dv<>Po^Dv<>Pos")}
    fig, axes = subplots(len(panels), 12, 6.7)
    for ax, (title, points) in zip(axes[0], panels.items()):
        for _, table, x, y, error, hollow in points:
            face = {"markerfacecolor": "w", "markeredgecolor": looks[table]["color"]} if hollow else {}
            ax.errorbar(x, y, error, markersize=5, elinewidth=0.6, zorder=3, **looks[table] | face)
        x, y = np.array([(x, y) for _, _, x, y, _, hollow in points if not hollow]).reshape(-1, 2).T
        title += f", {len(x)} filled points"
        if len(x) > 2:
            low, high = bootstrap_interval(x, y)
            title += (f": Spearman's rank correlation {spearman(x, y):.2f}\n"
                      f"(95 % interval {low:.2f} to {high:.2f}). Effects beyond one point are named.")
        values = [value for point in points for value in point[2:4]]
        ends = 1.3 * min(-1, *values), 1.3 * max(1, *values)
        ax.plot(ends, ends, color="0.6", linewidth=0.8, linestyle="--", label="y = x")
        for end in ends:
            ax.fill_between([0, end], 0, end, color="0.93", zorder=0)  # where both have one sign
        ax.set(title=title, xlabel="the paper's effect, in percentage points (asinh scale)", xscale="asinh",
               yscale="asinh", xlim=ends, ylim=ends, box_aspect=1,
               ylabel="ours at laptop scale, in percentage points (asinh scale)")
        for axis in (ax.xaxis, ax.yaxis):  # linear up to about a point, where most effects are
            axis.set_major_locator(FixedLocator([-16, -8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8, 16]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        place_names(ax, [(x, y, name if max(abs(x), abs(y)) > 1 else "", looks[table]["color"])
                         for name, table, x, y, *_ in points])
    for table, look in looks.items():
        axes[0, 0].plot([], [], linestyle="", label=re.sub(r"^t(?=\d+$)", "Table ", table), **look)
    axes[0, 0].plot([], [], "o", color="k", markerfacecolor="w", label="spoilt by a small last batch")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks) + 2)
    return fig
