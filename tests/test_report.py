"""report.py: arithmetic, missing, partial and malformed data, seeds, and what it refuses; from runs written by hand."""

import json
import re

import pytest
from conftest import ROOT

import figures
import report


@pytest.fixture(scope="module")
def rows():
    return report.manifest()


@pytest.fixture
def run(tmp_path, monkeypatch, rows):
    """run(name, clean, pgd10, aa, ...): writes a finished run of the row that the name claims into runs/ of an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, clean, pgd10, aa, last=None, n=10_000, root="runs", epochs=None, cuda=None, **changed):
        row, _, seed = name.partition("@")
        row = rows[row]
        args = {**row.setting, **({"seed": int(seed)} if seed else {}), "precision": "tf32", "out": f"runs/{name}", "data_dir": "elsewhere", **changed}
        folder = tmp_path / root / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"args": args, "command": [row.script], "device": "abacus", "versions": {"cuda": cuda}}))
        log = [{"epoch": e + 1, "test_clean": 50 + e % 40, "test_pgd10": 20 + e % 40, "seconds": 36.0} for e in range(epochs or args["epochs"])]
        (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
        for name, figures_ in (("result.json", (clean, pgd10, aa)), ("result_last.json", last)):
            if figures_:
                stages = {"pgd10": {"seconds": 3.6}, "aa": {"seconds": {"apgd-ce": 7.2}}}
                result = {"n": n, "test_images": 10_000, "eps": 8 / 255, "stages": stages, **dict(zip(report.METRICS, figures_))}
                (folder / name).write_text(json.dumps(result))
        return folder
    return write


def cells(rows, table, row):
    """The cells of a row's line in a table, by column name."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in report.table([r for r in rows.values() if r.id.startswith(table)]).splitlines()]
    return dict(zip(lines[0], next(line for line in lines if line[0] == row)))


@pytest.mark.parametrize("values, paper, noise, text", [
    ([], None, 0.3, ""), ([], 48.51, 0.3, "(48.51)"), ([48.0], None, 0.3, "48.00"),
    ([48.81], 48.51, 0.3, "48.81 (48.51, +0.30)"), ([48.20], 48.51, 0.3, "48.20 (48.51, **-0.31**)"),
    ([82.0, 83.0], 82.52, 0.5, "82.50 ± 0.71 (82.52, -0.02)"),       # sqrt(((0.5)^2 + (0.5)^2) / 1)
    ([82.0, 83.0, 85.5], 82.52, 0.5, "83.50 ± 1.80 (82.52, **+0.98**)"),
])
def test_cell(values, paper, noise, text):
    assert report.cell(values, paper, noise) == text


