"""tools/report.py: which runs count, tables, laptop effects, pictures, from runs written by hand."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from tools import figures, report

BASE, TRADES = "t2-base", "t12-r18-wd5e-4-relu-bneval"
LISTING, PARSE = functools.cache(report.listing), functools.cache(report.parse)  # each is read once


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "listing", LISTING)
    monkeypatch.setattr(report, "parse", PARSE)
    report.warn.cache_clear()


def write(name, clean=None, pgd10=None, aa=None, *, apgd=None, error=0.0, n=10_000, n_done=None, which="best",
          root="runs", epochs=None, commit=None, without=(), evaluated=(), **changed):
    """Write the run of the row and seed that its name claims; without figures it is in training."""
    row_id, _, seed = name.partition("@")
    row = report.read_rows(laptop="laptop" in root, roots=[])[row_id]
    args = row.setting | {"seed": int(seed or 0), "precision": "tf32"} | changed
    command, path = [args.pop("script")], Path(root, name)
    path.mkdir(parents=True, exist_ok=True)
    about = {"device": "abacus", "git_commit": commit or root, "data_sha256": "d"}
    record = {"args": {k: v for k, v in args.items() if k not in without}, "command": command, **about}
    (path / "args.json").write_text(json.dumps(record))
    log = [{"epoch": e + 1, "lr": 0.1, "train_loss": 2.0, "seconds": 36.0, "train_clean_acc": 60 + e % 40,
            "test_clean": 50 + e % 40, "test_pgd10": 20 + e % 40} for e in range(epochs or args["epochs"])]
    (path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    if clean is not None:
        attacks = row.evaluation.attacks if aa is None else report.eval_aa.STANDARD
        done = n if n_done is None else n_done
        result = {"clean": clean, "pgd10": pgd10, "aa": aa, "aa_error": error, "n": n, "n_done": done,
                  "complete": not attacks or done == n, "attacks": list(attacks),
                  "left": {} if apgd is None else {"apgd-t": [apgd, 0.5]},
                  "seconds": {"pgd10": 3.6, "autoattack": 7.2}, **about, "eps": args["eps"],
                  "model": args["model"], "activation": args["activation"]} | dict(evaluated)
        (path / ("result.json" if which == "best" else "result_last.json")).write_text(json.dumps(result))
    return path


def laptop(name, *figures, **more):
    more = {"n_done": 1000, "precision": "bf16", "root": "runs/laptop"} | more
    return write(name, *figures, **more)


def cells(text, row, seeds=""):
    """The cells of a row's line in a table, by column: the first one whose seeds begin like that."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    found = [dict(zip(lines[0], line)) for line in lines if line[0].strip("` †") == row]
    return next(line for line in found if line.get("seeds", "").startswith(seeds))


def table(name, row, seeds=""):
    return cells(report.show_table(name, report.read_rows()), row, seeds)


def laptop_table(name, row, seeds=""):
    return cells(report.show_table(name, report.read_rows(), report.read_rows(laptop=True)), row, seeds)


# ---- Tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "t2 t3 t4 t5 t6 t7 t8 t9 t12 t13 s1 x".split())
def test_every_table_is_printed_at_both_scales(script, name):
    for flags, rows in (([], report.read_rows()), (["--laptop"], report.read_rows(laptop=True))):
        status, out, err = script(report, name, *flags)
        runs = [row.run if flags else row.id for row in rows.values() if row.table == name]
        assert status == 0 and err == "" and len(out.partition("\n\n")[0].splitlines()) == 2 + len({*runs})
        assert "wrn" not in out.replace("-wrn", "") or not flags  # a tiny network is none


def test_a_row_not_run_shows_its_setting_and_the_papers_figures():
    shown = {"model": "wrn-34-20", "activation": "softplus", "wd": "0.0005", "ls": "0.2", "bn mode": "eval",
             "seeds": "not run", "Clean": "(87.58)", "PGD-10": "(57.19)", "AA": "(53.26)"}
    assert table("t8", "t8-wrn20-wd5e-4-softplus-bneval-ls0.2").items() >= shown.items()
    released = {"model": "wrn-34-10", "eps": "0.031", "Clean": "(84.92)", "AA": "(53.08)"}
    assert table("t13", "t13-zhang2019b-released").items() >= released.items()
    assert table("s1", "s1-wong2020")["lr decay epochs"] == "-"  # a one-cycle learning rate has none


