"""The CUDA path: on a pretended GPU everywhere (pretended_gpu.py says what that cannot show), on a real one
where there is one."""

import contextlib
import copy
import json
from unittest import mock

import pytest
import torch
from conftest import TINY, attack_of, log, needs_bf16, same_run
from pretended_gpu import PretendedGraph, pretended_gpu
from torch.overrides import TorchFunctionMode

import eval_aa
import models
import train_pgdat
import train_trades
import utils

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def own_graphs():
    forget_graphs()
    yield
    forget_graphs()


def forget_graphs():
    """Dynamo's limit of 8 graphs is for all models of a process: beyond it they would run uncompiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_gpu_that_is_not_there_is_one_clear_line(train):
    with pretended_gpu(2):
        status, _, err = train("--device", "cuda:7")
    assert status == 2 and "--device cuda:7" in err and err.count("\n") == 1


def test_under_torchrun_every_process_takes_its_own_and_synchronises_batch_norm(monkeypatch):
    monkeypatch.setattr(utils, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pretended_gpu(2):
        assert utils.pick_device("auto") == utils.pick_device("cuda") == torch.device("cuda", 1)
        model = models.build("tiny").to("cuda")
        optimizer = utils.make_optimizer(model, "sgd", 0.1, 0)
        utils.share_training(model, optimizer, train_pgdat.parse_args([]), 51_200)
        kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        assert kinds == {torch.nn.SyncBatchNorm}
        with pytest.raises(utils.InputError, match="--compile"):
            utils.share_training(model, optimizer, train_pgdat.parse_args(["--compile"]), 51_200)


def interrupted(t, *setting):
    """A schedule, but in the second epoch somebody presses Ctrl-C."""
    if t >= 1:
        raise KeyboardInterrupt
    return utils.lr_at(t, *setting)


MACHINES = pytest.mark.parametrize("machine", ["pretended", pytest.param("real", marks=needs_gpu)])


def on_a(machine):
    return pretended_gpu() if machine == "pretended" else contextlib.nullcontext()


@MACHINES
@pytest.mark.parametrize("module, device, flags", [
    (train_pgdat, "auto", "--precision fp32 --val 16 --early-stop-pgd 0 1 --optimizer sgd-gc"),
    (train_pgdat, "cuda:0", "--precision bf16 --compile --bn-mode eval --ema 0.9"),
    (train_trades, "cuda", "--precision bf16 --compile --optimizer adam --lr 1e-3 --awp 0.01"),
])
def test_training_going_on_and_evaluation(script, small_npz, tmp_path, monkeypatch, machine, module, device,
                                          flags):
    run, flags = tmp_path / "run", flags.split()
    argv = (*TINY, "--dataset", small_npz, "--steps", 1, "--device", device, *flags)
    with on_a(machine):
        with monkeypatch.context() as patch:
            patch.setattr(module, "lr_at", interrupted)
            assert script(module, *argv, "--epochs", 2, "--out", run)[0] == 130
        trained = script(module, *argv, "--epochs", 2, "--out", run, "--resume")
        evaluated = script(eval_aa, run, "--n", 2, "--attacks", "apgd-ce", "--device", device)
        name = torch.cuda.get_device_name()
    record, result = (json.loads((run / f"{file}.json").read_text()) for file in ("args", "result"))
    precision = flags[1] if flags[0] == "--precision" else "tf32"
    for (status, out, err), used in ((trained, precision), (evaluated, "tf32")):
        assert status == 0 and err == "", err
        assert f"device cuda:0: {name}, torch {torch.__version__}, {used}\n" in out
    assert record["args"]["precision"] == precision and record["device"] == result["device"] == name
    assert "resumes after epoch 1" in trained[1] and result["complete"]
    assert len(log(run)) == 2 and all(0 < e["train_loss"] < 100 for e in log(run))
    assert machine == "pretended" or (graphs() > 0) == ("--compile" in flags)


def test_several_evaluations_on_one_gpu_sum_on_the_cpu(script, run, monkeypatch):
    """NCCL takes one process a GPU."""
    summed, total = [], utils.sum_over_processes
    monkeypatch.setattr(utils, "sum_over_processes", lambda t: summed.append(t.device.type) or total(t))
    with pretended_gpu():
        status, _, err = script(eval_aa, run, "--n", 4, "--attacks", "apgd-ce", "--batch-size", 2)
    assert status == 0 and summed == ["cpu"] * (3 + 2), err  # clean, PGD-10 and margins; two rounds


# ---- The training attack in a CUDA graph -------------------------------------------------------------------


def prepared(module, argv, compiled=False, captured=False):
    """(model, optimizer, attack, args) on the GPU."""
    args = module.parse_args(["--model", "tiny", "--steps", "3", *argv])
    device, bf16 = torch.device("cuda", 0), args.precision == "bf16"
    forget_graphs()
    torch.manual_seed(0)
    model = models.build("tiny", normalize=module.NORMALIZE, bf16=bf16)
    model.to(device, memory_format=torch.channels_last)
    optimizer, attack = utils.make_optimizer(model, "sgd", args.lr, args.wd), attack_of(module, model, args)
    if compiled:
        model.compile(dynamic=False)
    if captured:
        attack = utils.CapturedAttack(attack, model)
    return model, optimizer, attack, args


def batch(step, size=16):
    """x, y and the generator of the noise."""
    x, y, rng = (utils.seeded("cuda", name, step) for name in ("x", "y", "attack"))
    x = torch.rand(size, 32, 32, 3, device="cuda", generator=x).permute(0, 3, 1, 2)
    return x, torch.randint(10, (size,), device="cuda", generator=y), rng


def four_steps(module, argv, compiled, captured):
    """x' of four steps, of which the third has fewer images, and the state dict behind them."""
    model, optimizer, attack, args = prepared(module, argv, compiled, captured)
    images = []

    def noted(*tensors):
        images.append(attack(*tensors).clone())
        return images[-1]

    for step, size in enumerate((16, 16, 10, 16)):
        x, y, rng = batch(step, size)
        optimizer.param_groups[0]["lr"] = args.lr / (step + 1)
        with utils.uncompiled(size == 10):
            module.train_step(model, optimizer, noted, x, y, (step + 1) / 4 * args.eps, 0, rng, args)
    assert not captured or len(attack.graphs) == 2
    assert (graphs() > 0) == compiled
    return images, model.state_dict()


