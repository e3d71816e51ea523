"""The paper's tables and figures, ours beside theirs, from finished runs in runs/ and results/.

    python report.py                      which rows are done, running, partly evaluated, missing; hours spent
    python report.py t4                   a table (t2 ... t9, t12, t13, s1, x) in Markdown: ours (paper, difference)
    python report.py f1                   a figure (f1 ... f4), as figures/f1.png and .pdf (--out: elsewhere)
    python report.py curves RUN...        learning curves, best epochs marked
    python report.py compare RUN...       clean and PGD-10 accuracy of rows, seeds side by side
    python report.py attack RUN           test images, adversarial versions, perturbations, predictions
    python report.py deviations RUN       what its setting differs in from the row that its folder names
    python report.py collect RUN...       copies complete runs, without weights, to results/
    python report.py robustbench RUN      the model-info JSON of a RobustBench entry
    python report.py readme               renews the README's table of what is in results/

RUN is a folder named after a row of run_all.sh, or a row and a seed (t2-base@1). Differences beyond seed noise are bold.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import eval_aa
import train_pgdat
import train_trades
from figures import METRICS, NAMES, draw_attack, draw_comparison, draw_curves, draw_figure, subplots
from utils import (
    HERE, InputError, Parser, attack_mode, clock, differences, fraction_text, load_checkpoint, load_dataset, pgd, random_start,
    run_script, seeded, to_float, write_atomically,
)

NOISE = {"clean": 0.5, "pgd10": 0.5, "aa": 0.3}  # between seeds; larger differences from the paper are marked
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BEGIN, END = "<!-- measured, by report.py readme -->", "<!-- end of measured -->"


# ---- Reading --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of run_all.sh. paper: {"clean": 82.52, "pgd10": 53.58, "aa": None}; run: the row that it is the same run as, often itself;
    setting: what the command resolves to ({}: a checkpoint that is only evaluated); evaluation: eval_aa.py's arguments."""

    id: str
    paper: dict
    run: str
    script: str
    setting: dict
    evaluation: object


class Run(NamedTuple):
    """A run's folder: args.json, log, result.json, result_last.json. What is missing is None or empty."""

    folder: Path
    record: dict | None
    log: list
    best: dict | None
    last: dict | None


