"""The paper's tables and figures, ours beside theirs, from the runs in results/ and runs/.

    python -m tools.report                  which seeds are done, and the epoch of what is under way
    python -m tools.report t4               a table (t2 ... t9, t12, t13, s1, x): figures and effects
    python -m tools.report t4 --laptop      what the tricks change at laptop scale, beside what the paper's do
    python -m tools.report f1               learning curves of a figure's rows (f1 to f4): figures/f1.png
    python -m tools.report curves RUN...    learning curves of runs' folders: figures/curves.png
    python -m tools.report effects          the paper's effects against ours: results/effects.png and a table
    python -m tools.report measured         the table in results/README.md of what is in there

A run counts if its setting is that of the row that its folder, ROW or ROW@SEED, is named after. Its result
counts if training is complete, and it is of the best epoch (of the last one, if the row is judged by that).
"""

import datetime
import importlib
import json
import math
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import eval_aa
from tools.figures import METRICS, draw_effects, draw_figure, draw_runs
from utils import HERE, NOT_A_SETTING, InputError, Parser, best, differences, run_script

# The rows without a trick. A row is compared with the one of its script, or with the same of its own network.
BASES = {"train_pgdat.py": "t2-base", "train_trades.py": "t12-r18-wd5e-4-relu-bneval"}
LAPTOP = ("clean", "pgd10", "apgd")  # what is measured at laptop scale
HOW = ("precision", "compile", "eval_every", "eval_from")  # how a run was done and tested, not what it is
WORDS = {"ls": "label smoothing", "wd": "weight decay", "ema": "weight averaging",
         "awp": "weight perturbation", "n_train": "training images"}
DEVIATION = 0.57  # of AA between seeds, of the best checkpoints of one setting: the largest published
LEGEND = """\
Figures: the mean over seeds ± their standard deviation; a seed's is the mean of its runs in any precision
(bf16 less fp32: +0.05 ± 0.10 clean over nine pairs). ~: an estimate from some images, which counts nowhere.
Effects: less the row without a trick of the same network and eps, paired by seed, ± a standard error from one
variance pooled over all rows. Bold: beyond two of these."""
NEEDED = f"Seeds needed: for the paper's effect on AA to be two standard errors if seeds vary by {DEVIATION}."
SCALE = """\
A tiny network, 2,500 images and 44 epochs reproduce no figure. Rows that differ in their network alone are
one run, beside the first of them. APGD: what APGD-CE and APGD-T leave of some images; the paper's is AA."""


# ---- Reading -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run's folder: args.json or None, log.jsonl or [], the result of the checkpoint asked for or None."""

    record: dict | None
    log: list
    result: dict | None

    def figure(self, metric):
        """"clean", "pgd10", "aa" if complete, or "apgd", which may be of some images. None if unknown."""
        if self.result is None or metric == "aa" and not self.result["complete"]:
            return None
        return self.result["left"].get("apgd-t", [None])[0] if metric == "apgd" else self.result[metric]


class Row(NamedTuple):
    """A line of run_all.sh, and its runs."""

    id: str
    paper: dict         # {"clean": 82.52, "pgd10": 53.58, "aa": None}
    run: str            # the row that it is the same run as, often itself
    flags: str          # of that run: its script and flags
    setting: dict       # the script and what its flags resolve to; {} if a checkpoint is only evaluated
    evaluation: object  # eval_aa.py's arguments
    runs: dict          # {seed: [Run]}

    @property
    def table(self):
        return self.id.partition("-")[0]

    def evaluated(self):
        return [run for runs in self.runs.values() for run in runs if run.result]

    def figures(self, metric):
        """{seed: the mean of its runs}, where it is known."""
        known = {seed: [run.figure(metric) for run in runs if run.figure(metric) is not None]
                 for seed, runs in sorted(self.runs.items())}
        return {seed: statistics.mean(figures) for seed, figures in known.items() if figures}


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
    """{id: Row}, as run_all.sh lists them. At laptop scale rows that differ in their network alone are one
    run, named after the first of them; its folder may have the name of any."""
    folders = [Path(root) for root in roots]
    if laptop:  # results/laptop-fp32 too
        folders = [folder for root in folders for folder in sorted(root.glob("laptop*"))]
    lines = listing(*["--laptop"] * laptop).splitlines()
    lines = [[field.strip() for field in line.split("|")] for line in lines]
    distinct, same, rows = {}, {}, {}  # distinct runs by what makes them so; the run of each id; all rows
    for row, _, command in lines:
        if not command.startswith("= "):
            setting, evaluation = parse(command)
            new = Row(row, {}, row, command.partition(" ;")[0], setting, evaluation, {})
            same[row] = distinct.setdefault(str((setting, evaluation.which)) if laptop else row, new)
            find_runs(same[row], row, folders)
    for row, paper, command in lines:
        figures = dict(zip(METRICS, (None if v == "-" else float(v) for v in paper.split("/"))))
        run = same[command[2:] if command.startswith("= ") else row]
        rows[row] = run._replace(id=row, paper={} if laptop else figures)
    return rows


