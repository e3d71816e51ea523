"""tools/report.py: arithmetic, seeds, malformed data, refusals, pictures, from runs written by hand."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import models
from tools import figures, report


@pytest.fixture(scope="module")
def rows():
    return report.manifest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, rows):
    """run(name, clean, pgd10, aa, ...): write a finished run of the row that the name claims."""
    def write(name, *best, last=None, n=10_000, root="runs", epochs=None, cuda=None, without=(), **changed):
        row, _, seed = name.partition("@")
        args = rows[row].setting | ({"seed": int(seed)} if seed else {}) | {"precision": "tf32"} | changed
        command = [args.pop("script")]
        path = folder / root / name
        path.mkdir(parents=True)
        record = {"args": {k: v for k, v in args.items() if k not in without}, "command": command,
                  "device": "abacus", "versions": {"cuda": cuda}, "data_sha256": "", "resumed": []}
        (path / "args.json").write_text(json.dumps(record))
        log = [{"epoch": e + 1, "lr": 0.1, "train_loss": 2.0, "seconds": 36.0,
                "test_clean": 50 + e % 40, "test_pgd10": 20 + e % 40}
               for e in range(epochs or args["epochs"])]
        (path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        stages = {"pgd10": {"seconds": 3.6}, "aa": {"seconds": {"apgd-ce": 7.2}}}
        result = {"n": n, "test_images": 10_000, "eps": 8 / 255, "stages": stages, "attacks": {}, "quick": {},
                  "pgd10_worst": None, "weights_sha256": ""}
        for file, accuracies in (("result.json", best), ("result_last.json", last)):
            if accuracies:
                (path / file).write_text(json.dumps(result | dict(zip(report.METRICS, accuracies))))
        return path
    return write


def lines_of(text):
    """The lines of a table's rows, and the lines below it."""
    table, _, below = text.strip().partition("\n\n")
    return table.splitlines()[2:], below.splitlines()


def cells(rows, table, row):
    """The cells of a row's line in a table, by column name."""
    text = report.table([r for r in rows.values() if r.id.startswith(table)])
    header, *lines = ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines())
    return dict(zip(header, next(line for line in lines if line[0] == row)))


@pytest.mark.parametrize("values, paper, noise, text", [
    ([], None, 0.3, ""), ([], 48.51, 0.3, "(48.51)"), ([48.0], None, 0.3, "48.00"),
    ([48.81], 48.51, 0.3, "48.81 (48.51, +0.30)"), ([48.20], 48.51, 0.3, "48.20 (48.51, **-0.31**)"),
    ([82.0, 83.0], 82.52, 0.5, "82.50 ± 0.71 (82.52, -0.02)"),       # sqrt(((0.5)^2 + (0.5)^2) / 1)
    ([82.0, 83.0, 85.5], 82.52, 0.5, "83.50 ± 1.80 (82.52, **+0.98**)"),
])
def test_cell(values, paper, noise, text):
    assert report.cell(values, paper, noise) == text


def test_table_8_has_18_rows_with_the_papers_figures_when_nothing_has_been_run(script, folder):
    status, out, err = script(report, "t8")
    lines, below = lines_of(out)
    assert status == 0 and err == "" and len(lines) == 18
    columns = "row | model | activation | wd | ls | bn mode | Clean | PGD-10 | AA | replicated by others"
    assert out.splitlines()[0] == f"| {columns} |"
    setting = "t8-wrn20-wd5e-4-softplus-bneval-ls0.2 | WRN-34-20 | softplus | 0.0005 | 0.2 | eval"
    assert lines[-1] == f"| {setting} | (87.58) | (57.19) | (53.26) |  |"
    assert below == [
        "In parentheses: the paper's figure, and ours less the paper's; "
        "bold beyond seed noise (0.5; AA 0.3).",
        "[1] Rice et al. (2020), their logs; 200 epochs, decay at 100 and 150; "
        "https://github.com/locuslab/robust_overfitting"]


