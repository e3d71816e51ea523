"""The drawings of report.py, from its rows and logs."""

import math

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

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

    points: [(x, y, name, colour)], markers of 3 points' radius. A line of that colour joins name and point.
    """
    points = sorted(points, key=lambda point: -len(point[2]))  # a short name finds a place anywhere
    ax.figure.draw_without_rendering()  # places the axes
    pixels, frame = ax.figure.dpi / 72, ax.get_window_extent()  # pixels of a point of print
    r = 3 * pixels
    at = ax.transData.transform([point[:2] for point in points])
    taken = [(u - r, v - r, u + r, v + r) for u, v in at]  # left, bottom, right, top, in pixels
    for (x, y, name, colour), (u, v) in zip(points, at):
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkB": 3}
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=6.5, ha="center",
                           va="center", arrowprops=line)
        text.set_in_layout(False)
        box = text.get_window_extent()
        w, h = box.width / 2 + pixels, box.height / 2
        for i in range(24, 24 * 40):  # ring after ring, 3 points apart, of 24 places each
            angle, ring = 2 * math.pi * i / 24, r * (1 + i // 24)
            dx, dy = (w + ring) * math.sin(angle), (h + ring) * math.cos(angle)
            left, bottom, right, top = mine = u + dx - w, v + dy - h, u + dx + w, v + dy + h
            inside = frame.x0 < left and right < frame.x1 and frame.y0 < bottom and top < frame.y1
            if inside and not any(left < c and a < right and bottom < d and b < top for a, b, c, d in taken):
                break
        text.set_position((dx / pixels, dy / pixels))
        text.arrow_patch.set_visible(i >= 3 * 24)  # which a name that touches its point does not need
        taken.append(mine)


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
    """A panel a run: test (thick) and training accuracy (thin). runs: [(name, log, epochs of its decays)]."""
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    fig, axes = subplots(columns, 4.5 * columns + 0.5, 2.8 * rows + 0.7, rows, sharey=True)
    for ax, (title, log, decays) in zip(axes.flat, runs):
        entry, split = chosen(log)
        for metric, key, name, colour in (("clean", "train_clean_acc", "clean", COLOURS[1]),
                                          ("pgd10", "train_adv_acc", "adversarial", COLOURS[0])):
            thin, thick = {"color": colour, "linewidth": 0.7}, {"color": colour, "linewidth": 2}
            plot(ax, log, key, "-", label=f"training, {name}", **thin)
            plot(ax, log, f"{split}_{metric}", ".-", label=f"{split}, {METRICS[metric]}", **thick)
            plot(ax, entry, f"{split}_{metric}", "k*", markersize=10, zorder=3)
        for epoch in decays:
            ax.axvline(epoch, color="0.5", linestyle=":")
        robust = [e[f"{split}_pgd10"] for e in log if e.get(f"{split}_pgd10") is not None]
        about = f"\nPGD-10: best {max(robust):.2f}, last {robust[-1]:.2f}" if robust else ""
        ax.set(title=title + about, xlabel="epoch", ylabel="accuracy (%)", xlim=(0, 1.02 * len(log)))
    for ax in axes.flat[len(runs):]:
        ax.remove()
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


def draw_effects(panels):
    """The paper's effect of a trick against ours at laptop scale, in percentage points, a panel each.

    panels: {title: [(name, table, the paper's effect, ours, its standard error or None)]}.
    """
    tables = sorted({point[1] for points in panels.values() for point in points}, key=lambda t: int(t[1:]))
    look = {table: {"color": colour, "marker": marker, "markeredgecolor": "k", "markeredgewidth": 0.4}
            for table, colour, marker in zip(tables, COLOURS, "os^Dv<>P")}
    fig, axes = subplots(len(panels), 12, 6.8)
    for ax, (title, points) in zip(axes[0], panels.items()):
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.axvline(0, color="0.6", linewidth=0.8)
        for _, table, x, y, error in points:
            ax.errorbar(x, y, error, markersize=5, elinewidth=0.6, zorder=3, **look[table])
        ax.margins(0.08)
        ax.set(title=title, xlabel="the paper's effect, in percentage points", xscale="asinh", yscale="asinh",
               ylabel="ours (tiny network, 2,500 images, 44 epochs), in percentage points")
        for axis in (ax.xaxis, ax.yaxis):  # linear up to about a point, where most effects are
            axis.set_major_locator(FixedLocator([-16, -8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8, 16]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        place_names(ax, [(x, y, name, look[table]["color"]) for name, table, x, y, _ in points])
    for table, style in look.items():
        axes[0, 0].plot([], [], linestyle="", label=f"Table {table[1:]}", **style)
    fig.legend(loc="outside lower center", ncols=len(look))
    return fig
