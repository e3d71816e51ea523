"""The drawings of report.py, from plain numbers: they read no file.

Accuracies are in per cent. The paper's figures are drawn hollow, measured ones filled.
"""

from models.__main__ import TABLE_11
from utils import InputError

METRICS = {"clean": "Clean", "pgd10": "PGD-10", "aa": "AA"}
NAMES = {"preactresnet-18": "ResNet-18", "preactresnet-50": "ResNet-50", "senet-18": "SENet-18",
         "densenet-121": "DenseNet-121", "densenet-201": "DenseNet-201", "googlenet": "GoogLeNet",
         "dpn-26": "DPN-26", "dpn-92": "DPN-92", "resnext-29": "ResNeXt-29", "regnetx-200mf": "RegNetX-200MF",
         "regnetx-400mf": "RegNetX-400MF", "wrn-34-10": "WRN-34-10", "wrn-34-20": "WRN-34-20"}
# Okabe and Ito's colours: colour-blind readers tell them apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
HOLLOW = {"linestyle": "", "markerfacecolor": "none", "markersize": 9}


def best_epoch(log):
    """(entry of the epoch that best.pt is from, or None; "test" or "val": the split it was chosen on)."""
    split = "val" if any("val_clean" in e for e in log) else "test"
    tested = [e for e in log if e.get(f"{split}_clean") is not None]
    metric = "pgd10" if any(e.get(f"{split}_pgd10") is not None for e in tested) else "clean"
    return max(tested, key=lambda e: e.get(f"{split}_{metric}") or 0, default=None), split


def subplots(columns, width, height=3.2, rows=1):
    """A figure and its axes (rows, columns), styled for print."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    plt.switch_backend("agg")
    plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3,
                         "savefig.dpi": 200, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def draw_curves(ax, curves):
    """Clean (dashed) and PGD-10 accuracy (solid) by epoch, the best epoch starred.

    curves: [(name, [a seed's log], the paper's figures, epochs)]. The paper's are of its best epoch, and
    stand at the end. Seeds after the first are faint.
    """
    for (name, logs, paper, epochs), colour in zip(curves, COLOURS * len(curves)):
        ax.plot([], [], color=colour, linewidth=4, label=name if logs else f"{name} (not run)")
        for i, log in enumerate(logs):
            draw_curve(ax, log, {"color": colour, "alpha": 0.3 if i else 1})
        for metric in ("clean", "pgd10"):
            if paper[metric] is not None:
                ax.plot(epochs, paper[metric], "o", color=colour, markerfacecolor="none", clip_on=False)
    explain_styles(ax, with_paper=any(any(paper.values()) for _, _, paper, _ in curves),
                   with_seeds=any(len(logs) > 1 for _, logs, *_ in curves))
    ax.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0, 1.03 * max((c[3] for c in curves), default=1)))
    if not any(logs for _, logs, *_ in curves):
        ax.set_ylim(0, 100)
    ax.legend(ncols=2)


def draw_curve(ax, log, style):
    """One run's clean and PGD-10 accuracy by epoch."""
    best, split = best_epoch(log)
    for metric, line in (("clean", "--"), ("pgd10", "-")):
        key = f"{split}_{metric}"
        points = [(e["epoch"], e[key]) for e in log if e.get(key) is not None]
        if points:
            ax.plot(*zip(*points), line, **style)
            ax.plot(best["epoch"], best[key], "*", markersize=9, **style)


def explain_styles(ax, with_paper, with_seeds):
    """Add to the legend of draw_curves what lines and markers mean."""
    for style, label in (("k--", "clean"), ("k-", "PGD-10"), ("k*", "best epoch")):
        ax.plot([], [], style, label=label)
    if with_paper:
        ax.plot([], [], "ko", markerfacecolor="none", label="the paper's best")
    if with_seeds:
        ax.plot([], [], "k-", alpha=0.3, label="other seeds")


def draw_weight_decay(ax, series):
    """Accuracy by weight decay. series: {name: [(weight decay, ours or {}, the paper's)]}."""
    for (name, points), colour in zip(series.items(), COLOURS):
        for metric, marker, line in (("clean", "s", "--"), ("pgd10", "o", "-")):
            filled = {"linestyle": line, "label": f"{name}, {METRICS[metric]}"}
            for column, style in ((1, filled), (2, HOLLOW)):
                known = [(p[0], p[column][metric]) for p in points if p[column].get(metric) is not None]
                ax.plot([x for x, _ in known], [y for _, y in known], marker=marker, color=colour, **style)
    ax.set(xscale="log", xlabel="weight decay (hollow: the paper's)", ylabel="accuracy (%)")
    ticks = sorted({p[0] for points in series.values() for p in points})
    ax.set_xticks(ticks, [f"{t:.0e}".replace("e-0", "e-") for t in ticks])
    ax.set_xticks([], minor=True)
    ax.legend()


def draw_architectures(ax, points):
    """Clean against PGD-10 accuracy, a circle's area by the size of the checkpoint.

    points: [(name, MB, ours or {}, the paper's)]. A name is written once, at ours if there is one.
    """
    for i, (name, size, ours, paper) in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        faces = [(f, face) for f, face in ((paper, "none"), (ours, colour)) if f.get("clean") is not None]
        for figures, face in faces:
            at = figures["clean"], figures["pgd10"]
            ax.scatter(*at, 2 * size, edgecolors=colour, facecolors=face, alpha=0.8)
        if faces:
            ax.annotate(name, at, (0, 5 + size**0.5), textcoords="offset points", fontsize=7, ha="center",
                        va="center")
    ax.margins(0.15)
    ax.set(xlabel="clean accuracy (%); hollow: the paper's", ylabel="PGD-10 accuracy (%)")
    separate_names(ax)


def separate_names(ax):
    """Put each name above or below its circle, near or far, where it overlaps no other name."""
    ax.figure.draw_without_rendering()  # places the axes
    taken = []
    for i, name in enumerate(ax.texts):
        y = name.get_position()[1] * (-1) ** i  # above and below in turn
        for y in (y, -y, 1.8 * y, -1.8 * y):
            name.set_position((0, y))
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def draw_comparison(axes, rows):
    """Clean and PGD-10 accuracy, a panel each. rows: {name: ([a seed's result], the paper's)}."""
    for ax, metric in zip(axes, ("clean", "pgd10")):
        for y, (results, paper) in enumerate(rows.values()):
            ax.plot([r[metric] for r in results], [y] * len(results), "o", color=COLOURS[0], alpha=0.8)
            if paper[metric] is not None:
                ax.plot([paper[metric]], [y], color="k", marker="o", **HOLLOW)
        low, high = ax.get_xlim()
        middle, span = (low + high) / 2, max(high - low, 3) / 2  # seeds differ by tenths: do not blow that up
        ax.set(xlabel=f"{METRICS[metric]} accuracy (%)", xlim=(middle - span, middle + span),
               yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5),
               yticklabels=rows if ax is axes[0] else [])