def find_runs(row, name, roots):
    """Add the runs in the folders NAME and NAME@SEED to row.runs. A warning names what does not count."""
    file = "result.json" if row.evaluation.which == "best" else "result_last.json"
    for folder in [folder for root in roots for folder in sorted(root.glob(f"{name}*"))]:
        match = re.fullmatch(rf"{re.escape(name)}(?:@(\d+))?", folder.name)
        run = read_run(folder, file) if match else None
        if run is None:
            continue
        seed = int(match[1] or 0)
        if differ := deviations(run, row, seed):
            print(f"warning: {folder} is not row {name} ({'; '.join(differ)}): skipped", file=sys.stderr)
            continue
        if run.result and (differ := of_another_evaluation(run, row)):
            print(f"warning: {folder / file} does not count: {'; '.join(differ)}", file=sys.stderr)
            run = run._replace(result=None)
        runs = row.runs.setdefault(seed, [])
        if not any(other.log == run.log and other.result for other in runs):  # a copy of a run counts once
            runs.append(run)


def read_run(folder, result="result.json"):
    """The Run in a folder, or None if there is none."""
    paths = [folder / name for name in ("args.json", "log.jsonl", result)]
    record, log, result = (path.read_text() if path.exists() else "" for path in paths)
    if record or result:
        return Run(json.loads(record or "null"), [*map(json.loads, log.splitlines())],
                   json.loads(result or "null"))


def deviations(run, row, seed):
    """How a run's setting (was) differs from its row's with that seed (is)."""
    if not row.setting:
        return []
    if run.record is None:
        return ["it has no args.json"]
    was, now = {"script": run.record["command"][0], **run.record["args"]}, row.setting | {"seed": seed}
    for setting in (was, now):
        setting["data"] = Path(setting["dataset"]).name
        for key in HOW:
            setting.pop(key, None)
    defaults, _ = parse(row.setting["script"])
    return differences(was, now, defaults)


def of_another_evaluation(run, row):
    """How a result differs from what counts: it is of the run's eps, network and data, of its best or last
    epoch once all are trained, and of as many images as the row's."""
    own, due = run.record["args"] if run.record else vars(row.evaluation), {}
    if run.record:
        if len(run.log) != own["epochs"]:
            return [f"{len(run.log)} of {own['epochs']} epochs are trained"]
        entry = best(run.log) if row.evaluation.which == "best" else run.log[-1]
        due = {"epoch": entry["epoch"], "data_sha256": run.record["data_sha256"]}
    on_cifar = own["dataset"] in (None, "cifar10", "cifar100")
    due |= {"eps": own["eps"], "model": own["model"], "activation": own["activation"] or "relu",
            "n": row.evaluation.n or (10_000 if on_cifar else None)}
    return [f"{k} is {run.result[k]}, not {v}" for k, v in due.items() if v not in (None, run.result[k])]


# ---- Arithmetic --------------------------------------------------------------------------------------------


