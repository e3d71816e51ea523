"""The drawings of report.py, from its rows and logs. The paper's figures are hollow, ours filled."""

import math

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from models.__main__ import TABLE_11
from utils import best

METRICS = {"clean": "Clean", "pgd10": "PGD-10", "aa": "AA"}
NAMES = {"preactresnet-18": "ResNet-18", "preactresnet-50": "ResNet-50", "senet-18": "SENet-18",
         "densenet-121": "DenseNet-121", "densenet-201": "DenseNet-201", "googlenet": "GoogLeNet",
         "dpn-26": "DPN-26", "dpn-92": "DPN-92", "resnext-29": "ResNeXt-29", "regnetx-200mf": "RegNetX-200MF",
         "regnetx-400mf": "RegNetX-400MF", "wrn-34-10": "WRN-34-10", "wrn-34-20": "WRN-34-20"}
# Okabe and Ito's colours, with grey for their yellow: colour-blind readers tell them apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
HOLLOW = {"linestyle": "", "markerfacecolor": "none", "markersize": 9}
LINES = {"clean": "--", "pgd10": "-"}


def subplots(columns, width, height=3.2, rows=1, **shared):
    """A figure and its axes (rows, columns), styled for print."""
    plt.switch_backend("agg")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True,
                         "grid.alpha": 0.3, "savefig.dpi": 200, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)


