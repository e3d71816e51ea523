"""What a training step costs here: the textbook's, and ours in every precision.

    python -m tools.bench                                          PGD-AT, PreActResNet-18, batch 128
    python -m tools.bench --trades --batch-size 32 --json trades.json

(a) textbook, fp32: the steps of tools/textbook.py, contiguous. PGD-AT as the public code does it: every
    attack step computes weight gradients too, the attack its final loss, and a clean pass an input gradient.
    TRADES: every attack step repeats the natural forward.
(b) ours, fp32: the step of train_pgdat.py or train_trades.py, channels-last, with the same updates.
(c) ours, bf16, on a CPU that has it. On CUDA the rows are: textbook fp32 and tf32; ours tf32, bf16, and bf16
    compiled, with the attack in a CUDA graph, as --compile trains; and that with torch's combo_kernels.

First (a) and (b) take three steps in float64 and must agree, or nothing is timed. Then every setting's loss
after three steps is printed beside float64's: the attack's signs amplify rounding to about a per cent. Then
the settings take turns on one fixed batch. TFLOP/s count what a setting executes; "% of mm" is their share of
the rate of matrix products in the same precision and the same turns. On CUDA, GB is what torch reserves for a
setting, its graph included, "GPU ms" how long the GPU itself works on a step, and "launches" how often the
host sends it work. Nothing else should run. Cost: five minutes on two CPU cores.
"""

import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
import train_pgdat
import train_trades
import utils
from tools import textbook
from utils import seeded

TOLERANCE = 1e-9                      # between (a) and (b) in float64
SQUARE = {"cpu": 2048, "cuda": 8192}  # rows of the matrices whose product is timed
# What sends work to a GPU, by name: cudaLaunchKernelExC, cuLaunchKernel, cudaGraphLaunch, cudaMemcpyAsync ...
LAUNCH = re.compile("cu(da)?(GraphLaunch|Launch|Memcpy|Memset)")
LAYOUT = {"textbook": torch.contiguous_format, "ours": torch.channels_last}
COMBO = {"combo_kernels": True, "combo_kernels_pointwise_only": True}  # for torch.compile
COLUMNS = {  # of the table: key, title, digits
    "ms": ("ms/step", 1), "ms_min": ("min", 1), "ms_max": ("max", 1), "images_per_second": ("images/s", 1),
    "ratio": ("x (a)", 2), "tflops": ("TFLOP/s", 3), "percent_of_mm": ("% of mm", 1),
    "reserved_gb": ("GB", 2), "gpu_ms": ("GPU ms", 1), "launches": ("launches", 0),
    "compile_seconds": ("compile s", 1),
}


def timed(function, device):
    """(seconds, result) of function(), the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - started, result


class Setting:
    """A fresh model, and a way to take its training steps. name: "ours bf16 compiled" or "... combo", say."""

    def __init__(self, script, args, device, name, dtype=torch.float32):
        self.script, self.args, self.device, self.name, self.seconds = script, args, device, name, []
        self.who, self.precision, *self.compiled = name.split()
        torch.manual_seed(0)
        self.model = models.build(args.model, normalize=script.NORMALIZE, bf16=self.precision == "bf16")
        self.model.to(device, dtype, memory_format=LAYOUT[self.who]).train()
        if dtype == torch.float64:  # images and noise may stay float32
            self.model.register_forward_pre_hook(lambda model, inputs: inputs[0].double())
        self.attack = partial(script.training_attack, self.model, args)
        if self.compiled:
            self.model.compile(dynamic=False, options=COMBO if "combo" in self.compiled else None)
            self.attack = utils.CapturedAttack(self.attack, self.model)
        self.optimizer = utils.make_optimizer(self.model, "sgd", args.lr, args.wd, args.momentum)

    def step(self, x, y, i):
        """The loss of a training step on x (B, 3, 32, 32), y (B,), with the noise of number i. Its time goes
        to self.seconds."""
        utils.set_precision(self.precision, self.device)
        known, rng = (self.model, self.optimizer), seeded(self.device, "noise", i)
        if self.who == "ours":
            given = *known, self.attack, x, y, self.args.eps, 0, rng, self.args
            seconds, (loss, _, _) = timed(lambda: self.script.train_step(*given), self.device)
        else:
            take = textbook.trades_step if self.script is train_trades else textbook.pgdat_step
            seconds, (_, loss) = timed(lambda: take(*known, x, y, rng, self.args), self.device)
        self.seconds.append(seconds)
        return loss.item()

    def loss_after_three_steps(self, x, y):
        return [self.step(x, y, i) for i in range(4)][3]


def largest_difference(script, flags):
    """Between the weights and running statistics of (a) and (b), relative to the largest of each tensor,
    after three steps of `tiny` in float64."""
    args, cpu = script.parse_args(["--model", "tiny", *flags]), torch.device("cpu")
    both = [Setting(script, args, cpu, f"{who} fp32", torch.float64) for who in ("ours", "textbook")]
    for i in range(3):
        x = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=seeded(cpu, "x", i))
        y = torch.randint(10, (8,), generator=seeded(cpu, "y", i))
        for setting in both:
            setting.step(x, y, i)
    pairs = zip(*(setting.model.state_dict().values() for setting in both))
    return torch.stack([(p - q).abs().max() / q.abs().max() for p, q in pairs]).max().item()


class FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas. (Its FlopCounterMode fails at gradients of a module's input.)"""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flop_per_image(setting, x, y):
    """FLOP that a step executes, by image: counted on two of them."""
    with FlopCounter() as counter:
        setting.step(x[:2], y[:2], 0)
    return counter.flop / 2