def test_figures_that_others_published_stand_below_rows_of_the_same_run():
    four, eight = (report.show_table(name, report.read_rows()) for name in ("t4", "t8"))
    assert "\nt4-wrn10-ls0 by others: 86.07 / 56.80 / -; Rice" in four
    assert "\nt8-wrn20-wd5e-4-relu-bntrain by others: 85.34 / 58.16 / 53.42; Rice" in eight
    replicated = json.loads((Path(report.__file__).parent / "replicated.json").read_text())
    assert all(row.run == row.id for row in map(report.read_rows().get, replicated))


def test_seeds_rows_that_are_the_same_run_and_both_folders():
    write(f"{BASE}@0", 82.0, 53.0, 48.0, root="results")
    write(f"{BASE}@01", 83.0, 54.0, 49.0)
    write(f"{BASE}@2", epochs=7)          # in training
    write("t4-r18-ls0.1", 82.69, 54.04, 48.76, eval_every=5, eval_from=100)
    want = {"seeds": "2 in tf32", "Clean": "82.50 ± 0.71 (82.52, -0.02)",
            "PGD-10": "53.50 ± 0.71 (53.58, -0.08)", "AA": "48.50 ± 0.71 (48.51, -0.01)"}
    assert table("t2", BASE).items() >= want.items()
    assert table("t4", "t4-r18-ls0").items() >= want.items()  # `= t2-base`
    assert table("t4", "t4-r18-ls0.1")["AA"] == "48.76 (48.76, +0.00)"
    assert table("t4", "t4-r18-ls0.2")["AA"] == "(49.20)"
    remark = "was tested after other epochs than its row: --eval-every was 1, is 5; --eval-from was 1, is 100"
    text = report.show_table("t4", report.read_rows())
    assert f"\nruns/t4-r18-ls0.1 {remark}" in text and text.count("other epochs") == 1


def test_effects_at_full_scale_are_paired_within_the_network_beside_the_seeds_that_they_take():
    """Differences of the two ResNet-18 rows with two seeds: +0.9, +0.7 and +0.1, +0.5. The pooled variance is
    (2 (0.1)^2 + 2 (0.2)^2) / 2 = 0.05, so that of a mean of two is 0.025, whose root is 0.158."""
    wrn = "t8-wrn10-wd5e-4-relu-bntrain"
    for seed, base, ls3, ls1 in ((0, 48.1, 49.0, 48.2), (1, 48.5, 49.2, 49.0)):
        write(f"{BASE}@{seed}", 82.0, 53.0, base)
        write(f"t4-r18-ls0.3@{seed}", 82.0, 53.0, ls3)
        write(f"t4-r18-ls0.1@{seed}", 82.0, 53.0, ls1)
    write("t4-r18-ls0.3@2", 82.0, 53.0, 60.0)                   # no base run of that seed,
    write("t4-r18-ls0.1@1", 82.0, 53.0, 60.0, root="results", precision="bf16")  # of that precision,
    write("t4-wrn10-ls0.1", 86.0, 56.0, 52.0)                   # of that network
    assert table("t4", "t4-r18-ls0.3")["effect, AA"] == "**+0.80** ± 0.16, 2 of 3 seeds (+0.73)"
    assert table("t4", "t4-r18-ls0.1", "2 in tf32")["effect, AA"] == "+0.30 ± 0.16 (+0.25)"
    alone = table("t4", "t4-r18-ls0.1", "1 in bf16")
    assert alone["AA"] == "60.00 (48.76, **+11.24**)" and alone["effect, AA"] == "(+0.25)"
    # 8 (0.57 / 0.73)^2 = 4.88; 8 (0.57 / 0.25)^2 = 41.6; 8 (0.57 / 0.55)^2 = 8.6
    for row, needed in (("r18-ls0.3", "5"), ("r18-ls0.1", "42"), ("wrn10-ls0.1", "9")):
        assert table("t4", f"t4-{row}")["seeds needed"] == needed
    write(wrn, 86.0, 56.0, 51.5)
    assert table("t4", "t4-wrn10-ls0.1")["effect, AA"] == "**+0.50** ± 0.22 (+0.55)"