def test_replicated_by_others(rows, folder):
    """Each figure stands at its row and at those that are the same run; at others, none."""
    def cell(row):
        return cells(rows, row.partition("-")[0], row).get("replicated by others")

    assert cell("t8-wrn20-wd5e-4-relu-bntrain") == "85.34 / 58.16 / 53.42 [1]"
    assert cell("t8-wrn20-wd5e-4-relu-bneval") == "" and cell("t9-eps8-wrn10-wd5e-4-relu-bneval") is None
    assert cell("t4-wrn10-ls0") == "86.07 / 56.80 / - [2]"  # `= t8-wrn10-wd5e-4-relu-bntrain`
    for row, entries in report.replications().items():
        assert rows[row].run == row
        for entry in entries:
            figures = [entry.pop(m) for m in report.METRICS if m in entry]
            assert figures and all(40 < v < 90 for v in figures)
            assert entry.keys() == {"who", "differs", "link"}
            assert entry["link"].startswith("https://github.com/")


def test_runs_seeds_and_rows_that_are_the_same_run(run, rows, capsys):
    run("t2-base", 82.0, 53.0, 48.0)
    run("t2-base@1", 83.0, 54.0, 49.0)
    run("t4-r18-ls0.1", 82.69, 54.04, 48.76, last=(84.0, 46.0, 41.0))
    want = {"Clean": "82.50 ± 0.71 (82.52, -0.02)", "PGD-10": "53.50 ± 0.71 (53.58, -0.08)",
            "AA": "48.50 ± 0.71 (48.51, -0.01)"}
    assert cells(rows, "t2", "t2-base").items() >= want.items()
    assert cells(rows, "t4", "t4-r18-ls0").items() >= want.items()     # `= t2-base`
    smoothed = cells(rows, "t4", "t4-r18-ls0.1")
    assert smoothed["AA"] == "48.76 (48.76, +0.00)" and smoothed["AA, other checkpoint"] == "41.00"
    assert cells(rows, "t4", "t4-r18-ls0.2")["Clean"] == "(82.73)"
    assert capsys.readouterr().err == ""


def test_table_7_has_the_papers_difference_rows(run, script):
    run("t2-base", 82.0, 53.0, 48.0)
    run("t7-r18-bneval", 83.5, 53.2, 48.6)
    lines = [re.sub(" +", " ", line) for line in script(report, "t7")[1].splitlines()]
    assert lines[4] == "| eval - train | | | +1.50 (+0.96) | +0.20 (+0.06) | +0.60 (+0.24) | |"
    assert lines[7].endswith("| (+1.91) | (-0.11) | (+0.23) | |")


def test_a_row_judged_by_the_last_checkpoint(run, rows):
    run("s1-madry2018", 80.0, 50.0, 45.0, last=(84.0, 46.0, 41.0))
    line = cells(rows, "s1", "s1-madry2018")
    assert line["AA"] == "41.00" and line["AA, other checkpoint"] == "45.00"


def test_a_table_may_mix_the_scripts(run, rows):
    run("t12-r18-wd5e-4-relu-bneval", 81.0, 53.0, 49.0)
    mixed = ("x-r18-bntrain-clean0", "t12-r18-wd5e-4-relu-bneval", "t13-eps8-wrn10-released")
    text = report.table([rows[r] for r in mixed])
    assert text.startswith("| row | script | model | bn mode | Clean | PGD-10 | AA |")
    assert lines_of(text)[0] == [
        "| x-r18-bntrain-clean0 | train_pgdat.py | ResNet-18 | train |  |  |  |  |",
        "| t12-r18-wd5e-4-relu-bneval | train_trades.py | ResNet-18 | eval "
        "| 81.00 (81.45, -0.45) | 53.00 (53.51, **-0.51**) | 49.00 (49.06, -0.06) "
        "| 82.40 / 53.00 / 49.54 [1] |",
        "| t13-eps8-wrn10-released | - | WRN-34-10 | - | (85.48) |  | (53.80) |  |"]