@pytest.mark.parametrize("machine, compiled, precision", [
    ("pretended", False, "fp32"),
    *(pytest.param("real", c, p, marks=needs_gpu) for c in (False, True) for p in ("fp32", "bf16"))])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("module", [train_pgdat, train_trades])
def test_graph_changes_no_bit(monkeypatch, machine, compiled, precision, module, bn_mode):
    """Of x', weights and running statistics, while eps and lr change, with a smaller batch and after it."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with on_a(machine):
        argv = ["--bn-mode", bn_mode, "--precision", precision]
        utils.set_precision(precision, torch.device("cuda"))
        torch.backends.cudnn.benchmark = False
        without, with_graph = (four_steps(module, argv, compiled, graph) for graph in (False, True))
    for got, want in zip(with_graph[0], without[0], strict=True):
        assert torch.equal(got, want)
    for name, want in without[1].items():
        assert torch.equal(with_graph[1][name], want), name


class NoWaiting(TorchFunctionMode):
    """On a pretended GPU: what lets the host wait for a real one is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waits = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
        assert func.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waiting_is_an_error(machine):
    if machine == "pretended":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@MACHINES
@pytest.mark.parametrize("module", [train_pgdat, train_trades])
def test_a_step_with_a_graph_never_waits_for_the_gpu(machine, module):
    """Attack, update, figures and averaging, after a step that warms up."""
    with on_a(machine):
        argv = ["--precision", "bf16", "--awp", "0.01"]
        model, optimizer, attack, args = prepared(module, argv, captured=True)
        average, meter = copy.deepcopy(model), utils.Meter("cuda")
        for step in range(2):
            x, y, rng = batch(step)
            with waiting_is_an_error(machine) if step else contextlib.nullcontext():
                loss, *logits = module.train_step(model, optimizer, attack, x, y, args.eps, 0, rng, args)
                meter.add(loss, y, *logits)
                utils.update_average(average, model, 0.9, step)
        with pytest.raises((AssertionError, RuntimeError)), waiting_is_an_error(machine):
            meter.read()