def place_names(ax, points):
    """Write names beside their points, each at the nearest place where it covers no point and no other name.

    points: [(x, y, name, radius of its marker in points, colour)]. A thin line of that colour joins the two.
    """
    points = sorted(points, key=lambda point: -len(point[2]))  # a short name finds a place anywhere
    ax.figure.draw_without_rendering()  # places the axes
    scale, frame = ax.figure.dpi / 72, ax.get_window_extent()
    at = ax.transData.transform([(x, y) for x, y, *_ in points])
    taken = [(u - r, v - r, u + r, v + r) for (u, v), r in zip(at, (scale * p[3] for p in points))]
    for (x, y, name, radius, colour), (u, v) in zip(points, at):
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkB": radius}
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=6.5, ha="center",
                           va="center", arrowprops=line)
        text.set_in_layout(False)
        box = text.get_window_extent()
        w, h = box.width / 2 + scale, box.height / 2
        for i in range(24, 24 * 40):  # ring after ring, 3 points apart, of 24 places each
            angle, ring = 2 * math.pi * i / 24, scale * (3 * (i // 24) + radius)
            dx, dy = (w + ring) * math.sin(angle), (h + ring) * math.cos(angle)
            left, bottom, right, top = mine = u + dx - w, v + dy - h, u + dx + w, v + dy + h
            inside = frame.x0 < left and right < frame.x1 and frame.y0 < bottom and top < frame.y1
            if inside and not any(left < c and a < right and bottom < d and b < top for a, b, c, d in taken):
                break
        text.set_position((dx / scale, dy / scale))
        text.arrow_patch.set_visible(i >= 3 * 24)  # which a name that touches its point does not need
        taken.append(mine)


# ---- Learning curves ---------------------------------------------------------------------------------------


def chosen(log):
    """([the entry of the epoch that best.pt is from], or [], and the split it was chosen on)."""
    split = "val" if any("val_clean" in entry for entry in log) else "test"
    entry = best(log, f"{split}_pgd10") or best(log, f"{split}_clean")
    return [entry] if entry else [], split


def plot(ax, entries, key, line, **style):
    """Draw a figure of the log by epoch, where it is known."""
    points = [(e["epoch"], e[key]) for e in entries if e.get(key) is not None]
    if points:
        ax.plot(*zip(*points), line, **style)


def draw_runs(runs):
    """A panel a run: test (thick) and training accuracy (thin). runs: [(name, log, epochs of the decays)]."""
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
    for style, label in (("k*", "best epoch"), ("k:", "the learning rate decays")):
        axes[0, 0].plot([], [], style, label=label)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# ---- Figures 1 to 4 ----------------------------------------------------------------------------------------

# rows: [(report.Row, [a seed's log], the seeds' mean {metric: figure})]


def draw_curves(ax, rows):
    """Clean and PGD-10 accuracy by epoch; seeds after the first are faint. The paper's are of its best epoch,
    and stand at the end."""
    for (row, logs, _), colour in zip(rows, COLOURS):
        ax.plot([], [], color=colour, linewidth=4, label=row.id if logs else f"{row.id} (not run)")
        for metric, line in LINES.items():
            for i, log in enumerate(logs):
                entry, split = chosen(log)
                plot(ax, log, f"{split}_{metric}", line, color=colour, alpha=0.3 if i else 1)
                plot(ax, entry, f"{split}_{metric}", "*", markersize=9, color=colour)
            if row.paper[metric] is not None:
                ax.plot(row.setting["epochs"], row.paper[metric], "o", color=colour, markerfacecolor="none")
    styles = {"k--": "clean", "k-": "PGD-10", "k*": "best epoch", "ko": "the paper's best"}
    for style, label in styles.items():
        ax.plot([], [], style, label=label, markerfacecolor="none" if style == "ko" else None)
    ax.set(xlabel="epoch", ylabel="accuracy (%)")
    ax.set_xlim(left=0)
    ax.legend(ncols=2)


def draw_weight_decay(ax, rows):
    """Accuracy by weight decay, a colour for each network."""
    for model, colour in zip(("preactresnet-18", "wrn-34-10"), COLOURS):
        mine = [(row, ours) for row, _, ours in rows if row.setting["model"] == model]
        points = [(row.setting["wd"], ours, row.paper) for row, ours in mine]
        for metric, line in LINES.items():
            filled = {"linestyle": line, "label": f"{NAMES[model]}, {METRICS[metric]}"}
            for column, style in ((1, filled), (2, HOLLOW)):
                known = [(p[0], p[column][metric]) for p in points if p[column].get(metric) is not None]
                ax.plot([x for x, _ in known], [y for _, y in known], marker="o", color=colour, **style)
    ax.set(xscale="log", xlabel="weight decay (hollow: the paper's)", ylabel="accuracy (%)")
    ticks = sorted({row.setting["wd"] for row, *_ in rows})
    ax.set_xticks(ticks, [f"{t:.0e}".replace("e-0", "e-") for t in ticks])
    ax.set_xticks([], minor=True)
    ax.legend()


def draw_architectures(ax, rows):
    """Clean against PGD-10 accuracy, a circle's area by the size of the checkpoint. A name is written once,
    at ours if there is one."""
    names = []
    for (row, _, ours), colour in zip(rows, 2 * COLOURS):
        size = TABLE_11[row.setting["model"]]
        faces = [(f, face) for f, face in ((row.paper, "none"), (ours, colour)) if f.get("clean") is not None]
        for figures, face in faces:
            at = figures["clean"], figures["pgd10"]
            ax.scatter(*at, 2 * size, edgecolors=colour, facecolors=face, alpha=0.8)
        if faces:
            names.append((*at, NAMES[row.setting["model"]], (size / 2) ** 0.5, colour))
    ax.margins(0.15)
    ax.set(xlabel="clean accuracy (%); hollow: the paper's", ylabel="PGD-10 accuracy (%)")
    place_names(ax, names)


def draw_figure(name, rows):
    """Figure 1 to 4 of the paper ("f1" ...)."""
    fig, axes = subplots(1 + (name == "f1"), 9 if name == "f1" else 5, 4 if name == "f2" else 3.2)
    if name == "f1":
        draw_weight_decay(axes[0, 0], [row for row in rows if row[0].table == "f1a"])
    if name == "f2":
        draw_architectures(axes[0, 0], rows)
    else:
        draw_curves(axes[0, -1], [row for row in rows if row[0].table != "f1a"])
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
        place_names(ax, [(x, y, name, 3, look[table]["color"]) for name, table, x, y, _ in points])
    for table, style in look.items():
        axes[0, 0].plot([], [], linestyle="", label=f"Table {table[1:]}", **style)
    fig.legend(loc="outside lower center", ncols=len(look))
    return fig
