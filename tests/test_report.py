"""tools/report.py: which runs count, tables, laptop effects, pictures, from runs written by hand."""

import functools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, spawn

from tools import figures, report

BASE = "t2-base"
LISTING, PARSE = functools.cache(report.listing), functools.cache(report.parse)  # each is read once


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "listing", LISTING)
    monkeypatch.setattr(report, "parse", PARSE)


def write(name, clean=None, pgd10=None, aa=None, *, apgd=None, error=0.0, n=10_000, n_done=None, which="best",
          root="runs", epochs=None, loss=2.0, evaluated=(), **changed):
    """Write the run of the row and seed that its name claims; without figures it is not evaluated. Its best
    epoch is the 40th, or the last one if there are fewer."""
    row_id, _, seed = name.partition("@")
    row = report.read_rows(laptop="laptop" in root, roots=[])[row_id]
    args = row.setting | {"seed": int(seed or 0), "precision": "tf32"} | changed
    command, path = [args.pop("script")], Path(root, name)
    path.mkdir(parents=True, exist_ok=True)
    about, epochs = {"device": "abacus", "data_sha256": "d"}, epochs or args["epochs"]
    (path / "args.json").write_text(json.dumps({"args": args, "command": command, **about}))
    log = [{"epoch": e + 1, "lr": 0.1, "train_loss": loss, "seconds": 36.0, "train_clean_acc": 60 + e % 40,
            "test_clean": 50 + e % 40, "test_pgd10": 20 + e % 40} for e in range(epochs)]
    (path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    if clean is not None:
        attacks = row.evaluation.attacks if aa is None else report.eval_aa.STANDARD
        done = n if n_done is None else n_done
        result = {"clean": clean, "pgd10": pgd10, "aa": aa, "aa_error": error, "n": n, "n_done": done,
                  "complete": not attacks or done == n, "attacks": list(attacks),
                  "left": {} if apgd is None else {"apgd-t": [apgd, 0.5]},
                  "seconds": {"pgd10": 3.6, "autoattack": 7.2}, **about, "eps": args["eps"],
                  "model": args["model"], "activation": args["activation"],
                  "epoch": min(epochs, 40) if which == "best" else epochs} | dict(evaluated)
        (path / ("result.json" if which == "best" else "result_last.json")).write_text(json.dumps(result))
    return path


def laptop(name, *figures, **more):
    return write(name, *figures, **{"n_done": 1000, "precision": "bf16", "root": "runs/laptop"} | more)


def cells(text, row):
    """The cells of a row's line in a table, by column; those that are not shown are empty."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    found, = [dict(zip(lines[0], line)) for line in lines if line[0].strip("`") == row]
    usual = ("AA: ours", "Clean: ours", "our effect: Clean", "our effect: PGD-10")
    return dict.fromkeys(usual, "") | found


def table(name, row):
    return cells(report.show_table(name, report.read_rows()), row)


def laptop_table(name, row):
    return cells(report.show_table(name, report.read_rows(), report.read_rows(laptop=True)), row)


# ---- Which runs count --------------------------------------------------------------------------------------


def test_seeds_rows_that_are_the_same_run_and_both_folders():
    write(f"{BASE}@0", 82.0, 53.0, 48.0, root="results")
    write(f"{BASE}@01", 83.0, 54.0, 49.0)
    write(f"{BASE}@2", epochs=7)          # in training
    write("t4-r18-ls0.1", 82.69, 54.04, 48.76, eval_every=5, eval_from=100, precision="bf16")
    want = {"flags": "train_pgdat.py", "seeds": "2", "Clean: ours": "82.50 ± 0.71", "Clean: paper": "82.52",
            "Clean: difference": "-0.02", "AA: ours": "48.50 ± 0.71", "AA: difference": "-0.01"}
    assert table("t2", BASE).items() >= want.items()
    assert table("t4", "t4-r18-ls0").items() >= want.items()  # `= t2-base`
    assert table("t4", "t4-r18-ls0.1")["AA: difference"] == "+0.00"
    want = {"flags": "train_pgdat.py --ls 0.2", "seeds": "0", "AA: ours": "", "AA: paper": "49.20"}
    assert table("t4", "t4-r18-ls0.2").items() >= want.items()


@pytest.mark.parametrize("changed", [{"eps": 4 / 255}, {"data_sha256": "e"}, {"model": "tiny"},
                                     {"activation": "elu"}, {"n": 1000}, {"epoch": 39}, {"epoch": 110}])
def test_a_result_of_another_evaluation_or_epoch_does_not_count(capsys, changed):
    write("t2-warmup-lr-15", 82.0, 53.0, 48.0, evaluated=changed)
    assert table("t2", "t2-warmup-lr-15")["Clean: ours"] == ""
    (key, value), = changed.items()
    assert f"t2-warmup-lr-15/result.json does not count: {key} is {value}, not" in capsys.readouterr().err


def test_a_result_counts_once_its_run_is_complete(capsys):
    """Killed after 2 epochs and evaluated, then gone on with: only a new evaluation counts."""
    write("t2-warmup-lr-15@1", 82.0, 53.0, 48.0)
    write("t2-warmup-lr-15", 30.0, 20.0, 15.0, epochs=2)
    assert table("t2", "t2-warmup-lr-15")["Clean: ours"] == "82.00"
    assert "2 of 110 epochs are trained" in capsys.readouterr().err
    assert "seed 0 at epoch 2, seed 1 done" in report.show_status(report.read_rows())
    write("t2-warmup-lr-15", 30.0, 20.0, 15.0, evaluated={"epoch": 2})
    assert table("t2", "t2-warmup-lr-15")["Clean: ours"] == "82.00"
    write("t2-warmup-lr-15", 84.0, 20.0, 15.0)
    assert table("t2", "t2-warmup-lr-15")["Clean: ours"] == "83.00 ± 1.41"


def test_a_row_is_judged_by_its_checkpoint():
    laptop("s1-madry2018", 99.0, 99.0)
    assert laptop_table("s1", "s1-madry2018")["seeds"] == "0"
    laptop("s1-madry2018", 47.0, 25.0, which="last", evaluated={"epoch": 40})
    assert laptop_table("s1", "s1-madry2018")["seeds"] == "0"
    laptop("s1-madry2018", 47.0, 25.0, which="last")
    assert laptop_table("s1", "s1-madry2018")["PGD-10: ours"] == "25.00"


def test_a_run_of_another_setting_is_skipped(capsys):
    write("t2-warmup-lr-15", 82.0, 53.0, 48.0, ls=0.1)
    write(f"{BASE}@2", 82.0, 53.0, 48.0, seed=1)
    write("t2-warmup-lr-20", 82.0, 53.0, 48.0, dataset="elsewhere/cifar10", compile=True)
    assert table("t2", "t2-warmup-lr-15")["AA: ours"] == table("t2", BASE)["AA: ours"] == ""
    assert table("t2", "t2-warmup-lr-20")["AA: ours"] == "48.00"
    err = capsys.readouterr().err
    assert "t2-warmup-lr-15 (--ls was 0.1, is 0)" in err and "t2-base@2" in err


def test_a_stopped_evaluation_is_shown_with_its_error_and_counts_nowhere():
    write("t2-warmup-lr-10", 82.0, 53.0, 48.0)
    write("t2-warmup-lr-10@1", 84.0, 55.0, 50.71, error=0.45, n_done=2000)
    shown = table("t2", "t2-warmup-lr-10")
    assert shown["Clean: ours"] == "83.00 ± 1.41" and shown["AA: difference"] == "-0.26"
    assert shown["AA: ours"] == "48.00, ~50.71 ± 0.45 (2,000 images)"
    text = report.show_status(report.read_rows())
    assert "t2: 1 of 10 runs\n" in text and "seed 0 done, seed 1 evaluated in part\n" in text


# ---- Effects -----------------------------------------------------------------------------------------------


def test_effects_are_paired_within_the_network_beside_the_seeds_that_the_papers_take():
    """Differences of the two ResNet-18 rows with two seeds: +0.9, +0.7 and +0.1, +0.5. The pooled variance is
    (2 (0.1)^2 + 2 (0.2)^2) / 2 = 0.05, so that of a mean of two is 0.025, whose root is 0.158."""
    wrn = "t8-wrn10-wd5e-4-relu-bntrain"
    for seed, base, ls3, ls1 in ((0, 48.1, 49.0, 48.2), (1, 48.5, 49.2, 49.0)):
        write(f"{BASE}@{seed}", 82.0, 53.0, base)
        write(f"t4-r18-ls0.3@{seed}", 82.0, 53.0, ls3)
        write(f"t4-r18-ls0.1@{seed}", 82.0, 53.0, ls1)
    write("t4-r18-ls0.3@2", 82.0, 53.0, 60.0)  # no base run of that seed,
    write("t4-wrn10-ls0.1", 86.0, 56.0, 52.0)  # of that network
    shown = {"our effect: AA": "**+0.80** ± 0.16", "our effect: seeds": "2", "paper's effect: AA": "+0.73"}
    assert table("t4", "t4-r18-ls0.3").items() >= shown.items()
    assert table("t4", "t4-r18-ls0.1")["our effect: AA"] == "+0.30 ± 0.16"
    # 8 (0.57 / 0.73)^2 = 4.88; 8 (0.57 / 0.25)^2 = 41.6; 8 (0.57 / 0.55)^2 = 8.6
    for row, needed in (("r18-ls0.3", "5"), ("r18-ls0.1", "42"), ("wrn10-ls0.1", "9")):
        assert table("t4", f"t4-{row}")["seeds needed"] == needed
    text = report.show_table("t4", report.read_rows())
    assert text.endswith("\nt4-r18-ls0.3: seed 2 has no base run: ./run_all.sh run t2-base@2\n"
                         f"t4-wrn10-ls0.1: seed 0 has no base run: ./run_all.sh run {wrn}@0")
    write(wrn, 86.0, 56.0, 51.5)
    assert table("t4", "t4-wrn10-ls0.1")["our effect: AA"] == "**+0.50** ± 0.22"


def test_a_run_in_another_precision_counts_and_a_copy_does_not():
    """Seed 0 is then (43.0 + 43.4) / 2 = 43.2 and (28.6 + 28.8) / 2 = 28.7. The clean effects -0.8 and -1.0
    have the mean -0.9 and the variance 0.02, that of the mean is half of it: 0.1^2. Those in PGD-10, 0.7 and
    0.1, have 0.4, 0.18 and 0.3^2. Before they were -1, -1 and 0.6, 0.1."""
    for name, clean, pgd10 in ((BASE, 44.0, 28.0), (f"{BASE}@1", 45.0, 28.4), ("t4-r18-ls0.3", 43.0, 28.6),
                               ("t4-r18-ls0.3@1", 44.0, 28.5)):
        laptop(name, clean, pgd10, root="results/laptop")
    before = {"runs": "2", "Clean: ours": "43.50 ± 0.71", "our effect: Clean": "**-1.00** ± 0.00",
              "our effect: PGD-10": "+0.35 ± 0.25"}
    assert laptop_table("t4", "t4-r18-ls0.3").items() >= before.items()
    shutil.copytree("results/laptop/t4-r18-ls0.3", "runs/laptop/t4-r18-ls0.3@0")
    assert laptop_table("t4", "t4-r18-ls0.3").items() >= before.items()
    laptop("t4-r18-ls0.3@0", 43.4, 28.8, precision="fp32", loss=2.1)
    after = {"runs": "3", "seeds": "2", "Clean: ours": "43.60 ± 0.57", "PGD-10: ours": "28.60 ± 0.14",
             "our effect: Clean": "**-0.90** ± 0.10", "our effect: PGD-10": "+0.40 ± 0.30"}
    assert laptop_table("t4", "t4-r18-ls0.3").items() >= after.items()
    laptop("t4-r18-ls0.4@7", 43.4, 28.8)
    text = report.show_table("t4", report.read_rows(), report.read_rows(laptop=True))
    assert text.endswith("\nt4-r18-ls0.4: seed 7 has no base run: ./run_all.sh run t2-base@7 --laptop")


def test_rows_that_differ_in_their_network_alone_are_one_run_at_laptop_scale(monkeypatch):
    """The checkpoint that is judged makes a difference. The first row has the name and the evaluation; a
    folder may have the name of any."""
    monkeypatch.setattr(report, "listing", lambda *flags: """\
t4-r18-ls0.1  | 82.69/54.04/48.76 | train_pgdat.py --ls 0.1 --model tiny ; eval_aa.py --attacks none
z-last        | -/-/- | train_pgdat.py --ls 0.1 --model tiny ; eval_aa.py --which last --attacks none
z-early       | -/-/- | = t4-wrn10-ls0.1
t4-wrn10-ls0.1 | 85.96/56.88/52.74 | train_pgdat.py --wd 5e-4 --model wrn-34-10 --ls 0.1 --model tiny""")
    laptop("t4-r18-ls0.1@1", 44.0, 28.0)
    for seed in (0, 1):
        laptop(f"t4-wrn10-ls0.1@{seed}", 46.0, 29.0, loss=2.1)
    rows = report.read_rows(laptop=True)
    assert [row.run for row in rows.values()] == ["t4-r18-ls0.1", "z-last", "t4-r18-ls0.1", "t4-r18-ls0.1"]
    for row in ("t4-r18-ls0.1", "t4-wrn10-ls0.1", "z-early"):
        assert rows[row].figures("pgd10") == {0: 29.0, 1: 28.5} and rows[row].evaluation.attacks == ()
    assert rows["z-last"].runs == {}


@pytest.mark.parametrize("row, effect", [
    ("t4-r18-ls0.3", (82.51 - 82.52, 54.34 - 53.58, 49.24 - 48.51)),
    ("t12-r18-wd5e-4-softplus-bneval", (82.37 - 81.45, 54.37 - 53.51, 50.51 - 49.06)),
    ("t9-eps0.031-wrn10-wd2e-4-relu-bneval", (85.17 - 85.34, 55.10 - 58.54, 51.85 - 54.64)),
    ("t6-elu", (82.17 - 82.52, 52.08 - 53.58, None)), (BASE, (None,) * 3),
    ("t13-rice2020-released", (None,) * 3)])
def test_the_papers_effect_is_within_the_architecture(row, effect):
    rows = report.read_rows()
    assert [*report.paper_effect(rows[row], rows).values()] == pytest.approx(list(effect))


def test_rank_correlation_and_its_bootstrap():
    x, y = np.array([3.0, 1.0, 4.0, 1.0, 5.0]), np.array([2.0, 7.0, 1.0, 8.0, 2.5])
    # ranks 3, 1.5, 4, 1.5, 5 and 2, 4, 1, 5, 3: covariances sum to -6.5, squares to 9.5 and 10
    assert figures.spearman(x, y) == pytest.approx(-6.5 / math.sqrt(9.5 * 10))
    assert figures.spearman(x, x**3) == pytest.approx(1)
    picks = np.random.default_rng(0).integers(5, size=(300, 5))
    found = [figures.spearman(x[i], y[i]) for i in picks if len({*x[i]}) > 1 and len({*y[i]}) > 1]
    assert figures.bootstrap_interval(x, y, 300) == pytest.approx(np.percentile(found, [2.5, 97.5]))


# ---- Figures and curves ------------------------------------------------------------------------------------


def drawn(ax):
    """The lines that an axes shows, without those of the legend: a list of points (x, y) each."""
    return [[*zip(*line.get_data())] for line in ax.lines if len(line.get_xdata())]


def test_figures_are_the_curves_of_the_runs_and_the_papers_figures(script):
    write("f3-wd1e-4")
    write("t8-wrn10-wd5e-4-relu-bntrain", epochs=7)  # which f3-wd5e-4 is
    clean, robust = map(drawn, report.show_figure("f3", report.read_rows()).axes)
    curve, star, seven, its_star, papers = clean
    assert curve == [(e + 1, 50 + e % 40) for e in range(110)] and star == [(40, 89)]
    assert seven == curve[:7] and its_star == [seven[-1]] and papers == [(110, 86.07)]
    assert robust[1] == [(40, 59)] and robust[4] == [(110, 56.60)]
    assert script(report, "f4")[0] == 0 and Path("figures/f4.png").exists()


def test_curves_of_runs(script):
    paths = [write(BASE), write("t4-r18-ls0.3", epochs=101)]
    assert script(report, "curves", *paths)[0] == 0 and Path("figures/curves.png").exists()
    fig = report.show_curves(paths)
    curves, _, robust, _ = map(drawn, fig.axes)
    assert curves[0][0] == (1, 60) and [line[0][0] for line in curves[4:]] == [100, 105]  # decays
    assert robust[0][0] == (1, 20) and robust[1] == [(40, 59)]
    assert [ax.get_title() for ax in fig.axes[:2]] == ["the default setting", "label smoothing 0.3"]
    trades = write("t12-r18-wd5e-4-relu-bneval")  # which has no --ls
    assert "label smoothing 0.3" in report.show_curves([trades, *paths]).axes[2].get_title().splitlines()


# ---- The command -------------------------------------------------------------------------------------------


def test_every_table_is_printed_at_both_scales():
    rows, laptop = report.read_rows(), report.read_rows(laptop=True)
    for table in "t2 t3 t4 t5 t6 t7 t8 t9 t12 t13 s1 x".split():
        for ours, runs in ((None, [row.id for row in rows.values() if row.table == table]),
                           (laptop, {row.run for row in laptop.values() if row.table == table})):
            lines = report.show_table(table, rows, ours).partition("\n\n")[0].splitlines()
            assert len(lines) == 2 + len(runs)


@pytest.mark.parametrize("argv, problem", [
    (["t99"], "no table"), (["curves"], "takes folders of runs"), (["t2", "--out", "x"], "is for pictures"),
    (["curves", "nowhere"], "holds no run"), (["effects"], "no laptop run with its base")])
def test_bad_arguments(script, argv, problem):
    status, out, err = script(report, *argv)
    assert status == 2 and problem in err and out == "" and len(err.splitlines()) == 1


def test_a_pipe_that_closes_and_a_terminal_without_plus_minus_end_in_no_traceback():
    command = f"set -o pipefail; {sys.executable} -m tools.report t4 | true"
    done = spawn("bash", "-c", command, cwd=".", PYTHONPATH=str(ROOT), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE
