"""The drawings of report.py, from plain numbers: they read no file.

Accuracies are in per cent. A figure of the paper's is drawn hollow, a measured one filled.
"""

from models.__main__ import TABLE_11
from utils import InputError

METRICS = {"clean": "Clean", "pgd10": "PGD-10", "aa": "AA"}
NAMES = {"preactresnet-18": "ResNet-18", "preactresnet-50": "ResNet-50", "wrn-34-10": "WRN-34-10", "wrn-34-20": "WRN-34-20"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito: colour-blind readers tell them apart


def best_epoch(log):
    """(entry of the epoch that best.pt is from, "test" or "val": the split it was chosen on); (None, ...) if none was tested."""
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
    plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 200, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def draw_curves(ax, runs):
    """Clean (dashed) and PGD-10 accuracy (solid) by epoch, best epoch starred, of [(name, log or [], the paper's, epochs)]; the
    paper's, of its best epoch, are hollow at the end."""
    for (name, log, paper, epochs), colour in zip(runs, COLOURS * len(runs)):
        best, split = best_epoch(log)
        ax.plot([], [], color=colour, linewidth=4, label=name if log else f"{name} (not run)")
        for metric, line in (("clean", "--"), ("pgd10", "-")):
            points = [(e["epoch"], e[key]) for e in log if e.get(key := f"{split}_{metric}") is not None]
            if points:
                ax.plot(*zip(*points), line, color=colour)
                ax.plot(best["epoch"], dict(points).get(best["epoch"]), "*", color=colour, markersize=9)
            if paper[metric] is not None:
                ax.plot(epochs, paper[metric], "o", color=colour, markerfacecolor="none", clip_on=False)
    for style, label in (("k--", "clean"), ("k-", "PGD-10"), ("k*", "best epoch"), *([("ko", "the paper's best")] if any(any(r[2].values()) for r in runs) else [])):
        ax.plot([], [], style, label=label, markerfacecolor="none" if style == "ko" else None)
    ax.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0, 1.03 * max((r[3] for r in runs), default=1)))
    if not any(log for _, log, *_ in runs):
        ax.set_ylim(0, 100)
    ax.legend()


def draw_weight_decay(ax, series):
    """Accuracy by weight decay of {name: [(wd, ours or {}, the paper's)]}; the paper's are hollow."""
    for (name, points), colour in zip(series.items(), COLOURS):
        for metric, marker, line in (("clean", "s", "--"), ("pgd10", "o", "-")):
            filled, hollow = {"linestyle": line, "label": f"{name}, {METRICS[metric]}"}, {"linestyle": "", "markerfacecolor": "none", "markersize": 9}
            for column, style in ((1, filled), (2, hollow)):
                known = [p for p in points if p[column].get(metric) is not None]
                ax.plot([p[0] for p in known], [p[column][metric] for p in known], marker=marker, color=colour, **style)
    ax.set(xscale="log", xlabel="weight decay (hollow: the paper's)", ylabel="accuracy (%)")
    ax.legend()


def draw_architectures(ax, points):
    """Clean against PGD-10 accuracy, circle area by checkpoint size, of [(name, MB, ours or {}, the paper's)]; the paper's are hollow."""
    for i, (name, size, *figures) in enumerate(points):
        colour, above = COLOURS[i % len(COLOURS)], 1 - 2 * (i % 2)  # names above and below in turn: fewer collide
        for figure, face in zip(figures, (colour, "none")):
            if figure.get("clean") is not None:
                ax.scatter(figure["clean"], figure["pgd10"], 2 * size, edgecolors=colour, facecolors=face, alpha=0.8)
                ax.annotate(name, (figure["clean"], figure["pgd10"]), (0, above * (5 + size**0.5)),
                            textcoords="offset points", fontsize=7, ha="center", va="center")
    ax.margins(0.15)
    ax.set(xlabel="clean accuracy (%); hollow: the paper's", ylabel="PGD-10 accuracy (%)")


def draw_comparison(axes, runs):
    """Clean and PGD-10 accuracy, a panel each: for each of {name: ([a seed's result], the paper's)} a line of dots; the paper's are hollow."""
    for ax, metric in zip(axes, ("clean", "pgd10")):
        for y, (results, paper) in enumerate(runs.values()):
            ax.plot([r[metric] for r in results], [y] * len(results), "o", color=COLOURS[0], alpha=0.8)
            ax.plot([float("nan") if paper[metric] is None else paper[metric]], [y], "ko", markerfacecolor="none", markersize=9)
        low, high = ax.get_xlim()
        span = max(high - low, 3) / 2  # seeds differ by tenths: do not blow that up
        ax.set(xlabel=f"{METRICS[metric]} accuracy (%)", yticks=range(len(runs)), yticklabels=runs if ax is axes[0] else [], ylim=(len(runs) - 0.5, -0.5),
               xlim=((low + high) / 2 - span, (low + high) / 2 + span))


def draw_attack(axes, x, x_adv, eps, before, after):
    """Rows of pictures of x and x' (N, 3, 32, 32): image, adversarial image, magnified perturbation, with the predicted classes."""
    shown = ((x, before, "image"), (x_adv, after, "adversarial"), (0.5 + (x_adv - x) / (2 * eps), [""] * len(x), f"difference,\n{0.5 / eps:.0f} times"))
    for (images, titles, name), line in zip(shown, axes):
        line[0].set_ylabel(name)
        for image, title, ax in zip(images, titles, line):
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=8)


def draw_figure(name, rows):
    """Figure 1 to 4 of the paper ("f1" ...), of [(report.Row, log or [], the judged result or {})] of its rows."""
    fig, axes = subplots(1 + (name == "f1"), 9 if name == "f1" else 5, 4 if name == "f2" else 3.2)
    if name == "f1":
        sweep = [(row.setting["model"], (row.setting["wd"], ours, row.paper)) for row, _, ours in rows if row.id.startswith("f1a")]
        draw_weight_decay(axes[0][0], {NAMES[m]: [point for model, point in sweep if model == m] for m in ("preactresnet-18", "wrn-34-10")})
    if name == "f2":
        models = [(row.setting["model"], ours, row.paper) for row, _, ours in rows]
        draw_architectures(axes[0][0], [(NAMES.get(m, m), TABLE_11[m], ours, paper) for m, ours, paper in models])
    else:
        draw_curves(axes[0][-1], [(row.id, log, row.paper, row.setting["epochs"]) for row, log, _ in rows if not row.id.startswith("f1a")])
    return fig
