"""run_all.sh: every row is there, carries the paper's figures, and is what its id says; it prints what it runs."""

import os
import re
import subprocess

import pytest
from conftest import ROOT, spawn

import eval_aa
import models
import train_pgdat
import train_trades


def run_all(*argv, **env):
    done = spawn("bash", ROOT / "run_all.sh", *argv, **env)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def manifest():
    """{id: (paper's figures, command)}."""
    rows = [[f.strip() for f in line.split("|")] for line in run_all("list")[1].splitlines()]
    assert len({r[0] for r in rows}) == len(rows), "an id stands twice"
    return {row: (paper, command) for row, paper, command in rows}


# Typed from the paper, not from the manifest: a few cells of each table.
PAPER = {
    "t2-base": "82.52/53.58/48.51", "t2-es-40-70": "86.52/52.65/46.6", "t2-es-60-100": "85.67/52.90/45.96",
    "t2-wulr-15": "82.64/53.29/48.12", "t2-wueps-20": "82.78/53.62/48.48",
    "t3-r18-b64": "80.08/51.31/-", "t3-r18-b512-scaled": "82.16/53.36/-", "t3-wrn10-b64-scaled": "85.40/54.86/-",
    "t3-wrn10-b128": "86.07/56.60/-", "t3-wrn10-b512": "86.29/50.17/-",
    "t4-r18-ls0.3": "82.51/54.34/49.24", "t4-wrn10-ls0.2": "86.09/57.31/53.00", "t4-wrn10-ls0.4": "86.19/57.63/52.71",
    "t5-mom": "82.52/53.58/48.51", "t5-adamw": "81.68/46.58/42.39", "t5-sgd-gc": "82.77/53.62/48.33", "t5-sgd-gcc": "82.93/53.40/48.51",
    "t6-leakyrelu": "82.11/53.25/-", "t6-selu": "78.88/49.53/-", "t6-softplus": "82.80/54.30/-", "t6-tanh": "80.13/49.12/-",
    "t7-r18-bneval": "83.48/53.64/48.75", "t7-senet18-bneval": "84.11/53.90/48.95", "t7-dpn26-bntrain": "83.67/53.88/48.50",
    "t7-densenet121-bneval": "86.33/56.11/51.24", "t7-wrn10-bneval": "87.38/56.04/51.93",
    "t8-wrn10-wd1e-4-relu-bntrain": "85.87/49.45/46.43", "t8-wrn10-wd5e-4-softplus-bneval-ls0.2": "86.98/56.21/52.10",
    "t8-wrn20-wd5e-4-softplus-bntrain-ls0.1": "85.69/57.86/53.66", "t8-wrn20-wd5e-4-softplus-bneval-ls0.1": "87.86/57.33/53.23",
    "t9-eps0.031-wrn10-wd5e-4-relu-bneval": "85.34/58.54/54.64", "t9-eps0.031-wrn20-wd5e-4-softplus-bneval": "85.43/57.94/54.32",
    "t9-eps8-wrn10-wd2e-4-relu-bntrain": "84.50/54.60/50.94", "t9-eps8-wrn20-wd5e-4-relu-bneval": "86.43/57.91/54.39",
    "t12-r18-wd5e-4-relu-bneval": "81.45/53.51/49.06", "t12-r18-wd5e-4-softplus-bntrain": "81.26/54.58/50.35",
    "t13-eps8-wrn20": "86.43/-/54.39", "t13-eps0.031-wrn10": "85.34/-/54.64",
}


def test_every_row_is_there_with_the_papers_figures(manifest):
    status, out, _ = run_all("count")
    counts = dict(line.rsplit(" ", 1) for line in out.splitlines())
    want = {"t2": 10, "t3": 14, "t4": 10, "t5": 6, "t6": 8, "t7": 12, "t8": 18, "t9": 17, "t12": 4, "t13": 3, "s1": 21,
            "f1a": 14, "f1b": 3, "f2": 12, "f3": 3, "f4": 3, "released": 3}
    assert status == 0 and {k: int(counts[k]) for k in want} == want
    tables = {r: c for r, (_, c) in manifest.items() if r[0] == "t" and not r.endswith("released")}
    assert len(tables) == 102 and sum(not c.startswith("=") for c in tables.values()) == 90
    assert {r: manifest[r][0] for r in PAPER} == PAPER
    assert all(re.fullmatch(r"(\d\d\.\d\d?|-)/(\d\d\.\d\d|-)/(\d\d\.\d\d?|-)", paper) for paper, _ in manifest.values())


