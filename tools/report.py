"""The paper's tables and figures, ours beside theirs, from the runs in runs/ and results/.

    python -m tools.report                    which runs are done, running, partly evaluated, missing; hours
    python -m tools.report t4                 a table (t2 ... t9, t12, t13, s1, x): ours (paper, difference)
    python -m tools.report t4 --laptop        what the tricks change at laptop scale, beside the paper's
    python -m tools.report f1                 a figure (f1 ... f4): figures/f1.png and .pdf
    python -m tools.report curves RUN...      learning curves of runs' folders: figures/curves.png
    python -m tools.report effects            the paper's effects against ours: results/effects.png, and a table
    python -m tools.report measured           the README's table of what is in results/

A run counts only if its setting is that of the row that its folder, ROW or ROW@SEED, is named after.
"""

import contextlib
import datetime
import functools
import importlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import eval_aa
from tools.figures import METRICS, NAMES, draw_effects, draw_figure, draw_runs
from utils import HERE, InputError, Parser, differences, run_script

# Tricks are compared with the row of their script that has none.
BASES = {"train_pgdat.py": "t2-base", "train_trades.py": "t12-r18-wd5e-4-relu-bneval"}
LAPTOP = {"clean": "clean", "pgd10": "pgd10", "apgd": "aa"}  # measured there: the paper's beside it
EFFECTS = ("t2", "t3", "t4", "t5", "t6", "t7", "t8", "t12")  # tables with a point each run in `effects`
LIMITS = {"clean": 1.0, "pgd10": 1.0, "aa": 0.6}  # a single seed's difference from the paper beyond it is bold
LEGEND = """\
In parentheses: the paper's figure, and ours less the paper's. Bold: beyond two standard errors of the mean over
seeds, their variance pooled over all rows with several seeds; with one seed beyond 1.0 (AA: 0.6), since AA of
best checkpoints varies by 0.12 to 0.57 between seeds (standard deviation)."""
LAPTOP_LEGEND = """\
Effects at a small scale (tiny network, 2,500 images, 44 epochs), no reproduction of a figure: the difference
from the row without the trick, paired by seed, ± a standard error from one variance, pooled over all laptop
runs; bold beyond two of them. The paper's is taken within one architecture. Rows without a trick are absolute.
APGD: left by APGD-CE and APGD-T, estimated from the first images; the paper's AA is beside it."""


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


warn = functools.cache(warn)  # every warning once


# ---- Reading -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run's folder: args.json or None, log.jsonl or [], the results of {"best", "last"} that there are."""

    folder: Path
    record: dict | None
    log: list
    results: dict

    def seconds(self):
        """What training and evaluation took."""
        return sum(e["seconds"] for e in self.log) + sum(sum(r["seconds"].values()) for r in self.results.values())


class Row(NamedTuple):
    """A line of run_all.sh, and its runs.

    paper: {"clean": 82.52, "pgd10": 53.58, "aa": None}. run: the row that it is the same run as, often
    itself. command: that run's. setting: the script and what its flags resolve to, or {} if a checkpoint is
    only evaluated. evaluation: eval_aa.py's arguments. runs: {seed: Run}.
    """

    id: str
    paper: dict
    run: str
    command: str
    setting: dict
    evaluation: object
    runs: dict

    @property
    def table(self):
        return self.id.partition("-")[0]

    def shown(self):
        """The setting that a table shows: nothing that has no effect; of a released checkpoint model, eps."""
        if not self.setting:
            return {k: getattr(self.evaluation, k) for k in ("model", "eps")}
        piecewise = self.setting.get("lr_schedule") == "piecewise"
        return self.setting | ({} if piecewise else {"lr_decay_epochs": None, "lr_decay_factor": None})


