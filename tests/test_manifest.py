"""run_all.sh: every row of the paper is there, with its figures and setting; it prints what it runs."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, spawn
from paper_rows import RELEASED, ROWS, SAME_SETTING, UNSTATED

import eval_aa
import utils

FOLDER = tempfile.TemporaryDirectory()  # without runs, on which what is printed may depend
SCRIPT = Path(shutil.copy(ROOT / "run_all.sh", FOLDER.name))
SMALL = {"model": "tiny", "n_train": 1000, "eval_every": 5}
OURS = {"x-r18-bntrain-clean0": {"bn_clean_passes": 0},
        "x-r18-bneval-clean0": {"bn_mode": "eval", "bn_clean_passes": 0}, "x-r18-ema": {"ema": 0.9995},
        "x-r18-awp": {"awp": 0.01}, "x-r18-ema-awp": {"ema": 0.9995, "awp": 0.01},
        "x-trades-r18-awp": {"script": "train_trades.py", "awp": 0.005, "awp_warmup": 10},
        "x-laptop-overfitting": SMALL, "x-laptop-overfitting-ema": SMALL | {"ema": 0.99},
        "x-laptop-overfitting-awp": SMALL | {"awp": 0.01}, "x-laptop-overfitting-ls": SMALL | {"ls": 0.3},
        **{f"x-laptop-overfitting-wd{wd}": SMALL | {"wd": float(wd)}
           for wd in ("1e-3", "2e-3", "5e-3", "1e-2", "2e-2")}}
WEIGHT_DECAY = {row: {"model": "wrn-34-10" if "wrn10" in row else "preactresnet-18",
                      "wd": float(row.partition("wd")[2])} for row in UNSTATED}
SAYS = {**ROWS, **{row: ("-/-/-", says) for row, says in {**OURS, **WEIGHT_DECAY}.items()}}
NOT_IN_ALL = re.compile("quickstart|x-laptop-|.*-released$")
ATTACKED = re.compile("(t2|t4|t7|t12)-")  # at laptop scale too
EPOCHS = "epochs", "lr_decay_epochs", "warmup_lr", "warmup_eps", "early_stop_pgd", "awp_warmup"


def run_all(*argv, **env):
    done = spawn("bash", SCRIPT, *argv, **env)
    return done.returncode, done.stdout, done.stderr


def listed(*argv):
    """{id: (paper's figures, command)}."""
    rows = [[f.strip() for f in line.split(" | ")] for line in run_all("list", *argv)[1].splitlines()]
    assert len({r[0] for r in rows}) == len(rows), "an id stands twice"
    return {row: (paper, command) for row, paper, command in rows}


@pytest.fixture(scope="module")
def manifest():
    return listed()


def run_of(manifest, row):
    """The row that a row is the same run as, often itself."""
    command = manifest[row][1]
    return command[2:] if command.startswith("= ") else row


def commands(manifest, row):
    """(the words of a row's command, the arguments of its evaluation); those of its run."""
    train, _, evaluate = manifest[run_of(manifest, row)][1].partition(" ; ")
    return train.split(), evaluate.split()[1:]


def resolved(words):
    """(what a training command's flags resolve to, the script's defaults), without the folder."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    return tuple({**vars(script.parse_args(argv)), "out": None} for argv in (words[1:], []))


@pytest.mark.parametrize("row", SAYS)
def test_a_row_is_what_its_table_says(manifest, row):
    """Figures, and the setting that its command resolves to: what the table says differs from the defaults,
    and nothing else."""
    figures, says = SAYS[row][0], dict(SAYS[row][1])
    assert manifest[row][0] == SAME_SETTING.get(row, figures)
    words, evaluate = commands(manifest, row)
    assert words[0] == says.pop("script", "train_pgdat.py")
    judged = says.pop("judged", "best")
    got, default = resolved(words)
    if row.startswith("s1-"):  # the methods' own code
        default["lr_decay_factor"] = got["lr_decay_factor"]
    assert got == default | says
    evaluation = eval_aa.parse_args(["x", *evaluate])
    assert evaluation.which == judged and evaluation.n is None
    plain = says.get("attack") == "none" or row.startswith("x-laptop-")
    assert evaluation.attacks == (() if plain else eval_aa.STANDARD)


@pytest.mark.parametrize("row", RELEASED)
def test_a_released_checkpoint_is_evaluated_as_its_table_says(manifest, row):
    (name, *argv), _ = commands(manifest, row)
    figures, says = RELEASED[row]
    got, default = (vars(eval_aa.parse_args(words)) for words in (argv, ["x"]))
    assert name == "eval_aa.py" and manifest[row][0] == figures
    assert got == {**default, "target": got["target"], **says}


def test_no_two_rows_are_the_same_run_without_saying_so(manifest):
    own = [manifest[row][1] for row in SAYS if not manifest[row][1].startswith("=")]
    assert len(set(own)) == len(own)
    for row in SAYS:
        paper, (figures, command) = manifest[row][0], manifest[run_of(manifest, row)]
        assert not command.startswith("="), row
        # the same run cannot have two figures; Tables 3, 6 and 13 leave one out
        assert all(a in (b, "-") for a, b in zip(paper.split("/"), figures.split("/"))), row


def test_print_and_list(manifest):
    assert list(listed("t4-r18-*", "t2-base", "t4-*")) == ["t2-base", *listed("t4-*")]
    assert manifest["t4-r18-ls0"] == ("82.52/53.58/48.51", "= t2-base")
    assert run_all("print", "t4-r18-ls0.3@1") == (0, (
        "python train_pgdat.py --ls 0.3 --seed 1 --out runs/t4-r18-ls0.3@1 --resume\n"
        "python eval_aa.py runs/t4-r18-ls0.3@1\n"), "")
    assert run_all("print", "t13-eps8-wrn10-released@2")[1] == (
        "python eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize "
        "--eps 8/255 --seed 2 --out runs/t13-eps8-wrn10-released@2/result.json\n")


@pytest.mark.parametrize("scale", [(), ("--laptop",)])
def test_ids_are_the_distinct_runs_that_rows_need(scale):
    rows = listed(*scale)
    distinct = {r for r in rows if run_of(rows, r) == r and not NOT_IN_ALL.match(r)}
    ids = run_all("ids", *scale)[1].split()
    assert len(ids) == len(distinct) and {*ids} == distinct
    needed = {run_of(rows, r): None for r in listed("t13-*", *scale)}
    assert run_all("print", "t13-*", *scale) == run_all("print", *needed, *scale)
    assert run_all("ids", "t4-r18-ls0*@2", "t2-base@2", "t2-base", *scale)[1].split() == [
        "t2-base@2", "t4-r18-ls0.1@2", "t4-r18-ls0.2@2", "t4-r18-ls0.3@2", "t4-r18-ls0.4@2", "t2-base"]


def test_a_row_at_laptop_scale_is_itself_but_small(manifest):
    laptop = listed("--laptop")
    assert list(laptop) == [row for row in manifest if not NOT_IN_ALL.match(row)]
    for row in laptop.keys() & SAYS:
        assert run_of(laptop, row) == run_of(manifest, row)
        (words, evaluate), (small, cheap) = commands(manifest, row), commands(laptop, row)
        want = resolved(words)[0] | {"model": "tiny", "n_train": 2500, "eval_every": 11, "time_scale": 0.4}
        for flag in {*EPOCHS} & {*want}:
            v = want[flag]
            want[flag] = [round(0.4 * e) for e in v] if isinstance(v, list) else v and round(0.4 * v)
        assert words[0] == small[0] and resolved(small)[0] == want, row
        attack = "apgd-ce,apgd-t --error 0.7" if ATTACKED.match(run_of(laptop, row)) else "none"
        assert cheap == [*evaluate, "--attacks", *attack.split()]
        assert eval_aa.parse_args(["x", *cheap]).error == (0 if attack == "none" else 0.7)


def test_laptop_and_flags_of_the_training_script():
    train = "python train_pgdat.py --ls 0.1 --model tiny --n-train 2500 --time-scale 0.4 --eval-every 11"
    row = "t4-r18-ls0.1@3"
    said = (f"{train} --precision bf16 --seed 3 --out runs/laptop/{row} --resume\n"
            f"python eval_aa.py runs/laptop/{row} --attacks apgd-ce,apgd-t --error 0.7\n")
    for argv in (f"--laptop {row} --precision bf16", f"{row} --precision bf16 --laptop"):
        assert run_all("print", *argv.split()) == (0, said, "")
    for device in ("--device cuda:1", "--device=cuda:1"):
        assert run_all("print", "t2-base", *device.split(), "--compile")[1].splitlines() == [
            f"python train_pgdat.py {device} --compile --out runs/t2-base --resume",
            f"python eval_aa.py runs/t2-base {device}"]


def test_small_networks_take_one_thread_unless_the_user_says_otherwise():
    for rows in (("quickstart",), ("t2-base", "--laptop")):
        chosen = run_all("print", *rows, OMP_NUM_THREADS="2")[1].splitlines()
        assert len(chosen) == 2 and all(line.startswith("python ") for line in chosen)
        lines = run_all("print", *rows, OMP_NUM_THREADS="")[1].splitlines()
        assert lines == [f"env OMP_NUM_THREADS=1 {line}" for line in chosen]
    assert run_all("print", "t2-base", OMP_NUM_THREADS="") == run_all("print", "t2-base")


@pytest.mark.parametrize("epochs, trains", [(12, False), (11, True)])
def test_a_finished_run_without_its_last_pt_is_only_evaluated(epochs, trains):
    name = f"t2-base@{epochs}"
    (run := SCRIPT.parent / "runs" / name).mkdir(parents=True)
    utils.write_json(run / "args.json", {"args": {"epochs": 12, "lr": 0.1}})
    (run / "log.jsonl").write_text("{}\n" * epochs)
    (run / "best.pt").touch()
    *training, evaluation = run_all("print", name)[1].splitlines()
    assert len(training) == trains and evaluation == f"python eval_aa.py runs/{name}"


@pytest.mark.parametrize("argv, culprit", [
    ("walk", "walk"), ("run", "run which row"), ("list --compile", "'--compile'"),
    ("ids t2-* t99-*@1", "'t99-*'"), ("run t2-base t4-r18", "'t4-r18'"), ("print t2-*@1%", "t2-*@1%"),
    ("run t2-base --out=x", "--out=x"), ("run t2-base quickstart --laptop", "'quickstart'"),
    ("run t2-base t13-rice2020-released --compile", "t13-rice2020-released"),
])
def test_what_it_does_not_know_is_refused(argv, culprit):
    status, out, err = run_all(*argv.split(), PYTHON="false")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and culprit in err


STAND_IN = """#!/bin/sh
echo "RAN $*"
case "$*" in *"$FAIL_ON"*) exit $STATUS;; esac
"""
SLEEPER = """#!/bin/sh
for name in HUP INT USR1 TERM; do trap "echo $name; exit 130" $name; done
read line && echo "read $line"
echo "RAN $*"
while :; do sleep 0.1; done
"""


@pytest.fixture
def python(tmp_path):
    """python(text): the path of a stand-in for the interpreter."""
    def write(text):
        path = tmp_path / "python"
        path.write_text(text)
        path.chmod(0o755)
        return str(path)
    return write


def test_a_link_from_elsewhere_runs_in_the_repository(tmp_path):
    (link := tmp_path / "all.sh").symlink_to(ROOT / "run_all.sh")
    assert f"\n{ROOT}\n" in spawn(link, "run", "t2-base", cwd=tmp_path, PYTHON="env pwd #").stdout


@pytest.mark.parametrize("rows", [
    ("t13-eps8-wrn20-released", "s1-lee2020"), ("t4-*@1", "--laptop"), ("t2-base", "--dataset", "*.md")])
def test_run_executes_what_print_shows(python, rows):
    python, env = python(STAND_IN), {"FAIL_ON": "nothing", "OMP_NUM_THREADS": ""}
    status, out, _ = run_all("run", *rows, PYTHON=python, **env)
    printed = run_all("print", *rows, PYTHON=python, **env)[1].splitlines()
    assert status == 0 and [line[2:] for line in out.splitlines() if line.startswith("+ ")] == printed != []
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert [line.replace("RAN", python) for line in ran] == [
        line.removeprefix("env OMP_NUM_THREADS=1 ").replace("\\", "") for line in printed]
    assert spawn("bash", "-c", "\n".join(printed), **env).stdout.splitlines() == ran


def test_a_row_that_fails_is_named_at_the_end_and_the_others_are_run(python):
    rows = ("t4-r18-ls0.2", "t2-base", "t4-r18-ls0.3@1")
    status, out, err = run_all("run", *rows, PYTHON=python(STAND_IN), FAIL_ON="t4-r18", STATUS="3")
    assert status == 1 and "t2-base" not in err
    assert err.count("(exit status 3)") == 2 and "t4-r18-ls0.2 " in err and "t4-r18-ls0.3@1 " in err
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert len(ran) == 4 and "eval_aa.py runs/t2-base" in ran[2]  # of a row that fails, no evaluation


def test_a_command_that_was_interrupted_has_not_failed(python):
    status, out, err = run_all("run", "t2-base", "t4-*", PYTHON=python(STAND_IN), FAIL_ON="t2", STATUS="130")
    assert status == 130 and out.count("RAN") == 1
    assert "interrupted: t2-base" in err and "failed" not in err


@pytest.mark.parametrize("name", ["HUP", "INT", "USR1", "TERM"])
def test_no_training_run_outlives_the_script(python, tmp_path, name):
    """A signal reaches the script alone and is passed on; Ctrl-C reaches both. Standard input is closed."""
    number = signal.Signals[f"SIG{name}"]
    process = subprocess.Popen(
        [SCRIPT, "run", "t2-base", "t4-r18-ls0.1"], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHON": python(SLEEPER)},
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == process.stdout.readline().replace("RAN", f"+ {tmp_path}/python")
    os.killpg(process.pid, number) if name == "INT" else process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == ("INT\n" if name == "INT" else "TERM\n")  # neither an evaluation nor the next row
    assert "interrupted: t2-base" in err and "failed" not in err and process.returncode == 128 + number