def test_no_two_rows_are_the_same_run_without_saying_so(manifest):
    commands = [c for _, c in manifest.values() if not c.startswith("=")]
    assert len(set(commands)) == len(commands)
    for row, (paper, command) in manifest.items():
        if command.startswith("="):
            other = manifest[command[2:]]
            assert not other[1].startswith("="), row
            # the same run cannot have two figures; Tables 3, 6 and 13 leave one out
            assert all(a in (b, "-") or a == b for a, b in zip(paper.split("/"), other[0].split("/"))), row


MODEL_OF = {"r18": "preactresnet-18", "wrn10": "wrn-34-10", "wrn20": "wrn-34-20", "senet18": "senet-18",
            "densenet121": "densenet-121", "googlenet": "googlenet", "dpn26": "dpn-26"}


def what_the_id_says(row):
    """The part of a setting that an id of the manifest spells out; what it leaves out is the default."""
    table, *parts = row.split("-")
    text = "-".join(parts)
    says = {}
    says["model"] = next((m for k, m in MODEL_OF.items() if k in parts), "wrn-34-10" if table in ("f1b", "f3", "f4") else "preactresnet-18")
    if table == "f2":
        says["model"] = text
    if match := re.search(r"wd(\d+e-\d)", text):
        says["wd"] = float(match[1])
    if match := re.search(r"bn(train|eval)", text):
        says["bn_mode"] = match[1]
    if match := re.search(r"ls([\d.]+)", text):
        says["ls"] = float(match[1])
    if match := re.search(r"-b(\d+)(-scaled)?$", text):
        says["batch_size"], says["lr"] = int(match[1]), 0.1 * int(match[1]) / 128 if match[2] else 0.1
    if match := re.search(r"^(es|wulr|wueps)-([\d-]+)$", text):
        key = {"es": "early_stop_pgd", "wulr": "warmup_lr", "wueps": "warmup_eps"}[match[1]]
        says[key] = [float(v) for v in match[2].split("-")] if match[1] == "es" else float(match[2])
    if table == "t5":
        says["optimizer"] = "sgd" if text == "mom" else text
        says["lr"] = 1e-4 if text in ("adam", "adamw") else 0.1
    if table == "t6":
        says["activation"], says["wd"] = text, 5e-5 if text in ("elu", "celu", "selu", "tanh") else 5e-4
    if table in ("t8", "t9", "t12"):
        says["activation"] = "softplus" if "softplus" in parts else "relu"
        assert "relu" in parts or "softplus" in parts
    if table == "t9":
        says["eps"], says["alpha"] = (0.031, 0.007) if "eps0.031" in row else (8 / 255, 2 / 255)
    if table == "f3" and "5e-4" not in row:
        says["lr_decay_epochs"] = [40, 45]
    if table == "f4":
        says["attack"] = "none"
    if "clean0" in parts:
        says["bn_clean_passes"] = 0
    return says