def gpu_work(events, steps):
    """(ms that the GPU works, launches by the host) a step, from torch.profiler's events of some steps. A
    CUDA graph is one launch, however many kernels it runs."""
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    launches = [e for e in events if e.device_type == DeviceType.CPU and LAUNCH.match(e.name)]
    return sum(e.time_range.elapsed_us() for e in on_gpu) / 1e3 / steps, len(launches) / steps


def product_rate(precision, device):
    """FLOP/s of the fastest of five products of square matrices."""
    n, dtype = SQUARE[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.mm(a, b)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b), device)[0] for _ in range(5))


def machine(device):
    """What the figures are from."""
    nvidia = Path("/proc/driver/nvidia/version")
    return {"processor": utils.device_name(torch.device("cpu")),
            "driver": re.search(r"\d+\.[\d.]+|$", nvidia.read_text())[0] if nvidia.exists() else None,
            "cudnn": torch.backends.cudnn.version(), **utils.environment(device)}


def show(rows):
    print(f"{'setting':18}" + "".join(f"{title:>10}" for title, _ in COLUMNS.values()))
    for row in rows:
        cells = ["-" if row[k] is None else f"{row[k]:.{digits}f}" for k, (_, digits) in COLUMNS.items()]
        print(f"{row['setting']:18}" + "".join(f"{cell:>10}" for cell in cells))
    if any(0 in (row["gpu_ms"], row["launches"]) for row in rows):
        print("0 GPU ms or launches: torch's profiler saw nothing, though the GPU worked")


def parse_args():
    p = utils.Parser(description=__doc__, prog="python -m tools.bench")
    p.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=", ".join(models.MODELS))
    p.add_argument("--trades", action="store_true", help="measure TRADES instead of PGD-AT")
    p.add_argument("--bn-mode", choices=("train", "eval"),
                   help="batch norm while attacking; default: train, for TRADES eval")
    p.add_argument("--batch-size", type=int, default=128, help="images a step, at least two")
    p.add_argument("--rounds", type=int, help="steps of each setting that count; default: 30, on a CPU 3")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--json", metavar="FILE", help="write the figures there, to a new file")
    args = p.parse_args()
    if args.json and Path(args.json).exists():
        p.error(f"--json {args.json} is there already: delete it, or choose another name")
    return args


