"""The paper's tables and figures, ours beside theirs, from the runs in runs/ and results/.

    python -m tools.report                    which rows are done, running, partly evaluated, missing; hours
    python -m tools.report t4                 a table (t2 ... t9, t12, t13, s1, x): ours (paper, difference)
    python -m tools.report f1                 a figure (f1 ... f4): figures/f1.png and .pdf (--out: elsewhere)
    python -m tools.report curves RUN...      learning curves, best epochs marked
    python -m tools.report compare RUN...     clean and PGD-10 accuracy of rows, seeds side by side
    python -m tools.report attack RUN         test images, adversarial versions, perturbations, predictions
    python -m tools.report agreement RUN RUN  how many images both withstand, only one of them, neither
    python -m tools.report deviations RUN     how its setting differs from the row that its folder names
    python -m tools.report collect RUN...     copy complete runs, without weights, to results/
    python -m tools.report robustbench RUN    the model-info JSON of a RobustBench entry
    python -m tools.report readme             renew the README's table of what is in results/

RUN is the path of a folder, such as runs/t2-base@1; most commands need one named after a row and its seed.
Differences from the paper beyond seed noise are bold.
"""

import json
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import eval_aa
import runs
import train_pgdat
import train_trades
from tools.figures import METRICS, NAMES, draw_attack, draw_comparison, draw_curves, draw_figure, subplots
from utils import InputError, attack_mode, load_dataset, pgd, random_start, seeded, to_float

SCRIPTS = {"train_pgdat.py": train_pgdat, "train_trades.py": train_trades}
NOISE = {"clean": 0.5, "pgd10": 0.5, "aa": 0.3}  # between seeds; larger differences from the paper are bold
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BEGIN, END = "<!-- measured, by tools.report readme -->", "<!-- end of measured -->"
LEGEND = ("In parentheses: the paper's figure, and ours less the paper's; bold beyond seed noise "
          f"({NOISE['clean']}; AA {NOISE['aa']}).")
TAKES = {"status": 0, "readme": 0, "f1": 0, "f2": 0, "f3": 0, "f4": 0, "attack": 1, "deviations": 1,
         "robustbench": 1, "agreement": 2, "curves": 99, "compare": 99, "collect": 99}  # at most so many RUNs
ROOTS = ("runs", "results")  # of runs, here
COLLECTED = ("args.json", "log.jsonl", "result.json", "result.npz", "result_last.json", "result_last.npz")


# ---- Reading -----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of run_all.sh.

    paper: {"clean": 82.52, "pgd10": 53.58, "aa": None}. run: the row that it is the same run as, often
    itself. setting: the script and what its flags resolve to, or {} if a checkpoint is only evaluated.
    evaluation: eval_aa.py's arguments. table: "t2", of "t2-base"; "released" and "quickstart" are two.
    """

    id: str
    paper: dict
    run: str
    setting: dict
    evaluation: object

    @property
    def table(self):
        return "released" if self.id.endswith("-released") else self.id.partition("-")[0]

    def shown(self):
        """The setting that a table shows: nothing that has no effect; of a released checkpoint model, eps."""
        if not self.setting:
            return {k: getattr(self.evaluation, k) for k in ("model", "eps")}
        piecewise = self.setting["lr_schedule"] == "piecewise"
        return self.setting | ({} if piecewise else {"lr_decay_epochs": None, "lr_decay_factor": None})


class Run(NamedTuple):
    """A run's folder: args.json, log, result.json, result_last.json. What is missing is None or empty."""

    folder: Path
    record: dict | None
    log: list
    best: dict | None
    last: dict | None


def row_and_seed(folder):
    """What a folder's name claims: (row, seed), t2-base being t2-base@0; ("", None) if the seed is no number.
    """
    row, _, seed = Path(folder).absolute().name.partition("@")
    return (row, int(seed or 0)) if (seed or "0").isdecimal() else ("", None)