# Table 1, typed from the paper: lr, epochs, decay, batch size, weight decay, early stop (train, attack), warm-up (lr, eps).
TABLE_1 = {
    "madry2018": (0.1, 200, [100, 150], 128, 2e-4, 0, 0, 0, 0), "cai2018": (0.1, 300, [150, 250], 200, 5e-4, 0, 0, 0, 1),
    "zhang2019b": (0.1, 76, [75], 128, 2e-4, 1, 0, 0, 0), "wang2019": (0.01, 120, [60, 100], 128, 1e-4, 0, 1, 0, 0),
    "qin2019": (0.1, 110, [100, 105], 256, 2e-4, 0, 0, 0, 1), "mao2019": (0.1, 80, [50, 60], 50, 2e-4, 0, 0, 0, 0),
    "carmon2019": (0.1, 100, "cosine", 256, 5e-4, 0, 0, 0, 0), "alayrac2019": (0.2, 64, [38, 46, 51], 128, 5e-4, 0, 0, 0, 0),
    "shafahi2019b": (0.1, 200, [100, 150], 128, 2e-4, 0, 0, 0, 0), "zhang2019a": (0.05, 105, [79, 90, 100], 256, 5e-4, 0, 0, 0, 0),
    "zhang-wang2019": (0.1, 200, [60, 90], 60, 2e-4, 0, 0, 0, 0), "atzmon2019": (0.01, 100, [50], 32, 1e-4, 0, 0, 0, 0),
    "wong2020": (0.2, 30, "onecycle", 128, 5e-4, 0, 0, 0, 0), "rice2020": (0.1, 200, [100, 150], 128, 5e-4, 1, 0, 0, 0),
    "ding2020": (0.3, 128, [51, 77, 102], 128, 2e-4, 0, 0, 0, 0), "pang2020a": (0.01, 200, [100, 150], 50, 1e-4, 0, 0, 0, 0),
    "zhang2020": (0.1, 120, [60, 90, 110], 128, 2e-4, 0, 1, 0, 0), "huang2020": (0.1, 200, "cosine", 256, 5e-4, 0, 0, 1, 0),
    "cheng2020": (0.1, 200, [80, 140, 180], 128, 5e-4, 0, 0, 0, 0), "lee2020": (0.1, 200, [100, 150], 128, 2e-4, 0, 0, 0, 0),
    "xu2020": (0.1, 120, [60, 90], 256, 1e-4, 0, 0, 0, 0),
}


def what_table_1_says(row):
    lr, epochs, decay, batch_size, wd, _, attack, warm_lr, warm_eps = TABLE_1[row.removeprefix("s1-")]
    says = {"model": "preactresnet-18", "lr": lr, "epochs": epochs, "batch_size": batch_size, "wd": wd}
    says |= {"lr_schedule": decay} if isinstance(decay, str) else {"lr_decay_epochs": decay}
    says["early_stop_pgd"] = [40, 70] if attack else None
    says["warmup_lr"], says["warmup_eps"] = 15 * warm_lr, 15 * warm_eps
    if row == "s1-carmon2019":
        says["optimizer"] = "nesterov"
    return says


def test_every_row_resolves_to_the_setting_that_its_id_says(manifest):
    """Through the scripts' own parse_args: what the id says is set, and nothing else is."""
    for row, (_, command) in manifest.items():
        if row.startswith(("quickstart", "x-tiny")):  # of our own making
            continue
        same = command[2:] if command.startswith("= ") else row
        train, *evaluate = run_commands(manifest[same][1])
        evaluation = eval_aa.parse_args(["x", *(evaluate[0] if evaluate else [])])
        if row.endswith("-released"):
            args = eval_aa.parse_args(train[1:])
            assert args.model == MODEL_OF[row.split("-")[2]] and args.no_normalize and args.eps == (0.031 if "0.031" in row else 8 / 255)
            continue
        script = {"train_pgdat.py": train_pgdat, "train_trades.py": train_trades}[train[0]]
        assert (script is train_trades) == (row.split("-")[0] in ("t9", "t12", "t13")), row
        args, default = vars(script.parse_args(train[1:])), vars(script.parse_args([]))
        says = what_table_1_says(row) if row.startswith("s1-") else what_the_id_says(same if row.startswith("t13") else row)
        assert {k: v for k, v in args.items() if k != "out"} == {**{k: v for k, v in default.items() if k != "out"}, **says}, row
        assert args["model"] in models.MODELS
        assert evaluation.n is None and evaluation.attacks == (() if row.startswith("f4") else eval_aa.STANDARD)
        judged_last = row.startswith("s1-") and not TABLE_1[row[3:]][5]
        assert evaluation.which == ("last" if judged_last else "best"), row


def run_commands(command):
    """The scripts' argument vectors in a command of the manifest: [train] or [train, evaluate without its name]."""
    train, *evaluate = command.split(";")
    return [train.split()] + [e.split()[1:] for e in evaluate]