def manifest():
    """{id: Row}, in the order of run_all.sh."""
    lines = subprocess.run(["bash", HERE / "run_all.sh", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    fields = {f[0].strip(): [g.strip() for g in f[1:]] for f in (line.split("|") for line in lines)}
    scripts, rows = {"train_pgdat.py": train_pgdat, "train_trades.py": train_trades}, {}
    for row, (paper, command) in fields.items():
        run = command[2:] if command.startswith("= ") else row
        train, _, evaluation = fields[run][1].partition(";")
        script, *argv = train.split()
        figures = {m: None if v == "-" else float(v) for m, v in zip(METRICS, paper.split("/"))}
        setting = vars(scripts[script].parse_args(argv)) if script in scripts else {}
        rows[row] = Row(row, figures, run, script, setting, eval_aa.parse_args(["-", *evaluation.split()[1:]]))
    return rows


def is_result(r):
    """Whether all that is read from a result file makes sense; may raise on odd values, as is_log may."""
    seconds = [t for s in r["stages"].values() for t in (s["seconds"].values() if isinstance(s["seconds"], dict) else [s["seconds"]])]
    return r["n"] > 0 and r["test_images"] > 0 and r["eps"] >= 0 and all(v is None or 0 <= v <= 100 for v in (r[m] for m in METRICS)) and sum(seconds) >= 0


def is_log(log):
    """Whether the entries of a log are those of its epochs in turn, and all that is read from them makes sense."""
    accuracies = [e[k] for e in log for k in ("test_clean", "test_pgd10", "val_clean", "val_pgd10") if e.get(k) is not None]
    return all(0 <= v <= 100 for v in accuracies) and all(e["seconds"] >= 0 and e["epoch"] == i + 1 for i, e in enumerate(log))


def read_run(folder):
    """The Run in a folder, or None if there is none. A malformed file is skipped with a warning that names it."""
    def read(name, valid, lines=False):
        try:
            text = (folder / name).read_text() if (folder / name).exists() else None
            value = text and ([json.loads(line) for line in text.splitlines()] if lines else json.loads(text))
            if text is None or valid(value):
                return value
        except (AttributeError, KeyError, TypeError, ValueError):  # what odd values make of the checks
            pass
        print(f"warning: {folder / name} is malformed: skipped", file=sys.stderr)

    folder = Path(folder)
    record = read("args.json", lambda r: {"dataset", "model", "eps", "epochs"} <= r["args"].keys() and r["command"][0] and r["device"] and r["versions"].keys())
    best, last = read("result.json", is_result), read("result_last.json", is_result)
    log = record and read("log.jsonl", is_log, lines=True) or []
    return Run(folder, record, log, best, last) if record or best or last else None


def find_runs(row, roots=("runs", "results")):
    """{seed: Run} of a row ("": the row's own), from the first of the roots that holds a result of it."""
    found = {}
    for folder in (f for root in roots for f in sorted(Path(root).glob(f"{row.run}*"))):
        name, _, seed = folder.name.partition("@")
        if name == row.run and (seed or "0").isdigit() and not (seed in found and (found[seed].best or found[seed].last)):
            found |= {seed: run} if (run := read_run(folder)) else {}
    return found


def claimed(folder, rows):
    """(Run in a folder, Row that the folder's name claims). Raises InputError if there is none."""
    folder, run = Path(folder), read_run(folder)
    name, _, seed = folder.resolve().name.partition("@")
    if run is None or run.record is None:
        raise InputError(f"{folder} holds no run that can be read")
    if name not in rows or not (seed or "0").isdigit():
        raise InputError(f"{folder}: run_all.sh has no row {folder.resolve().name}")
    return run, rows[rows[name].run]


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def deviations(run, row):
    """What a run's setting differs in from its row's, with the seed that its folder's name claims, in words."""
    if run.record is None:
        return ["it has no args.json that can be read"] if row.setting else []
    seed = run.folder.resolve().name.partition("@")[2]
    want, got = ({**args, "data": Path(args.get("dataset", "")).name} for args in (row.setting, run.record["args"]))
    want |= {"seed": int(seed)} if seed else {}
    got |= {k: want.get(k) for k in ("precision", "compile")}  # how it was computed: args.json and the result say it
    return differences({**want, "script": row.script}, {**got, "script": run.record["command"][0]})


def whole(result, row):
    """Whether a result holds the figures that the row's evaluation asks for, on all the images that it asks for."""
    wanted = METRICS if row.evaluation.attacks == eval_aa.STANDARD else ("clean", "pgd10")
    return bool(result) and result["n"] == (row.evaluation.n or result["test_images"]) and all(result[m] is not None for m in wanted)


def judged(run, row):
    """The whole result that the row is judged by, or None: the best checkpoint's, or the last's if its method stops at the last."""
    result = run.last if row.evaluation.which == "last" else run.best
    return result if whole(result, row) else None


def valid_runs(row):
    """The runs of a row, one a seed, that have the row's setting; others are skipped with a warning."""
    valid = []
    for run in find_runs(row).values():
        if differ := deviations(run, row):
            print(f"warning: {run.folder} is not row {row.run} ({'; '.join(differ)}): skipped", file=sys.stderr)
        else:
            valid.append(run)
    return valid


def cell(values, paper, noise):
    """`ours (paper, difference)`. ours: the mean over seeds, ± their standard deviation if there are several; bold: beyond noise."""
    if not values:
        return "" if paper is None else f"({paper:.2f})"
    mean = statistics.mean(values)
    ours = f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    if paper is None:
        return ours
    difference = round(mean - paper, 2)
    return f"{ours} ({paper:.2f}, {f'**{difference:+.2f}**' if abs(difference) > noise else f'{difference:+.2f}'})"


def hours(run):
    """Hours of training and evaluation."""
    stages = [s.get("seconds", 0) for r in (run.best, run.last) if r for s in r["stages"].values()]
    return (sum(e["seconds"] for e in run.log) + sum(sum(s.values()) if isinstance(s, dict) else s for s in stages)) / 3600


# ---- Text -----------------------------------------------------------------------------------------------------------


def markdown(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def table(rows):
    """Rows in the paper's order, the settings that they differ in, the figures; also of the other checkpoint where there are some."""
    def text(key, v):
        value = "/".join(f"{e:g}" for e in v) if isinstance(v, list) else NAMES.get(v, v)
        return "-" if v is None else fraction_text(v) if key == "eps" else str(value)

    keys = [k for k in rows[0].setting if k not in ("out", "alpha") and len({str(row.setting[k]) for row in rows if row.setting}) > 1]
    results = [[(judged(run, row), run) for run in valid_runs(row) if judged(run, row)] for row in rows]
    others = [[r for own, run in found for r in (run.best, run.last) if r is not own and whole(r, row)] for row, found in zip(rows, results)]
    header = ["row", *(k.replace("_", " ") for k in keys), *METRICS.values(), *(f"{m}, other checkpoint" for m in METRICS.values() if any(others))]
    lines = []
    for row, found, other in zip(rows, results, others):
        line = [row.id, *(text(k, row.setting.get(k)) for k in keys)]
        line += [cell([r[m] for r, _ in found if r[m] is not None], row.paper[m], NOISE[m]) for m in METRICS]
        lines.append(line + [cell([r[m] for r in other if r[m] is not None], None, 0) for m in METRICS if any(others)])
    return markdown(header, lines) + ("\n\nOther checkpoint: the last; of rows judged by the last, the best." if any(others) else "")


def status(rows):
    """Which rows are done, running, partly evaluated, missing; hours spent."""
    state, spent = {"done": [], "partial": [], "running": [], "missing": []}, {"GPU": 0.0, "CPU": 0.0}
    for row in (r for r in rows.values() if r.run == r.id):
        runs = find_runs(row).values()
        for run in runs:
            spent["GPU" if run.record and run.record["versions"].get("cuda") else "CPU"] += hours(run)
        epochs = f"{max((len(run.log) for run in runs), default=0)} of {row.setting.get('epochs')} epochs"
        kind = "done" if any(judged(r, row) for r in runs) else "partial" if any(r.best or r.last for r in runs) else "running" if runs else "missing"
        state[kind].append(row.id + (f" ({epochs})" if kind == "running" else ""))
    return "\n".join([f"{kind:8} {len(ids):4}   {', '.join(ids)}" for kind, ids in state.items()] + [f"{k}-hours {v:.2f}" for k, v in spent.items()])


def renew_readme(rows, path=HERE / "README.md"):
    """The README's text with its table of what is in results/ renewed."""
    lines = []
    for row in (r for r in rows.values() if r.run == r.id):
        for run in find_runs(row, roots=[HERE / "results"]).values():
            if result := judged(run, row):
                ours = ["-" if result[m] is None else f"{result[m]:.2f}" for m in METRICS]
                paper = " / ".join("-" if v is None else f"{v:.2f}" for v in row.paper.values()) if any(row.paper.values()) else "-"
                lines.append([f"`{run.folder.name}`", *ours, paper, f"{result['n']:,}", run.record["device"] if run.record else "-", clock(3600 * hours(run))])
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError(f"{path} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{markdown(['row', *METRICS.values(), 'paper', 'test images', 'device', 'time'], lines)}\n{END}{after}"


def collect(run, row):
    """Copies a run's text files to results/. Raises InputError if it is not what its row says, unfinished, or partly evaluated."""
    problems = deviations(run, row)
    problems += [f"its log has {len(run.log)} epochs"] if len(run.log) != run.record["args"].get("epochs") else []
    problems += [] if judged(run, row) else [f"its {row.evaluation.which} checkpoint is not evaluated as the row asks, on all images by all attacks"]
    if problems:
        raise InputError(f"{run.folder} is not all of row {row.id}: {'; '.join(problems)}")
    target = Path("results") / run.folder.resolve().name
    target.mkdir(parents=True, exist_ok=True)
    for path in (p for p in run.folder.iterdir() if p.name in ("args.json", "log.jsonl", "result.json", "result_last.json")):
        (target / path.name).write_bytes(path.read_bytes())
    return f"{run.folder} -> {target}"


def robustbench(run):
    """RobustBench's model-info JSON, for a run's best checkpoint."""
    r, args = run.best, run.record["args"]
    if not r or r["aa"] is None or r["n"] != r["test_images"] or args["dataset"] not in ("cifar10", "cifar100"):
        raise InputError(f"{run.folder}: not evaluated by AutoAttack (standard) on all test images of CIFAR, as RobustBench asks")
    return json.dumps({
        "link": "https://arxiv.org/abs/2010.00467", "name": "Bag of Tricks for Adversarial Training",
        "authors": "Tianyu Pang, Xiao Yang, Yinpeng Dong, Hang Su, Jun Zhu", "additional_data": False, "number_forward_passes": 1,
        "dataset": args["dataset"], "venue": "ICLR 2021", "architecture": NAMES.get(args["model"], args["model"]), "eps": fraction_text(r["eps"]),
        "clean_acc": f"{r['clean']:.2f}", "reported": f"{r['aa']:.2f}", "autoattack_acc": f"{r['aa']:.2f}", "unreliable": False}, indent=2)


# ---- Figures, the command line --------------------------------------------------------------------------------------


def attacked(folder, data_dir, n=8):
    """What draw_attack takes: the first n test images under PGD-10 on a run's best checkpoint."""
    path = Path(folder) / "best.pt"
    checkpoint = load_checkpoint(path)
    if not eval_aa.is_ours(checkpoint):
        raise InputError(f"{path} is no checkpoint of a training run")
    dataset, eps = (checkpoint["args"][k] for k in ("dataset", "eps"))
    model, spec = eval_aa.rebuild(eval_aa.parse_args([str(path)]), path, checkpoint, checkpoint["args"])
    classes = CLASSES if Path(dataset).name.startswith("cifar10") and spec["num_classes"] == 10 else range(spec["num_classes"])
    data = load_dataset(dataset, data_dir)
    x, y = to_float(data.test_images[:n]), data.test_labels[:n]
    with attack_mode(model, "eval"):
        x_adv = pgd(model, x, y, random_start(x, eps, seeded("cpu", 0)), eps, 2 / 255, 10)
        before, after = ([f"{classes[p]}{'' if p == t else ' (wrong)'}" for p, t in zip(model(z).argmax(1), y)] for z in (x, x_adv))
    return x, x_adv, eps, before, after


def draw(what, folders, rows, data_dir):
    """The figure that a command line asks for."""
    if what == "attack":
        shown = attacked(folders[0], data_dir)
        fig, axes = subplots(len(shown[0]), 1.2 * len(shown[0]), 4, rows=3)
        draw_attack(axes, *shown)
    elif what == "curves":
        fig, axes = subplots(1, 5.5)
        names = {f: Path(f).resolve().name for f in folders}
        paper = {f: rows[n.partition("@")[0]].paper if n.partition("@")[0] in rows else dict.fromkeys(METRICS) for f, n in names.items()}
        logs = {f: run.log for f in folders if (run := read_run(f)) and run.log}
        if missing := [f for f in folders if f not in logs]:
            raise InputError(f"{missing[0]} holds no log that can be read")
        draw_curves(axes[0][0], [(names[f], logs[f], paper[f], len(logs[f])) for f in folders])
    elif what == "compare":
        found = {row.id: row for _, row in (claimed(f, rows) for f in folders)}
        fig, axes = subplots(2, 8, 1.4 + 0.4 * len(found))
        same = {(NAMES.get(s["model"], s["model"]), Path(s["dataset"]).stem, f"{s['epochs']} epochs") for s in (row.setting for row in found.values())}
        fig.suptitle(f"{', '.join(same.pop()) if len(same) == 1 else 'several settings'}; a dot is a seed")
        draw_comparison(axes[0], {r: ([judged(run, row) for run in valid_runs(row) if judged(run, row)], row.paper) for r, row in found.items()})
    else:
        runs = {r: valid_runs(row) for r, row in rows.items() if r.startswith(what)}
        ours = {r: next((judged(run, rows[r]) for run in found if judged(run, rows[r])), {}) for r, found in runs.items()}
        fig = draw_figure(what, [(rows[r], found[0].log if found else [], ours[r]) for r, found in runs.items()])
    return fig


def main():
    p = Parser(description=__doc__)
    p.add_argument("what", nargs="?", default="status", help="status, a table, a figure, or a command (above)")
    p.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    p.add_argument("--out", help="of a picture, without suffix (default: figures/ and what it shows)")
    p.add_argument("--data-dir", default="data", help="for `attack`: where cifar10.npz is (default: %(default)s)")
    args = p.parse_args()
    rows, what = manifest(), args.what
    tables, takes = {r.partition("-")[0] for r in rows if r[0] not in "fq"}, {"attack": 1, "deviations": 1, "robustbench": 1, "curves": 99, "compare": 99, "collect": 99}
    if what not in {"status", "readme", "f1", "f2", "f3", "f4", *tables, *takes}:
        p.error(f"{what!r} is no table, figure or command of report.py: see --help")
    if not min(takes.get(what, 0), 1) <= len(args.runs) <= takes.get(what, 0):
        p.error(f"{what} takes {'no RUN' if what not in takes else 'one RUN' if takes[what] == 1 else 'one RUN or more'}")
    if what == "status":
        print(status(rows))
    elif what in tables:
        print(table([row for r, row in rows.items() if r.partition("-")[0] == what]))
    elif what == "readme":
        write_atomically(HERE / "README.md", lambda f, text=renew_readme(rows): f.write(text.encode()))
    elif what == "deviations":
        print("\n".join(deviations(*claimed(args.runs[0], rows))) or "none")
    elif what == "collect":
        print("\n".join(collect(*claimed(folder, rows)) for folder in args.runs))
    elif what == "robustbench":
        print(robustbench(claimed(args.runs[0], rows)[0]))
    else:
        fig = draw(what, args.runs, rows, args.data_dir)
        stem = Path(args.out or f"figures/{'-'.join([what, *(Path(r).resolve().name for r in args.runs)])}")
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".pdf"):
            fig.savefig(f"{stem}{suffix}")
        print(f"{stem}.png, {stem}.pdf")


if __name__ == "__main__":
    run_script(main)