def manifest():
    """{id: Row}, in the order of run_all.sh."""
    command = ["bash", runs.HERE / "run_all.sh", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = [[field.strip() for field in line.split("|")] for line in listed.splitlines()]
    commands, rows = {row: command for row, _, command in fields}, {}
    for row, paper, command in fields:
        run = command[2:] if command.startswith("= ") else row
        train, _, evaluation = commands[run].partition(";")
        script, *argv = train.split()
        trains = script in SCRIPTS
        setting = {"script": script, **vars(SCRIPTS[script].parse_args(argv))} if trains else {}
        asked = eval_aa.parse_args(["-", *evaluation.split()[1:]] if trains else argv)
        figures = {m: None if v == "-" else float(v) for m, v in zip(METRICS, paper.split("/"))}
        rows[row] = Row(row, figures, run, setting, asked)
    return rows


def read(path, form):
    """What runs.read_json reads; None if the file is missing or, with a warning that names it, malformed."""
    try:
        return runs.read_json(path, form) if path.exists() else None
    except InputError:
        warn(f"{path} is malformed: skipped")


def read_run(folder):
    """The Run in a folder, or None if there is none."""
    folder = Path(folder)
    record = read(folder / "args.json", runs.RECORD)
    best, last = (read(folder / name, eval_aa.RESULT) for name in ("result.json", "result_last.json"))
    log = read(folder / "log.jsonl", [runs.ENTRY]) if record else None
    return Run(folder, record, log or [], best, last) if record or best or last else None


def find_runs(row, roots=ROOTS, warns=True):
    """{seed: Run} of a row, from the first of the roots that holds a result of it.

    Folders of one root that name the same seed (t2-base, t2-base@0) are one run: all but the first are
    skipped with a warning.
    """
    found = {}
    for root in roots:
        here = {}
        for folder in sorted(Path(root).glob(f"{row.run}*")):
            name, seed = row_and_seed(folder)
            if name != row.run or not (run := read_run(folder)):
                continue
            if seed in here and warns:
                warn(f"{folder} is the same seed as {here[seed].folder}: skipped")
            here.setdefault(seed, run)
        done = {seed for seed, run in found.items() if run.best or run.last}
        found |= {seed: run for seed, run in here.items() if seed not in done}
    return found


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def replications():
    """{row: [{"who", "link", "differs", and figures}]}: what others have published for a row's setting."""
    return json.loads((Path(__file__).parent / "replicated.json").read_text())


def claimed(folder, rows):
    """(Run in a folder, Row that the folder's name claims). Raises InputError if there is none."""
    run, (row, _) = read_run(folder), row_and_seed(folder)
    if run is None or run.record is None:
        raise InputError(f"{folder} holds no run that can be read")
    if row not in rows:
        raise InputError(f"{folder}: run_all.sh has no row {Path(folder).absolute().name}")
    return run, rows[rows[row].run]


# ---- Arithmetic --------------------------------------------------------------------------------------------


def deviations(run, row):
    """How a run's setting (was) differs from its row's (is), with the seed that its folder claims."""
    if not row.setting:
        return []
    if run.record is None:
        return ["it has no args.json that can be read"]
    _, seed = row_and_seed(run.folder)
    want = row.setting | ({"seed": seed} if seed else {})
    got = {"script": run.record["command"][0], **run.record["args"]}
    got |= {k: want[k] for k in ("precision", "compile")}  # how it was computed, not what
    want, got = ({**s, "data": Path(s["dataset"]).name} for s in (want, got))
    return runs.differences(got, want, SCRIPTS[row.setting["script"]].make_parser())


def whole(result, row):
    """Whether a result holds the figures that the row's evaluation asks for, on all those images."""
    wanted = METRICS if row.evaluation.attacks == eval_aa.STANDARD else ("clean", "pgd10")
    return bool(result) and result["n"] == (row.evaluation.n or result["test_images"]) \
        and all(result[m] is not None for m in wanted)


def judged(run, row):
    """The whole result of the checkpoint that the row is judged by, the best or the last; or None."""
    result = run.last if row.evaluation.which == "last" else run.best
    return result if whole(result, row) else None


def valid_runs(row):
    """The runs of a row, one a seed, that have the row's setting; others are skipped with a warning."""
    valid = []
    for run in find_runs(row).values():
        if differ := "; ".join(deviations(run, row)):
            warn(f"{run.folder} is not row {row.run} ({differ}): skipped")
        else:
            valid.append(run)
    return valid


def judged_results(found, row):
    """The results, one a run, of the runs that are evaluated as the row asks."""
    return [result for run in found if (result := judged(run, row))]


def cell(values, paper, noise):
    """`ours (paper, difference)`. ours: the mean over seeds, ± the standard deviation of several."""
    if not values:
        return "" if paper is None else f"({paper:.2f})"
    mean = statistics.mean(values)
    ours = f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    if paper is None:
        return ours
    difference = round(mean - paper, 2)
    bold = "**" if abs(difference) > noise else ""
    return f"{ours} ({paper:.2f}, {bold}{difference:+.2f}{bold})"


def difference_cell(train, eval):
    """`ours (paper)` of a row in eval mode less train mode, as Table 7 prints; each is (values, paper)."""
    (a, paper_a), (b, paper_b) = train, eval
    ours = f"{statistics.mean(b) - statistics.mean(a):+.2f} " if a and b else ""
    return f"{ours}({paper_b - paper_a:+.2f})"


def mean_result(results):
    """{metric: its mean over the results that have it}."""
    known = {m: [r[m] for r in results if r[m] is not None] for m in METRICS}
    return {m: statistics.mean(values) for m, values in known.items() if values}


def read_flags(folder):
    """{"clean", "pgd10", an attack's name ...: (N,) bool} of a run's result.npz."""
    path = Path(folder) / "result.npz"
    try:
        with np.load(path, allow_pickle=False) as npz:
            return dict(npz)
    except FileNotFoundError:
        raise InputError(f"no such file: {path} (eval_aa.py writes it)") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path} is malformed") from None


