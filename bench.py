"""What a training step costs: the textbook implementation, ours with the same updates, and our faster settings.

    python bench.py                                  PGD-AT, PreActResNet-18
    python bench.py --trades --bn-mode eval
    python bench.py --model wrn-34-10 --precision bf16 --compile --json wrn.json

(a) textbook: as the public code does it. PGD-AT: the attack by loss.backward(), so that every attack step computes weight
    gradients too, the attack's final loss, and two clean forwards with graph and an input gradient for the log. TRADES:
    the natural forward repeated in every attack step. Contiguous fp32.
(b) ours, fp32: train_pgdat.py's or train_trades.py's own step, channels-last, with the same updates.
(c) ours, tf32: the scripts' default on CUDA, and measured there only.
(d) ours, fast: under --precision and --compile (on CUDA by default bf16, compiled, the attack in a CUDA graph; on a CPU
    only if asked for: neither helps there).

First (a) and (b) take three steps in float64 and must agree, or nothing is timed. Then the settings take turns on one fixed
batch; augmentation is timed by itself. FLOP are those that each of them executes.
"""

import argparse
import copy
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
import train_pgdat
import train_trades
from utils import (
    InputError, Parser, batches, environment, make_forward, make_optimizer, number, pick_device, run_script, seeded,
    set_precision, write_atomically,
)

STEPS_PER_EPOCH, EPOCHS = 391, 110  # of the paper's runs: 50,000 images in batches of 128
SQUARE = {"cpu": 2048, "cuda": 8192}  # rows of the matrices whose product is the ceiling
TOLERANCE = 1e-9                    # between (a) and (b) in float64


# ---------------------------------------------------------------------------------------------------------------------
# (a) The textbook steps
# ---------------------------------------------------------------------------------------------------------------------


def textbook_pgdat(model, optimizer, x, y, args, noise):
    """One PGD-AT step (Madry et al., 2018), 37 forward-equivalents an image with BN in eval mode while attacking."""
    model.train(args.bn_mode == "train")
    delta = torch.empty_like(x).uniform_(-args.eps, args.eps, generator=noise)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(args.steps):
        delta.requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        delta = (delta.detach() + args.alpha * delta.grad.sign()).clamp(-args.eps, args.eps)
        delta = (x + delta).clamp(0, 1) - x
    F.cross_entropy(model(x + delta), y).detach()

    model.train()
    loss = F.cross_entropy(model(x + delta), y)
    clean = x.clone().requires_grad_()
    clean_loss = F.cross_entropy(model(clean), y)
    optimizer.zero_grad()
    loss.backward()
    torch.autograd.grad(clean_loss, clean)
    optimizer.step()
    F.cross_entropy(model(x), y)


def textbook_trades(model, optimizer, x, y, args, noise):
    """One TRADES step (Zhang et al., 2019) with two passes in the loss, 36 forward-equivalents an image."""
    def divergence(natural, adversarial, reduction):
        return F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(natural, dim=1), reduction=reduction)

    model.train(args.bn_mode == "train")
    x_adv = x + 0.001 * torch.empty_like(x).normal_(generator=noise)
    for _ in range(args.steps):
        x_adv.requires_grad_()
        adversarial = model(x_adv)
        grad, = torch.autograd.grad(divergence(model(x), adversarial, "sum"), x_adv)
        x_adv = x_adv.detach() + args.alpha * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)

    model.train()
    optimizer.zero_grad()
    natural = model(x)
    loss = F.cross_entropy(natural, y) + args.beta * divergence(natural, model(x_adv), "batchmean")
    loss.backward()
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The settings as functions of (x, y, noise)
# ---------------------------------------------------------------------------------------------------------------------


def textbook(model, script, args):
    optimizer = make_optimizer(model, "sgd", args.lr, args.wd, args.momentum)
    step = textbook_pgdat if script is train_pgdat else textbook_trades
    return lambda x, y, noise: step(model, optimizer, x, y, args, noise)


def ours(model, forward, script, args):
    optimizer = make_optimizer(model, "sgd", args.lr, args.wd, args.momentum)
    attack = script.make_attack(model, forward, args)
    model.train()

    def step(x, y, noise):
        x_adv = attack(x, y, args.eps, 0, noise) if script is train_pgdat else attack(x, args.eps, noise)
        script.train_step(model, forward, optimizer, x, x_adv, y, args)
    return step


def largest_difference(script, args, steps=3):
    """Between (a)'s and (b)'s weights and running statistics after a few steps of `tiny` in float64, relative to their size."""
    torch.manual_seed(0)
    reference = models.build("tiny", normalize=script.NORMALIZE).double()
    model = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    takes = textbook(reference, script, args), ours(model, model, script, args)
    for i in range(steps):
        x = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=seeded("cpu", "x", i))
        y = torch.randint(10, (8,), generator=seeded("cpu", "y", i))
        for take in takes:
            take(x, y, seeded("cpu", "noise", i))
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(model.state_dict().values(), reference.state_dict().values()))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def timed(function, device):
    """Seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ceiling(device, dtype):
    """FLOP/s of the fastest of ten products of square matrices, under the precision that is set."""
    n = SQUARE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions, which are what it is a ceiling of
    torch.mm(a, b)
    rate = 2 * n**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(10))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


class FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas. (Its FlopCounterMode fails at gradients with respect to a module's input.)"""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flop_of(make, x, y, device):
    """FLOP of one step on the batch, counted on two of its images."""
    step = make()
    with FlopCounter() as counter:
        step(x[:2], y[:2], seeded(device, "noise"))
    return counter.flop * len(x) / 2


def augmentation_seconds(batch_size, device):
    """To shuffle, crop and flip one batch, median over an epoch of ten."""
    images = torch.zeros(10 * batch_size, 32, 32, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    stream = batches(images, labels, batch_size, seeded(device, 0), padding="reflect")
    next(stream)
    return statistics.median(timed(lambda: next(stream), device) for _ in range(9))


class Setting:
    """One of (a) to (d): builds its model, warms it up, and measures the memory of a step."""

    def __init__(self, name, precision, compile, options, script, args, device):
        self.name, self.precision = name, precision
        set_precision(precision, device)
        torch.manual_seed(0)
        model = models.build(options.model, normalize=script.NORMALIZE).to(device)
        self.x = torch.rand(options.batch_size, 3, 32, 32, device=device)
        self.y = torch.randint(10, (options.batch_size,), device=device)
        if name == "textbook":
            make = lambda: textbook(model, script, args)
        else:
            model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
            eager = argparse.Namespace(**{**vars(args), "compile": False})
            make = lambda: ours(model, model, script, eager)
        self.flop = flop_of(make, self.x, self.y, device)
        args = argparse.Namespace(**{**vars(args), "compile": compile})
        self.take = make() if name == "textbook" else ours(model, make_forward(model, precision, compile), script, args)
        self.device, self.seconds, self.peak = device, [], None
        weights = sum(t.nbytes for t in (*model.state_dict().values(), self.x))
        before = torch.cuda.memory_allocated(device) - weights if device.type == "cuda" else 0
        for i in range(3 if device.type == "cuda" else 1):
            self.take(self.x, self.y, seeded(device, "warm-up", i))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the warm-up's holds the workspaces of cuDNN's search
            self.take(self.x, self.y, seeded(device, "memory"))
            self.peak = torch.cuda.max_memory_allocated(device) - before
        self.ceiling = ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def measure(self, i):
        set_precision(self.precision, self.device)
        self.seconds.append(timed(lambda: self.take(self.x, self.y, seeded(self.device, "noise", i)), self.device))

    def result(self, baseline):
        """The row of the table. baseline: median seconds of (a)."""
        median, n = statistics.median(self.seconds), len(self.x)
        return {
            "setting": self.name, "precision": self.precision, "ms": 1e3 * median, "ms_min": 1e3 * min(self.seconds),
            "ms_max": 1e3 * max(self.seconds), "steps": len(self.seconds), "images_per_second": n / median,
            "ratio": baseline / median, "gflop": self.flop / 1e9, "tflops": self.flop / median / 1e12,
            "ceiling_tflops": self.ceiling / 1e12, "percent_of_ceiling": 100 * self.flop / median / self.ceiling,
            "peak_gb": None if self.peak is None else self.peak / 1e9,
            "hours_110_epochs": median * STEPS_PER_EPOCH * 128 / n * EPOCHS / 3600,
        }


def show(rows):
    print(f"{'setting':15} {'ms/step':>9} {'min':>9} {'max':>9} {'img/s':>8} {'x (a)':>6} {'TFLOP/s':>8} {'% of max':>8} {'GB':>6} {'h/110 ep.':>9}")
    for r in rows:
        peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.2f}"
        print(f"{r['setting'] + ', ' + r['precision']:15} {r['ms']:9.1f} {r['ms_min']:9.1f} {r['ms_max']:9.1f} {r['images_per_second']:8.1f} "
              f"{r['ratio']:6.2f} {r['tflops']:8.3f} {r['percent_of_ceiling']:8.1f} {peak:>6} {r['hours_110_epochs']:9.2f}")


def parse_args():
    p = Parser(description=__doc__)
    p.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME", help="(default: %(default)s)")
    p.add_argument("--batch-size", type=number(2, kind=int), default=128, help="images a step (default: %(default)s)")
    p.add_argument("--trades", action="store_true", help="TRADES instead of PGD-AT")
    p.add_argument("--bn-mode", choices=("train", "eval"), help="batch norm while attacking (default: train; TRADES: eval)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="of (d) (default: bf16 on CUDA)")
    p.add_argument("--compile", action="store_true", default=None, help="in (d) (default on CUDA)")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="not in (d)")
    p.add_argument("--rounds", type=number(1, kind=int), help="steps of each setting that count (default: 30, on a CPU 3)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    return p.parse_args()


def main():
    options = parse_args()
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    options.rounds = options.rounds or (30 if cuda else 3)
    precision = options.precision or ("bf16" if cuda else "fp32")
    compile = cuda if options.compile is None else options.compile
    set_precision(precision, device)  # refuses what this device cannot do
    torch.backends.cudnn.benchmark = True  # for all settings alike
    script = train_trades if options.trades else train_pgdat
    args = script.parse_args(["--bn-mode", options.bn_mode] if options.bn_mode else [])

    name = f"{'TRADES' if options.trades else 'PGD-AT'}, {options.model}, batch {options.batch_size}, --bn-mode {args.bn_mode}"
    about = environment(device)
    print(f"{name}; {about['device']}, torch {about['versions']['torch']}")
    difference = largest_difference(script, args)
    print(f"(a) and (b) after three steps of tiny in float64: weights and running statistics differ by {difference:.1e} (relative)")
    if not difference <= TOLERANCE:
        sys.exit(f"bench.py: (b) does not take the same steps as (a): more than {TOLERANCE:g}; nothing is timed")

    common = (options, script, args, device)
    settings = [Setting("textbook", "fp32", False, *common), Setting("ours", "fp32", False, *common)]
    if cuda:
        settings.append(Setting("ours", "tf32", False, *common))
    if (precision, compile) not in ((s.precision, False) for s in settings):
        settings.append(Setting("fast", precision, compile, *common))
    for i in range(options.rounds):
        for setting in settings:
            setting.measure(i)
    rows = [s.result(statistics.median(settings[0].seconds)) for s in settings]
    show(rows)
    augmentation = augmentation_seconds(options.batch_size, device)
    print(f"augmentation: {1e3 * augmentation:.2f} ms a batch, {100 * augmentation * 1e3 / rows[-1]['ms']:.2f} % of the fastest setting's step")
    if options.json:
        record = {"what": name, "settings": rows, "augmentation_ms": 1e3 * augmentation, "difference_float64": difference, **about}
        try:
            write_atomically(options.json, lambda f: f.write((json.dumps(record, indent=2) + "\n").encode()))
        except OSError as e:
            raise InputError(f"--json {options.json}: {e.strerror}") from None


if __name__ == "__main__":
    run_script(main)