@pytest.mark.parametrize("flags, replays", [
    ("--warmup-eps 2 --ema 0.9", [4, 2]),  # two shapes of batches
    ("--early-stop-pgd 1 2", [])])         # the attack's length depends on the images
def test_graph_in_a_run_changes_no_bit(script, small_npz, tmp_path, flags, replays):
    """Two epochs of batches of 40, 40 and 16 images: as many captures as shapes, a replay a step."""
    argv = (*TINY, "--batch-size", 40, "--dataset", small_npz, "--steps", 2, "--epochs", 2, "--eval-from", 2,
            *flags.split())
    with pretended_gpu():
        for out, more in (("without", ()), ("with", ("--compile",))):
            status, _, err = script(train_pgdat, *argv, "--out", tmp_path / out, *more)
            assert status == 0, err
    same_run(tmp_path / "without", tmp_path / "with")
    assert [graph.replays for graph in PretendedGraph.made] == replays


# ---- Precision: what only a GPU can show, and as much of it as a CPU can ---------------------------------


def updates(n, device, precision, compiled=False, dtype=torch.float32):
    """n updates of PGD-AT, whose attack starts from the images, on one batch -> their losses, model, x, y."""
    forget_graphs()
    utils.set_precision(precision, torch.device(device))
    args, losses = train_pgdat.parse_args(["--bn-mode", "eval"]), []
    torch.manual_seed(0)
    name, batch = ("tiny", 16) if device == "cpu" else ("preactresnet-18", 128)
    model = models.build(name, bf16=precision == "bf16").to(device, dtype)
    if compiled:
        model.compile(dynamic=False)
    x, y = torch.rand(batch, 3, 32, 32).to(device, dtype), torch.randint(10, (batch,)).to(device)
    optimizer = utils.make_optimizer(model, "sgd", 0.01, 5e-4)
    attack = attack_of(train_pgdat, model, args)
    with mock.patch.object(train_pgdat, "random_start", lambda x, eps, rng: x):
        for _ in range(n):
            loss, *_ = train_pgdat.train_step(model, optimizer, attack, x, y, 8 / 255, 0, None, args)
            losses.append(loss.item())
    assert (graphs() > 0) == compiled
    return losses, model, x, y


def on(device, precision, compiled=False):
    marks = needs_gpu if device == "cuda" else needs_bf16 if precision == "bf16" else ()
    return pytest.param(device, precision, compiled, marks=marks)


@pytest.mark.parametrize("device, precision, compiled", [
    on("cpu", "fp32"), on("cpu", "bf16"), on("cuda", "fp32"), on("cuda", "tf32"), on("cuda", "bf16"),
    on("cuda", "bf16", True)])
def test_losses_are_those_in_float64(device, precision, compiled):
    """Of three steps; from the second on rounding tells, through the signs of gradients near 0."""
    want, got = updates(3, device, "fp32", dtype=torch.float64)[0], updates(3, device, precision, compiled)[0]
    assert got[0] == pytest.approx(want[0], rel={"fp32": 1e-3, "tf32": 5e-3, "bf16": 1e-2}[precision])
    assert got == pytest.approx(want, rel=2e-2)


@pytest.mark.parametrize("device, precision, compiled", [on("cpu", "bf16"), on("cuda", "bf16", True)])
def test_an_attack_in_bf16_is_as_strong_as_in_fp32(device, precision, compiled):
    _, model, x, y = updates(10 if device == "cpu" else 20, device, precision, compiled)
    plain = copy.deepcopy(model)
    plain.bf16 = False
    utils.set_precision("fp32", torch.device(device))
    with utils.attack_mode(model, "eval"), utils.attack_mode(plain, "eval"):
        images = x, *(utils.pgd(m, x, y, x, 8 / 255, 2 / 255, 10) for m in (plain, model))
        clean, fp32, bf16 = (torch.nn.functional.cross_entropy(plain(i), y).item() for i in images)
    assert fp32 > 1.2 * clean and bf16 == pytest.approx(fp32, rel=0.02)
