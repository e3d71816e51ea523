"""The paper's tables and figures, ours beside theirs, from the runs in results/ and runs/.

    python -m tools.report                  which runs are done, running, partly evaluated, missing
    python -m tools.report t4               a table (t2 ... t9, t12, t13, s1, x): figures and effects
    python -m tools.report t4 --laptop      what the tricks change at laptop scale, beside what the paper's do
    python -m tools.report f1               learning curves of a figure's rows (f1 to f4): figures/f1.png
    python -m tools.report curves RUN...    learning curves of runs' folders: figures/curves.png
    python -m tools.report effects          the paper's effects against ours: results/effects.png and a table
    python -m tools.report measured         the table in results/README.md of what is in there

A run counts only if its setting is that of the row that its folder, ROW or ROW@SEED, is named after, and its
result only if it is of the run's own eps, data set, network and number of images.
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

import eval_aa
from tools.figures import METRICS, draw_effects, draw_figure, draw_runs
from utils import HERE, NOT_A_SETTING, InputError, Parser, differences, run_script

# The rows without a trick. A row is compared with the one of its script, or with the same of its own network.
BASES = {"train_pgdat.py": "t2-base", "train_trades.py": "t12-r18-wd5e-4-relu-bneval"}
LAPTOP = {"clean": "clean", "pgd10": "pgd10", "apgd": "aa"}  # measured there: the paper's figure beside it
WORDS = {"ls": "label smoothing", "ema": "weight averaging", "awp": "weight perturbation"}
LIMITS = {"clean": 1.0, "pgd10": 1.0, "aa": 0.6}  # a figure further off the paper's is bold
TESTING = ("eval_every", "eval_from")
DEVIATION = 0.57  # of AA between seeds, of the best checkpoints of one setting: the largest published
EFFECTS = """\
Effects: ours (the paper's), against the row without a trick of the same network and eps, paired by seed and
precision, ± a standard error from one variance pooled over all rows. Bold: beyond two of these."""
LEGEND = f"""\
Figures: the mean of our seeds ± their standard deviation (the paper's figure, ours less it). Bold: off by
more than 1.0, in AA 0.6. ~: AutoAttack of some images only, an estimate that counts nowhere.
{EFFECTS}
Seeds needed: with so many of each setting the paper's effect on AA is two standard errors, if AA varies
between seeds by {DEVIATION}, the largest standard deviation that others published."""
LAPTOP_LEGEND = f"""\
{EFFECTS}
A tiny network, 2,500 images and 44 epochs reproduce no figure. Rows that differ in their network alone are
one run, beside the first of them. APGD: what APGD-CE and APGD-T leave, estimated from some images; the
paper's AA is beside it."""
SPOILT = "† The last batch of an epoch has 4 images, which spoil batch norm's running statistics."


@functools.cache  # once each
def warn(text):
    print(f"warning: {text}", file=sys.stderr)


# ---- Reading -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run's folder: args.json or None, log.jsonl or [], the result of the checkpoint asked for or None."""

    folder: Path
    record: dict | None
    log: list
    result: dict | None

    def about(self, key):
        """A value that args.json and result have in common."""
        return (self.record or self.result)[key]

    @property
    def precision(self):
        return self.record["args"]["precision"] if self.record else self.result["precision"]

    def figure(self, metric):
        """"clean", "pgd10", "aa" if complete, or "apgd", which may be of some images. None if unknown."""
        if metric == "apgd":
            return self.result["left"].get("apgd-t", [None])[0] if self.result["n_done"] else None
        return self.result[metric] if metric != "aa" or self.result["complete"] else None

    def seconds(self):
        """Of training and evaluation."""
        stages = self.result["seconds"].values() if self.result else ()
        return sum(stages) + sum(entry["seconds"] for entry in self.log)


class Row(NamedTuple):
    """A line of run_all.sh, and its runs.

    paper: {"clean": 82.52, "pgd10": 53.58, "aa": None}; nothing at laptop scale. run: the row that it is the
    same run as, often itself. command: that run's. setting: the script and what its flags resolve to, or {}
    if a checkpoint is only evaluated. evaluation: eval_aa.py's arguments. runs: {(seed, precision): [Run]},
    several if their commits differ.
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

    def all_runs(self):
        return [run for runs in self.runs.values() for run in runs]

    def precisions(self):
        """Those of the runs that are evaluated."""
        return list(dict.fromkeys(run.precision for run in self.all_runs() if run.result))

    def evaluated(self, precision):
        return [run for run in self.all_runs() if run.result and run.precision == precision]

    def figures(self, metric, precision):
        """{seed: figure, the mean if it has several runs}, where it is known."""
        found = {}
        for (seed, computed_in), runs in self.runs.items():
            figures = [run.figure(metric) for run in runs if run.result and computed_in == precision]
            if known := [figure for figure in figures if figure is not None]:
                found[seed] = statistics.mean(known)
        return found


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
    del setting["out"]
    return setting, eval_aa.parse_args(["-", *evaluation.split()[1:]])


def read_rows(laptop=False, roots=("results", "runs")):
    """{id: Row}, as run_all.sh lists them. A row whose script or flags fail is left out with a warning. At
    laptop scale rows may differ in their network alone: they are one run then, the first one's."""
    lines = listing(*["--laptop"] * laptop).splitlines()
    fields = [[field.strip() for field in line.split("|")] for line in lines]
    folders = [Path(root) for root in roots]
    if laptop:  # results/laptop-fp32 too
        folders = [folder for root in folders for folder in sorted(root.glob("laptop*"))]
    rows, built, first = {}, {}, {}
    for row, _, command in fields:
        if not command.startswith("= "):
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    new = Row(row, {}, row, command, *parse(command), {})
            except (Exception, SystemExit) as e:  # somebody's own script, half-written
                warn(f"row {row} is left out: {said.getvalue().strip() or repr(e)}")
                continue
            identity = str((new.setting, new.evaluation.which)) if laptop else row
            built[row] = first.setdefault(identity, new)
            find_runs(new, folders, built[row].runs)  # a folder may have the name of any of them
    for row, paper, command in fields:
        run = command[2:] if command.startswith("= ") else row
        if run in built:
            figures = [None if v == "-" or laptop else float(v) for v in paper.split("/")]
            rows[row] = built[run]._replace(id=row, paper=dict(zip(METRICS, figures)))
    return rows


def find_runs(row, roots, found):
    """Add a row's runs to found, {(seed, precision): [Run, ...]}. One of another setting, and one that
    repeats an evaluated run at the same commit, is skipped with a warning."""
    name = "result.json" if row.evaluation.which == "best" else "result_last.json"
    for folder in (folder for root in roots for folder in sorted(root.glob(f"{row.run}*"))):
        match = re.fullmatch(rf"{re.escape(row.run)}(?:@(\d+))?", folder.name)
        run = read_run(folder, name) if match else None
        if run is None:
            continue
        seed = int(match[1] or 0)
        if differ := deviations(run, row, seed):
            warn(f"{folder} is not row {row.run} ({'; '.join(differ)}): skipped")
            continue
        if run.result and (differ := of_another_evaluation(run, row)):
            warn(f"{folder / name} is of another evaluation ({'; '.join(differ)}): skipped")
            if run.record is None:
                continue
            run = run._replace(result=None)
        same = found.setdefault((seed, run.precision), [])
        repeated = [r for r in same if r.result and r.about("git_commit") == run.about("git_commit")]
        if repeated and run.result:
            warn(f"{folder} repeats {repeated[0].folder}, of the same seed, precision and commit: skipped")
        else:
            same.append(run)


def read_run(folder, result="result.json"):
    """The Run in a folder, or None if there is none."""
    record, log, result = (read_file(folder / name) for name in ("args.json", "log.jsonl", result))
    return Run(folder, record, log or [], result) if record or result else None


def read_file(path):
    """What a file of a run holds. None if it is not there or, with a warning, if it cannot be read."""
    key = {"args.json": "args", "log.jsonl": "epoch"}.get(path.name, "complete")
    try:
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found = [json.loads(text) for text in texts]
        if all(key in entry for entry in found):
            return found if path.suffix == ".jsonl" else found[0]
        problem = f"no {key!r} in it, as in files of older versions"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        problem = e
    warn(f"{path} is skipped: {problem}")


def of_another_evaluation(run, row):
    """How a result differs from one of the run's own eps, data set and network, and the row's images."""
    own = run.record["args"] if run.record else vars(row.evaluation)
    on_cifar = own["dataset"] in (None, "cifar10", "cifar100")
    due = {"eps": own["eps"], "model": own["model"], "activation": own["activation"] or "relu",
           "data_sha256": run.record["data_sha256"] if run.record else None,
           "n": row.evaluation.n or (10_000 if on_cifar else None)}
    return [f"{k} is {run.result[k]}, not {v}" for k, v in due.items() if v not in (None, run.result[k])]


def deviations(run, row, seed):
    """How a run's setting (was) differs from its row's with that seed (is)."""
    if not row.setting:
        return []
    if run.record is None:
        return ["it has no args.json"]
    was, now = {"script": run.record["command"][0], **run.record["args"]}, row.setting | {"seed": seed}
    for setting in (was, now):
        setting["data"] = Path(setting["dataset"]).name
        for key in ("precision", "compile", *TESTING):  # how it was done, not what
            setting.pop(key, None)
    defaults, _ = parse(row.setting["script"])
    return differences(was, now, defaults)


# ---- Arithmetic --------------------------------------------------------------------------------------------


def pooled_variance(groups):
    """The variance within groups of figures, of the seeds of a setting each; None if no group has several."""
    groups = [list(group) for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return squares / sum(len(group) - 1 for group in groups) if groups else None


def base_of(row, rows):
    """The row without a trick that another one is compared with, of the same network and eps, or None."""
    base = rows.get(BASES.get(row.setting.get("script")))
    if base is None:
        return None
    plain = base.setting | {k: row.setting[k] for k in ("model", "eps", "alpha")}
    alike = [other for other in rows.values() if other.setting == plain and other.id == other.run != row.run]
    return alike[0] if alike else None


def effects(rows, metrics):
    """{(run, precision): {metric: (mean difference from the base row, its standard error or None, seeds)}},
    paired by seed, with one variance pooled over all of them."""
    bases = {row.id: base_of(row, rows) for row in rows.values() if row.id == row.run}
    keys = [(run, precision) for run, base in bases.items() if base for precision in rows[run].precisions()]
    found = {key: {} for key in keys}
    for metric in metrics:
        pairs = {}
        for run, precision in keys:
            ours, theirs = (row.figures(metric, precision) for row in (rows[run], bases[run]))
            pairs[run, precision] = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        variance = pooled_variance(pairs.values())
        for key, differences in pairs.items():
            if n := len(differences):
                error = None if variance is None else math.sqrt(variance / n)
                found[key][metric] = statistics.mean(differences), error, n
    return found


def paper_effect(row, rows):
    """{metric: the paper's figure less its base row's, or None}."""
    base = base_of(row, rows)
    known = [m for m in METRICS if base and None not in (row.paper[m], base.paper[m])]
    return {m: row.paper[m] - base.paper[m] if m in known else None for m in METRICS}


def seeds_needed(effect):
    """How many seeds of each of two settings make their difference in AA two standard errors, as text."""
    if effect is None or round(effect, 2) == 0:
        return ""
    return f"{math.ceil(8 * (DEVIATION / effect) ** 2):,}"  # from effect = 2 sqrt(2 / n) DEVIATION


def spoilt(row):
    """Whether epochs end with a batch so small (4 images) that it spoils batch norm's running statistics."""
    images, batch = row.setting.get("n_train") or 50_000, row.setting.get("batch_size", 1)
    return 0 < images % batch < 16


# ---- Text and pictures -------------------------------------------------------------------------------------


def markdown(header, lines):
    """A table, without the columns in which nothing stands."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    lines = [[line[i] for i in kept] for line in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differing(settings):
    """The names of what some settings differ in. What one lacks, of another script, makes no difference."""
    known = {k: v for setting in settings for k, v in setting.items()}
    return [k for k, v in known.items() if len({str(setting.get(k, v)) for setting in settings}) > 1]


def settings(rows):
    """(names of the settings that rows differ in, {row: their values}), without those that have no effect."""
    shown = {}
    for row in rows:
        setting = dict(row.setting) or {k: getattr(row.evaluation, k) for k in ("model", "eps")}
        setting.pop("alpha", None)  # it goes with eps
        if setting.get("lr_schedule", "piecewise") != "piecewise":
            setting |= {"lr_decay_epochs": None, "lr_decay_factor": None}
        shown[row.id] = setting
    keys = differing(shown.values())
    texts = {row: [setting_text(k, setting.get(k)) for k in keys] for row, setting in shown.items()}
    return [k.replace("_", " ") for k in keys], texts


def setting_text(key, value):
    if value is None:
        return "-"
    if key == "eps" and math.isclose(255 * value, round(255 * value)):
        return f"{round(255 * value)}/255"
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)


def seeds_text(row, precision, seeds):
    """`2 in bf16`, and how many runs these are if a seed has several."""
    if precision is None:
        return "not evaluated" if row.all_runs() else "not run"
    runs = len(row.evaluated(precision))
    return f"{seeds} in {precision}" + (f", {runs} runs" if runs > seeds else "")


def mean_text(figures):
    """The mean over seeds, ± the standard deviation of several."""
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.2f}{spread}" if figures else ""


def difference_text(value, error=None):
    """`+0.55 ± 0.21`, bold beyond two standard errors."""
    if value is None:
        return ""
    bold = "**" if error is not None and abs(value) > 2 * error else ""
    return f"{bold}{value:+.2f}{bold}" + (f" ± {error:.2f}" if error is not None else "")


def beside(ours, papers):
    """`ours (the paper's)`; either may be empty."""
    return f"{ours} ({papers})".strip() if papers else ours


def figure_cell(row, metric, precision):
    """`ours (the paper's, difference), ~estimates`; at laptop scale ours alone."""
    figures, paper = list(row.figures(metric, precision).values()), row.paper.get(metric)
    papers = "" if paper is None else f"{paper:.2f}"
    if figures and papers:
        off = statistics.mean(figures) - paper
        papers += f", **{off:+.2f}**" if abs(off) > LIMITS[metric] else f", {off:+.2f}"
    parts = [beside(mean_text(figures), papers)]
    for result in (run.result for run in row.evaluated(precision) if metric == "aa"):
        if result["aa"] is not None and result["n_done"] and not result["complete"]:
            parts.append(f"~{result['aa']:.2f} ± {result['aa_error']:.2f} ({result['n_done']:,} images)")
    return ", ".join(filter(None, parts))


def effect_cell(effect, paper, seeds):
    """`our effect (the paper's)`, with the number of seeds if the base row lacks some of them."""
    mean, error, n = effect or (None, None, seeds)
    which = f", {n} of {seeds} seeds" if n < seeds else ""
    return beside(difference_text(mean, error) + which, difference_text(paper))


def replications(row):
    """A line for each figure that others have published for a row's setting."""
    entries = json.loads((Path(__file__).parent / "replicated.json").read_text()).get(row.run, [])
    figures = [" / ".join(f"{e[m]:.2f}" if m in e else "-" for m in METRICS) for e in entries]
    about = ["; ".join((e["who"], e["differs"], e["link"])) for e in entries]
    return [f"{row.id} by others: {text}; {who}" for text, who in zip(figures, about)]


def tested_otherwise(row):
    """A line for each run that was not tested after the epochs that its row says: its best may be another."""
    lines = []
    for run in (run for run in row.all_runs() if row.setting):
        was, now = ({k: args.get(k, 1) for k in TESTING} for args in (run.record["args"], row.setting))
        if differ := differences(now, was, {}):
            lines.append(f"{run.folder} was tested after other epochs than its row: {'; '.join(differ)}")
    return lines


def show_table(table, rows, laptop=None):
    """A table's rows, or at laptop scale its distinct runs, a line for each precision: settings, our figures
    and effects beside the paper's, and the seeds that its effect takes."""
    ours, metrics = (laptop, LAPTOP) if laptop else (rows, {m: m for m in METRICS})
    shown, lines, notes = {}, [], []
    for row in rows.values():
        if row.table == table and row.id in ours:
            shown.setdefault(ours[row.id].run if laptop else row.id, row)
    names, texts = settings([ours[row.id] for row in shown.values()])
    found = effects(ours, metrics)
    for row in shown.values():
        own, papers = ours[row.id], paper_effect(row, rows)
        needed = "" if laptop else seeds_needed(papers["aa"])
        for precision in own.precisions() or [None]:
            seeds, effect = len(own.figures("clean", precision)), found.get((own.run, precision), {})
            figures = [figure_cell(own, metric, precision) for metric in metrics]
            changes = [effect_cell(effect.get(m), papers[theirs], seeds) for m, theirs in metrics.items()]
            lines.append([own.id + " †" * spoilt(own), *texts[own.id], seeds_text(own, precision, seeds),
                          *figures, *changes, needed])
        notes += tested_otherwise(own) + ([] if laptop else replications(row))
    if any(spoilt(ours[row.id]) for row in shown.values()):
        notes.append(SPOILT)
    heads = ["Clean", "PGD-10", "APGD" if laptop else "AA"]
    header = ["row", *names, "seeds", *heads, *(f"effect, {head}" for head in heads), "seeds needed"]
    return "\n".join([markdown(header, lines), "", LAPTOP_LEGEND if laptop else LEGEND, *notes])


def state(row):
    """done, running, partial (evaluated in part) or missing, and the row's id with what there is to say."""
    runs, asked = row.all_runs(), row.evaluation
    results = [run.result for run in runs if run.result]
    done = [r for r in results if tuple(r["attacks"]) == asked.attacks
            and (r["complete"] or r["n_done"] >= (asked.stop_after or r["n"]))]
    if done:
        return "done", row.id + (f" x{len(done)}" if len(done) > 1 else "")
    if results:
        return "partial", row.id
    if runs:
        return "running", f"{row.id} ({max(len(run.log) for run in runs)} of {row.setting['epochs']} epochs)"
    return "missing", row.id


def show_status(rows):
    """A line a table: which distinct runs are done, running, evaluated in part, missing; and the hours."""
    tables, lines, hours = {}, [], {}
    for row in (row for row in rows.values() if row.run == row.id):
        for run in row.all_runs():
            hours[run.about("device")] = hours.get(run.about("device"), 0) + run.seconds() / 3600
        kind, name = state(row)
        states = tables.setdefault(row.table, {"done": [], "running": [], "partial": [], "missing": []})
        states[kind].append(name)
    for table, states in tables.items():
        counts = "  ".join(f"{len(names):3} {kind}" for kind, names in states.items())
        known = "; ".join(f"{k}: {', '.join(v)}" for k, v in states.items() if v and k != "missing")
        lines.append(f"{table:{max(map(len, tables))}}  {counts}   {known}".rstrip())
    return "\n".join([*lines, *(f"{h:.1f} hours on {device}" for device, h in hours.items())])


def show_measured(rows):
    """The table in results/README.md: a line for each row that has results, and each precision."""
    lines = []
    for row in (row for row in rows.values() if row.run == row.id):
        for precision in row.precisions():
            runs = row.evaluated(precision)
            devices = ", ".join(sorted({run.about("device") for run in runs}))
            took = datetime.timedelta(seconds=round(statistics.mean(run.seconds() for run in runs)))
            cells = [figure_cell(row, metric, precision) or "-" for metric in METRICS]
            cells += [f"{runs[0].result['n']:,}", devices, str(took)]
            lines.append([f"`{row.id}`", str(len(row.figures("clean", precision))), *cells])
    return markdown(["row", "seeds", *METRICS.values(), "test images", "device", "time a seed"], lines)


def show_effects(rows, laptop):
    """(the picture of all effects, its table), in the precision of most laptop runs. Each is compared with
    the paper's effect in the first of its rows, which is ResNet-18's if there is one."""
    most = statistics.mode([p for row in laptop.values() if row.id == row.run for p in row.precisions()]
                           or [None])
    lines, panels = [], {"PGD-10": [], "Clean": []}
    for (run, precision), effect in effects(laptop, LAPTOP).items():
        row, paper = rows[run], paper_effect(rows[run], rows)
        if precision != most or not effect or paper["clean"] is None:
            continue
        hollow, flags = spoilt(laptop[run]), re.sub(r" --model \S+", "", row.command.partition(" ;")[0])
        papers = [difference_text(change) or "-" for change in paper.values()]
        lines.append([f"`{run}`" + " †" * hollow, f"`{flags}`", *papers, *effect_cells(effect)])
        for metric, points in zip(("pgd10", "clean"), panels.values()):
            ours, error, _ = effect[metric]
            points.append((short_name(row), row.table, paper[metric], ours, error, hollow))
    if not lines:
        raise InputError("no laptop run with its base: ./run_all.sh run t2-base t7-r18-bneval --laptop")
    header = ["run", "flags", "paper: Clean", "PGD-10", "AA", "ours: seeds", "Clean", "PGD-10", "APGD"]
    return draw_effects(panels), "\n".join([markdown(header, lines), "", LAPTOP_LEGEND, SPOILT])


def effect_cells(effect):
    """Seeds, clean, PGD-10 and APGD of a laptop run's effect, as text."""
    texts = {m: difference_text(mean, error) for m, (mean, error, _) in effect.items()}
    return [str(effect["clean"][-1]), *(texts.get(m, "-") for m in LAPTOP)]


def short_name(row):
    """What is special about a row: t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 -> softplus-ls0.1."""
    name, trades = re.sub(r"^t\d+|-r18|-wrn10|-wd5e-4|-relu\b", "", row.id), row.table == "t12"
    return ("TRADES " if trades else "") + name.replace("-bneval" if trades else "-bntrain", "")[1:]


def show_curves(folders):
    """The learning curves of runs, a column each, named by what they differ in."""
    runs = [read_run(Path(folder)) for folder in folders]
    for folder, run in zip(folders, runs):
        if not run or not run.record:
            raise InputError(f"{folder} holds no run")
    args = [{k: v for k, v in run.record["args"].items() if k not in NOT_A_SETTING} for run in runs]
    keys, panels = differing(args), []
    for run, setting in zip(runs, args):
        defaults, _ = parse(run.record["command"][0])
        special = [k for k in keys if k in setting and setting[k] != defaults.get(k)]
        words = [f"{WORDS.get(k, k.replace('_', ' '))} {setting_text(k, setting[k])}" for k in special]
        name = ", ".join(words) or "the default setting" if keys else run.folder.absolute().name
        decays = setting["lr_decay_epochs"] if setting["lr_schedule"] == "piecewise" else []
        panels.append((name, run.log, [epoch for epoch in decays if epoch <= len(run.log)]))
    if len({name for name, *_ in panels}) < len(panels):  # of different scripts
        panels = [(run.folder.absolute().name, *rest) for run, (_, *rest) in zip(runs, panels)]
    return draw_runs(panels)


def show_figure(name, rows):
    """The learning curves of the rows of Figure 1 to 4 ("f1" ...). Of rows that are one run, the first."""
    shown = {}
    for row in rows.values():
        if row.id.startswith(name):
            shown.setdefault(row.run, (row, [run.log for run in row.all_runs()]))
    return draw_figure(list(shown.values()))


def save(fig, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    print(f"written: {path}", file=sys.stderr)


def main():
    p = Parser(description=__doc__, prog="python -m tools.report")
    p.add_argument("what", nargs="?", default="status", help="status, a table, a figure or a command (above)")
    p.add_argument("runs", nargs="*", metavar="RUN", help="for `curves`: folders of runs")
    p.add_argument("--laptop", action="store_true", help="for status or a table: of the rows at laptop scale")
    p.add_argument("--out", metavar="FILE", help="file of the picture (default: as above)")
    args = p.parse_args()
    what, drawn = args.what, ("f1", "f2", "f3", "f4", "curves", "effects")
    out = args.out or ("results/effects.png" if what == "effects" else f"figures/{what}.png")
    if bool(args.runs) != (what == "curves"):
        p.error("curves takes folders of runs, and nothing else does")
    if args.out and what not in drawn:
        p.error(f"--out has no effect with {what}, which draws nothing")
    if args.laptop and what in (*drawn, "measured"):
        p.error(f"--laptop has no effect with {what}")
    if what == "curves":
        return save(show_curves(args.runs), out)
    rows = read_rows(roots=["results"] if what == "measured" else ["results", "runs"])
    laptop = read_rows(laptop=True) if args.laptop or what == "effects" else None
    if what == "status":
        print(show_status(laptop or rows))
    elif what == "measured":
        print(show_measured(rows))
    elif what == "effects":
        fig, text = show_effects(rows, laptop)
        print(text)
        save(fig, out)
    elif what in drawn:
        save(show_figure(what, rows), out)
    elif what in {row.table for row in rows.values()} and not re.match("[fq]", what):
        print(show_table(what, rows, laptop))
    else:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")


if __name__ == "__main__":
    run_script(main)
