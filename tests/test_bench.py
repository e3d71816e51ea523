"""tools/bench.py: nothing is timed unless our step is the textbook's; what is counted is right."""

import argparse
import contextlib
import json
from unittest import mock

import pytest
import torch
from pretended_gpu import PretendedGraph, pretended_gpu
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import train_pgdat
import train_trades
import utils
from models.__main__ import multiply_adds
from tools import bench

QUICK = "--model", "tiny", "--batch-size", 4, "--rounds", 1, "--device", "cpu"


@pytest.fixture(autouse=True)
def attacks_of_two_steps(monkeypatch):
    for module in (train_pgdat, train_trades):
        parse = module.parse_args
        monkeypatch.setattr(module, "parse_args", lambda argv, parse=parse: parse([*argv, "--steps", "2"]))


@pytest.mark.parametrize("module, flags, mistake", [
    (train_pgdat, [], {"bn_clean_passes": 1}),  # which no weight shows
    (train_pgdat, ["--bn-mode", "eval"], {"ls": 1e-7}),
    (train_trades, ["--trades"], {"beta": 6 + 1e-6}),
])
def test_a_planted_mistake_is_not_timed(script, monkeypatch, module, flags, mistake):
    def mistaken(args):
        return argparse.Namespace(**vars(args) | mistake)

    step, attack = module.train_step, module.training_attack
    monkeypatch.setattr(module, "train_step", lambda *given: step(*given[:-1], mistaken(given[-1])))
    monkeypatch.setattr(module, "training_attack", lambda model, args, *given: attack(
        model, mistaken(args), *given))
    status, out, _ = script(bench, *QUICK, *flags)
    assert "nothing is timed" in status  # Python prints it, and exits with status 1
    assert "loss after three steps" not in out


def test_gpu_time_and_launches_a_step():
    """In two steps the host sends work six times, once a graph; the GPU does ten things of 500 us."""
    host = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch",
            "cudaMemcpyAsync", "cudaMemsetAsync", "cudaDeviceSynchronize", "cudaStreamIsCapturing"]
    events = [(DeviceType.CPU, name, 7, False) for name in host]
    events += [(DeviceType.CUDA, name, 500, False) for name in [*["kernel"] * 8, "Memcpy DtoD", "Memset"]]
    events += [(DeviceType.CUDA, "Optimizer.step", 9_000, True)]  # the span of kernels that are there already
    events = [FunctionEvent(i, name, 0, 100, 100 + us, device_type=device, is_user_annotation=span)
              for i, (device, name, us, span) in enumerate(events)]
    assert bench.gpu_work(events, steps=2) == (2.5, 3)


@pytest.mark.parametrize("flags, has_combo", [([], False), (["--trades"], True)])
def test_rows_on_cuda(script, monkeypatch, flags, has_combo):
    """A torch that does not know combo_kernels lacks a row; a profiler that sees nothing is named."""
    compiled = []

    def compile(model, dynamic, options):
        if options and not has_combo:
            raise RuntimeError("Unexpected optimization option combo_kernels")
        compiled.append(options)

    for name in ("synchronize", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 9)
    monkeypatch.setattr(bench, "profile", lambda activities: contextlib.nullcontext(mock.Mock(events=list)))
    monkeypatch.setitem(bench.SQUARE, "cuda", 64)
    with pretended_gpu():
        status, out, _ = script(bench, *QUICK[:-1], "cuda", *flags)
    assert status == 0 and "profiler saw nothing" in out
    rows = [line[:18].strip() for line in out[out.index("\nsetting "):].splitlines()[2:]]
    names = ["textbook fp32", "textbook tf32", "ours tf32", "ours bf16", "ours bf16 compiled"]
    names += ["ours bf16 combo"] * has_combo
    assert rows[: len(names)] == names and ("no row for ours bf16 combo" in out) == (not has_combo)
    assert compiled == [None, bench.COMBO][: 1 + has_combo]
    # four steps for the loss, a round that does not count, one that does, and two under the profiler
    assert [graph.replays for graph in PretendedGraph.made] == [8] * len(compiled)


@pytest.mark.parametrize("instructions, flags, textbook, ours", [  # textbook, ours: forwards by image
    ("avx2 avx512_bf16", [], 13, 10), ("avx2", ["--trades"], 12, 11)])
def test_rows_and_figures(script, monkeypatch, tmp_path, instructions, flags, textbook, ours):
    monkeypatch.setattr(utils, "cpu_info", lambda: f"flags\t\t: fpu {instructions} sse\n")
    monkeypatch.setitem(bench.SQUARE, "cpu", 64)
    status, out, err = script(bench, *QUICK, *flags, "--json", tmp_path / "b.json")
    assert (status, err) == (0, "")

    figures, has_bf16 = json.loads((tmp_path / "b.json").read_text()), "bf16" in instructions
    rows = {row["setting"]: row for row in figures["settings"]}
    assert list(rows) == ["textbook fp32", "ours fp32"] + ["ours bf16"] * has_bf16
    assert ("no row for bf16: " in out) != has_bf16
    assert figures["difference_float64"] < bench.TOLERANCE and figures["versions"]["torch"] in out
    for name, row in rows.items():
        assert sum(line.startswith(name) for line in out.splitlines()) == 1
        assert row["loss"] == pytest.approx(row["loss_float64"], rel=0.2) and row["loss"] > 0
        flop = row["tflops"] * row["ms"] * 1e9 / 4  # of a step, by image
        forwards = textbook if name == "textbook fp32" else ours
        assert flop == pytest.approx(forwards * 2 * multiply_adds("tiny"), rel=0.02)
        assert row["ms_min"] == row["ms"] == row["ms_max"] == pytest.approx(1e3 * row["seconds"][0])
        assert row["images_per_second"] == pytest.approx(4e3 / row["ms"])
        assert row["ratio"] == pytest.approx(rows["textbook fp32"]["ms"] / row["ms"])
        assert row["reserved_gb"] is row["gpu_ms"] is row["launches"] is None  # there is no GPU
        assert row["percent_of_mm"] == pytest.approx(100 * row["tflops"] / row["mm_tflops"])