def test_a_stopped_evaluation_is_shown_with_its_error_and_counts_nowhere():
    write("t2-warmup-lr-10", 82.0, 53.0, 48.0)
    write("t2-warmup-lr-10@1", 84.0, 55.0, 50.71, error=0.45, n_done=2000)
    shown = table("t2", "t2-warmup-lr-10")
    assert shown["Clean"].startswith("83.00 ± 1.41") and shown["PGD-10"].startswith("54.00 ± 1.41")
    assert shown["AA"] == "48.00 (48.26, -0.26), ~50.71 ± 0.45 (2,000 images)"
    write(BASE, 82.0, 53.0, 46.1, error=0.45, n_done=2000)
    assert table("t2", BASE)["AA"] == "(48.51), ~46.10 ± 0.45 (2,000 images)"
    write(BASE, 82.0, 53.0, 53.0, error=None, n_done=0)     # PGD-10 alone is done
    assert table("t2", BASE)["AA"] == "(48.51)"
    assert "partial: t2-base\n" in report.show_status(report.read_rows())


@pytest.mark.parametrize("changed", [{"eps": 4 / 255}, {"data_sha256": "e"}, {"model": "tiny"},
                                     {"activation": "elu"}, {"n": 1000}])
def test_a_result_of_another_evaluation_than_the_rows_does_not_count(capsys, changed):
    write("t2-warmup-lr-15", 82.0, 53.0, 48.0, evaluated=changed)
    assert table("t2", "t2-warmup-lr-15")["Clean"] == "(82.64)"
    (key, value), = changed.items()
    said = f"warning: runs/t2-warmup-lr-15/result.json is of another evaluation ({key} is {value}, not"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name, text, clean", [
    ("args.json", "{", "(82.52)"), ("args.json", "1", "(82.52)"), ("result.json", "", "(82.52)"),
    ("result.json", '{"aa": 48}', "(82.52)"), ("log.jsonl", b"\xff", "82.00"), ("log.jsonl", "[]", "82.00")])
def test_a_file_that_cannot_be_read_is_named_and_skipped(capsys, name, text, clean):
    path = write(BASE, 82.0, 53.0, 48.0) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    write("t2-warmup-lr-10", 82.0, 53.0, 48.0)
    assert table("t2", BASE)["Clean"].startswith(clean) and table("t2", "t2-warmup-lr-10")["AA"][0] == "4"
    assert f"warning: {path} is skipped: " in capsys.readouterr().err


def test_a_run_of_another_setting_is_skipped(capsys):
    write("t2-warmup-lr-15", 82.0, 53.0, 48.0, ls=0.1)
    write(f"{BASE}@2", 82.0, 53.0, 48.0, seed=1)
    write("t5-adam", 82.0, 53.0, 48.0, dataset="elsewhere/cifar100", precision="bf16", compile=True)
    assert table("t2", "t2-warmup-lr-15")["AA"] == "(48.12)" and table("t2", BASE)["AA"] == "(48.51)"
    err = capsys.readouterr().err
    assert "runs/t2-warmup-lr-15 is not row t2-warmup-lr-15 (--ls was 0.1, is 0): skipped\n" in err
    assert "t2-base (--seed was 1, is 2)" in err and "t5-adam (--data was cifar100, is cifar10)" in err
    assert len(err.splitlines()) == 3  # once each, though every table reads every run


def test_a_run_from_before_a_flag_existed_has_its_default(capsys):
    for name in (BASE, "t2-early-stop-40-70"):
        write(name, 82.0, 53.0, 48.0, eval_from=100, without=("n_train", "time_scale", "early_stop_pgd"))
    assert table("t2", BASE)["AA"].startswith("48.00")
    assert table("t2", "t2-early-stop-40-70")["AA"] == "(46.60)"
    assert "--early-stop-pgd was None, is [40.0, 70.0]" in capsys.readouterr().err