def test_print_and_list():
    status, out, _ = run_all("list", "t4-r18-*")
    assert [line.split("|")[0].strip() for line in out.splitlines()] == [f"t4-r18-ls{s}" for s in ("0", "0.1", "0.2", "0.3", "0.4")]
    assert run_all("print", "t4-r18-ls0.3@1") == (0, (
        "python train_pgdat.py --ls 0.3 --seed 1 --out runs/t4-r18-ls0.3@1 --resume\n"
        "python eval_aa.py runs/t4-r18-ls0.3@1\n"), "")
    assert run_all("print", "t4-r18-ls0")[1] == run_all("print", "t2-base")[1]
    assert run_all("print", "s1-madry2018")[1].splitlines()[1] == "python eval_aa.py runs/s1-madry2018 --which last"
    assert run_all("print", "t13-eps8-wrn10-released")[1] == (
        "python eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize --eps 8/255 "
        "--out runs/t13-eps8-wrn10-released/result.json\n")


def test_an_array_index_is_a_distinct_run(manifest):
    distinct = [r for r, (_, c) in manifest.items() if not c.startswith("=") and not re.search("^quickstart|^x-tiny|released$", r)]
    assert distinct[6] == "t2-wulr-20"
    assert run_all("print", SLURM_ARRAY_TASK_ID="7") == run_all("print", distinct[6])
    assert run_all("print", SLURM_ARRAY_TASK_ID=str(len(distinct))) == run_all("print", distinct[-1])
    status, _, err = run_all("print", SLURM_ARRAY_TASK_ID=str(len(distinct) + 1))
    assert status == 2 and f"they are 1 to {len(distinct)}" in err
    assert len(run_all("print", "all")[1].splitlines()) == 2 * len(distinct)


@pytest.mark.parametrize("argv, message", [
    (("run", "t2-es"), "no row t2-es; there is t2-es-40-70 t2-es-40-100 t2-es-60-100"),
    (("run", "t2-base", "t99"), "no row t99"),
    (("run", "t2-base@one"), "the seed of t2-base@one is not a number"),
    (("run",), "run which row?"),
    (("walk",), "unknown action walk"),
])
def test_what_it_does_not_know_is_refused(argv, message, tmp_path):
    status, out, err = run_all(*argv, PYTHON="false", SLURM_ARRAY_TASK_ID="")
    assert status == 2 and message in err and out == "" and len(err.splitlines()) == 1


STAND_IN = """#!/bin/sh
echo "RAN $*"
case "$*" in *"$FAIL_ON"*) exit 3;; esac
"""


def test_a_sigterm_reaches_the_training_run(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap 'echo SAVED; exit 143' TERM\necho RAN $*\nwhile :; do sleep 0.1; done\n")
    python.chmod(0o755)
    process = subprocess.Popen([ROOT / "run_all.sh", "run", "t2-base"], env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("RAN"):
        pass
    process.terminate()
    assert process.communicate(timeout=30)[0] == "SAVED\n" and process.returncode == 143  # and no evaluation


def test_run_executes_what_print_shows_and_stops_at_a_failure(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    for rows in (("t2-base", "t4-r18-ls0.1@3"), ("t13-eps8-wrn20-released",), ("s1-lee2020",)):
        status, out, _ = run_all("run", *rows, PYTHON=str(python), FAIL_ON="nothing")
        printed = run_all("print", *rows, PYTHON=str(python))[1].splitlines()
        assert status == 0 and [line[2:] for line in out.splitlines() if line.startswith("+ ")] == printed
        assert [line.replace("RAN", str(python)) for line in out.splitlines() if line.startswith("RAN")] == printed
    status, out, _ = run_all("run", SLURM_ARRAY_TASK_ID="7", PYTHON=str(python), FAIL_ON="nothing")
    assert status == 0 and "RAN train_pgdat.py --warmup-lr 20 --out runs/t2-wulr-20 --resume" in out
    status, out, _ = run_all("run", "t4-r18-ls0.2", "t2-base", PYTHON=str(python), FAIL_ON="train_pgdat.py")
    assert status == 3 and "eval_aa.py" not in out and "t2-base" not in out  # neither its evaluation nor the next row