def test_table_8_has_18_rows_with_the_papers_figures_when_nothing_has_been_run(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(report, "t8")
    lines = out.splitlines()
    assert status == 0 and err == "" and len(lines) == 2 + 18
    assert re.sub(" +", " ", lines[0]) == "| row | model | activation | wd | ls | bn mode | Clean | PGD-10 | AA |"
    assert lines[2] == "| t8-wrn10-wd1e-4-relu-bntrain | WRN-34-10 | relu | 0.0001 | 0 | train | (85.87) | (49.45) | (46.43) |"
    assert lines[19].startswith("| t8-wrn20-wd5e-4-softplus-bneval-ls0.2 | WRN-34-20 | softplus | 0.0005 | 0.2 | eval | (87.58) | (57.19) | (53.26) |")


def test_runs_seeds_and_rows_that_are_the_same_run(run, rows, capsys):
    run("t2-base", 82.0, 53.0, 48.0)
    run("t2-base@1", 83.0, 54.0, 49.0)
    run("t4-r18-ls0.1", 82.69, 54.04, 48.76, last=(84.0, 46.0, 41.0))
    want = {"Clean": "82.50 ± 0.71 (82.52, -0.02)", "PGD-10": "53.50 ± 0.71 (53.58, -0.08)", "AA": "48.50 ± 0.71 (48.51, -0.01)"}
    assert cells(rows, "t2", "t2-base").items() >= want.items()
    assert cells(rows, "t4", "t4-r18-ls0").items() >= want.items()     # `= t2-base`
    smoothed = cells(rows, "t4", "t4-r18-ls0.1")
    assert smoothed["AA"] == "48.76 (48.76, +0.00)" and smoothed["AA, other checkpoint"] == "41.00"
    assert cells(rows, "t4", "t4-r18-ls0.2")["Clean"] == "(82.73)"
    assert capsys.readouterr().err == ""


def test_a_row_judged_by_the_last_checkpoint(run, rows):
    run("s1-madry2018", 80.0, 50.0, 45.0, last=(84.0, 46.0, 41.0))
    line = cells(rows, "s1", "s1-madry2018")
    assert line["AA"] == "41.00" and line["AA, other checkpoint"] == "45.00"


def test_partial_and_deviating_runs_do_not_count(run, rows, capsys):
    run("t2-base", 82.0, 53.0, 48.0, n=1000)
    run("t2-wulr-10", 82.0, 53.0, None)
    run("t2-wulr-15", 82.0, 53.0, 48.0, ls=0.1)
    run("t2-wulr-20", 82.0, 53.0, 48.0, cuda="13.0")
    assert [cells(rows, "t2", r)["AA"][0] for r in ("t2-base", "t2-wulr-10", "t2-wulr-15", "t2-wulr-20")] == ["(", "(", "(", "4"]
    assert "t2-wulr-15 is not row t2-wulr-15 (--ls was 0, is 0.1): skipped" in capsys.readouterr().err
    run("t2-es-40-70", None, None, None, epochs=7)
    (report.Path("runs") / "t2-es-40-70" / "result.json").unlink()
    text = report.status(rows)
    assert re.search(r"^partial +2 +t2-base, t2-wulr-10$", text, re.M) and re.search(r"^running +1 +t2-es-40-70 \(7 of 110 epochs\)$", text, re.M)
    assert "GPU-hours 1.10" in text      # 110 x 36 s, and 10.8 s of evaluation


def test_malformed_files_are_skipped_by_name(run, rows, capsys):
    result = {"clean": 82.0, "pgd10": 53.0, "aa": 48.0, "n": 10_000, "test_images": 10_000, "eps": 0.03, "stages": {}}
    entry = {"epoch": 1, "seconds": 1.0, "test_clean": 80.0, "test_pgd10": 50.0}
    path = run("t2-base", 82.0, 53.0, 48.0)
    for file, text in [
        ("result.json", '{"clean": 8'), ("result.json", "[]"), *(("result.json", json.dumps({**result, **c})) for c in (
            {"clean": "high"}, {"aa": 480}, {"stages": {"aa": 3}}, {"stages": {"aa": {"seconds": "long"}}}, {"test_images": 0})),
        ("args.json", "[]"), ("args.json", '{"args": {}, "command": []}'), ("args.json", '{"args": {"dataset": "cifar10"}, "command": []}'),
        ("log.jsonl", '{"epoch": 1'), *(("log.jsonl", json.dumps({**entry, **c})) for c in ({"epoch": float("inf")}, {"seconds": None}, {"test_pgd10": "x"})),
    ]:
        before = (path / file).read_text()
        (path / file).write_text(text)
        report.status(rows)
        assert cells(rows, "t2", "t2-base")["AA"] == ("48.00 (48.51, **-0.51**)" if file == "log.jsonl" else "(48.51)")
        assert f"t2-base/{file} is malformed: skipped" in capsys.readouterr().err, text
        (path / file).write_text(before)


def test_results_serve_where_runs_are_gone(run, rows):
    run("t2-base", 82.0, 53.0, 48.0, root="results")
    assert cells(rows, "t2", "t2-base")["AA"].startswith("48.00")
    run("t2-base", 83.0, 54.0, 49.0)
    assert cells(rows, "t2", "t2-base")["AA"].startswith("49.00")


def test_collect_copies_what_is_whole_and_refuses_the_rest(run, script):
    folder = run("t2-base@3", 82.0, 53.0, 48.0)
    (folder / "best.pt").write_text("weights")
    assert script(report, "collect", folder)[0] == 0
    copied = report.Path("results/t2-base@3")
    assert {p.name for p in copied.iterdir()} == {"args.json", "log.jsonl", "result.json"}
    assert (copied / "result.json").read_text() == (folder / "result.json").read_text()
    for i, (name, changes, problem) in enumerate([
        ("t2-wulr-10", {"n": 1000}, "is not evaluated as the row asks"), ("t2-wulr-15", {"wd": 1e-3}, "--wd was 0.0005, is 0.001"),
        ("t2-wulr-20", {"epochs": 109}, "109"), ("s1-madry2018", {}, "its last checkpoint is not evaluated"),
        ("t2-es-40-70@2", {"seed": 1}, "--seed was 2, is 1"),
    ]):
        folder = run(name, 82.0, 53.0, 48.0, **changes)
        status, out, err = script(report, "collect", folder)
        assert status == 2 and problem in err and len(err.splitlines()) == 1 and not report.Path("results", name).exists()
        assert script(report, "deviations", folder)[1] == "none\n" or changes.keys() & {"wd", "seed"}


def test_every_table_of_the_manifest_is_printed(rows, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for table in "t2 t3 t4 t5 t6 t7 t8 t9 t12 t13 s1 x".split():
        status, out, err = script(report, table)
        assert status == 0 and err == "" and len(out.splitlines()) == 2 + sum(r.startswith(table + "-") for r in rows)
    assert script(report, "t13")[1].splitlines()[0] == "| row | model | eps | Clean | PGD-10 | AA |"


def test_robustbench_entry(run, script):
    status, out, _ = script(report, "robustbench", run("t8-wrn10-wd5e-4-relu-bneval", 87.38, 56.0, 51.9))
    entry = json.loads(out)
    assert status == 0 and entry["architecture"] == "WRN-34-10" and entry["eps"] == "8/255" and entry["dataset"] == "cifar10"
    assert (entry["clean_acc"], entry["autoattack_acc"]) == ("87.38", "51.90")
    assert set(entry) == set("link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported "
                             "autoattack_acc unreliable".split())
    status, _, err = script(report, "robustbench", run("t2-base", 82.0, 53.0, 48.0, n=1000))
    assert status == 2 and "not evaluated by AutoAttack (standard) on all test images" in err


def test_every_figure_is_drawn(run, script, tmp_path):
    for name in ("t8-wrn10-wd1e-4-relu-bntrain", "t8-wrn10-wd5e-4-relu-bntrain", "f3-wd1e-4", "t2-base@1"):
        folder = run(name, 86.0, 56.0, 52.0)
    for argv in (["f1"], ["f2"], ["f3"], ["f4"], ["curves", folder], ["compare", folder], ["curves", folder, "--out", "a/b.c"]):
        status, out, err = script(report, *argv)
        assert status == 0 and err == "", err
        for path in out.strip().split(", "):
            assert (tmp_path / path).stat().st_size > 5000
    assert out == "a/b.c.png, a/b.c.pdf\n"


def test_the_best_epoch_is_that_of_best_pt():
    log = [{"epoch": 1, "test_clean": 50, "test_pgd10": 40}, {"epoch": 2, "test_clean": 60, "test_pgd10": 40}, {"epoch": 3}]
    assert figures.best_epoch(log) == (log[0], "test")                                     # the first, as in training
    assert figures.best_epoch([{**e, "test_pgd10": None} for e in log[:2]])[0]["epoch"] == 2
    held_out = [{**e, "val_clean": 1, "val_pgd10": 10 - e["epoch"]} for e in log]
    assert figures.best_epoch(held_out) == (held_out[0], "val")
    assert figures.best_epoch(log[2:]) == (None, "test")


@pytest.mark.parametrize("argv, problem", [
    (["t99"], "no table, figure or command"), (["collect"], "takes one RUN or more"), (["t2", "x"], "takes no RUN"),
    (["attack", "a", "b"], "takes one RUN"), (["deviations", "nowhere"], "holds no run that can be read"), (["curves", "nowhere"], "holds no log"), (["attack", "nowhere"], "no such file"),
])
def test_bad_arguments(script, tmp_path, monkeypatch, argv, problem):
    monkeypatch.chdir(tmp_path)
    status, _, err = script(report, *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1


def test_the_readme_is_up_to_date(rows):
    """If not: python report.py readme."""
    assert report.renew_readme(rows) == (ROOT / "README.md").read_text()


def test_report_stays_small():
    assert len((ROOT / "report.py").read_text().splitlines()) < 350
