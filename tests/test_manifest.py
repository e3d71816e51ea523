"""run_all.sh: every row is there, with the paper's figures and setting; it prints what it runs."""

import os
import re
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
OVERFITTING = {"x-laptop-overfitting": {}, "x-laptop-overfitting-ema": {"ema": 0.99},
               "x-laptop-overfitting-awp": {"awp": 0.01}, "x-laptop-overfitting-ls": {"ls": 0.3}}
NOT_IN_ALL = re.compile("quickstart|x-laptop-|.*-released$")


def run_all(*argv, **env):
    done = spawn("bash", ROOT / "run_all.sh", *argv, **env)
    return done.returncode, done.stdout, done.stderr


def listed(*argv):
    """{id: (paper's figures, command)}."""
    rows = [[f.strip() for f in line.split(" | ")] for line in run_all("list", *argv)[1].splitlines()]
    assert len({r[0] for r in rows}) == len(rows), "an id stands twice"
    return {row: (paper, command) for row, paper, command in rows}


@pytest.fixture(scope="module")
def manifest():
    return listed()


@pytest.fixture(scope="module")
def laptop():
    return listed("--laptop")


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
    parse_args = SCRIPTS[words[0]].parse_args
    return tuple({**vars(parse_args(argv)), "out": None} for argv in (words[1:], []))


def test_every_row_of_the_paper_is_there_and_no_other(manifest):
    assert set(manifest) == {*ROWS, *UNSTATED, *NOT_THE_PAPERS, *RELEASED, *OVERFITTING}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_what_its_table_says(manifest, row):
    """Figures, and the setting that its command resolves to: what the table says differs from the defaults,
    and nothing else."""
    figures, says = ROWS[row][0], dict(ROWS[row][1])
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
    got, default = resolved(commands(manifest, row)[0])
    model = "wrn-34-10" if "wrn10" in row else "preactresnet-18"
    assert manifest[row][0] == "-/-/-"
    assert got == default | {"model": model, "wd": float(row.partition("wd")[2])} and got["wd"] != 5e-4


@pytest.mark.parametrize("row", OVERFITTING)
def test_overfitting_on_a_laptop(manifest, row):
    words, evaluate = commands(manifest, row)
    got, default = resolved(words)
    assert got == default | {"model": "tiny", "n_train": 1000, "eval_every": 5} | OVERFITTING[row]
    assert words[0] == "train_pgdat.py" and evaluate == ["--attacks", "none"]


def test_no_two_rows_are_the_same_run_without_saying_so(manifest):
    own = [command for _, command in manifest.values() if not command.startswith("=")]
    assert len(set(own)) == len(own)
    for row, (paper, _) in manifest.items():
        figures, command = manifest[run_of(manifest, row)]
        assert not command.startswith("="), row
        # the same run cannot have two figures; Tables 3, 6 and 13 leave one out
        assert all(a in (b, "-") for a, b in zip(paper.split("/"), figures.split("/"))), row


def test_print_and_list(manifest):
    assert list(listed("t4-r18-ls*")) == [f"t4-r18-ls{s}" for s in (0, .1, .2, .3, .4)]
    assert list(listed("t4-r18-*", "t2-base", "t4-*")) == ["t2-base", *listed("t4-*")]
    assert manifest["t4-r18-ls0"] == ("82.52/53.58/48.51", "= t2-base")
    assert manifest["s1-xu2020"][1].endswith(" --wd 1e-4 ; eval_aa.py --which last")
    assert run_all("print", "t4-r18-ls0.3@1") == (0, (
        "python train_pgdat.py --ls 0.3 --seed 1 --out runs/t4-r18-ls0.3@1 --resume\n"
        "python eval_aa.py runs/t4-r18-ls0.3@1\n"), "")
    assert run_all("print", "t4-r18-ls0") == run_all("print", "t2-base")
    assert run_all("print", "s1-lee2020")[1].endswith("\npython eval_aa.py runs/s1-madry2018 --which last\n")
    assert run_all("print", "t13-eps8-wrn10-released@2")[1] == (
        "python eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize "
        "--eps 8/255 --seed 2 --out runs/t13-eps8-wrn10-released@2/result.json\n")


@pytest.mark.parametrize("scale", [(), ("--laptop",)])
def test_ids_are_the_distinct_runs_that_rows_need(scale):
    rows = listed(*scale)
    distinct = [r for r in rows if run_of(rows, r) == r and not NOT_IN_ALL.match(r)]
    ids = run_all("ids", *scale)[1].split()
    assert len(ids) == len(distinct) and set(ids) == set(distinct)
    assert run_all("ids", "all", *scale)[1].split() == ids
    assert len(run_all("print", "all@1", *scale)[1].splitlines()) == 2 * len(ids)
    for pattern in ("t[24]-*", "t13-*"):
        needed = {run_of(rows, r): None for r in listed(pattern, *scale)}
        assert run_all("ids", pattern, *scale)[1].split() == [*needed]
        assert run_all("print", pattern, *scale) == run_all("print", *needed, *scale)
    assert run_all("ids", "t4-r18-*@2", "t4-r18-ls0@2", "t2-base", *scale)[1].split() == [
        "t2-base@2", *(f"t4-r18-ls{s}@2" for s in (.1, .2, .3, .4)), "t2-base"]