def test_a_row_whose_script_is_not_there_is_left_out_with_a_warning(monkeypatch, capsys):
    listing = "t2-base | 82.52/53.58/48.51 | train_pgdat.py\nm-1 | -/-/- | train_gone.py\nm-2 | -/-/- | = m-1"
    monkeypatch.setattr(report, "listing", lambda *flags: listing)
    assert [*report.read_rows()] == [BASE] and "row m-1 is left out" in capsys.readouterr().err


def test_status_and_measured(script):
    write(BASE, 82.0, 53.0, 48.0)
    write(f"{BASE}@1", 82.0, 53.0, 48.0)
    write("t2-early-stop-40-70", epochs=7)
    write("t2-warmup-lr-10", 82.0, 53.0, 48.0, n_done=2000)
    out = script(report)[1]
    assert ("done: t2-base x2; running: t2-early-stop-40-70 (7 of 110 epochs); "
            "partial: t2-warmup-lr-10\n") in out
    assert out.endswith("\n3.4 hours on abacus\n")
    write("quickstart", 41.0, 28.0, 25.0, n=100, root="results")
    write("quickstart@1", 43.0, 30.0, 25.0, n=100, root="results")
    assert script(report, "measured")[1].splitlines()[2:] == [  # of what is in results/ alone
        "| `quickstart` | 2 | 42.00 ± 1.41 | 29.00 ± 1.41 | 25.00 ± 0.00 | 100 | abacus | 0:04:59 |"]


# ---- Laptop scale ------------------------------------------------------------------------------------------


def write_effects():
    """Two settings with paired differences in PGD-10 of 1.0, 2.0 and of 0.3, 0.1, 0.2."""
    for seed, pgd10 in enumerate((28.0, 29.0, 27.0)):
        laptop(f"{BASE}@{seed}", 44.0 + seed, pgd10, apgd=24.0)
    for name, found in {"t4-r18-ls0.3": (29.0, 31.0), "t7-r18-bneval": (28.3, 29.1, 27.2)}.items():
        for seed, pgd10 in enumerate(found):
            laptop(f"{name}@{seed}", 44.5 + seed, pgd10, apgd=24.25)


def test_effects_are_paired_by_seed_with_one_pooled_variance(capsys):
    write_effects()
    found = report.effects(report.read_rows(laptop=True), report.LAPTOP)
    # Squared deviations 2 (0.5)^2 and 2 (0.1)^2, degrees of freedom 1 and 2.
    variance = (2 * 0.5**2 + 2 * 0.1**2) / 3
    assert found["t4-r18-ls0.3", "bf16"]["pgd10"] == pytest.approx((1.5, math.sqrt(variance / 2), 2))
    assert found["t7-r18-bneval", "bf16"]["pgd10"] == pytest.approx((0.2, math.sqrt(variance / 3), 3))
    assert found["t7-r18-bneval", "bf16"]["apgd"] == pytest.approx((0.25, 0, 3))
    shown = {"seeds": "2 in bf16", "Clean": "45.00 ± 0.71", "effect, Clean": "**+0.50** ± 0.00 (-0.01)",
             "effect, PGD-10": "**+1.50** ± 0.29 (+0.76)", "effect, APGD": "**+0.25** ± 0.00 (+0.73)"}
    assert laptop_table("t4", "t4-r18-ls0.3").items() >= shown.items()
    assert laptop_table("t7", "t7-r18-bneval")["effect, PGD-10"] == "+0.20 ± 0.24 (+0.06)"
    shown = {"Clean": "45.00 ± 1.00", "seeds": "3 in bf16", "effect, Clean": ""}
    assert laptop_table("t7", "t7-r18-bntrain").items() >= shown.items()
    empty = {"seeds": "not run", "effect, Clean": "(+0.68)", "effect, APGD": "(-4.47)"}
    assert laptop_table("t5", "t5-adam").items() >= empty.items()
    assert capsys.readouterr().err == ""


