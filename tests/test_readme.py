"""README: every command in it is executed here, in a dry run where it trains, evaluates or needs a GPU."""

import re
import shlex
import sys

import pytest
from conftest import ROOT, spawn

import eval_aa
import train_pgdat
import train_trades

README = (ROOT / "README.md").read_text()
# Typed from the README: a command that is changed there has to be looked at here.
COMMANDS = """
pip install -r requirements.txt
./run_all.sh run quickstart
python train_pgdat.py --wd 5e-4 --bn-mode eval --ls 0.1
python -m pytest -q
python train_pgdat.py --wd 5e-4 --bn-mode eval --ls 0.1
python train_trades.py --model wrn-34-10 --activation softplus
python eval_aa.py runs/pgdat-ls0.1-bn-mode-eval
./run_all.sh list 't2-*'
./run_all.sh print t4-r18-ls0.3
./run_all.sh cost t4-r18-ls0.3
./run_all.sh run t4-r18-ls0.3@1
python -m tools.report t4
python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize
python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize --n 1000 --attacks apgd-ce,apgd-t --out quick.json
python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize --attacks none --pgd-steps 50 --restarts 5 --loss cw
./run_all.sh ids 't2-*' | xargs -P 8 -n 1 --process-slot-var=CUDA_VISIBLE_DEVICES ./run_all.sh run
torchrun --nproc_per_node=8 -- train_pgdat.py --model wrn-34-20 --bn-mode eval
PYTHON="torchrun --nproc_per_node=8 --" ./run_all.sh run t8-wrn20-wd5e-4-relu-bneval
""".strip().splitlines()


def commands():
    """The indented lines of the README that are commands, without their comments."""
    lines = [line[4:].partition("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
    return [line for line in lines if not line.startswith("runs/")]


def test_the_commands_are_the_ones_that_are_tested():
    assert commands() == COMMANDS


STAND_IN = "#!/bin/sh\necho RAN $*\n"


def dry(command, folder):
    """(argument vector, environment) that executes a command of the README without its work."""
    words, python = shlex.split(command), folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = {}
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "./run_all.sh":
        return ["bash", *words], {"PYTHON": str(python)}
    if words[0] == "torchrun":
        words = ["python", *words[words.index("--") + 1 :]]
    if words[1].startswith("train_"):
        return [sys.executable, *words[1:], "--dry-run"], env
    return [sys.executable, *words[1:]], env


PIPES = [c for c in COMMANDS if "|" in c]
TRAINING = [c for c in COMMANDS if re.search(r"(python|--) train|run_all.sh (run|list|print) ", c)
            and c not in PIPES]
EVALUATIONS = [c for c in COMMANDS if c.startswith("python eval_aa.py")]
TOOLS = [c for c in COMMANDS if c.startswith("python -m tools")]


@pytest.mark.parametrize("command", TRAINING)
def test_training_and_the_manifest(command, tmp_path):
    argv, env = dry(command, tmp_path)
    done = spawn(*argv, **env)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations(command):
    assert eval_aa.parse_args(shlex.split(command)[2:]).target


@pytest.mark.parametrize("command", TOOLS)
def test_tools(command):
    done = spawn(sys.executable, *shlex.split(command)[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


def test_every_command_belongs_to_a_test_or_is_what_ci_does():
    left = set(COMMANDS) - {*TRAINING, *EVALUATIONS, *TOOLS, *PIPES}
    assert left == {COMMANDS[0], "python -m pytest -q", "./run_all.sh cost t4-r18-ls0.3"}
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -r requirements.txt" in ci and "python -m pytest -q" in ci
    assert all(spawn("bash", "-n", "-c", command).returncode == 0 for command in PIPES)


def test_flags_that_are_named_exist():
    parsers = [train_pgdat.make_parser(), train_trades.make_parser(), eval_aa.make_parser()]
    known = {flag for p in parsers for flag in p._option_string_actions}
    # Of torchrun, sbatch, xargs and tools.
    others = {"--nproc_per_node", "--array", "--gres", "--wrap", "--process-slot-var", "--trades"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named <= known | others, named - known - others


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