EPOCHS = "epochs", "lr_decay_epochs", "warmup_lr", "warmup_eps", "early_stop_pgd", "awp_warmup"


def test_a_row_at_laptop_scale_is_itself_but_small(manifest, laptop):
    """Rows share a run, the first one's, if and only if they are the same then, and judged alike."""
    assert list(laptop) == [row for row in manifest if not NOT_IN_ALL.match(row)]
    runs = {}
    for row in laptop:
        (words, evaluate), (small, cheap) = commands(manifest, row), commands(laptop, row)
        want = resolved(words)[0] | {"model": "tiny", "n_train": 2500, "eval_every": 11, "time_scale": 0.4}
        for flag in {*EPOCHS} & {*want}:
            v = want[flag]
            want[flag] = [round(0.4 * e) for e in v] if isinstance(v, list) else v and round(0.4 * v)
        assert words[0] == small[0] and resolved(small)[0] == want, row
        assert ("last" in evaluate) == ("last" in cheap), row
        key = str((words[0], sorted(want.items()), "last" in evaluate))
        assert run_of(laptop, row) == runs.setdefault(key, row)
        is_attacked = re.match("(t2|t4|t7|t12)-", runs[key])
        assert [w for w in cheap if w not in ("--which", "last")] == (
            "--attacks apgd-ce,apgd-t --stop-after 1000" if is_attacked else "--attacks none").split()


def test_how_many_runs_a_laptop_makes(laptop):
    tables = "t2", "t3", "t4", "t5", "t6", "t7", "t8", "t12"
    rows = [row for row in laptop if row.split("-")[0] in tables]
    assert len(rows) == 82 and len({run_of(laptop, row) for row in rows}) == 43
    rows += listed("t9-*", "--laptop")
    assert len(rows) == 99 and len({run_of(laptop, row) for row in rows}) == 50


def test_what_a_laptop_takes_for_the_same_run(tmp_path):
    """Flags that restate a default make no difference, the checkpoint that is judged does."""
    rows = """
row z-pgdat -/-/- train_pgdat.py --epochs 110 --lr-decay-epochs 100 105 --model tiny
evaluate="--n 9 --which last" row z-last -/-/- train_pgdat.py
row z-trades -/-/- train_trades.py
row z-train -/-/- train_trades.py --bn-mode train
row z-epochs -/-/- train_pgdat.py --epochs 1100
"""
    text = (ROOT / "run_all.sh").read_text()
    (tmp_path / "run_all.sh").write_text(text.replace("\nall=", f"{rows}\nall="))
    done = spawn("bash", tmp_path / "run_all.sh", "ids", "z-*", "--laptop")
    assert done.stdout.split() == ["t2-base", "z-last", "t12-r18-wd5e-4-relu-bneval",
                                   "t12-r18-wd5e-4-relu-bntrain", "z-epochs"]


def test_laptop_and_flags_of_the_training_script():
    train = "python train_pgdat.py --ls 0.1 --model tiny --n-train 2500 --time-scale 0.4 --eval-every 11"
    out = "runs/laptop/t4-r18-ls0.1@3"
    said = (f"{train} --precision bf16 --seed 3 --out {out} --resume\n"
            f"python eval_aa.py {out} --attacks apgd-ce,apgd-t --stop-after 1000\n")
    row = "t4-wrn10-ls0.1@3"
    for argv in (f"{row} --laptop --precision bf16", f"--laptop {row} --precision bf16",
                 f"{row} --precision bf16 --laptop"):
        assert run_all("print", *argv.split()) == (0, said, "")
    for flag, text in (("--dry-run", "--dry-run"), ("--dataset=my data.npz", r"--dataset=my\ data.npz")):
        lines = run_all("print", "t2-base", "--compile", flag)[1].splitlines()
        assert lines[0] == f"python train_pgdat.py --compile {text} --out runs/t2-base --resume"
        assert lines[1:] == ([] if flag == "--dry-run" else ["python eval_aa.py runs/t2-base"])
    for device in ("--device cuda:1", "--device=cuda:1"):
        assert run_all("print", "t2-base", *device.split(), "--compile")[1].splitlines() == [
            f"python train_pgdat.py {device} --compile --out runs/t2-base --resume",
            f"python eval_aa.py runs/t2-base {device}"]


