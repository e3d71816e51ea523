"""The paper's tables and figures, ours beside theirs, from the runs in runs/ and results/.

    python -m tools.report                  which runs are done, running, partly evaluated, missing; hours
    python -m tools.report t4               a table (t2 ... t9, t12, t13, s1, x): ours (paper, difference)
    python -m tools.report t4 --laptop      what the tricks change at laptop scale, beside what the paper's do
    python -m tools.report f1               learning curves of a figure's rows (f1 to f4): figures/f1.png
    python -m tools.report curves RUN...    learning curves of runs' folders: figures/curves.png
    python -m tools.report effects          the paper's effects against ours: results/effects.png and a table
    python -m tools.report measured         the table in results/README.md of what is in there

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
from tools.figures import METRICS, draw_effects, draw_figure, draw_runs
from utils import HERE, InputError, Parser, differences, run_script

# The rows without a trick, which the others of their script are compared with.
BASES = {"train_pgdat.py": "t2-base", "train_trades.py": "t12-r18-wd5e-4-relu-bneval"}
LAPTOP = {"clean": "clean", "pgd10": "pgd10", "apgd": "aa"}  # measured there: the paper's figure beside it
NAMES = {"preactresnet-18": "ResNet-18", "preactresnet-50": "ResNet-50", "senet-18": "SENet-18",
         "densenet-121": "DenseNet-121", "densenet-201": "DenseNet-201", "googlenet": "GoogLeNet",
         "dpn-26": "DPN-26", "dpn-92": "DPN-92", "resnext-29": "ResNeXt-29", "regnetx-200mf": "RegNetX-200MF",
         "regnetx-400mf": "RegNetX-400MF", "wrn-34-10": "WRN-34-10", "wrn-34-20": "WRN-34-20"}
EFFECTS = ("t2", "t3", "t4", "t5", "t6", "t7", "t8", "t12")  # the tables that `effects` draws
TESTING = ("eval_every", "eval_from")
LIMITS = {"clean": 1.0, "pgd10": 1.0, "aa": 0.6}  # one seed's difference from the paper is bold beyond this
LEGEND = """\
In parentheses: the paper's figure, and ours less the paper's. Bold: beyond two standard errors of the mean
over seeds, from one variance pooled over all rows with several seeds; with one seed beyond 1.0 (AA: 0.6), as
best checkpoints of one setting vary by 0.12 to 0.57 AA (standard deviation). ~: AutoAttack of some images
only, an estimate with its standard error, which counts nowhere."""
LAPTOP_LEGEND = """\
Effects at a small scale (tiny network, 2,500 images, 44 epochs), no reproduction of a figure: the difference
from the row without the trick, paired by seed, ± a standard error from one variance pooled over all laptop
runs; bold beyond two of these. The paper's is taken within one architecture. The rows without a trick are
absolute. APGD: what APGD-CE and APGD-T leave, estimated from some images; the paper's AA is beside it."""


@functools.cache  # once each
def warn(text):
    print(f"warning: {text}", file=sys.stderr)


# ---- Reading -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run's folder: args.json or None, log.jsonl or [], the results of {"best", "last"} that there are."""

    folder: Path
    record: dict | None
    log: list
    results: dict

    def seconds(self):
        """Of training and evaluation."""
        stages = [second for result in self.results.values() for second in result["seconds"].values()]
        return sum(stages) + sum(entry["seconds"] for entry in self.log)


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

    def judged(self):
        """{seed: result} of the checkpoint that the row asks for, where all images were evaluated."""
        results = {seed: run.results.get(self.evaluation.which) for seed, run in self.runs.items()}
        dataset = self.setting.get("dataset") or self.evaluation.dataset or "cifar10"
        images = self.evaluation.n or (10_000 if dataset in ("cifar10", "cifar100") else None)
        return {seed: r for seed, r in results.items() if r and r["n"] == (images or r["n"])}

    def values(self, metric):
        """{seed: figure}: "clean", "pgd10", "aa" if complete, or "apgd", which may be of some images."""
        found = {}
        for seed, result in self.judged().items():
            if metric == "apgd" and result["n_done"]:
                found[seed] = result["left"].get("apgd-t", [None])[0]
            elif metric in ("clean", "pgd10") or metric == "aa" and result["complete"]:
                found[seed] = result[metric]
        return {seed: value for seed, value in found.items() if value is not None}


def listing(*flags):
    """What `run_all.sh list` prints: id | the paper's figures | command."""
    command = ["bash", HERE / "run_all.sh", "list", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(command):
    """(setting, evaluation) of a row's command, by the scripts' own parse_args."""
    train, _, evaluation = command.partition(";")
    script, *flags = train.split()
    if script == "eval_aa.py":
        return {}, eval_aa.parse_args(flags)
    setting = {"script": script, **vars(importlib.import_module(Path(script).stem).parse_args(flags))}
    return setting, eval_aa.parse_args(["-", *evaluation.split()[1:]])


def read_rows(laptop=False, roots=("runs", "results")):
    """{id: Row}, as run_all.sh lists them. A row whose script or flags fail is left out with a warning. At
    laptop scale rows may differ in their network alone: they are one run then, the first one's."""
    lines = listing(*["--laptop"] * laptop).splitlines()
    fields = [[field.strip() for field in line.split("|")] for line in lines]
    rows, built, first = {}, {}, {}
    for row, _, command in fields:
        if not command.startswith("= "):
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    new = Row(row, {}, row, command, *parse(command), {})
            except (Exception, SystemExit) as e:  # somebody's own script, half-written
                problem = said.getvalue().strip() or f"{type(e).__name__}: {e}"
                warn(f"row {row} is left out: {problem.splitlines()[-1]}")
                continue
            identity = str((new.setting | {"out": None}, new.evaluation.which)) if laptop else row
            built[row] = first.setdefault(identity, new)
            for seed, run in find_runs(new, [Path(r, "laptop" * laptop) for r in roots]).items():
                built[row].runs.setdefault(seed, run)  # a folder may have the name of any of them
    for row, paper, command in fields:
        run = command[2:] if command.startswith("= ") else row
        if run in built:
            figures = {m: None if v == "-" else float(v) for m, v in zip(METRICS, paper.split("/"))}
            rows[row] = built[run]._replace(id=row, paper=figures)
    return rows


def read_run(folder):
    """The Run in a folder, or None if there is none."""
    texts = {path.name: path.read_text() for path in Path(folder).glob("*.json*")}
    record, log = json.loads(texts.get("args.json", "null")), texts.get("log.jsonl", "").splitlines()
    files = {"best": "result.json", "last": "result_last.json"}
    results = {which: json.loads(texts[name]) for which, name in files.items() if name in texts}
    for which in [which for which, result in results.items() if "complete" not in result]:
        warn(f"{folder}: its result is of an older form and does not count: evaluate it again")
        del results[which]
    return Run(Path(folder), record, [json.loads(e) for e in log], results) if record or results else None


def find_runs(row, roots):
    """{seed: Run} of a row. Of folders that name the same seed the first that is evaluated counts; one with
    another setting is skipped with a warning."""
    found = {}
    for folder in (folder for root in roots for folder in sorted(root.glob(f"{row.run}*"))):
        name = re.fullmatch(rf"{re.escape(row.run)}(?:@(\d+))?", folder.name)
        if name and (run := read_run(folder)):
            seed = int(name[1] or 0)
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
        how = ("precision", "compile", *TESTING)  # how it was computed and tested, not what
        data = Path(setting.get("dataset", "")).name
        return {k: v for k, v in setting.items() if k not in how} | {"data": data}

    was = comparable({"script": run.record["command"][0], **run.record["args"]})
    defaults, _ = parse(row.setting["script"])
    return differences(was, comparable(row.setting | {"seed": seed}), defaults)


def remarks(rows):
    """A line for each run that was not tested after the epochs that its row says: its best may be another."""
    lines = []
    for row in (row for row in rows if row.setting):
        for run in row.runs.values():
            before, now = ({k: args.get(k, 1) for k in TESTING} for args in (row.setting, run.record["args"]))
            if differ := differences(before, now, {}):
                lines.append(f"{run.folder} was tested after other epochs than its row: {'; '.join(differ)}")
    return lines


# ---- Arithmetic --------------------------------------------------------------------------------------------


def pooled_variance(groups):
    """The variance within groups of figures, of the seeds of a setting each; None if no group has several."""
    groups = [list(group) for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return squares / sum(len(group) - 1 for group in groups) if groups else None


def limits(rows):
    """limit(metric, n): beyond which the difference of n seeds' mean from the paper is more than noise."""
    runs = [row for row in rows.values() if row.id == row.run and any(row.paper.values())]
    variance = {m: pooled_variance([row.values(m).values() for row in runs]) for m in METRICS}
    return lambda metric, n: 2 * math.sqrt(variance[metric] / n) if n > 1 else LIMITS[metric]


def base_of(row, rows):
    """The row without a trick that a row is compared with, or None."""
    return rows.get(BASES.get(row.setting.get("script")))


def paired(row, base, metric):
    """{seed: figure less the base row's} of the seeds that both have, computed in one precision."""
    ours, theirs, pairs = row.values(metric), base.values(metric), {}
    for seed in sorted(ours.keys() & theirs.keys()):
        mine, other = (r.runs[seed].record["args"]["precision"] for r in (row, base))
        if mine == other:
            pairs[seed] = ours[seed] - theirs[seed]
        else:
            warn(f"{row.runs[seed].folder} is of {mine}, {base.runs[seed].folder} of {other}: left out")
    return pairs


def effects(laptop):
    """{laptop run: {metric: (mean paired difference, standard error or None, seeds)}}, without the bases."""
    runs = [(row, base_of(row, laptop)) for row in laptop.values() if row.id == row.run]
    runs = [(row, base) for row, base in runs if base and row.run != base.run]
    found = {row.id: {} for row, _ in runs}
    for metric in LAPTOP:
        pairs = {row.id: paired(row, base, metric).values() for row, base in runs}
        variance = pooled_variance(pairs.values())
        for row, seeds in pairs.items():
            if n := len(seeds):
                error = None if variance is None else math.sqrt(variance / n)
                found[row][metric] = statistics.mean(seeds), error, n
    return found


def paper_effect(row, rows):
    """{metric: the paper's figure less that of the same network at the same eps without a trick, or None}."""
    effect, base = dict.fromkeys(METRICS), base_of(row, rows)
    if base is None:
        return effect
    plain = base.setting | {k: row.setting[k] for k in ("model", "eps", "alpha")}
    alike = [other for other in rows.values() if other.setting | {"out": plain["out"]} == plain]
    for m in METRICS:
        without = next((other.paper[m] for other in alike if other.paper[m] is not None), None)
        if row.paper[m] is not None and without is not None and row not in alike:
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


def settings(rows):
    """(names of the settings that rows differ in, {row: their values}), as text: nothing that has no effect,
    and of a released checkpoint model and eps."""
    shown = {row.id: dict(row.setting) or {k: getattr(row.evaluation, k) for k in ("model", "eps")}
             for row in rows}
    for setting in shown.values():
        if setting.get("lr_schedule", "piecewise") != "piecewise":
            setting |= {"lr_decay_epochs": None, "lr_decay_factor": None}
    # A setting that a row lacks (of another script) does not make it differ.
    known = {k: v for setting in shown.values() for k, v in setting.items() if k not in ("out", "alpha")}
    keys = [k for k, v in known.items() if len({str(s.get(k, v)) for s in shown.values()}) > 1]
    texts = {row: [setting_text(k, s.get(k)) for k in keys] for row, s in shown.items()}
    return [k.replace("_", " ") for k in keys], texts


def setting_text(key, value):
    if value is None:
        return "-"
    if key == "eps" and math.isclose(255 * value, round(255 * value)):
        return f"{round(255 * value)}/255"
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else str(NAMES.get(value, value))


def mean_text(figures):
    """The mean over seeds, ± the standard deviation of several."""
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.2f}{spread}" if figures else ""


def cell(row, metric, limit):
    """`ours (paper, difference), ~estimates`."""
    figures, paper, parts = list(row.values(metric).values()), row.paper[metric], []
    if figures and paper is not None:
        difference = round(statistics.mean(figures) - paper, 2)
        bold = "**" if abs(difference) > limit(metric, len(figures)) else ""
        parts.append(f"{mean_text(figures)} ({paper:.2f}, {bold}{difference:+.2f}{bold})")
    elif figures or paper is not None:
        parts.append(mean_text(figures) or f"({paper:.2f})")
    for result in row.judged().values() if metric == "aa" else ():
        if result["aa"] is not None and result["n_done"] and not result["complete"]:
            parts.append(f"~{result['aa']:.2f} ± {result['aa_error']:.2f} ({result['n_done']:,} images)")
    return ", ".join(parts)


def mode_cell(train, eval, metric):
    """`ours (paper)` of a row in eval mode less the one in train mode, as Table 7 prints."""
    a, b = train.values(metric).values(), eval.values(metric).values()
    ours = f"{statistics.mean(b) - statistics.mean(a):+.2f} " if a and b else ""
    return f"{ours}({eval.paper[metric] - train.paper[metric]:+.2f})"


def replication_cell(entries, notes):
    """What others have published for a row's setting: `84.15 / - / 48.72 [1]`; [1] is the first of notes."""
    cells = []
    for entry in entries:
        note = "; ".join(entry[k] for k in ("who", "differs", "link"))
        if note not in notes:
            notes.append(note)
        figures = " / ".join(f"{entry[m]:.2f}" if m in entry else "-" for m in METRICS)
        cells.append(f"{figures} [{notes.index(note) + 1}]")
    return ", ".join(cells)


def show_table(table, rows):
    """A table's rows: the settings that they differ in, ours and the paper's figures, and what others got."""
    shown = [row for row in rows.values() if row.table == table]
    replicated = json.loads((Path(__file__).parent / "replicated.json").read_text())
    (names, texts), limit, lines, notes = settings(shown), limits(rows), [], []
    for row in shown:
        others = replication_cell(replicated.get(row.run, []), notes)
        lines.append([row.id, *texts[row.id], *(cell(row, m, limit) for m in METRICS), others])
        if table == "t7" and row.id.endswith("-bneval"):
            train = rows[row.id.replace("-bneval", "-bntrain")]
            modes = (mode_cell(train, row, m) for m in METRICS)
            lines.append(["eval - train", *[""] * len(names), *modes, ""])
    header = ["row", *names, *METRICS.values()] + ["replicated by others"] * bool(notes)
    text = markdown(header, [line[: len(header)] for line in lines])
    notes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([text, "", LEGEND, *notes, *remarks(shown)])


def difference_text(value, error=None):
    """`+0.55 ± 0.21`, bold beyond two standard errors."""
    if value is None:
        return "-"
    if error is None:
        return f"{value:+.2f}"
    bold = "**" if abs(value) > 2 * error else ""
    return f"{bold}{value:+.2f}{bold} ± {error:.2f}"


def laptop_cells(row, found):
    """Seeds, clean, PGD-10 and APGD of a laptop run, as text: its effect, or a base's own figures. Empty:
    there is no run yet."""
    if row.run in found:
        effect = found[row.run]
        texts, seeds = {m: difference_text(*effect[m][:2]) for m in effect}, effect.get("clean", [0])[-1]
    else:
        texts = {m: mean_text(list(row.values(m).values())) for m in LAPTOP}
        seeds = len(row.values("clean"))
    if "apgd-t" not in row.evaluation.attacks:
        texts["apgd"] = "-"
    return [str(seeds), *(texts.get(m, "") for m in LAPTOP)]


def show_laptop_table(table, rows, laptop):
    """What each row's trick changes at laptop scale, and in the paper."""
    shown = [row for row in rows.values() if row.table == table and row.id in laptop]
    (names, texts), found, lines = settings(shown), effects(laptop), []
    for row in shown:
        small = laptop[row.id]
        theirs = [f"{figure:.2f}" if figure else "-" for figure in row.paper.values()]
        if small.run in found:
            theirs = map(difference_text, paper_effect(row, rows).values())
        seeds, *ours = laptop_cells(small, found)
        lines.append([row.id, *texts[row.id], seeds, *(text for pair in zip(ours, theirs) for text in pair)])
    header = ["row", *names, "seeds", "Clean", "paper's", "PGD-10", "paper's", "APGD", "paper's AA"]
    return "\n".join([markdown(header, lines), "", LAPTOP_LEGEND, *remarks(laptop[row.id] for row in shown)])


def state(row):
    """done, running, partial (evaluated in part) or missing, and the row's id with what there is to say."""
    done = [r for r in row.judged().values() if tuple(r["attacks"]) == row.evaluation.attacks
            and (r["complete"] or r["n_done"] >= (row.evaluation.stop_after or r["n"]))]
    if done:
        return "done", row.id + (f" x{len(done)}" if len(done) > 1 else "")
    if any(run.results for run in row.runs.values()):
        return "partial", row.id
    if row.runs:
        epochs = max(len(run.log) for run in row.runs.values())
        return "running", f"{row.id} ({epochs} of {row.setting['epochs']} epochs)"
    return "missing", row.id


def show_status(rows):
    """A line a table: which distinct runs are done, running, evaluated in part, missing; hours spent."""
    kinds = ("done", "running", "partial", "missing")
    tables, hours, lines = {}, {"GPU": 0.0, "CPU": 0.0}, []
    for row in (row for row in rows.values() if row.run == row.id):
        for run in row.runs.values():
            record = run.record or next(iter(run.results.values()))
            hours["GPU" if record["versions"]["cuda"] else "CPU"] += run.seconds() / 3600
        kind, name = state(row)
        tables.setdefault(row.table, {k: [] for k in kinds})[kind].append(name)
    for table, states in tables.items():
        counts = "  ".join(f"{len(states[k]):3} {k}" for k in kinds)
        known = "; ".join(f"{k}: {', '.join(states[k])}" for k in kinds[:3] if states[k])
        lines.append(f"{table:{max(map(len, tables))}}  {counts}   {known}".rstrip())
    return "\n".join(lines + [f"{kind}-hours {h:.2f}" for kind, h in hours.items()])


def show_measured(rows):
    """The table in results/README.md: a line for each row that has results."""
    lines, limit = [], limits(rows)
    for row in (row for row in rows.values() if row.run == row.id and row.judged()):
        results, runs = list(row.judged().values()), [row.runs[seed] for seed in row.judged()]
        devices = sorted({(run.record or result)["device"] for run, result in zip(runs, results)})
        took = datetime.timedelta(seconds=round(statistics.mean(run.seconds() for run in runs)))
        lines.append([f"`{row.id}`", str(len(runs)), *(cell(row, m, limit) or "-" for m in METRICS),
                      f"{results[0]['n']:,}", ", ".join(devices), str(took)])
    return markdown(["row", "seeds", *METRICS.values(), "test images", "device", "time a seed"], lines)


# ---- Pictures ----------------------------------------------------------------------------------------------


def show_effects(rows, laptop):
    """(the picture of all effects, its table). Each laptop run is compared with the paper's figures of
    ResNet-18 if there are any, else of WRN-34-10, else of the table's first architecture."""
    found, alike, rank = effects(laptop), {}, {"preactresnet-18": 0, "wrn-34-10": 1}
    for row in rows.values():
        if row.table in EFFECTS and row.id in laptop and laptop[row.id].run in found:
            alike.setdefault(laptop[row.id].run, []).append(row)
    lines, points = [], {"pgd10": [], "clean": []}
    for run, candidates in alike.items():
        row = min(candidates, key=lambda row: rank.get(row.setting["model"], 2))
        paper, flags = paper_effect(row, rows), re.sub(r" --model \S+", "", row.command.partition(" ;")[0])
        ours = laptop_cells(laptop[run], found)
        lines.append([f"`{run}`", f"`{flags}`", *map(difference_text, paper.values()), *ours])
        for metric, shown in points.items():
            if metric in found[run] and paper[metric] is not None:
                shown.append((short_name(row), row.table, paper[metric], *found[run][metric][:2]))
    if not points["clean"]:
        raise InputError("no laptop run with its base: ./run_all.sh run t2-base t7-r18-bneval --laptop")
    panels = {}
    for metric, shown in points.items():
        x, y = (np.array([point[i] for point in shown]) for i in (2, 3))
        low, high = bootstrap_interval(x, y)
        panels[f"{METRICS[metric]}, {len(shown)} runs: Spearman's rank correlation {spearman(x, y):.2f} "
               f"(95 % interval {low:.2f} to {high:.2f})"] = shown
    header = ["run", "flags", "paper: Clean", "PGD-10", "AA", "ours: seeds", "Clean", "PGD-10", "APGD"]
    return draw_effects(panels), f"{markdown(header, lines)}\n\n{LAPTOP_LEGEND}"


def short_name(row):
    """What is special about a row: t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 -> softplus-ls0.1."""
    name, trades = re.sub(r"^t\d+|-r18|-wrn10|-wd5e-4|-relu\b", "", row.id), row.table == "t12"
    return ("TRADES " if trades else "") + name.replace("-bneval" if trades else "-bntrain", "")[1:]


def show_curves(folders):
    """The learning curves of runs, a panel each."""
    runs = []
    for folder in folders:
        run = read_run(folder)
        if not run or not run.record:
            raise InputError(f"{folder} holds no run")
        args = run.record["args"]
        decays = args["lr_decay_epochs"] if args["lr_schedule"] == "piecewise" else []
        decays = [epoch for epoch in decays if epoch <= len(run.log)]
        runs.append((Path(folder).absolute().name, run.log, decays))
    return draw_runs(runs)


def show_figure(name, rows):
    """The learning curves of the rows of Figure 1 to 4 ("f1" ...). Of rows that are one run, the first."""
    shown = {}
    for row in rows.values():
        if row.id.startswith(name):
            shown.setdefault(row.run, (row, [run.log for run in row.runs.values()]))
    return draw_figure(list(shown.values()))


def save(fig, *paths):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path)
    print(f"written: {', '.join(paths)}", file=sys.stderr)