def draw_attack(axes, x, x_adv, eps, before, after):
    """Images x, adversarial images x' (N, 3, 32, 32) and magnified perturbations, a line of axes each.

    before, after: what the model says of x and x', one text an image.
    """
    difference = 0.5 + (x_adv - x) / (2 * eps)
    shown = ((x, before, "image"), (x_adv, after, "adversarial"),
             (difference, [""] * len(x), f"difference,\n{0.5 / eps:.0f} times"))
    for (images, titles, name), line in zip(shown, axes):
        line[0].set_ylabel(name)
        for image, title, ax in zip(images, titles, line):
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=8)


def draw_figure(name, rows):
    """Figure 1 to 4 of the paper ("f1" ...). rows: [(report.Row, [a seed's log], the seeds' mean or {})]."""
    fig, axes = subplots(1 + (name == "f1"), 9 if name == "f1" else 5, 4 if name == "f2" else 3.2)
    if name == "f1":
        series = {NAMES[m]: [] for m in ("preactresnet-18", "wrn-34-10")}
        for row, _, ours in rows:
            if row.id.startswith("f1a"):
                series[NAMES[row.setting["model"]]].append((row.setting["wd"], ours, row.paper))
        draw_weight_decay(axes[0][0], series)
    if name == "f2":
        architectures = [(row.setting["model"], ours, row.paper) for row, _, ours in rows]
        draw_architectures(axes[0][0], [(NAMES[m], TABLE_11[m], *figures) for m, *figures in architectures])
    else:
        curves = [(row.id, logs, row.paper, row.setting["epochs"]) for row, logs, _ in rows]
        draw_curves(axes[0][-1], [c for c in curves if not c[0].startswith("f1a")])
    return fig