def agreement(folders):
    """Which share of the test images two runs both withstand, only the first, only the second, neither."""
    a, b = map(read_flags, folders)
    whole = [attack for attack in eval_aa.STANDARD if attack in a and attack in b][-1:]
    lines = []
    for name in ("clean", "pgd10", *whole):
        for folder, flags in zip(folders, (a, b)):
            if name not in flags:
                raise InputError(f"{folder}/result.npz does not say which images are right ({name})")
        if len(a[name]) != len(b[name]):
            raise InputError(f"{folders[0]} and {folders[1]} were not evaluated on the same images ({name})")
        shares = a[name] & b[name], a[name] & ~b[name], ~a[name] & b[name], ~a[name] & ~b[name]
        title = METRICS.get("aa" if name == eval_aa.STANDARD[-1] else name, name)
        lines.append([title, *(f"{100 * share.mean():.2f}" for share in shares)])
    names = [Path(folder).absolute().name for folder in folders]
    header = ["% of the images", "both right", *(f"only {name}" for name in names), "neither"]
    return f"{markdown(header, lines)}\n\n{len(a['clean']):,} images."


def hours(run):
    """Hours of training and evaluation."""
    seconds = [entry["seconds"] for entry in run.log]
    for result in filter(None, (run.best, run.last)):
        for took in (stage["seconds"] for stage in result["stages"].values()):
            seconds += took.values() if isinstance(took, dict) else [took]
    return sum(seconds) / 3600


# ---- Text --------------------------------------------------------------------------------------------------


