"""run_all.sh: every row is there, with the paper's figures and setting; it prints what it runs."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, spawn
from paper_rows import NOT_THE_PAPERS, RELEASED, ROWS, SAME_SETTING, UNSTATED

import eval_aa
import train_pgdat
import train_trades

SCRIPTS = {"train_pgdat.py": train_pgdat, "train_trades.py": train_trades}


def run_all(*argv, **env):
    done = spawn("bash", ROOT / "run_all.sh", *argv, **env)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def manifest():
    """{id: (paper's figures, command)}."""
    rows = [[f.strip() for f in line.split("|")] for line in run_all("list")[1].splitlines()]
    assert len({r[0] for r in rows}) == len(rows), "an id stands twice"
    return {row: (paper, command) for row, paper, command in rows}


def commands(manifest, row):
    """(training script's words, evaluation's arguments) of a row or of the row that it is the same as."""
    command = manifest[row][1]
    train, _, evaluate = (manifest[command[2:]][1] if command.startswith("= ") else command).partition(";")
    return train.split(), evaluate.split()[1:]


def test_every_row_of_the_paper_is_there_and_no_other(manifest):
    assert set(manifest) == {*ROWS, *UNSTATED, *NOT_THE_PAPERS, *RELEASED}
    status, out, _ = run_all("count")
    counts = dict(line.rsplit(" ", 1) for line in out.splitlines())
    assert status == 0 and int(counts["rows"]) == len(manifest) and int(counts["t8"]) == 18


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_what_its_table_says(manifest, row):
    """Figures, and the setting that its command resolves to: what the table says differs from the defaults,
    and nothing else."""
    figures, says = ROWS[row][0], dict(ROWS[row][1])
    assert manifest[row][0] == SAME_SETTING.get(row, figures)
    (name, *argv), evaluate = commands(manifest, row)
    assert name == says.pop("script", "train_pgdat.py")
    judged = says.pop("judged", "best")
    got, default = (vars(SCRIPTS[name].parse_args(words)) for words in (argv, []))
    # decay factors: the methods' own code
    free = ("out", "lr_decay_factor") if row.startswith("s1-") else ("out",)
    assert {k: v for k, v in got.items() if k not in free} == {k: v for k,
                                                               v in (default | says).items() if k not in free}
    evaluation = eval_aa.parse_args(["x", *evaluate])
    assert evaluation.which == judged and evaluation.n is None
    assert evaluation.attacks == (() if says.get("attack") == "none" else eval_aa.STANDARD)


@pytest.mark.parametrize("row", RELEASED)
def test_a_released_checkpoint_is_evaluated_as_its_table_says(manifest, row):
    (name, *argv), _ = commands(manifest, row)
    figures, says = RELEASED[row]
    got, default = (vars(eval_aa.parse_args(words)) for words in (argv, ["x"]))
    assert name == "eval_aa.py" and manifest[row][0] == figures
    assert got == {**default, "target": got["target"], **says}


@pytest.mark.parametrize("row", UNSTATED)
def test_the_other_values_of_figure_1a_differ_in_nothing_but_weight_decay(manifest, row):
    (name, *argv), _ = commands(manifest, row)
    got, default = (vars(SCRIPTS[name].parse_args(words)) for words in (argv, []))
    differ = {k for k in got if got[k] != default[k]} - {"out"}
    assert manifest[row][0] == "-/-/-" and "wd" in differ <= {"wd", "model"}
    assert (got["model"],
            float(row.partition("wd")[2])) == ("wrn-34-10" if "wrn10" in row else "preactresnet-18",
                                               got["wd"])


def test_no_two_rows_are_the_same_run_without_saying_so(manifest):
    commands = [c for _, c in manifest.values() if not c.startswith("=")]
    assert len(set(commands)) == len(commands)
    for row, (paper, command) in manifest.items():
        if command.startswith("="):
            other = manifest[command[2:]]
            assert not other[1].startswith("="), row
            # the same run cannot have two figures; Tables 3, 6 and 13 leave one out
            assert all(a in (b, "-") or a == b for a, b in zip(paper.split("/"), other[0].split("/"))), row


def test_print_and_list():
    out = run_all("list", "t4-r18-*")[1]
    assert [line.split()[0] for line in out.splitlines()] == [f"t4-r18-ls{s}" for s in (0, .1, .2, .3, .4)]
    assert run_all("print", "t4-r18-ls0.3@1") == (0, (
        "python train_pgdat.py --ls 0.3 --seed 1 --out runs/t4-r18-ls0.3@1 --resume\n"
        "python eval_aa.py runs/t4-r18-ls0.3@1\n"), "")
    assert run_all("print", "t4-r18-ls0")[1] == run_all("print", "t2-base")[1]
    assert run_all("print",
                   "s1-madry2018")[1].splitlines()[1] == "python eval_aa.py runs/s1-madry2018 --which last"
    assert run_all("print", "t13-eps8-wrn10-released")[1] == (
        "python eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize "
        "--eps 8/255 --out runs/t13-eps8-wrn10-released/result.json\n")


def test_an_array_index_is_a_distinct_run(manifest):
    others = re.compile("quickstart|x-tiny|.*-released$")
    distinct = [r for r, (_, c) in manifest.items() if not c.startswith("=") and not others.match(r)]
    assert distinct[6] == "t2-warmup-lr-20"
    assert run_all("print", SLURM_ARRAY_TASK_ID="7") == run_all("print", distinct[6])
    assert run_all("print", SLURM_ARRAY_TASK_ID=str(len(distinct))) == run_all("print", distinct[-1])
    status, _, err = run_all("print", SLURM_ARRAY_TASK_ID=str(len(distinct) + 1))
    assert status == 2 and f"they are 1 to {len(distinct)}" in err
    assert len(run_all("print", "all")[1].splitlines()) == 2 * len(distinct)


def test_ids_are_the_distinct_runs_that_rows_need(manifest):
    distinct = run_all("ids")[1].splitlines()
    assert run_all("ids", "all")[1].splitlines() == distinct
    assert len(distinct) == int(run_all("count")[1].split()[-1])
    assert run_all("print", SLURM_ARRAY_TASK_ID="7") == run_all("print", distinct[6])
    assert run_all("ids", "t4-r18-*", "t2-base")[1].split() == [
        "t2-base", "t4-r18-ls0.1", "t4-r18-ls0.2", "t4-r18-ls0.3", "t4-r18-ls0.4"]
    for pattern, n in (("t2-*", 10), ("t13-*", 10), ("quickstart*", 2)):
        ids = run_all("ids", pattern)[1].splitlines()
        assert len(ids) == len(set(ids)) == n and not any(manifest[row][1].startswith("=") for row in ids)


def test_patterns():
    """print, and so run, take them as list does, and leave out rows that are the same run."""
    ids = run_all("ids", "t4-*")[1].split()
    assert run_all("print", "t4-*") == run_all("print", *ids) != ""
    assert run_all("print", "t[24]-*") == run_all("print", *run_all("ids", "t[24]-*")[1].split())
    assert run_all("print", "t4-*@2", "t2-base") == run_all("print", *(f"{i}@2" for i in ids), "t2-base")


@pytest.mark.parametrize("action", ["list", "ids", "print", "run", "cost"])
def test_a_pattern_that_matches_nothing(action):
    assert run_all(action, "t99-*", PYTHON="false") == (2, "", "run_all.sh: error: no row matches 't99-*'\n")
    if action not in ("list", "ids"):
        assert run_all(action, "t99-*@1", PYTHON="false") == run_all(action, "t99-*")
    else:
        advice = "run_all.sh: error: no row matches 't2'; there are those of 't2-*'\n"
        assert run_all(action, "t2") == (2, "", advice)


def test_dry_run(python):
    printed = "python train_pgdat.py --out runs/t2-base --resume --dry-run\n"
    for argv in (("t2-base", "--dry-run"), ("--dry-run", "t2-base")):
        assert run_all("print", *argv) == (0, printed, "")
    out = run_all("run", "t4-r18-*", "--dry-run", PYTHON=python(STAND_IN), FAIL_ON="nothing")[1]
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert len(ran) == 5 and all(line.endswith("--dry-run") for line in ran)
    status, out, err = run_all("print", "t13-eps8-wrn10-released", "--dry-run")
    assert status == 2 and out == "" and "trains nothing" in err


def test_cost_hands_rows_and_options_on(python):
    argv = "t4-r18-*", "t2-base@1", "--precision", "fp32"
    out = run_all("cost", *argv, PYTHON=python(STAND_IN), FAIL_ON="nothing")[1]
    ids = "t2-base t4-r18-ls0.1 t4-r18-ls0.2 t4-r18-ls0.3 t4-r18-ls0.4 t2-base@1"
    assert out == f"RAN -m tools.bench --row {ids} --precision fp32\n"


ON_A_GPU = """#!/bin/sh
sleep 0.3
echo "$CUDA_VISIBLE_DEVICES" "$@" >> "$0.log"
"""
HEADER = (ROOT / "run_all.sh").read_text()


@pytest.mark.parametrize("tool", ["xargs", "parallel"])
def test_one_run_a_gpu(python, tool):
    """The header's lines, with 3 GPUs: a run and its evaluation are on one of them, and all are used."""
    if tool == "parallel" and not shutil.which("parallel"):
        pytest.skip("GNU parallel is not installed")
    line = next(line[1:].strip() for line in HEADER.splitlines() if f"| {tool} " in line)
    python = python(ON_A_GPU)
    done = spawn("bash", "-c", line.replace("-P 8", "-P 3").replace("-j 8", "-j 3"), PYTHON=python)
    assert done.returncode == 0, done.stderr
    logged = [line.split() for line in Path(f"{python}.log").read_text().splitlines()]
    trained = {line[line.index("--out") + 1]: line[0] for line in logged if "--out" in line}
    evaluated = {line[2]: line[0] for line in logged if line[1] == "eval_aa.py"}
    assert trained == evaluated  # a row stays on its GPU
    assert set(trained) == {f"runs/{row}" for row in run_all("ids", "t2-*")[1].split()}
    assert set(trained.values()) == {"0", "1", "2"}


@pytest.mark.parametrize("argv, message", [
    (("cost",), "cost of which row?"),
    (("run", "t2-early"), "no row t2-early; there is t2-early-stop-40-70 t2-early-stop-40-100"),
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
SLEEPER = """#!/bin/sh
trap 'echo TERM; exit 143' TERM
trap 'echo INT; exit 130' INT
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


@pytest.mark.parametrize("number, name, to_group", [(signal.SIGTERM, "TERM", False),
                                                    (signal.SIGINT, "INT", True)])
def test_no_training_run_outlives_the_script(python, number, name, to_group):
    """SIGTERM reaches the script alone and is passed on; Ctrl-C reaches both. Standard input is closed."""
    process = subprocess.Popen([ROOT / "run_all.sh", "run", "t2-base", "t4-r18-ls0.1"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env={**os.environ,
                                                                       "PYTHON": python(SLEEPER)},
                               start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                                        signal.SIG_DFL))
    while not process.stdout.readline().startswith("RAN"):
        pass
    os.killpg(process.pid, number) if to_group else process.terminate()
    assert process.communicate(timeout=30)[0] == f"{name}\n"  # neither an evaluation nor the next row
    assert process.returncode == 128 + number


def test_run_executes_what_print_shows(python):
    python = python(STAND_IN)
    for rows in (("t2-base", "t4-r18-ls0.1@3"), ("t13-eps8-wrn20-released",), ("s1-lee2020",)):
        status, out, _ = run_all("run", *rows, PYTHON=python, FAIL_ON="nothing")
        printed = run_all("print", *rows, PYTHON=python)[1].splitlines()
        assert status == 0 and [line[2:] for line in out.splitlines() if line.startswith("+ ")] == printed
        assert [line.replace("RAN", python) for line in out.splitlines() if line.startswith("RAN")] == printed
        pasted = spawn("bash", "-c", "\n".join(printed), FAIL_ON="nothing").stdout
        assert pasted.splitlines() == [line for line in out.splitlines() if line.startswith("RAN")]
    status, out, _ = run_all("run", SLURM_ARRAY_TASK_ID="7", PYTHON=python, FAIL_ON="nothing")
    assert status == 0 and "RAN train_pgdat.py --warmup-lr 20 --out runs/t2-warmup-lr-20 --resume" in out


def test_a_row_that_fails_is_named_at_the_end_and_the_others_are_run(python):
    rows = ("t4-r18-ls0.2", "t2-base", "t4-r18-ls0.3")
    status, out, err = run_all("run", *rows, PYTHON=python(STAND_IN), FAIL_ON="t4-r18")
    assert status == 1
    assert err == "run_all.sh: failed: t4-r18-ls0.2 (exit status 3) t4-r18-ls0.3 (exit status 3)\n"
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert len(ran) == 4 and "eval_aa.py runs/t2-base" in ran[2]  # of a row that fails, no evaluation
