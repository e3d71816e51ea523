"""The drawings of report.py, from its rows and logs."""

import matplotlib.pyplot as plt
import numpy as np

from utils import best

METRICS = {"clean": "Clean", "pgd10": "PGD-10", "aa": "AA"}
# Okabe and Ito's colours, with grey for their yellow: colour-blind readers tell them apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
# What the paper finds useful, named in bold, and how far above its point, in typographic points.
USEFUL = {"ls": ("label smoothing", -5), "softplus": ("softplus", 6), "bneval": ("BN eval", -5)}


def subplots(columns, width, height, rows=1, **shared):
    """A figure and its axes (rows, columns), styled for print."""
    plt.switch_backend("agg")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True,
                         "grid.alpha": 0.3, "savefig.dpi": 200, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)


# ---- Learning curves ---------------------------------------------------------------------------------------


def split_of(log):
    """The images that the best epoch was chosen on: held out ones, or the test set."""
    return "val" if any("val_clean" in entry for entry in log) else "test"


def plot(ax, entries, key, line, **style):
    """Draw a figure of the log by epoch, where it is known."""
    points = [(e["epoch"], e[key]) for e in entries if e and e.get(key) is not None]
    if points:
        ax.plot(*zip(*points), line, **style)


def draw_runs(runs, title):
    """A column a run: training and test accuracy above, robust test accuracy on an axis of its own below.

    runs: [(title, log, epochs of its decays)].
    """
    fig, axes = subplots(len(runs), 2.6 * len(runs) + 1, 5.2, 2, sharex="col", sharey="row")
    fig.suptitle(title, fontsize=9)
    for (upper, lower), (name, log, decays) in zip(axes.T, runs):
        split = split_of(log)
        for key, colour, width, label in (("train_clean_acc", COLOURS[1], 0.7, "training, clean"),
                                          ("train_adv_acc", COLOURS[0], 0.7, "training, adversarial"),
                                          (f"{split}_clean", COLOURS[1], 2, f"{split}, clean"),
                                          (f"{split}_pgd10", COLOURS[0], 2, f"{split}, PGD-10")):
            plot(upper, log, key, "-", label=label, color=colour, linewidth=width)
        plot(lower, log, f"{split}_pgd10", ".-", color=COLOURS[0], linewidth=2)
        for ax, key in ((upper, f"{split}_clean"), (lower, f"{split}_pgd10")):
            plot(ax, [best(log)], key, "k*", markersize=9, zorder=3)
            for epoch in decays:
                ax.axvline(epoch, color="0.5", linestyle=":")
        robust = [e[f"{split}_pgd10"] for e in log if e.get(f"{split}_pgd10") is not None]
        about = f"PGD-10: best {max(robust):.2f}, last {robust[-1]:.2f}" if robust else ""
        upper.set(title=name, xlim=(0, 1.02 * len(log)))
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
    for ax, metric in zip(axes[0], ("clean", "pgd10")):
        for (row, logs), (colour, line, marker) in zip(rows, looks):
            for i, log in enumerate(logs):
                key = f"{split_of(log)}_{metric}"
                plot(ax, log, key, line, color=colour, alpha=0.3 if i else 1)
                plot(ax, [best(log)], key, "*", color=colour, markersize=9)
            if row.paper[metric] is not None:
                ax.plot(row.setting["epochs"], row.paper[metric], marker, color=colour, mfc="none")
            ax.plot([], [], line, color=colour, label=row.id if logs else f"{row.id} (not run)")
        ax.plot([], [], "k*", label="best epoch")
        ax.plot([], [], "ko", label="hollow: the paper's best epoch", mfc="none")
        ax.set(xlabel="epoch", ylabel=f"{METRICS[metric]} accuracy (%)")
        ax.set_xlim(left=0)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# ---- Effects -----------------------------------------------------------------------------------------------


def ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def spearman(x, y):
    """Spearman's rank correlation: Pearson's of the ranks."""
    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def bootstrap_interval(x, y, resamples=2_000):
    """The 95 % interval of spearman(x, y) over resampled points."""
    picks = np.random.default_rng(0).integers(len(x), size=(resamples, len(x)))
    with np.errstate(invalid="ignore"):  # of a few points all picks may be equal
        return np.nanpercentile([spearman(x[i], y[i]) for i in picks], [2.5, 97.5])


def draw_effects(panels):
    """The paper's effects against ours at laptop scale, a panel each.

    panels: {title: [(name, table, the paper's effect, ours, its standard error or None)]}.
    """
    tables = list(dict.fromkeys(point[1] for points in panels.values() for point in points))
    looks = {table: {"color": colour, "marker": marker, "markeredgecolor": "k", "markeredgewidth": 0.4}
             for table, colour, marker in zip(tables, 3 * COLOURS, "os^Dv<>Ps^Dv<>Po^Dv<>Pos")}
    fig, axes = subplots(len(panels), 12, 6.8)
    for ax, (title, points) in zip(axes[0], panels.items()):
        x, y = np.array([point[2:4] for point in points]).T
        ends = 2 * min(-1, *x, *y), 3 * max(1, *x, *y)  # names need room
        title += f", {len(x)} effects"
        if len(x) > 2:
            low, high = bootstrap_interval(x, y)
            title += f": rank correlation {spearman(x, y):.2f} (95 % interval {low:.2f} to {high:.2f})"
        ax.set(title=title, xlabel="the paper's effect, in percentage points (asinh scale)", xscale="asinh",
               ylabel="ours at laptop scale, in percentage points (asinh scale)", yscale="asinh")
        ticks = [-16, -8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8, 16]  # linear up to about a point
        ax.set(xticks=ticks, xticklabels=ticks, yticks=ticks, yticklabels=ticks, box_aspect=1)
        ax.set(xlim=ends, ylim=ends)
        ax.minorticks_off()
        ax.plot(ends, ends, color="0.6", linewidth=0.8, linestyle="--", label="equal effects")
        for end in ends:
            grey = ax.fill_between([0, end], 0, end, color="0.93", zorder=0)
        grey.set_label("both have the same sign")
        named = set()
        for name, table, x, y, error in sorted(points, key=lambda p: -max(abs(p[2]), abs(p[3]))):
            ax.errorbar(x, y, error, markersize=5, elinewidth=0.6, zorder=3, **looks[table])
            if name not in named and (max(abs(x), abs(y)) > 1 or name in USEFUL):
                text, above = USEFUL.get(name, (name, 0))
                weight = "bold" if name in USEFUL else "normal"
                side, right = ("left", 6) if x > 0 or name in USEFUL else ("right", -6)
                ax.annotate(text, (x, y), (right, above), textcoords="offset points", va="center", ha=side,
                            weight=weight, fontsize=8)
            named.add(name)
    axes[0, 0].errorbar([], [], [], color="k", elinewidth=0.6, linestyle="", label="± our standard error")
    for table, look in looks.items():
        axes[0, 0].plot([], [], linestyle="", label=table.replace("t", "Table "), **look)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
               title="Named once each: effects beyond one point and, in bold, what the paper finds useful")
    return fig