def main():
    options, load = parse_args(), os.getloadavg()[0]
    device, n = utils.pick_device(options.device), options.batch_size
    cuda, script = device.type == "cuda", train_trades if options.trades else train_pgdat
    flags = ["--lr", "0.01"]  # on few images 0.1 leaves too little loss to compare
    flags += ["--bn-mode", options.bn_mode] if options.bn_mode else []
    args = script.parse_args(["--model", options.model, *flags])
    what = f"{'TRADES' if options.trades else 'PGD-AT'}, {args.model}, batch {n}, --bn-mode {args.bn_mode}"
    about = machine(device)
    gpu = f"{about['device']}, driver {about['driver']}, cuDNN {about['cudnn']}; " if cuda else ""
    print(f"{what}; {gpu}{about['processor']}, torch {torch.__version__}")
    difference = largest_difference(script, flags)
    print("(a) and (b) after three steps of tiny in float64: "
          f"weights and running statistics differ by {difference:.1e} (relative)")
    if not difference <= TOLERANCE:
        sys.exit(f"(b) does not take (a)'s steps: more than {TOLERANCE:g}; nothing is timed")

    names = ["textbook fp32", "ours fp32", "ours bf16"]
    if cuda:
        names = ["textbook fp32", "textbook tf32", "ours tf32", "ours bf16", "ours bf16 compiled",
                 "ours bf16 combo"]
        torch.compiler.config.force_disable_caches = True  # compilation is timed from nothing
        torch._dynamo.config.recompile_limit = 64  # all models together: beyond it they would run uncompiled
    try:
        utils.set_precision("bf16", device)
    except utils.InputError as e:
        print(f"no row for bf16: {e}")
        names.remove("ours bf16")
    make = partial(Setting, script, args, device)
    x = torch.rand(n, 3, 32, 32, device=device, generator=seeded(device, "x"))
    y = torch.randint(10, (n,), device=device, generator=seeded(device, "y"))
    images = {who: x.contiguous(memory_format=layout) for who, layout in LAYOUT.items()}
    flop = {who: flop_per_image(make(f"{who} fp32"), images[who], y) for who in LAYOUT}
    few = slice(n if cuda else 4)  # on a CPU float64 takes its time
    exact = {who: make("textbook fp32", torch.float64).loss_after_three_steps(images[who][few], y[few])
             for who in LAYOUT}  # the noise depends on the layout of the images

    print(f"loss after three steps on {len(y[few])} images:")
    settings = []
    for name in names:
        if cuda:
            torch.cuda.empty_cache()  # what stays reserved holds the settings so far
            before = torch.cuda.memory_reserved()
        try:
            s = make(name)
            s.loss = s.loss_after_three_steps(images[s.who][few], y[few])
        except RuntimeError as e:
            if "combo" not in name:
                raise
            print(f"  no row for {name}, which this torch does not manage: {str(e).splitlines()[0][:90]}")
            continue
        s.reserved_gb = (torch.cuda.memory_reserved() - before) / 1e9 if cuda else None
        print(f"  {name:18} {s.loss:.5f}, in float64 {exact[s.who]:.5f}", flush=True)
        settings.append(s)

    rates = {s.precision: 0 for s in settings}
    rounds = options.rounds or (30 if cuda else 3)
    for i in range(1 + rounds):  # the first one does not count
        for s in settings:
            s.step(images[s.who], y, i)
        rates = {precision: max(rate, product_rate(precision, device)) for precision, rate in rates.items()}
    baseline, rows = median(settings[0].seconds[-rounds:]), []
    for s in settings:
        seconds, gpu_ms, launches = s.seconds[-rounds:], None, None
        if cuda:  # after all timing: a profiler slows the host down
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for i in range(2):
                    s.step(images[s.who], y, i)
            gpu_ms, launches = gpu_work(profiled.events(), 2)
        typical, rate = median(seconds), rates[s.precision]
        executed = flop[s.who] * n / typical
        rows.append({
            "setting": s.name, "loss": s.loss, "loss_float64": exact[s.who], "seconds": seconds,
            "ms": 1e3 * typical, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
            "images_per_second": n / typical, "ratio": baseline / typical, "tflops": executed / 1e12,
            "mm_tflops": rate / 1e12, "percent_of_mm": 100 * executed / rate, "reserved_gb": s.reserved_gb,
            "gpu_ms": gpu_ms, "launches": launches, "compile_seconds": s.seconds[0] if s.compiled else None})
    show(rows)
    after = os.getloadavg()[0]
    print(f"load average {load:.2f} before, {after:.2f} after; timings need a quiet machine")
    if options.json:
        utils.write_json(options.json, {"what": what, **about, "load_average": [load, after],
                                        "difference_float64": difference, "settings": rows})


if __name__ == "__main__":
    utils.run_script(main)