def test_partial_and_deviating_runs_do_not_count(run, rows, capsys):
    run("t2-base", 82.0, 53.0, 48.0, n=1000)
    run("t2-warmup-lr-10", 82.0, 53.0, None)
    run("t2-warmup-lr-15", 82.0, 53.0, 48.0, ls=0.1)
    run("t2-warmup-lr-20", 82.0, 53.0, 48.0, cuda="13.0")
    names = ("t2-base", "t2-warmup-lr-10", "t2-warmup-lr-15", "t2-warmup-lr-20")
    assert [cells(rows, "t2", row)["AA"][0] for row in names] == ["(", "(", "(", "4"]
    warning = "t2-warmup-lr-15 is not row t2-warmup-lr-15 (--ls was 0.1, is 0): skipped"
    assert warning in capsys.readouterr().err
    run("t2-early-stop-40-70", epochs=7)
    run("t5-adam", 83.0, 48.0, 44.0)
    run("t5-adam@1", 83.0, 48.0, 44.0)
    lines = [re.sub(" +", " ", line) for line in report.status(rows).splitlines()]
    assert lines[1] == ("t2 1 done 1 running 2 partial 6 missing done: t2-warmup-lr-20; running: "
                        "t2-early-stop-40-70 (7 of 110 epochs); partial: t2-base, t2-warmup-lr-10")
    assert lines[4] == "t5 1 done 0 running 0 partial 4 missing done: t5-adam (2 seeds)"
    assert lines[-2] == "GPU-hours 1.10"      # 110 x 36 s, and 10.8 s of evaluation
    assert warning in capsys.readouterr().err and max(map(len, lines)) < 200


def test_status_where_there_is_nothing(script, folder):
    status, out, err = script(report)
    assert status == 0 and err == ""
    assert out.startswith("There are no runs/ and no results/ here.\nquickstart ")
    Path("results").mkdir()
    assert script(report)[1].startswith("quickstart ")


def test_one_seed_counts_once(run, rows, capsys):
    for name, clean in (("t2-base", 82.0), ("t2-base@0", 82.0), ("t2-base@00", 82.0), ("t2-base@1", 83.0)):
        run(name, clean, 53.0, 48.0)
    assert cells(rows, "t2", "t2-base")["Clean"] == "82.50 ± 0.71 (82.52, -0.02)"
    err = capsys.readouterr().err
    assert err == "".join(f"warning: runs/t2-base@{s} is the same seed as runs/t2-base: skipped\n"
                          for s in ("0", "00"))
    run("t2-base@01", 83.0, 53.0, 48.0, root="results")  # the collected copy of another name
    assert cells(rows, "t2", "t2-base")["Clean"].startswith("82.50 ± 0.71")


def test_a_run_from_before_a_flag_existed_has_the_flags_default(run, rows, script):
    old = {"without": ("bn_clean_passes", "test_batch_size", "early_stop_pgd")}
    path = run("t2-base@1", 82.0, 53.0, 48.0, **old)
    assert cells(rows, "t2", "t2-base")["AA"].startswith("48.00")
    assert script(report, "deviations", path) == (0, "none\n", "")
    assert script(report, "collect", path)[0] == 0 and Path("results/t2-base@1/args.json").exists()
    path = run("t2-early-stop-40-70", 82.0, 53.0, 48.0, **old)
    assert script(report, "deviations", path)[1] == "--early-stop-pgd was None, is [40.0, 70.0]\n"


@pytest.mark.parametrize("file, text", [
    ("result.json", '{"clean": 8'), ("result.json", "[]"), ("result.json", '{"clean": 82.0}'),
    ("args.json", '{"args": {}}'), ("log.jsonl", '{"epoch": 1'), ("log.jsonl", '{"epoch": 1}\n'),
])
def test_malformed_files_are_skipped_by_name(run, rows, capsys, file, text):
    (run("t2-base", 82.0, 53.0, 48.0) / file).write_text(text)
    report.status(rows)
    counts = "48.00 (48.51, **-0.51**)" if file == "log.jsonl" else "(48.51)"
    assert cells(rows, "t2", "t2-base")["AA"] == counts
    assert f"t2-base/{file} is malformed: skipped" in capsys.readouterr().err


