"""README: its commands parse, its flags and files exist, its figures are those of results/."""

import re
import shlex
import sys
import types

import pytest
import torch
from conftest import ROOT, spawn

import eval_aa
import train_pgdat
import train_trades
from tools import report

README, RESULTS = ((ROOT / folder / "README.md").read_text() for folder in (".", "results"))
SNIPPETS = re.findall(r"```python\n(.*?)```\n", README, re.S)
COMMANDS = [line[4:].partition("  #")[0].strip()
            for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines() if line.startswith("    ")]
PARSERS = {"train_pgdat.py": train_pgdat, "train_trades.py": train_trades, "eval_aa.py": eval_aa}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command):
    assert spawn("bash", "-n", "-c", command).returncode == 0
    words = shlex.split(command.rpartition("&& ")[2].partition("|")[0].partition("--wrap")[0])
    words = [w for w in words if not re.match(r"[A-Z]+=", w)]
    if words[0] == "./run_all.sh":  # `run` only prints, for it is given an echo for Python
        done = spawn("bash", *words, PYTHON="echo python")
        assert done.returncode == 0 and done.stdout, done.stderr
    elif words[:2] == ["python", "-m"]:
        assert words[2] == "pytest" or (ROOT / f"{words[2].replace('.', '/')}.py").exists()
    elif words[0] in ("python", "torchrun"):
        script, *flags = words[1:] if words[0] == "python" else words[words.index("--") + 1 :]
        assert PARSERS[script].parse_args(flags)
    else:
        assert words[0] == "sbatch"


def test_the_snippet_for_a_model_of_ones_own_runs(tmp_path, monkeypatch):
    class Net(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Flatten(), torch.nn.Linear(3072, 10))

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Net=Net))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    torch.save(Net().state_dict(), "mine.pt")
    names = {}
    exec(SNIPPETS[0], names)
    assert names["result"]["complete"] and (tmp_path / "mine.json").exists()


def test_flags_and_links_exist(capfd):
    known = {"--nproc_per_node", "--array", "--gres", "--wrap", "--process-slot-var", "--trades", "--laptop"}
    for module in PARSERS.values():
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capfd.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named <= known, named - known
    for page in (ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "docs" / "deviations.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("what", ["measured", "effects"])
def test_the_tables_in_results_are_what_report_prints(what):
    shown = RESULTS.partition(f"<!-- {what} -->\n")[2].partition(f"<!-- end of {what} -->")[0]
    rows, laptop = (report.read_rows(small, roots=["results"]) for small in (False, True))
    laptop = {row: found for row, found in laptop.items() if found.runs}  # a row of one's own may have none
    text = report.show_measured(rows) if what == "measured" else report.show_effects(rows, laptop)[1]
    assert shown.strip() == text.partition("\n\n")[0]


def test_the_effects_in_the_table_of_tricks_are_those_of_their_flags():
    laptop = report.read_rows(laptop=True, roots=["results"])
    found = report.effects(laptop, report.LAPTOP)
    cell = r"(\S+ ± \S+) / (\S+ ± \S+) \((\d) seeds?\)"
    named = re.findall(rf"^\| [^|]* \| `(--[^`]*)`.* \| {cell}(?:;.*)? \|$", README, re.M)
    assert len(named) == len(re.findall(cell, README)) > 0
    for flags, clean, pgd10, seeds in named:
        setting, _ = report.parse(f"train_pgdat.py {flags} --model tiny --n-train 2500 --time-scale 0.4 "
                                  "--eval-every 11")
        run, = (run for run in found if laptop[run].setting == setting)
        assert report.effect_cells(found[run])[:3] == [seeds, clean, pgd10]