def test_rows_that_differ_in_their_network_alone_are_one_run_at_laptop_scale(monkeypatch):
    """Flags that restate a default make no difference, the checkpoint that is judged does. The first row has
    the name and the evaluation; a folder may have the name of any."""
    monkeypatch.setattr(report, "listing", lambda *flags: """\
t4-r18-ls0.1  | 82.69/54.04/48.76 | train_pgdat.py --ls 0.1 --model tiny ; eval_aa.py --attacks none
z-last        | -/-/- | train_pgdat.py --ls 0.1 --model tiny ; eval_aa.py --which last --attacks none
z-trades      | -/-/- | train_trades.py --model tiny ; eval_aa.py --attacks none
t4-wrn10-ls0.1 | 85.96/56.88/52.74 | train_pgdat.py --wd 5e-4 --model wrn-34-10 --ls 0.1 --model tiny
z-same        | -/-/- | = t4-wrn10-ls0.1
z-train       | -/-/- | train_trades.py --model tiny --bn-mode train ; eval_aa.py --attacks none""")
    laptop("t4-r18-ls0.1@1", 44.0, 28.0)
    for seed in (0, 1):
        laptop(f"t4-wrn10-ls0.1@{seed}", 46.0, 29.0)
    rows = report.read_rows(laptop=True)
    assert [row.run for row in rows.values()] == [
        "t4-r18-ls0.1", "z-last", "z-trades", "t4-r18-ls0.1", "t4-r18-ls0.1", "z-train"]
    for row in ("t4-r18-ls0.1", "t4-wrn10-ls0.1", "z-same"):
        assert rows[row].figures("pgd10", "bf16") == {0: 29.0, 1: 28.0}
        assert rows[row].evaluation.attacks == ()
    assert rows["z-last"].runs == {}
    assert report.show_status(rows).startswith("t4    1 done    0 running    0 partial    0 missing   done: ")
    assert all(row.run == row.id for row in report.read_rows().values() if row.id != "z-same")


def test_a_run_of_ones_own_stands_beside_the_shipped_ones(tmp_path, capsys):
    """The README's `./run_all.sh run t4-r18-ls0.3 --laptop` trains in fp32, most shipped runs are in bf16."""
    for folder in ("laptop", "laptop-fp32"):
        shutil.copytree(ROOT / "results" / folder, tmp_path / "results" / folder)
    def lines():
        text = report.show_table("t4", report.read_rows(), report.read_rows(laptop=True))
        return text.partition("\n\n")[0].splitlines()
    before, shipped = lines(), "results/laptop-fp32/t4-r18-ls0.3@0"
    mine = Path(shutil.copytree(shipped, "runs/laptop/t4-r18-ls0.3"))
    assert lines() == before
    assert capsys.readouterr().err == (
        f"warning: {mine} repeats {shipped}, of the same seed, precision and commit: skipped\n")
    args = (mine / "args.json").read_text()
    (mine / "args.json").write_text(args.replace('"git_commit": "', '"git_commit": "9'))
    after = lines()
    changed, = [line for line in after if line not in before]
    assert len(after) == len(before) and "| t4-r18-ls0.3 | 0.3 | 1 in fp32, 2 runs | 43.24 |" in changed
    shutil.rmtree("results")
    row = laptop_table("t4", "t4-r18-ls0.3")
    assert row["seeds"] == "1 in fp32" and row["Clean"] == "43.24" and row["effect, Clean"] == "(-0.01)"


def test_seeds_and_precisions_of_both_rows_are_paired():
    laptop(f"{BASE}@0", 44.0, 28.0)
    laptop(f"{BASE}@1", 45.0, 28.0, precision="fp32")
    laptop(f"{BASE}@3", 45.0, 28.0)
    for seed in range(3):
        laptop(f"t5-adam@{seed}", 46.0, 28.0)
    found = report.effects(report.read_rows(laptop=True), report.LAPTOP)["t5-adam", "bf16"]
    assert found["clean"] == (2.0, None, 1)  # of one pair no variance is known
    assert laptop_table("t5", "t5-adam")["effect, Clean"] == "+2.00, 1 of 3 seeds (+0.68)"