def test_results_serve_where_runs_are_gone(run, rows):
    run("t2-base", 82.0, 53.0, 48.0, root="results")
    assert cells(rows, "t2", "t2-base")["AA"].startswith("48.00")
    run("t2-base", 83.0, 54.0, 49.0)
    assert cells(rows, "t2", "t2-base")["AA"].startswith("49.00")


def test_collect_copies_what_is_whole(run, script):
    path = run("t2-base@3", 82.0, 53.0, 48.0)
    for name in ("best.pt", "result.npz"):
        (path / name).write_text(name)
    assert script(report, "collect", path)[0] == 0
    copied = {p.name: p.read_text() for p in Path("results/t2-base@3").iterdir()}
    names = ("args.json", "log.jsonl", "result.json", "result.npz")
    assert copied == {f: (path / f).read_text() for f in names}


def test_collect_overwrites_only_what_is_the_same(run, script):
    path = run("t2-base", 82.0, 53.0, 48.0)
    kept = Path("results/t2-base/result.json")
    for _ in range(2):
        assert script(report, "collect", path)[0] == 0
    other = kept.read_text().replace("82.0", "81.0")
    kept.write_text(other)
    problem = "results/t2-base holds another result.json: --force overwrites"
    assert script(report, "collect", path) == (2, "", f"report.py: error: {problem}\n")
    assert kept.read_text() == other
    assert script(report, "collect", path, "--force")[0] == 0 and kept.read_text() != other


def test_agreement(run, script):
    """Four images, which both, only the first, only the second or neither of two runs withstand."""
    a, b = (run(name, 82.0, 53.0, 48.0) for name in ("t2-base", "t2-base@1"))
    flags = {"clean": [1, 1, 1, 1], "pgd10": [1, 1, 0, 1], "apgd-ce": [1, 1, 0, 1], "square": [1, 0, 0, 0]}
    flags = {k: np.array(v, dtype=bool) for k, v in flags.items()}
    np.savez(a / "result.npz", **flags)
    np.savez(b / "result.npz", **{**flags, "clean": ~flags["clean"], "square": flags["square"][::-1]})
    status, out, err = script(report, "agreement", a, b)
    lines, below = lines_of(out)
    assert status == 0 and err == "" and below == ["4 images."]
    assert out.startswith("| % of the images | both right | only t2-base | only t2-base@1 | neither |")
    assert lines == ["| Clean | 0.00 | 100.00 | 0.00 | 0.00 |", "| PGD-10 | 75.00 | 0.00 | 0.00 | 25.00 |",
                     "| AA | 0.00 | 25.00 | 25.00 | 50.00 |"]
    np.savez(b / "result.npz", **{k: v for k, v in flags.items() if k != "square"})
    assert lines_of(script(report, "agreement", a, b)[1])[0][2] == "| apgd-ce | 75.00 | 0.00 | 0.00 | 25.00 |"
    np.savez(b / "result.npz", **{k: v[:3] for k, v in flags.items()})
    for spoil, problem in ((lambda f: None, "were not evaluated on the same images (clean)"),
                           (lambda f: f.write_text("npz"), "is malformed"), (Path.unlink, "no such file")):
        spoil(b / "result.npz")
        status, out, err = script(report, "agreement", a, b)
        assert status == 2 and problem in err and out == "" and len(err.splitlines()) == 1


