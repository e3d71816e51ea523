"""The CUDA path: on a pretended GPU everywhere (pretended_gpu.py says what that cannot show), on a real one
where there is one."""

import contextlib
import json
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, spawn
from pretended_gpu import pretended_gpu

import eval_aa
import models
import runs
import train_pgdat
import train_trades
import utils
from tools import bench

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = ("--model", "tiny", "--batch-size", 40, "--lr", 0.05, "--steps", 3)


@pytest.fixture(params=["pretended", pytest.param("real", marks=needs_gpu)])
def gpu(request):
    with pretended_gpu() if request.param == "pretended" else contextlib.nullcontext():
        yield request.param


# ---- Which device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_device_has_an_index_and_becomes_the_current_one(gpu, name):
    assert runs.pick_device(name) == torch.device("cuda", 0)
    assert runs.pick_device("cpu") == torch.device("cpu")


def test_the_pretended_gpu_keeps_torchs_own_check():
    """Without it, no test would see that torch.cuda.set_device takes no device without an index."""
    with pretended_gpu(), pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))


def test_a_gpu_that_is_not_there_is_one_clear_line(script, monkeypatch):
    with pretended_gpu(2):
        status, _, err = script(train_pgdat, "--device", "cuda:7")
    assert status == 2 and err == "train_pgdat.py: error: --device cuda:7: there is only cuda:0 to cuda:1\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (train_trades, bench):
        status, _, err = script(module, "--device", "cuda")
        assert status == 2 and err.endswith("error: --device cuda: torch sees no GPU here\n")
        assert len(err.splitlines()) == 1
    assert runs.pick_device("auto") == torch.device("cpu")