def test_each_script_has_its_base_and_rows_are_judged_by_their_checkpoint():
    laptop(BASE, 44.0, 28.0)
    laptop(TRADES, 40.0, 27.0)
    laptop("t9-eps8-wrn20-wd5e-4-softplus-bneval", 41.0, 26.5)  # named after its row of Table 12
    assert laptop_table("t12", "t12-r18-wd5e-4-softplus-bneval")["effect, PGD-10"] == "-0.50 (+0.86)"
    laptop("t9-eps0.031-wrn10-wd2e-4-relu-bneval", 41.0, 26.5)  # its base is at the same eps
    assert laptop_table("t9", "t9-eps0.031-wrn10-wd2e-4-relu-bneval")["effect, PGD-10"] == "(-3.44)"
    laptop("s1-madry2018", 99.0, 99.0, which="best", root="results/laptop")
    assert laptop_table("s1", "s1-madry2018")["seeds"] == "not evaluated"
    laptop("s1-madry2018", 47.0, 25.0, which="last", root="results/laptop")
    assert laptop_table("s1", "s1-madry2018")["effect, PGD-10"] == "-3.00"


@pytest.mark.parametrize("row, effect", [
    ("t4-r18-ls0.3", (82.51 - 82.52, 54.34 - 53.58, 49.24 - 48.51)),
    ("t4-wrn10-ls0.1", (85.96 - 86.07, 56.88 - 56.60, 52.74 - 52.19)),
    ("t8-wrn20-wd1e-4-relu-bntrain", (86.21 - 86.97, 49.74 - 57.57, 47.58 - 53.26)),
    ("t7-googlenet-bneval", (85.26 - 83.97, 53.77 - 53.76, 48.83 - 48.73)),
    ("t9-eps0.031-wrn10-wd2e-4-relu-bneval", (85.17 - 85.34, 55.10 - 58.54, 51.85 - 54.64)),
    ("t9-eps8-wrn20-wd5e-4-softplus-bneval", (85.51 - 86.43, 57.50 - 57.91, 54.21 - 54.39)),
    ("t6-elu", (82.17 - 82.52, 52.08 - 53.58, None)), (BASE, (None,) * 3), ("f2-resnext-29", (None,) * 3),
    ("x-r18-ema", (None,) * 3), ("t13-rice2020-released", (None,) * 3), ("t7-dpn26-bntrain", (None,) * 3),
])
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


def test_effects_are_drawn_and_printed_for_every_run_with_its_base(script):
    write_effects()
    laptop("t8-wrn10-wd1e-4-relu-bntrain", 43.0, 27.0)
    laptop("t3-r18-b64", 40.0, 25.0)  # 2,500 images leave a batch of 4
    laptop("x-r18-ema", 43.0, 27.0)   # has no figure in the paper
    laptop(f"{BASE}@0", 43.0, 27.0, precision="fp32", root="runs/laptop-fp32")  # fewer are of this precision
    laptop("t5-adam@0", 43.0, 27.0, precision="fp32")
    status, out, _ = script(report, "effects", "--out", "a/e.png")
    assert status == 0 and Path("a/e.png").exists()
    shown = {"flags": "`train_pgdat.py --ls 0.3`", "paper: Clean": "-0.01", "AA": "+0.73", "ours: seeds": "2",
             "PGD-10": "**+1.50** ± 0.29"}
    assert cells(out, "t4-r18-ls0.3").items() >= shown.items()
    assert "`t7-r18-bneval`" in out and "x-r18-ema" not in out and "t5-adam" not in out
    assert "| `t3-r18-b64` † |" in out and report.SPOILT in out
    robust, _ = report.show_effects(report.read_rows(), report.read_rows(laptop=True))[0].axes
    assert {text.get_text() for text in robust.texts} == {"ls0.3", "b64", "wd1e-4"}  # bneval's is +0.06
    assert robust.get_title().startswith("PGD-10, 3 filled points: Spearman's rank correlation 1.00\n(")
    points = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in robust.containers]
    want = [(-2.27, -3.0), (0.76, 1.5), (0.06, 0.2), (-7.15, -1.0)]
    assert np.array(points) == pytest.approx(np.array(want))
    assert [c.lines[0].get_markerfacecolor() == "w" for c in robust.containers] == [True, False, False, False]
    assert robust.get_xlim() == robust.get_ylim() == pytest.approx((1.3 * -7.15, 1.3 * 1.5))
    assert [*zip(robust.get_xlim(), robust.get_ylim())] in drawn(robust)  # y = x