@pytest.mark.parametrize("argv, message", [
    (("walk",), "unknown action walk: there is list, print, run, ids"),
    (("run",), "run which row? ./run_all.sh list shows them"),
    (("print", "--dry-run"), "print which row? ./run_all.sh list shows them"),
    (("list", "t2"), "no row matches 't2'"),
    (("list", "--compile"), "no row matches '--compile'"),
    (("list", "t2-*", "t99-*"), "no row matches 't99-*'"),
    (("ids", "t2-*", "t99-*@1"), "no row matches 't99-*'"),
    (("run", "t2-base", "t99"), "no row matches 't99'"),
    (("run", ""), "no row matches ''"),
    (("run", "@1"), "no row matches ''"),
    (("run", "t2-base@"), "the seed of t2-base@ is not a number"),
    (("run", "t2-base@x"), "the seed of t2-base@x is not a number"),
    (("print", "t2-base", "t2-*@1%"), "the seed of t2-*@1% is not a number"),
    (("run", "t2-base", "t13-rice2020-released", "--compile"),
     "t13-rice2020-released trains nothing: it takes no --compile"),
    (("run", "t2-base", "quickstart", "--laptop"), "no row matches 'quickstart' at laptop scale"),
    (("print", "x-laptop-overfitting", "--laptop"), "no row matches 'x-laptop-overfitting' at laptop scale"),
    (("run", "t13-rice2020-released", "--laptop"), "no row matches 't13-rice2020-released' at laptop scale"),
])
def test_what_it_does_not_know_is_refused(argv, message):
    assert run_all(*argv, PYTHON="false") == (2, "", f"run_all.sh: error: {message}\n")


STAND_IN = """#!/bin/sh
echo "RAN $*"
case "$*" in *"$FAIL_ON"*) exit 3;; esac
"""
ON_A_GPU = """#!/bin/sh
sleep 0.1
echo "$CUDA_VISIBLE_DEVICES" "$@" >> "$0.log"
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


def test_help_and_a_link_from_elsewhere(tmp_path):
    (link := tmp_path / "all.sh").symlink_to(ROOT / "run_all.sh")
    for argv in ((), ("help",), ("-h",), ("--help",)):
        done = spawn(link, *argv, cwd=tmp_path)
        assert done.returncode == 0 and re.match("The manifest: [^$]+$", done.stdout)
        assert all(f"./run_all.sh {action} " in done.stdout for action in ("list", "print", "run", "ids"))
    assert f"\n{ROOT}\n" in spawn(link, "run", "t2-base", cwd=tmp_path, PYTHON="env pwd #").stdout


def test_one_run_a_gpu(python):
    """The header's line, with 3 GPUs: a run and its evaluation are on one of them, and all are used."""
    line = next(line[1:] for line in (ROOT / "run_all.sh").read_text().splitlines() if "| xargs " in line)
    python = python(ON_A_GPU)
    assert spawn("bash", "-c", line.replace("-P 8", "-P 3"), PYTHON=python).returncode == 0
    gpus = {}
    for gpu, *words in map(str.split, Path(f"{python}.log").read_text().splitlines()):
        run = words[words.index("--out") + 1] if "--out" in words else words[1]
        gpus[run] = gpus.get(run, "") + gpu
    assert set(gpus) == {f"runs/{row}" for row in run_all("ids", "t2-*")[1].split()}
    assert set(gpus.values()) == {"00", "11", "22"}


@pytest.mark.parametrize("rows", [
    ("t2-base", "t4-r18-ls0.1@3"), ("t13-eps8-wrn20-released",), ("s1-lee2020",),
    ("t4-*@1", "--laptop"), ("t2-base", "--dry-run"), ("t2-base", "--dataset", "*.md")])
def test_run_executes_what_print_shows(python, rows):
    python = python(STAND_IN)
    status, out, _ = run_all("run", *rows, PYTHON=python, FAIL_ON="nothing")
    printed = run_all("print", *rows, PYTHON=python)[1].splitlines()
    assert status == 0 and [line[2:] for line in out.splitlines() if line.startswith("+ ")] == printed != []
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert [line.replace("RAN", python) for line in ran] == [line.replace("\\", "") for line in printed]
    assert spawn("bash", "-c", "\n".join(printed), FAIL_ON="nothing").stdout.splitlines() == ran


def test_a_row_that_fails_is_named_at_the_end_and_the_others_are_run(python):
    rows = ("t4-r18-ls0.2", "t2-base", "t4-r18-ls0.3@1")
    status, out, err = run_all("run", *rows, PYTHON=python(STAND_IN), FAIL_ON="t4-r18")
    assert status == 1
    assert err == "run_all.sh: failed: t4-r18-ls0.2 (exit status 3) t4-r18-ls0.3@1 (exit status 3)\n"
    ran = [line for line in out.splitlines() if line.startswith("RAN")]
    assert len(ran) == 4 and "eval_aa.py runs/t2-base" in ran[2]  # of a row that fails, no evaluation


@pytest.mark.parametrize("number, name, to_group", [(signal.SIGTERM, "TERM", False),
                                                    (signal.SIGINT, "INT", True)])
def test_no_training_run_outlives_the_script(python, tmp_path, number, name, to_group):
    """SIGTERM reaches the script alone and is passed on; Ctrl-C reaches both. Standard input is closed."""
    process = subprocess.Popen(
        [ROOT / "run_all.sh", "run", "t2-base", "t4-r18-ls0.1"], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHON": python(SLEEPER)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == process.stdout.readline().replace("RAN", f"+ {tmp_path}/python")
    os.killpg(process.pid, number) if to_group else process.terminate()
    assert process.communicate(timeout=30)[0] == f"{name}\n"  # neither an evaluation nor the next row
    assert process.returncode == 128 + number