@pytest.mark.parametrize("name, changes, problem, deviations", [
    ("t2-warmup-lr-10", {"n": 1000}, "is not evaluated as the row asks", "none"),
    ("t2-warmup-lr-15", {"wd": 1e-3}, "--wd was 0.001, is 0.0005", "--wd was 0.001, is 0.0005"),
    ("t2-warmup-lr-20", {"epochs": 109}, "109 epochs", "none"),
    ("s1-madry2018", {}, "its last checkpoint is not evaluated", "none"),
    ("t2-early-stop-40-70@2", {"seed": 1}, "--seed was 1, is 2", "--seed was 1, is 2"),
])
def test_collect_refuses_the_rest(run, script, name, changes, problem, deviations):
    path = run(name, 82.0, 53.0, 48.0, **changes)
    status, _, err = script(report, "collect", path)
    assert status == 2 and problem in err and len(err.splitlines()) == 1 and not Path("results").exists()
    assert script(report, "deviations", path)[1] == f"{deviations}\n"


def test_every_table_of_the_manifest_is_printed(rows, script, folder):
    for table in "t2 t3 t4 t5 t6 t7 t8 t9 t12 t13 s1 x".split():
        status, out, err = script(report, table)
        n = sum(r.startswith(table + "-") for r in rows) + 6 * (table == "t7")  # with its difference rows
        assert status == 0 and err == "" and len(lines_of(out)[0]) == n
    out = script(report, "t13")[1]
    assert out.startswith("| row | model | eps | Clean | PGD-10 | AA |")
    assert "| t13-zhang2019b-released | WRN-34-10 | 0.031 | (84.92) |" in out


def test_a_setting_without_effect_is_not_shown(rows, folder):
    decays = {row: cells(rows, "s1", row)["lr decay epochs"] for row in rows if row.startswith("s1-")}
    assert {row for row, epochs in decays.items() if epochs == "-"} == {
        "s1-carmon2019", "s1-wong2020", "s1-huang2020"}
    assert decays["s1-rice2020"] == "100/150"


def test_robustbench_entry(run, script):
    status, out, _ = script(report, "robustbench", run("t8-wrn10-wd5e-4-relu-bneval", 87.38, 56.0, 51.9))
    assert status == 0 and json.loads(out).items() >= {
        "architecture": "WRN-34-10", "eps": "8/255", "dataset": "cifar10", "clean_acc": "87.38",
        "reported": "51.90", "autoattack_acc": "51.90", "unreliable": False}.items()
    out = script(report, "robustbench", run("t7-r18-bneval", 83.5, 53.6, 48.7))[1]
    assert json.loads(out)["architecture"] == "PreActResNet-18"
    status, _, err = script(report, "robustbench", run("t2-base", 82.0, 53.0, 48.0, n=1000))
    assert status == 2 and "not evaluated by AutoAttack (standard) on all test images" in err


# ---- Pictures ----------------------------------------------------------------------------------------------


STYLES = ["clean", "PGD-10", "best epoch", "the paper's best"]


def drawn(ax):
    """The lines that an axes shows, hollow ones and others: two lists of lists of points (x, y)."""
    shown = {True: [], False: []}
    for line in ax.lines:
        if points := [*zip(*line.get_data())]:
            shown[line.get_markerfacecolor() == "none"].append(points)
    return shown[True], shown[False]


def texts(of):
    return [text.get_text() for text in of]


def legend(ax):
    return texts(ax.get_legend().get_texts())