def pooled_variance(groups):
    """The variance within groups of figures, of the seeds of a setting each; None if no group has several."""
    groups = [list(group) for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return squares / sum(len(group) - 1 for group in groups) if groups else None


def base_of(row, rows):
    """The row without a trick that another one is compared with, of the same network and eps, or None."""
    if base := rows.get(BASES.get(row.setting.get("script"))):
        plain = base.setting | {k: row.setting[k] for k in ("model", "eps", "alpha")}
        alike = [other for other in rows.values() if other.setting == plain and other.id == other.run]
        return alike[0] if alike and alike[0].run != row.run else None


def effects(rows, metrics):
    """{run: {metric: (mean difference from the base row, its standard error or None, seeds)}} of the runs
    that share a seed with their base: paired by seed, with one variance pooled over all of them."""
    bases = {row.id: base_of(row, rows) for row in rows.values() if row.id == row.run}
    found = {}
    for metric in metrics:
        pairs = {}
        for run, base in bases.items():
            ours, theirs = rows[run].figures(metric), base.figures(metric) if base else {}
            pairs[run] = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        variance = pooled_variance(pairs.values())
        for run, differences in pairs.items():
            if n := len(differences):
                error = None if variance is None else math.sqrt(variance / n)
                found.setdefault(run, {})[metric] = statistics.mean(differences), error, n
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


# ---- Text --------------------------------------------------------------------------------------------------


def markdown(header, lines):
    """A table, without the columns in which nothing stands."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    lines = [[line[i] for i in kept] for line in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value, bold=False):
    """`+0.55`, "" for None."""
    return "" if value is None else f"**{value:+.2f}**" if bold else f"{value:+.2f}"


def figure_cells(row, metric):
    """Our mean over seeds ± their standard deviation, and estimates; the paper's figure; the difference."""
    figures, paper = list(row.figures(metric).values()), row.paper.get(metric)
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    ours = [f"{statistics.mean(figures):.2f}{spread}"] if figures else []
    for result in (run.result for run in row.evaluated() if metric == "aa"):
        if result["aa"] is not None and not result["complete"]:
            ours.append(f"~{result['aa']:.2f} ± {result['aa_error']:.2f} ({result['n_done']:,} images)")
    off = None if paper is None or not figures else statistics.mean(figures) - paper
    return [", ".join(ours), "" if paper is None else f"{paper:.2f}", signed(off)]


def effect_cells(effect, metrics=LAPTOP):
    """The seeds of a run's effect, and for each metric `**+0.55** ± 0.21`, bold beyond two standard errors.
    What is unknown is empty."""
    cells = [str(effect["clean"][-1])] if effect else [""]
    for mean, error, _ in (effect.get(metric, (None, None, 0)) for metric in metrics):
        spread, bold = ("", False) if error is None else (f" ± {error:.2f}", abs(mean) > 2 * error)
        cells.append(signed(mean, bold) + spread)
    return cells


def without_base(row, rows, flags):
    """A line that names the seeds of a row that its base row lacks, with the command that makes them."""
    base = base_of(row, rows)
    seeds = [seed for seed in row.figures("clean") if base and seed not in base.figures("clean")]
    command = " ".join(["./run_all.sh run", *(f"{base.id}@{seed}" for seed in seeds), *flags])
    return [f"{row.id}: seed {', '.join(map(str, seeds))} has no base run: {command}"] if seeds else []


def show_table(table, rows, laptop=None):
    """A table's rows, or at laptop scale its distinct runs: our figures (at full scale beside the paper's)
    and effects beside the paper's, and the seeds that these take."""
    ours, metrics = (laptop, LAPTOP) if laptop else (rows, METRICS)
    shown, lines, notes = {}, [], []
    for row in (row for row in rows.values() if row.table == table and row.id in ours):
        shown.setdefault(ours[row.id].run if laptop else row.id, row)
    found = effects(ours, metrics)
    for row in shown.values():
        own, papers = ours[row.id], paper_effect(row, rows)
        lines.append([row.id, row.flags, str(len(own.evaluated())), str(len(own.figures("clean"))),
                      *(cell for metric in metrics for cell in figure_cells(own, metric)),
                      *map(signed, papers.values()), *effect_cells(found.get(own.run, {}), metrics),
                      "" if laptop else seeds_needed(papers["aa"])])
        notes += without_base(own, ours, ["--laptop"] * bool(laptop))
    heads = ["Clean", "PGD-10", "APGD" if laptop else "AA"]
    header = ["row", "flags", "runs", "seeds",
              *(f"{head}: {what}" for head in heads for what in ("ours", "paper", "difference")),
              *(f"paper's effect: {name}" for name in METRICS.values()),
              *(f"our effect: {name}" for name in ("seeds", *heads)), "seeds needed"]
    return "\n".join([markdown(header, lines), "", LEGEND, SCALE if laptop else NEEDED, *notes])


def show_status(rows):
    """How many distinct runs of each table have begun, and how far each seed of these is."""
    lines, distinct = [], [row for row in rows.values() if row.run == row.id]
    for table in dict.fromkeys(row.table for row in distinct):
        members = [row for row in distinct if row.table == table]
        begun = [row for row in members if row.runs]
        lines.append(f"{table}: {len(begun)} of {len(members)} runs")
        for row in begun:
            # AutoAttack is done with all images; of some of its attacks an estimate is enough.
            done = row.figures("aa" if row.evaluation.attacks == eval_aa.STANDARD else "clean")
            states = []
            for seed, runs in sorted(row.runs.items()):
                state = f"at epoch {max(len(run.log) for run in runs)}"
                if any(run.result for run in runs):
                    state = "done" if seed in done else "evaluated in part"
                states.append(f"seed {seed} {state}")
            lines.append(f"    {row.id:40} {', '.join(states)}")
    return "\n".join(lines)


def show_measured(rows):
    """The table in results/README.md: a line for each row that has results."""
    lines = []
    for row in (row for row in rows.values() if row.run == row.id and row.evaluated()):
        runs = row.evaluated()
        devices = ", ".join(sorted({(run.record or run.result)["device"] for run in runs}))
        seconds = [sum(e["seconds"] for e in run.log) + sum(run.result["seconds"].values()) for run in runs]
        cells = [figure_cells(row, metric)[0] or "-" for metric in METRICS]
        lines.append([f"`{row.id}`", str(len(runs)), *cells, f"{runs[0].result['n']:,}", devices,
                      str(datetime.timedelta(seconds=round(statistics.mean(seconds))))])
    return markdown(["row", "runs", *METRICS.values(), "test images", "device", "time a run"], lines)


# ---- Pictures ----------------------------------------------------------------------------------------------


def show_effects(rows, laptop):
    """(the picture of all effects, its table). Each is compared with the paper's effect in the first of its
    rows, which is ResNet-18's if there is one."""
    lines, panels = [], {"PGD-10": [], "Clean": []}
    for run, effect in effects(laptop, LAPTOP).items():
        row, paper = rows[run], paper_effect(rows[run], rows)
        if paper["clean"] is None:
            continue
        lines.append([f"`{run}`", f"`{row.flags}`", *map(signed, paper.values()), *effect_cells(effect)])
        for metric, points in zip(("pgd10", "clean"), panels.values()):
            points.append((short_name(row), row.table, paper[metric], *effect[metric][:2]))
    if not lines:
        raise InputError("no laptop run with its base: ./run_all.sh run t2-base t7-r18-bneval --laptop")
    header = ["run", "flags", "paper: Clean", "PGD-10", "AA", "ours: seeds", "Clean", "PGD-10", "APGD"]
    return draw_effects(panels), "\n".join([markdown(header, lines), "", LEGEND, SCALE])


def short_name(row):
    """The trick of a row, whatever its strength: t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 -> softplus-ls."""
    default = "bneval" if row.table == "t12" else "bntrain"
    dull = rf"^t\d+|-r18|-wrn10|-wd5e-4|-relu\b|-{default}|-scaled|(?<=ls)0.*|(?<=softplus)-bn\w+|(-\d\d+)+$"
    return "TRADES " * (row.table == "t12") + re.sub(dull, "", row.id)[1:]


def show_curves(folders):
    """The learning curves of runs, a column each, named by what they differ in. What they share is the
    picture's title. Defaults, where scripts differ the first one's, are not named, but for the seed."""
    runs = [read_run(Path(folder)) for folder in folders]
    for folder, run in zip(folders, runs):
        if not run or not run.record:
            raise InputError(f"{folder} holds no run")
    settings = [{"script": run.record["command"][0], **run.record["args"]} for run in runs]
    defaults = {k: v for s in settings[::-1] for k, v in parse(s["script"])[0].items()} | {"seed": None}
    keys = [k for k in defaults if k not in NOT_A_SETTING]
    differ = [k for k in keys if len({str(s.get(k, defaults[k])) for s in settings}) > 1]

    def words(setting, keys, between=", "):
        special = {k: setting[k] for k in keys if k in setting and setting[k] != defaults[k]}
        return between.join(f"{WORDS.get(k, k.replace('_', ' '))} {v}" for k, v in special.items())

    panels = []
    for folder, run, setting in zip(folders, runs, settings):
        name = words(setting, differ, "\n") or "the default setting"
        decays = setting["lr_decay_epochs"] if setting["lr_schedule"] == "piecewise" else []
        panels.append((name if differ else Path(folder).absolute().name, run.log, decays))
    return draw_runs(panels, words(settings[0], [k for k in keys if k not in (*differ, *HOW)]))


def show_figure(name, rows):
    """The learning curves of the rows of Figure 1 to 4 ("f1" ...). Of rows that are one run, the first."""
    shown = {}
    for row in rows.values():
        if row.id.startswith(name):
            shown.setdefault(row.run, (row, [run.log for runs in row.runs.values() for run in runs]))
    return draw_figure(list(shown.values()))


def save(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
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
    if args.out and what not in drawn or args.laptop and what in (*drawn, "measured"):
        p.error("--out is for pictures, --laptop for the status and for tables")
    if what == "curves":
        return save(show_curves(args.runs), out)
    rows = read_rows(roots=["results"] if what == "measured" else ["results", "runs"])
    laptop = read_rows(laptop=True) if args.laptop or what == "effects" else None
    if what == "status":
        print(show_status(laptop or rows))
    elif what == "measured":
        print(show_measured(rows))
    elif what == "effects":
        picture, text = show_effects(rows, laptop)
        print(text)
        save(picture, out)
    elif what in drawn:
        save(show_figure(what, rows), out)
    elif what in {row.table for row in rows.values()} and not re.match("[fq]", what):
        print(show_table(what, rows, laptop))
    else:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    sys.stdout.reconfigure(errors="replace")       # what cannot print ± prints ?
    run_script(main)