# ---- The command line --------------------------------------------------------------------------------------


def main():
    p = Parser(description=__doc__, prog="python -m tools.report")
    p.add_argument("what", nargs="?", default="status", help="status, a table, a figure or a command (above)")
    p.add_argument("runs", nargs="*", metavar="RUN", help="for `curves`: folders of runs")
    p.add_argument("--laptop", action="store_true", help="for status or a table: of the rows at laptop scale")
    p.add_argument("--out", metavar="FILE", help="file of the picture (default: as above)")
    args = p.parse_args()
    what, figures = args.what, ("f1", "f2", "f3", "f4")
    if bool(args.runs) != (what == "curves"):
        p.error("curves takes folders of runs, and nothing else does")
    if args.out and what not in (*figures, "curves", "effects"):
        p.error(f"--out has no effect with {what}, which draws nothing")
    if args.laptop and what in (*figures, "curves", "effects", "measured"):
        p.error(f"--laptop has no effect with {what}")
    if what == "curves":
        return save(show_curves(args.runs), args.out or "figures/curves.png")
    rows = read_rows(roots=["results"] if what == "measured" else ["runs", "results"])
    laptop = read_rows(laptop=True) if args.laptop or what == "effects" else None
    if what == "status":
        print(show_status(laptop or rows))
    elif what == "measured":
        print(show_measured(rows))
    elif what == "effects":
        fig, text = show_effects(rows, laptop)
        print(text)
        save(fig, args.out or "results/effects.png")
    elif what in figures:
        fig = show_figure(what, rows)
        save(fig, *([args.out] if args.out else [f"figures/{what}.png", f"figures/{what}.pdf"]))
    elif what in {row.table for row in rows.values()} and not re.match("[fq]", what):
        print(show_laptop_table(what, rows, laptop) if args.laptop else show_table(what, rows))
    else:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")


if __name__ == "__main__":
    run_script(main)