def test_figure_1(run, rows):
    run("t2-base", 80.0, 53.0, 48.0)
    run("t2-base@1", 82.0, 55.0, 48.0)
    run("f1a-r18-wd1e-4", 80.0, 50.0, 45.0)
    run("t8-wrn10-wd1e-4-relu-bntrain", 86.0, 49.0, 46.0)
    sweep, curves = report.draw("f1", [], rows, None).axes
    hollow, ours = drawn(sweep)
    assert ours[:2] == [[(1e-4, 80.0), (5e-4, 81.0)], [(1e-4, 50.0), (5e-4, 54.0)]]
    assert ours[2:] == [[(1e-4, 86.0)], [(1e-4, 49.0)]]
    assert hollow[:2] == [[(5e-4, 82.52)], [(5e-4, 53.58)]] and [*map(len, hollow[2:])] == [3, 3]
    assert legend(sweep) == [f"{m}, {a}" for m in ("ResNet-18", "WRN-34-10") for a in ("Clean", "PGD-10")]
    assert texts(sweep.get_xticklabels()) == "5e-5 1e-4 2e-4 3e-4 5e-4 7e-4 1e-3".split()
    hollow, ours = drawn(curves)
    assert [*map(len, ours)] == [110, 1, 110, 1] and len(hollow) == 3 * 2
    assert legend(curves) == ["f1b-wd1e-4", "f1b-wd2e-4 (not run)", "f1b-wd5e-4 (not run)", *STYLES]
    run("t8-wrn10-wd1e-4-relu-bntrain@1", 88.0, 51.0, 46.0)
    sweep, curves = report.draw("f1", [], rows, None).axes
    assert drawn(sweep)[1][2:] == [[(1e-4, 87.0)], [(1e-4, 50.0)]]                      # the seeds' mean
    assert [line.get_alpha() for line in curves.lines if len(line.get_xdata()) == 110] == [1, 1, 0.3, 0.3]
    assert legend(curves)[-1] == "other seeds"


def test_figure_2(run, rows):
    run("f2-dpn-92", 85.0, 55.0, 50.0)
    run("t2-base", 82.0, 54.0, 48.0)
    ax, = report.draw("f2", [], rows, None).axes
    filled = {tuple(c.get_offsets()[0]): len(c.get_facecolors()) for c in ax.collections}
    assert filled.pop((82.0, 54.0)) and filled.pop((85.0, 55.0))
    assert len(filled) == 6 and (82.52, 53.58) in filled and not any(filled.values())
    names = "ResNet-18 SENet-18 DenseNet-121 GoogLeNet DPN-26 DPN-92 WRN-34-10"
    assert texts(ax.texts) == names.split() and ax.texts[0].xy == (82.0, 54.0)  # once, at ours
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert "clean" in ax.get_xlabel() and ax.get_ylabel() == "PGD-10 accuracy (%)"


def test_figures_3_and_4(run, rows):
    run("f3-wd1e-4", 86.0, 56.0, 52.0)
    ax, = report.draw("f3", [], rows, None).axes
    clean, star, robust, star_robust = drawn(ax)[1]
    assert clean == [(e + 1, 50 + e % 40) for e in range(110)] and star == [(40, 89)]
    assert robust == [(e + 1, 20 + e % 40) for e in range(110)] and star_robust == [(40, 59)]
    assert drawn(ax)[0] == [[(110, 86.07)], [(110, 56.60)]] and ax.get_xlim() == (0, 113.3)
    run("f4-wd1e-4", 95.0, 0.0, None)
    ax, = report.draw("f4", [], rows, None).axes
    assert len(drawn(ax)[1]) == 4 and not drawn(ax)[0]
    assert legend(ax) == ["f4-wd1e-4", *(f"f4-wd{wd} (not run)" for wd in ("2e-4", "5e-4"))] + STYLES[:3]


def test_figures_of_which_nothing_has_been_run(folder, script):
    assert script(report, "f3") == (0, "figures/f3.png, figures/f3.pdf\n",
                                    "f3: nothing has been run: only the paper's figures are drawn\n")
    problem = "f4: nothing has been run, and the paper prints no figures"
    assert script(report, "f4") == (2, "", f"report.py: error: {problem}\n")
    assert not Path("figures/f4.png").exists()