# ---- Figures and curves ------------------------------------------------------------------------------------


def drawn(ax):
    """The lines that an axes shows, without those of the legend: a list of points (x, y) each."""
    return [[*zip(*line.get_data())] for line in ax.lines if len(line.get_xdata())]


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_figures_are_the_curves_of_the_runs_and_the_papers_figures(script):
    write("f3-wd1e-4")
    write("t8-wrn10-wd5e-4-relu-bntrain", epochs=7)  # which f3-wd5e-4 is
    fig = report.show_figure("f3", report.read_rows())
    clean, robust = map(drawn, fig.axes)
    curve, star, seven, its_star, papers = clean
    assert curve == [(e + 1, 50 + e % 40) for e in range(110)] and star == [(40, 89)]
    assert seven == curve[:7] and its_star == [seven[-1]] and papers == [(110, 86.07)]
    assert robust[1] == [(40, 59)] and robust[4] == [(110, 56.60)]
    assert legend(fig) == ["f3-wd1e-4", "f3-wd2e-4 (not run)", "f3-wd5e-4", "best epoch",
                           "hollow: the paper's best epoch"]
    one = report.show_figure("f1", report.read_rows())  # f1b's rows are three of f1a's
    assert len(legend(one)) == 14 + 2 and [len(drawn(ax)) for ax in one.axes] == [2 + 4] * 2
    assert script(report, "f4")[0] == 0 and Path("figures/f4.png").exists()


def test_curves_of_runs(script):
    paths = [write(BASE), laptop("s1-wong2020"), write("t4-r18-ls0.3", epochs=101)]
    assert script(report, "curves", *paths)[0] == 0 and Path("figures/curves.png").exists()
    fig = report.show_curves(paths[::2])
    first, _, robust, other = map(drawn, fig.axes)
    train, test, _, star, *decays = first
    assert train[0] == (1, 60) and test[0] == (1, 50) and star == [(40, 89)]
    assert [line[0][0] for line in decays] == [100, 105]
    assert robust[0][0] == (1, 20) and robust[1] == [(40, 59)]
    assert [line[0][0] for line in other[2:]] == [100]  # the decay at 105 is still to come
    assert [ax.get_title() for ax in fig.axes[:2]] == ["the default setting", "label smoothing 0.3"]
    decays = "the learning rate decays"
    one = report.show_curves(paths[1:2])
    assert decays in legend(fig) and decays not in legend(one)  # one-cycle
    assert one.axes[0].get_title() == "s1-wong2020"  # no other run to differ from
    both = report.show_curves([paths[0], write("t12-r18-wd5e-4-relu-bneval"), paths[2]])
    assert both.axes[1].get_title() == "t12-r18-wd5e-4-relu-bneval"  # of another script: folders' names


def test_the_best_epoch_is_that_of_best_pt():
    log = [{"epoch": 1, "test_clean": 50, "test_pgd10": 40}, {"epoch": 2, "test_clean": 60, "test_pgd10": 40},
           {"epoch": 3}]
    assert figures.chosen(log) == ([log[0]], "test")  # the first, as in training
    assert figures.chosen([{**e, "test_pgd10": None} for e in log[:2]])[0][0]["epoch"] == 2
    held_out = [{**e, "val_clean": 1, "val_pgd10": 10 - e["epoch"]} for e in log]
    assert figures.chosen(held_out) == ([held_out[0]], "val") and figures.chosen(log[2:]) == ([], "test")


@pytest.mark.parametrize("argv, problem", [
    (["t99"], "no table"), (["curves"], "takes folders of runs"), (["t2", "--out", "x"], "no effect with t2"),
    (["curves", "nowhere"], "holds no run"), (["effects"], "no laptop run with its base")])
def test_bad_arguments(script, argv, problem):
    status, out, err = script(report, *argv)
    assert status == 2 and problem in err and out == "" and len(err.splitlines()) == 1