def test_under_torchrun_every_process_takes_its_own(monkeypatch):
    monkeypatch.setattr(runs, "under_torchrun", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pretended_gpu(2):
        assert runs.pick_device("auto") == runs.pick_device("cuda") == torch.device("cuda", 1)
        with pytest.raises(utils.InputError, match="a GPU of its own"):
            runs.pick_device("cuda:0")


def test_batch_norm_is_synchronised_between_gpus(monkeypatch):
    monkeypatch.setattr(runs, "world", lambda: 2)
    converted = runs.sync_batch_norm(models.build("tiny"), torch.device("cuda", 0))
    norms = [m for m in converted.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    with pytest.raises(utils.InputError, match="--compile is not supported on several GPUs"):
        runs.check_split(train_pgdat.parse_args(["--compile"]), 50_000, torch.device("cuda", 0))


# ---- The scripts from end to end ---------------------------------------------------------------------------


def weights(path):
    return runs.load_checkpoint(path)["state_dict"]


@pytest.mark.parametrize("module, flags", [
    (train_pgdat, ("--device", "auto", "--precision", "tf32", "--bn-mode", "train")),
    (train_pgdat, ("--device", "cuda:0", "--precision", "bf16", "--compile", "--bn-mode", "eval", "--val",
                   16)),
    (train_pgdat, ("--device", "cuda", "--early-stop-pgd", 0, 1, "--optimizer", "sgd-gc")),
    (train_trades, ("--device", "cuda", "--precision", "bf16", "--compile", "--bn-mode", "train")),
    (train_trades, ("--device", "cuda:0", "--bn-mode", "eval", "--optimizer", "adam")),
    (train_pgdat, ("--device", "cuda", "--compile", "--bn-mode", "eval", "--ema", 0.9)),
    (train_trades, ("--device", "cuda", "--precision", "bf16", "--compile", "--ema", 0.9, "--awp", 0.01)),
], ids=lambda v: v.__name__ if hasattr(v, "__name__") else "".join(map(str, v)))
def test_training_and_evaluation(gpu, script, small_npz, tmp_path, module, flags):
    run = tmp_path / "run"
    argv = (*TINY, "--dataset", small_npz, "--epochs", 2)
    status, _, err = script(module, *argv, *flags, "--out", run)
    assert status == 0, err
    record = json.loads((run / "args.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert record["args"]["precision"] == dict(zip(flags, flags[1:])).get("--precision", "tf32")
    assert record["device"] == torch.cuda.get_device_name()
    assert record["versions"]["cuda"] == torch.version.cuda
    assert len(log) == 2 and all(np.isfinite(e["train_loss"]) for e in log)
    if gpu == "pretended":  # the CPU's arithmetic: graphs or not, the same weights as there
        argv = (*argv, *(f for f in flags if f not in ("--compile", "--device", "--precision", "cuda",
                                                       "cuda:0", "auto", "bf16", "tf32")))
        assert script(module, *argv, "--device", "cpu", "--out", tmp_path / "cpu")[0] == 0
        assert all(torch.equal(*pair) for pair in zip(weights(run / "last.pt").values(),
                                                      weights(tmp_path / "cpu" / "last.pt").values(),
                                                      strict=True))
    status, _, err = script(eval_aa, run, "--n", 12, "--attacks", "apgd-ce", "--device", flags[1],
                            "--batch-size", 5)
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["precision"] == "tf32"
    assert result["stages"]["pgd10"]["device"] == torch.cuda.get_device_name()


# A training script whose process kills itself before its third step, of the second epoch.
KILLED = """
import contextlib, os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pretended_gpu import pretended_gpu
import train_trades, runs
step, steps = train_trades.train_step, []

def train_step(*args):
    steps.append(1)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)

train_trades.train_step = train_step
with pretended_gpu() if {gpu!r} == "pretended" else contextlib.nullcontext():
    runs.run_script(train_trades.main)
"""


def test_a_killed_run_goes_on(gpu, script, small_npz, tmp_path):
    (tmp_path / "train_trades.py").write_text(KILLED.format(root=str(ROOT), gpu=gpu))
    argv = (*TINY, "--dataset", small_npz, "--epochs", 2, "--device", "cuda", "--precision", "bf16",
            "--compile")
    done = spawn(sys.executable, tmp_path / "train_trades.py", *argv, "--out", tmp_path / "cut")
    assert done.returncode == -signal.SIGKILL and (tmp_path / "cut" / "last.pt").exists(), done.stderr
    status, out, err = script(train_trades, *argv, "--out", tmp_path / "cut", "--resume")
    assert status == 0 and "after epoch 1" in out, err
    assert script(train_trades, *argv, "--out", tmp_path / "whole")[0] == 0
    cut, whole = weights(tmp_path / "cut" / "last.pt"), weights(tmp_path / "whole" / "last.pt")
    exact = gpu == "pretended"  # on a GPU cuDNN chooses its algorithms anew
    assert all(torch.equal(cut[k], whole[k]) if exact else cut[k].isfinite().all() for k in whole)


def test_bench(gpu, script, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SQUARE, "cuda", 64)
    status, out, err = script(bench, "--model", "tiny", "--batch-size", 4, "--rounds", 1, "--json",
                              tmp_path / "b.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "b.json").read_text())["settings"]
    assert [(r["setting"], r["precision"]) for r in rows] == [("textbook", "fp32"), ("ours", "fp32"),
                                                              ("ours", "tf32"), ("fast", "bf16")]
    assert all(r["peak_gb"] is not None for r in rows)


# ---- Attacks in CUDA graphs --------------------------------------------------------------------------------


def attacks(script, bn_mode, sizes, graphed, precision="fp32", model="tiny"):
    """The images of one attack for each of the sizes, of a model whose weights change in between; the model;
    the Graphed or None."""
    args = script.parse_args(["--model", model, "--bn-mode", bn_mode])
    runs.set_precision(precision, torch.device("cuda", 0))
    torch.manual_seed(0)
    model = models.build(model, normalize=script.NORMALIZE).to("cuda",
                                                               memory_format=torch.channels_last).train()
    x = torch.rand(max(sizes), 3, 32, 32).to("cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (max(sizes),)).to("cuda")
    args.compile = graphed
    attack, seen = script.make_attack(model, runs.make_forward(model, precision), args), []
    for i, n in enumerate(sizes):
        noise, eps = utils.seeded(x.device, i), (4 + i) / 255
        seen.append(attack(x[:n], y[:n], eps, 0, noise) if script is train_pgdat else attack(x[:n], eps,
                                                                                             noise))
        with torch.no_grad():
            model.linear.weight.mul_(1.1)
    return seen, model


@pytest.mark.parametrize("script", [train_pgdat, train_trades])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_a_recorded_attack_is_the_attack_bit_for_bit(script, bn_mode, monkeypatch):
    """Inputs copied in, statistics as if nothing had been run to warm up, results of one shape that do not
    overwrite each other."""
    captured, capture = [], runs.Graphed.capture
    monkeypatch.setattr(runs.Graphed, "capture", lambda self,
                        inputs: captured.append(len(inputs[0])) or capture(self, inputs))
    sizes = (12, 8, 12, 12, 8)
    with pretended_gpu():
        eager, plain = attacks(script, bn_mode, sizes, graphed=False)
        assert captured == []
        replayed, model = attacks(script, bn_mode, sizes, graphed=True)
    assert captured == [12, 8]
    assert all(map(torch.equal, eager, replayed)) and not torch.equal(eager[2], eager[3])
    assert all(map(torch.equal, plain.buffers(), model.buffers()))


def test_a_capture_refuses_to_wait_for_the_device():
    with pretended_gpu(), pytest.raises(RuntimeError, match="not permitted while a graph is captured"):
        model = models.build("tiny").to("cuda")
        runs.Graphed(lambda x: x * x.sum().item(), model)(torch.ones(2, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("script", [train_pgdat, train_trades])
@pytest.mark.parametrize("bn_mode, precision", [("train", "fp32"), ("eval", "bf16")])
def test_a_graph_on_the_gpu_is_the_attack(script, bn_mode, precision):
    sizes = (128, 80, 128, 80, 128)
    (eager, plain), (replayed, model) = (attacks(script, bn_mode, sizes, graphed, precision,
                                                 "preactresnet-18") for graphed in (False, True))
    # the sign of a gradient near 0 may differ, in bf16 of more of them
    for i, (a, b) in enumerate(zip(eager, replayed)):
        assert ((a - b).abs() < 1e-6).float().mean() > (0.9 if precision == "bf16" else 0.99), i
    for a, b in zip(plain.buffers(), model.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("bn_mode, precision", [("train", "fp32"), ("eval", "bf16")])
def test_nothing_is_compiled_after_the_first_batch_of_each_size(bn_mode, precision):
    args = train_pgdat.parse_args(["--bn-mode", bn_mode, "--compile"])
    runs.set_precision(precision, torch.device("cuda", 0))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = models.build("preactresnet-18", normalize=train_pgdat.NORMALIZE).train()
    model.to("cuda", memory_format=torch.channels_last)
    forward = runs.make_forward(model, precision, compile=True)
    attack = train_pgdat.make_attack(model, forward, args)
    optimizer = utils.make_optimizer(model, "sgd", 0.01, 5e-4)
    graphs = []
    for i, n in enumerate((128, 80, 128, 80, 128)):
        x = torch.rand(n, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        y = torch.randint(10, (n,), device="cuda")
        x_adv = attack(x, y, args.eps, 0, utils.seeded(x.device, i))
        loss, _, _ = train_pgdat.train_step(model, forward, optimizer, x, x_adv, y, args)
        assert loss.isfinite()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[4]


# ---- What only a GPU can show ------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("gamma", [0, 0.01])
@pytest.mark.parametrize("script", [train_pgdat, train_trades])
def test_a_step_never_waits_for_the_device(script, gamma):
    args = script.parse_args(["--model", "tiny"])
    model = models.build("tiny",
                         normalize=script.NORMALIZE).cuda().to(memory_format=torch.channels_last).train()
    x, y = torch.rand(40, 3, 32, 32, device="cuda"), torch.randint(10, (40,), device="cuda")
    attack, meter = script.make_attack(model, model, args), runs.Meter("cuda")
    optimizer = utils.make_optimizer(model, "sgd", 0.1, 5e-4)
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            noise = utils.seeded(x.device, i)
            x_adv = attack(x, y, args.eps, 0, noise) if script is train_pgdat else attack(x, args.eps, noise)
            loss, logits, clean_logits = script.train_step(model, model, optimizer, x, x_adv, y, args, gamma)
            meter.add(loss, y, logits, clean_logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_bf16_keeps_master_weights_statistics_and_input_gradients_in_fp32():
    model = models.build("tiny", normalize=models.CIFAR_NORMALIZE).cuda().train()
    forward = runs.make_forward(model, "bf16")
    x = torch.rand(40, 3, 32, 32, device="cuda").requires_grad_()
    logits = forward(x)
    grad, = torch.autograd.grad(logits.sum(), x)
    assert logits.dtype == grad.dtype == torch.float32
    assert all(t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())