def test_curves_and_comparison(run, rows):
    paths = [run("t2-base@1", 82.0, 53.0, 48.0), run("x-r18-bneval-clean0", 83.0, 54.0, 49.0)]
    run("t2-base", 83.0, 52.0, 48.0)
    ax, = report.draw("curves", paths, rows, None).axes
    assert legend(ax) == ["t2-base@1", "x-r18-bneval-clean0", *STYLES]
    assert drawn(ax)[0] == [[(110, 82.52)], [(110, 53.58)]] and len(drawn(ax)[1]) == 8
    fig = report.draw("compare", paths, rows, None)
    clean, robust = fig.axes
    assert drawn(clean) == ([[(82.52, 0)]], [[(83.0, 0), (82.0, 0)], [(83.0, 1)]])
    assert drawn(robust) == ([[(53.58, 0)]], [[(52.0, 0), (53.0, 0)], [(54.0, 1)]])
    assert texts(clean.get_yticklabels()) == ["t2-base", "x-r18-bneval-clean0"]
    title = "ResNet-18, cifar10, 110 epochs; a dot is a seed; a circle is the paper's"
    assert fig.get_suptitle() == title


def test_pictures_have_the_name_that_was_asked_for(run, script, folder):
    path = run("quickstart", 41.0, 28.0, 25.0)
    run("f3-wd1e-4", 86.0, 56.0, 52.0)
    for argv, stem in ((["f3"], "figures/f3"), (["curves", path], "figures/curves-quickstart"),
                       (["f3", "--out", "a/b.c"], "a/b.c"), (["f3", "--out", "d.png"], "d")):
        assert script(report, *argv) == (0, f"{stem}.png, {stem}.pdf\n", "")
        assert Path(f"{stem}.png").exists() and Path(f"{stem}.pdf").exists()


def test_attack_shows_predictions_and_true_classes(folder):
    args = {"model": "tiny", "activation": "relu", "eps": 8 / 255, "epochs": 1,
            "dataset": str(ROOT / "data" / "cifar10_mini.npz")}
    state = models.build("tiny").state_dict()
    state["linear.weight"].zero_()
    state["linear.bias"].copy_(torch.arange(10) == 8)  # everything is a ship
    about = {"args": args, "num_classes": 10, "epoch": 1, "normalize": None}
    torch.save({"state_dict": state, **about}, "best.pt")
    axes = report.draw("attack", [folder], {}, None).axes
    said = ["ship\n(not cat)", "ship", "ship", "ship\n(not airplane)", *["ship\n(not frog)"] * 2]
    assert len(axes) == 3 * 8 and all(ax.images[0].get_array().shape == (32, 32, 3) for ax in axes)
    assert [ax.get_title() for ax in axes[:6]] == [ax.get_title() for ax in axes[8:14]] == said
    assert [ax.get_ylabel() for ax in axes[::8]] == ["image", "adversarial", "difference,\n16 times"]


def test_the_best_epoch_is_that_of_best_pt():
    log = [{"epoch": 1, "test_clean": 50, "test_pgd10": 40}, {"epoch": 2, "test_clean": 60, "test_pgd10": 40},
           {"epoch": 3}]
    assert figures.best_epoch(log) == (log[0], "test")  # the first, as in training
    assert figures.best_epoch([{**e, "test_pgd10": None} for e in log[:2]])[0]["epoch"] == 2
    held_out = [{**e, "val_clean": 1, "val_pgd10": 10 - e["epoch"]} for e in log]
    assert figures.best_epoch(held_out) == (held_out[0], "val")
    assert figures.best_epoch(log[2:]) == (None, "test")


@pytest.mark.parametrize("argv, problem", [
    (["t99"], "no table, figure or command"), (["collect"], "takes one RUN or more"),
    (["t2", "x"], "takes no RUN"), (["attack", "a", "b"], "takes one RUN"),
    (["agreement", "a"], "takes two RUNs"), (["agreement", "a", "b", "c"], "takes two RUNs"),
    (["deviations", "nowhere"], "holds no run"), (["curves", "nowhere"], "holds no log"),
    (["attack", "nowhere"], "no such file"),
])
def test_bad_arguments(script, folder, argv, problem):
    status, _, err = script(report, *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1


def test_the_readme_is_up_to_date(rows, script):
    """If not: python -m tools.report readme."""
    text = (ROOT / "README.md").read_text()
    assert report.renew_readme(rows) == text
    assert script(report, "readme") == (0, "", "") and (ROOT / "README.md").read_text() == text