def markdown(header, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def setting_text(key, value):
    """How a table shows a setting."""
    if value is None:
        return "-"
    if key == "eps":
        return runs.fraction_text(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else str(NAMES.get(value, value))


def replication_cell(row, notes):
    """What others have published for a row's setting: `84.15 / - / 48.72 [1]`; [1] is the first of notes."""
    cells = []
    for entry in replications().get(row.run, []):
        note = "; ".join(entry[k] for k in ("who", "differs", "link") if entry.get(k))
        if note not in notes:
            notes.append(note)
        figures = " / ".join(f"{entry[m]:.2f}" if m in entry else "-" for m in METRICS)
        cells.append(f"{figures} [{notes.index(note) + 1}]")
    return ", ".join(cells)


def table(rows):
    """Rows in the paper's order: the settings that they differ in, the figures, the other checkpoint's."""
    def values(results, metric):
        return [r[metric] for r in results if r[metric] is not None]

    # A row that lacks a setting (of another script) does not make it differ.
    shown, figures = {row.id: row.shown() for row in rows}, {}
    known = {k: v for s in shown.values() for k, v in s.items()}
    settings = {k: {str(s.get(k, v)) for s in shown.values()} for k, v in known.items()}
    keys = [k for k, different in settings.items() if len(different) > 1 and k not in ("out", "alpha")]
    header = ["row", *(k.replace("_", " ") for k in keys), *METRICS.values()]
    lines, others, replicated, notes = [], [], [], []
    for row in rows:
        found = [run for run in valid_runs(row) if judged(run, row)]
        ours = judged_results(found, row)
        other = [r for run in found for r in (run.best, run.last) if whole(r, row) and r not in ours]
        figures[row.id] = [(values(ours, m), row.paper[m]) for m in METRICS]
        cells = [cell(*pair, NOISE[m]) for m, pair in zip(METRICS, figures[row.id])]
        lines.append([row.id, *(setting_text(k, shown[row.id].get(k)) for k in keys), *cells])
        replicated.append([replication_cell(row, notes)])
        others.append([cell(values(other, m), None, 0) for m in METRICS])
        if row.id.startswith("t7-") and row.id.endswith("-bneval"):
            pairs = zip(figures[row.id.replace("-bneval", "-bntrain")], figures[row.id])
            lines.append(["eval - train", *("" for _ in keys), *(difference_cell(*pair) for pair in pairs)])
            others.append(["" for _ in METRICS])
            replicated.append([""])
    below = [LEGEND]
    if any(map(any, others)):
        header += [f"{m}, other checkpoint" for m in METRICS.values()]
        lines = [line + other for line, other in zip(lines, others)]
        below.append("Other checkpoint: the last; of rows judged by the last, the best.")
    if notes:
        header.append("replicated by others")
        lines = [line + other for line, other in zip(lines, replicated)]
    return "\n".join([markdown(header, lines), "", *below, *(f"[{i}] {n}" for i, n in enumerate(notes, 1))])


def state(row, found):
    """done, running, partial (evaluated in part) or missing, and the row's id with what there is to say."""
    seeds = len(judged_results(found, row))
    if seeds:
        return "done", row.id + (f" ({seeds} seeds)" if seeds > 1 else "")
    if any(run.best or run.last for run in found):
        return "partial", row.id
    if found:
        epochs = max(len(run.log) for run in found)
        return "running", f"{row.id} ({epochs} of {row.setting.get('epochs')} epochs)"
    return "missing", row.id


def status(rows):
    """A line a table: which distinct runs are done, running, evaluated in part, missing; hours spent.

    A run that deviates from its row is none of them, but its hours were spent.
    """
    kinds = ("done", "running", "partial", "missing")
    tables, spent = {}, {"GPU": 0.0, "CPU": 0.0}
    for row in (r for r in rows.values() if r.run == r.id):
        for run in find_runs(row, warns=False).values():
            spent["GPU" if run.record and run.record["versions"].get("cuda") else "CPU"] += hours(run)
        kind, name = state(row, valid_runs(row))
        tables.setdefault(row.table, {k: [] for k in kinds})[kind].append(name)
    width = max(map(len, tables))
    lines = [] if any(map(Path.is_dir, map(Path, ROOTS))) else ["There are no runs/ and no results/ here."]
    for name, states in tables.items():
        counts = "  ".join(f"{len(states[k]):3} {k}" for k in kinds)
        known = "; ".join(f"{k}: {', '.join(states[k])}" for k in kinds[:3] if states[k])
        lines.append(f"{name:{width}}  {counts}   {known}".rstrip())
    return "\n".join(lines + [f"{kind}-hours {h:.2f}" for kind, h in spent.items()])


def measured_line(row):
    """The README's line of a row that is in results/, over its seeds, or None."""
    found = [run for run in find_runs(row, roots=[runs.HERE / "results"]).values() if judged(run, row)]
    if not found:
        return None
    results = [judged(run, row) for run in found]
    ours = [cell([r[m] for r in results if r[m] is not None], row.paper[m], NOISE[m]) or "-" for m in METRICS]
    devices = {run.record["device"] for run in found if run.record}
    took = runs.clock(3600 * sum(map(hours, found)) / len(found))
    return [f"`{row.id}`", str(len(found)), *ours, f"{results[0]['n']:,}", ", ".join(sorted(devices)), took]


def renew_readme(rows, path=runs.HERE / "README.md"):
    """The README's text with its table of what is in results/ renewed."""
    lines = [measured_line(row) for row in rows.values() if row.run == row.id]
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError(f"{path} has no {BEGIN} ... {END}")
    header = ["row", "seeds", *METRICS.values(), "test images", "device", "time a seed"]
    return f"{before}{BEGIN}\n{markdown(header, filter(None, lines))}\n{END}{after}"


def collect(run, row, force=False):
    """Copy a run's small files to results/.

    Raises InputError if the run is not all that its row says, or, without force, if results/ holds another.
    """
    problems = deviations(run, row)
    if len(run.log) != run.record["args"]["epochs"]:
        problems.append(f"its log has {len(run.log)} epochs")
    if not judged(run, row):
        problems.append(f"its {row.evaluation.which} checkpoint is not evaluated as the row asks, "
                        "on all images by all attacks")
    if problems:
        raise InputError(f"{run.folder} is not all of row {row.id}: {'; '.join(problems)}")
    target = Path("results") / run.folder.absolute().name
    texts = {name: (run.folder / name).read_bytes() for name in COLLECTED if (run.folder / name).exists()}
    other = [f for f, text in texts.items() if (target / f).exists() and (target / f).read_bytes() != text]
    if other and not force:
        raise InputError(f"{target} holds another {' and '.join(other)}: --force overwrites")
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_bytes(text)
    return f"{run.folder} -> {target}"


def robustbench(run):
    """RobustBench's model-info JSON, for a run's best checkpoint."""
    r, args = run.best, run.record["args"]
    if not r or r["aa"] is None or r["n"] != r["test_images"] or args["dataset"] not in runs.NAMED_DATASETS:
        raise InputError(f"{run.folder}: not evaluated by AutoAttack (standard) on all test images of CIFAR, "
                         "as RobustBench asks")
    preact = "PreAct" if args["model"].startswith("preact") else ""  # the paper's ResNet-18 is one
    return json.dumps({
        "link": "https://arxiv.org/abs/2010.00467", "name": "Bag of Tricks for Adversarial Training",
        "authors": "Tianyu Pang, Xiao Yang, Yinpeng Dong, Hang Su, Jun Zhu", "additional_data": False,
        "number_forward_passes": 1, "dataset": args["dataset"], "venue": "ICLR 2021",
        "architecture": preact + setting_text("model", args["model"]), "eps": runs.fraction_text(r["eps"]),
        "clean_acc": f"{r['clean']:.2f}", "reported": f"{r['aa']:.2f}", "autoattack_acc": f"{r['aa']:.2f}",
        "unreliable": False}, indent=2)


# ---- Figures -----------------------------------------------------------------------------------------------


def show_attack(folder, data_dir, n=8):
    """The first n test images under PGD-10 on a run's best checkpoint."""
    path = Path(folder) / "best.pt"
    checkpoint = runs.load_checkpoint(path)
    if not eval_aa.is_ours(checkpoint):
        raise InputError(f"{path} is no checkpoint of a training run")
    dataset, eps = (checkpoint["args"][k] for k in ("dataset", "eps"))
    model, spec = eval_aa.rebuild(eval_aa.parse_args([str(path)]), path, checkpoint, checkpoint["args"])
    is_cifar10 = Path(dataset).name.startswith("cifar10") and spec["num_classes"] == 10
    classes = CLASSES if is_cifar10 else range(spec["num_classes"])
    data = load_dataset(runs.fetch(dataset, data_dir))
    x, y = to_float(data.test_images[:n]), data.test_labels[:n]  # x (n, 3, 32, 32)

    def predictions(x):
        pairs = zip(model(x).argmax(1), y)
        return [f"{classes[p]}" if p == t else f"{classes[p]}\n(not {classes[t]})" for p, t in pairs]

    with attack_mode(model, "eval"):
        x_adv = pgd(model, x, y, random_start(x, eps, seeded("cpu", 0)), eps, 2 / 255, 10)
        before, after = predictions(x), predictions(x_adv)
    fig, axes = subplots(len(x), 1.2 * len(x), 4, rows=3)
    draw_attack(axes, x, x_adv, eps, before, after)
    return fig


def show_curves(folders, rows):
    """The learning curves of any runs, with the paper's figures of those named after a row."""
    curves = []
    for folder in folders:
        run, name = read_run(folder), Path(folder).absolute().name
        if not (run and run.log):
            raise InputError(f"{folder} holds no log that can be read")
        row = rows.get(row_and_seed(folder)[0])
        curves.append((name, [run.log], row.paper if row else dict.fromkeys(METRICS), len(run.log)))
    fig, axes = subplots(1, 5.5)
    draw_curves(axes[0][0], curves)
    return fig


def show_comparison(folders, rows):
    """The accuracies of the rows that some runs are of, with all their seeds."""
    compared = {row.id: row for _, row in (claimed(folder, rows) for folder in folders)}
    titles = {f"{setting_text('model', s['model'])}, {Path(s['dataset']).stem}, {s['epochs']} epochs"
              for s in (row.setting for row in compared.values())}
    title = titles.pop() if len(titles) == 1 else "several settings"
    circle = "; a circle is the paper's" if any(any(row.paper.values()) for row in compared.values()) else ""
    fig, axes = subplots(2, 8, 1.4 + 0.4 * len(compared))
    fig.suptitle(f"{title}; a dot is a seed{circle}")
    shown = {r: (judged_results(valid_runs(row), row), row.paper) for r, row in compared.items()}
    draw_comparison(axes[0], shown)
    return fig


def draw(what, folders, rows, data_dir):
    """The figure that a command line asks for."""
    if what == "attack":
        return show_attack(folders[0], data_dir)
    if what == "curves":
        return show_curves(folders, rows)
    if what == "compare":
        return show_comparison(folders, rows)
    shown = []
    for row in (row for r, row in rows.items() if r.startswith(what)):
        found = valid_runs(row)
        logs = [run.log for run in found if run.log]
        shown.append((row, logs, mean_result(judged_results(found, row))))
    if not any(logs or ours for _, logs, ours in shown):
        if not any(any(row.paper.values()) for row, *_ in shown):
            raise InputError(f"{what}: nothing has been run, and the paper prints no figures")
        print(f"{what}: nothing has been run: only the paper's figures are drawn", file=sys.stderr)
    return draw_figure(what, shown)


def save(fig, stem):
    """Write a figure as .png and .pdf."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        fig.savefig(f"{stem}{suffix}")
    print(f"{stem}.png, {stem}.pdf")


# ---- The command line --------------------------------------------------------------------------------------


def main():
    p = runs.Parser(description=__doc__, prog="python -m tools.report")
    p.add_argument("what", nargs="?", default="status", help="status, a table, a figure or a command (above)")
    p.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    p.add_argument("--out", help="file of a picture (default: figures/ and what it shows)")
    p.add_argument("--force", action="store_true", help="let `collect` overwrite what is in results/")
    p.add_argument("--data-dir", default="data", help="for `attack`: where cifar10.npz is")
    args = p.parse_args()
    rows, what, folders = manifest(), args.what, args.runs
    tables, most = {r.partition("-")[0] for r in rows if r[0] not in "fq"}, TAKES.get(what, 0)
    if what not in {*tables, *TAKES}:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")
    least = 2 if what == "agreement" else min(most, 1)
    if not least <= len(folders) <= most:
        p.error(f"{what} takes {('no RUN', 'one RUN', 'two RUNs', 'one RUN or more')[min(most, 3)]}")
    if args.out and (what in tables or what in ("status", "readme", "deviations", "collect", "agreement",
                                                "robustbench")):
        p.error(f"--out has no effect with {what}, which draws nothing")
    if what == "status":
        print(status(rows))
    elif what in tables:
        print(table([row for r, row in rows.items() if r.partition("-")[0] == what]))
    elif what == "readme":
        text = renew_readme(rows)
        runs.write_atomically(runs.HERE / "README.md", text.encode())
    elif what == "deviations":
        print("\n".join(deviations(*claimed(folders[0], rows))) or "none")
    elif what == "collect":
        print("\n".join(collect(*claimed(folder, rows), args.force) for folder in folders))
    elif what == "agreement":
        print(agreement(folders))
    elif what == "robustbench":
        print(robustbench(claimed(folders[0], rows)[0]))
    else:
        default = f"figures/{'-'.join([what, *(Path(f).absolute().name for f in folders)])}"
        fig = draw(what, folders, rows, args.data_dir)
        save(fig, (args.out or default).removesuffix(".png").removesuffix(".pdf"))


if __name__ == "__main__":
    runs.run_script(main)