def listing(*flags):
    """What `run_all.sh list` prints: id | figures | command."""
    command = ["bash", HERE / "run_all.sh", "list", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def training_script(name):
    return importlib.import_module(Path(name).stem)


def parse(command):
    """(setting, evaluation) of a row's command, from the scripts' own parse_args."""
    train, _, evaluation = command.partition(";")
    script, *flags = train.split()
    if script == "eval_aa.py":
        return {}, eval_aa.parse_args(flags)
    setting = {"script": script, **vars(training_script(script).parse_args(flags))}
    return setting, eval_aa.parse_args(["-", *evaluation.split()[1:]])


def read_rows(laptop=False, roots=("runs", "results")):
    """{id: Row} in the order of run_all.sh. A row whose script or flags fail is left out with a warning."""
    fields = [[field.strip() for field in line.split("|")]
              for line in listing(*["--laptop"] * laptop).splitlines()]
    roots = [Path(root, "laptop" if laptop else "") for root in roots]
    built = {}
    for row, _, command in fields:
        if not command.startswith("= "):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    setting, evaluation = parse(command)
                    problem = None
                except (Exception, SystemExit) as e:  # somebody's own script, half-written
                    problem = (said.getvalue().strip() or f"{type(e).__name__}: {e}").splitlines()[-1]
            if problem:
                warn(f"row {row} is left out: {problem}")
                continue
            built[row] = Row(row, {}, row, command, setting, evaluation, {})
            built[row].runs.update(find_runs(built[row], roots))
    rows = {}
    for row, paper, command in fields:
        run = command[2:] if command.startswith("= ") else row
        if run in built:
            figures = {m: None if v == "-" else float(v) for m, v in zip(METRICS, paper.split("/"))}
            rows[row] = built[run]._replace(id=row, paper=figures)
    return rows


def read_run(folder):
    """The Run in a folder, or None if there is none."""
    def read(name):
        path = Path(folder, name)
        return path.read_text() if path.exists() else ""

    record, log = json.loads(read("args.json") or "null"), read("log.jsonl").splitlines()
    results = {"best": read("result.json"), "last": read("result_last.json")}
    results = {which: json.loads(text) for which, text in results.items() if text}
    for which in [which for which, result in results.items() if "n_done" not in result]:
        warn(f"{folder}: the result is of an older form and does not count: evaluate it again")
        del results[which]
    return Run(Path(folder), record, [json.loads(e) for e in log], results) if record or results else None


def find_runs(row, roots):
    """{seed: Run} of a row. Where folders name the same seed the first that is evaluated counts; one that has
    another setting is skipped with a warning."""
    found = {}
    for folder in (folder for root in roots for folder in sorted(root.glob(f"{row.run}*"))):
        name = re.fullmatch(rf"{re.escape(row.run)}(@(\d+))?", folder.name)
        if not name or not (run := read_run(folder)):
            continue
        seed = int(name[2] or 0)
        if differ := deviations(run, row, seed):
            warn(f"{folder} is not row {row.run} ({'; '.join(differ)}): skipped")
        elif seed not in found or run.results and not found[seed].results:
            found[seed] = run
    return found


def deviations(run, row, seed):
    """How a run's setting (was) differs from its row's with that seed (is)."""
    if not row.setting:
        return []
    if run.record is None:
        return ["it has no args.json"]

    def comparable(setting):
        how = ("precision", "compile")  # how it was computed, not what
        return {k: v for k, v in setting.items() if k not in how} | {"data": Path(setting["dataset"]).name}

    defaults = vars(training_script(row.setting["script"]).parse_args([]))
    was = comparable({"script": run.record["command"][0], **run.record["args"]})
    return differences(was, comparable(row.setting | {"seed": seed}), defaults)


# ---- Arithmetic --------------------------------------------------------------------------------------------


def judged(row):
    """{seed: result} of the checkpoint that the row is judged by, if it is evaluated on all its images."""
    found = {}
    for seed, run in row.runs.items():
        if result := run.results.get(row.evaluation.which):
            dataset = row.setting.get("dataset") or row.evaluation.dataset or "cifar10"
            images = row.evaluation.n or (10_000 if dataset in ("cifar10", "cifar100") else result["n"])
            found |= {seed: result} if result["n"] == images else {}
    return found


def values(row, metric):
    """{seed: figure}: "clean", "pgd10", "aa" where AutoAttack is complete, or "apgd", maybe of some images."""
    found = {}
    for seed, result in judged(row).items():
        if metric == "apgd":
            found[seed] = result["left"]["apgd-t"][0] if "apgd-t" in result["left"] and result["n_done"] else None
        elif metric != "aa" or result["complete"]:
            found[seed] = result[metric]
    return {seed: value for seed, value in found.items() if value is not None}


def pooled_variance(groups):
    """The variance within groups of figures, seeds of one setting each; None if no group has several."""
    groups = [group for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return squares / sum(len(group) - 1 for group in groups) if groups else None


def seed_variance(rows):
    """{metric: the variance between seeds, over all rows}."""
    runs = [row for row in rows.values() if row.id == row.run]
    return {m: pooled_variance([list(values(row, m).values()) for row in runs]) for m in METRICS}


def base_of(row, rows):
    """The row without tricks that a row's run is compared with, or None."""
    return rows.get(BASES.get(row.setting.get("script")))


def paired(row, base, metric):
    """{seed: figure less the base row's} of the seeds that both have, computed in one precision."""
    ours, theirs, pairs = values(row, metric), values(base, metric), {}
    for seed in sorted(ours.keys() & theirs.keys()):
        mine, other = (r.runs[seed].record["args"]["precision"] for r in (row, base))
        if mine == other:
            pairs[seed] = ours[seed] - theirs[seed]
        else:
            warn(f"{row.runs[seed].folder} is of {mine}, {base.runs[seed].folder} of {other}: left out")
    return pairs


def effects(laptop):
    """{laptop run: {metric: (mean paired difference, standard error or None, seeds)}} of all but the bases."""
    runs = [(row, base_of(row, laptop)) for row in laptop.values() if row.id == row.run]
    runs = [(row, base) for row, base in runs if base and row.run != base.run]
    found = {row.id: {} for row, _ in runs}
    for metric in LAPTOP:
        pairs = {row.id: list(paired(row, base, metric).values()) for row, base in runs}
        variance = pooled_variance(pairs.values())
        for row, all_seeds in pairs.items():
            if n := len(all_seeds):
                error = None if variance is None else math.sqrt(variance / n)
                found[row][metric] = statistics.mean(all_seeds), error, n
    return found


def paper_effect(row, rows):
    """{metric: the paper's figure less that of the same network and eps without tricks; None if it has none}
    """
    def comparable(setting):
        return {k: v for k, v in setting.items() if k != "out"}

    effect, base = dict.fromkeys(METRICS), base_of(row, rows)
    if base:
        plain = comparable(base.setting | {k: row.setting[k] for k in ("model", "eps", "alpha")})
        alike = [other.paper for other in rows.values() if comparable(other.setting) == plain]
        for m in METRICS:
            without = next((paper[m] for paper in alike if paper[m] is not None), None)
            if row.paper[m] is not None and without is not None:
                effect[m] = row.paper[m] - without
    return effect


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


# ---- Text --------------------------------------------------------------------------------------------------


def markdown(header, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def setting_text(key, value):
    """How a table shows a setting."""
    if value is None:
        return "-"
    if key == "eps" and math.isclose(255 * value, round(255 * value)):
        return f"{round(255 * value)}/255"
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else str(NAMES.get(value, value))


def settings(rows):
    """(names of the settings that rows differ in, {row: their values}), as text. A setting that a row lacks
    (of another script) does not make it differ."""
    shown = {row.id: row.shown() for row in rows}
    known = {k: v for setting in shown.values() for k, v in setting.items() if k not in ("out", "alpha")}
    keys = [k for k, v in known.items() if len({str(s.get(k, v)) for s in shown.values()}) > 1]
    texts = {row: [setting_text(k, s.get(k)) for k in keys] for row, s in shown.items()}
    return [k.replace("_", " ") for k in keys], texts


def mean_text(figures):
    """The mean over seeds, ± the standard deviation of several."""
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.2f}{spread}" if figures else ""


def cell(row, metric, variance):
    """`ours (paper, difference), ~estimates`. variance: between seeds, by metric, over all rows."""
    figures, paper, parts = list(values(row, metric).values()), row.paper[metric], []
    if figures and paper is not None:
        difference, n = round(statistics.mean(figures) - paper, 2), len(figures)
        limit = 2 * math.sqrt(variance[metric] / n) if n > 1 else LIMITS[metric]
        bold = "**" if abs(difference) > limit else ""
        parts.append(f"{mean_text(figures)} ({paper:.2f}, {bold}{difference:+.2f}{bold})")
    elif figures or paper is not None:
        parts.append(mean_text(figures) if figures else f"({paper:.2f})")
    for result in judged(row).values() if metric == "aa" else ():
        if result["aa"] is not None and result["n_done"] and not result["complete"]:
            parts.append(f"~{result['aa']:.2f} ± {result['aa_error']:.2f} ({result['n_done']:,} images)")
    return ", ".join(parts)


def mode_cell(train, eval, metric):
    """`ours (paper)` of a row in eval mode less the one in train mode, as Table 7 prints."""
    a, b = (list(values(row, metric).values()) for row in (train, eval))
    ours = f"{statistics.mean(b) - statistics.mean(a):+.2f} " if a and b else ""
    return f"{ours}({eval.paper[metric] - train.paper[metric]:+.2f})"


def replication_cell(row, replicated, notes):
    """What others have published for a row's setting: `84.15 / - / 48.72 [1]`; [1] is the first of notes."""
    cells = []
    for entry in replicated.get(row.run, []):
        note = "; ".join(entry[k] for k in ("who", "differs", "link"))
        if note not in notes:
            notes.append(note)
        figures = " / ".join(f"{entry[m]:.2f}" if m in entry else "-" for m in METRICS)
        cells.append(f"{figures} [{notes.index(note) + 1}]")
    return ", ".join(cells)


def show_table(rows, all_rows):
    """Rows in the paper's order: the settings that they differ in, the figures, and what others got."""
    replicated = json.loads((Path(__file__).parent / "replicated.json").read_text())
    names, texts = settings(rows)
    lines, notes, variance = [], [], seed_variance(all_rows)
    for row in rows:
        cells = [cell(row, m, variance) for m in METRICS]
        lines.append([row.id, *texts[row.id], *cells, replication_cell(row, replicated, notes)])
        train = all_rows.get(row.id.replace("-bneval", "-bntrain"))
        if row.table == "t7" and train and train.id != row.id:
            lines.append(["eval - train", *("" for _ in names), *(mode_cell(train, row, m) for m in METRICS), ""])
    header = ["row", *names, *METRICS.values()] + ["replicated by others"] * bool(notes)
    below = [LEGEND] + ["~: AutoAttack of some images only, an estimate with its standard error, which counts "
                        "nowhere."] * any("~" in text for line in lines for text in line)
    below += [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([markdown(header, [line[: len(header)] for line in lines]), "", *below])


def difference_text(value):
    return "-" if value is None else f"{value:+.2f}"


def effect_text(effect):
    """`+0.55 ± 0.21`, bold beyond two standard errors; nothing where there is no run yet."""
    if effect is None:
        return ""
    mean, error, _ = effect
    if error is None:
        return f"{mean:+.2f}"
    bold = "**" if abs(mean) > 2 * error else ""
    return f"{bold}{mean:+.2f}{bold} ± {error:.2f}"


def show_laptop_table(rows, all_rows, laptop):
    """Each row's effect at laptop scale, beside the paper's."""
    rows = [row for row in rows if row.id in laptop]
    (names, texts), found, lines = settings(rows), effects(laptop), []
    for row in rows:
        small, paper, cells = laptop[row.id], paper_effect(row, all_rows), []
        for metric, theirs in LAPTOP.items():
            figures = list(values(small, metric).values())
            seeds = len(figures) if metric == "clean" else seeds
            beside = difference_text(paper[theirs])
            if small.run in found:
                effect = found[small.run].get(metric)
                ours, seeds = effect_text(effect), effect[2] if effect and metric == "clean" else seeds
            else:
                ours, beside = mean_text(figures), "-" if row.paper[theirs] is None else f"{row.paper[theirs]:.2f}"
            cells += ["-" if metric == "apgd" and "apgd-t" not in small.evaluation.attacks else ours, beside]
        lines.append([row.id, *texts[row.id], str(seeds), *cells])
    header = ["row", *names, "seeds", "Clean", "the paper's", "PGD-10", "the paper's", "APGD", "the paper's AA"]
    return f"{markdown(header, lines)}\n\n{LAPTOP_LEGEND}"


def state(row):
    """done, running, partial (evaluated in part) or missing, and the row's id with what there is to say."""
    asked = row.evaluation.attacks
    done = [r for r in judged(row).values() if tuple(r["attacks"]) == asked
            and (r["complete"] or r["n_done"] >= (row.evaluation.stop_after or r["n"]))]
    if done:
        return "done", row.id + (f" ({len(done)} seeds)" if len(done) > 1 else "")
    if any(run.results for run in row.runs.values()):
        return "partial", row.id
    if row.runs:
        epochs = max(len(run.log) for run in row.runs.values())
        return "running", f"{row.id} ({epochs} of {row.setting['epochs']} epochs)"
    return "missing", row.id


def show_status(rows):
    """A line a table: which distinct runs are done, running, evaluated in part, missing; hours spent."""
    kinds = ("done", "running", "partial", "missing")
    tables, hours = {}, {"GPU": 0.0, "CPU": 0.0}
    for row in (row for row in rows.values() if row.run == row.id):
        for run in row.runs.values():
            record = run.record or next(iter(run.results.values()))
            hours["GPU" if record["versions"]["cuda"] else "CPU"] += run.seconds() / 3600
        kind, name = state(row)
        tables.setdefault(row.table, {k: [] for k in kinds})[kind].append(name)
    lines, width = [], max(map(len, tables))
    for table, states in tables.items():
        counts = "  ".join(f"{len(states[k]):3} {k}" for k in kinds)
        known = "; ".join(f"{k}: {', '.join(states[k])}" for k in kinds[:3] if states[k])
        lines.append(f"{table:{width}}  {counts}   {known}".rstrip())
    return "\n".join(lines + [f"{kind}-hours {h:.2f}" for kind, h in hours.items()])


def show_measured(rows):
    """The README's table: a line for each row that has results."""
    lines, variance = [], seed_variance(rows)
    for row in (row for row in rows.values() if row.run == row.id and judged(row)):
        results = list(judged(row).values())
        runs = [row.runs[seed] for seed in judged(row)]
        devices = sorted({(run.record or result)["device"] for run, result in zip(runs, results)})
        took = datetime.timedelta(seconds=round(statistics.mean(run.seconds() for run in runs)))
        lines.append([f"`{row.id}`", str(len(runs)), *(cell(row, m, variance) or "-" for m in METRICS),
                      f"{results[0]['n']:,}", ", ".join(devices), str(took)])
    return markdown(["row", "seeds", *METRICS.values(), "test images", "device", "time a seed"], lines)


# ---- Pictures ----------------------------------------------------------------------------------------------


def show_effects(rows, laptop):
    """(the picture of all effects, its table in markdown): a point each laptop run of EFFECTS, beside the
    paper's figure for ResNet-18, or else WRN-34-10, or else its first architecture."""
    found, rank = effects(laptop), {"preactresnet-18": 0, "wrn-34-10": 1}
    compared = {run: [] for run in found}
    for row in rows.values():
        if row.table in EFFECTS and row.id in laptop and laptop[row.id].run in found:
            compared[laptop[row.id].run].append(row)
    compared = {run: min(those, key=lambda row: rank.get(row.setting["model"], 2))
                for run, those in compared.items() if those}
    lines, points = [], {"pgd10": [], "clean": []}
    for run, row in compared.items():
        paper, ours = paper_effect(row, rows), found[run]
        flags = re.sub(r" --model \S+", "", row.command.partition(";")[0].strip())
        seeds = max((effect[2] for effect in ours.values()), default=0)
        lines.append([f"`{run}`", f"`{flags}`", *(difference_text(paper[m]) for m in METRICS),
                      *(effect_text(ours.get(m)) for m in LAPTOP), str(seeds)])
        for metric, shown in points.items():
            if metric in ours and paper[metric] is not None:
                mean, error, _ = ours[metric]
                shown.append((short_name(row), row.table, paper[metric], mean, error))
    if not points["pgd10"]:
        raise InputError("there is no laptop run with its base yet: ./run_all.sh run t2-base t4-r18-ls0.3 --laptop")
    panels = {}
    for metric, shown in points.items():
        x, y = (np.array([point[i] for point in shown]) for i in (2, 3))
        low, high = bootstrap_interval(x, y)
        panels[f"{METRICS[metric]}, {len(shown)} runs: Spearman's rank correlation {spearman(x, y):.2f} "
               f"(95 % interval {low:.2f} to {high:.2f})"] = shown
    header = ["run", "flags", "paper: Clean", "PGD-10", "AA", "ours: Clean", "PGD-10", "APGD", "seeds"]
    return draw_effects(panels), f"{markdown(header, lines)}\n\n{LAPTOP_LEGEND}"


def short_name(row):
    """What is special about a row: t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 -> softplus-bntrain-ls0.1"""
    name = re.sub(r"^t\d+-(r18-|wrn10-)?(wd5e-4-)?(relu-)?", "", row.id).removesuffix("-relu-bntrain")
    return f"TRADES {name}" if row.table == "t12" else name


def show_curves(folders):
    """The learning curves of runs, a panel each."""
    runs = []
    for folder in folders:
        run = read_run(folder)
        if not run or not run.record or not run.log:
            raise InputError(f"{folder} holds no run with a log")
        args = run.record["args"]
        decays = args["lr_decay_epochs"] if args["lr_schedule"] == "piecewise" else []
        runs.append((Path(folder).absolute().name, run.log, decays))
    return draw_runs(runs)


def show_figure(name, rows):
    """Figure 1 to 4 of the paper."""
    shown = []
    for row in (row for row in rows.values() if row.id.startswith(name)):
        means = {m: statistics.mean(figures) for m in METRICS if (figures := values(row, m).values())}
        shown.append((row, [run.log for run in row.runs.values() if run.log], means))
    if not any(logs or ours for _, logs, ours in shown):
        if not any(any(row.paper.values()) for row, *_ in shown):
            raise InputError(f"{name}: nothing has been run, and the paper prints no figures")
        warn(f"{name}: nothing has been run: only the paper's figures are drawn")
    return draw_figure(name, shown)


def save(fig, *paths):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path)
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)


# ---- The command line --------------------------------------------------------------------------------------


def main():
    p = Parser(description=__doc__, prog="python -m tools.report")
    p.add_argument("what", nargs="?", default="status", help="status, a table, a figure or a command (above)")
    p.add_argument("runs", nargs="*", metavar="RUN", help="for `curves`: folders of runs")
    p.add_argument("--laptop", action="store_true", help="for a table or status: of the rows at laptop scale")
    p.add_argument("--out", help="file of a picture, in the format of its suffix (default: as above)")
    args = p.parse_args()
    what, pictures = args.what, {"f1", "f2", "f3", "f4", "curves", "effects"}
    if bool(args.runs) != (what == "curves"):
        p.error("curves takes folders of runs, and nothing else does")
    if args.out and what not in pictures:
        p.error(f"--out has no effect with {what}, which draws nothing")
    if args.laptop and what in pictures | {"measured"}:
        p.error(f"--laptop has no effect with {what}")
    if what == "curves":
        return save(show_curves(args.runs), args.out or "figures/curves.png")
    rows = read_rows(roots=["results"] if what == "measured" else ["runs", "results"])
    table = [row for row in rows.values() if row.table == what and not re.match("[fq]", what)]
    laptop = read_rows(laptop=True) if args.laptop or what == "effects" else None
    if table:
        print(show_laptop_table(table, rows, laptop) if args.laptop else show_table(table, rows))
    elif what == "status":
        print(show_status(laptop or rows))
    elif what == "measured":
        print(show_measured(rows))
    elif what == "effects":
        fig, text = show_effects(rows, laptop)
        print(text)
        save(fig, args.out or "results/effects.png")
    elif what in pictures:
        save(show_figure(what, rows), *([args.out] if args.out else [f"figures/{what}{s}" for s in (".png", ".pdf")]))
    else:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")


if __name__ == "__main__":
    run_script(main)
