"""What a training step costs: the textbook's, ours with the same updates, and our faster settings.

    python -m tools.bench                                  PGD-AT, PreActResNet-18
    python -m tools.bench --trades --bn-mode eval
    python -m tools.bench --model wrn-34-10 --precision bf16 --compile --json wrn.json
    python -m tools.bench --row t7-r18-bneval --compile    what a row costs here (./run_all.sh cost)

(a) textbook: as the public code does it, in contiguous fp32. PGD-AT: loss.backward() makes every attack step
    compute weight gradients too, the attack computes its final loss, and two clean forwards with graph and an
    input gradient serve the log. TRADES: every attack step repeats the natural forward.
(b) ours, fp32: train_pgdat.py's or train_trades.py's own step, channels-last, with the same updates.
(c) ours, tf32: the scripts' default on CUDA, and measured there only.
(d) ours, fast: under --precision and --compile. The default on CUDA is bf16, compiled, the attack in a CUDA
    graph; on a CPU neither helps, and (d) is measured only if asked for.

First (a) and (b) take three steps in float64 and must agree, or nothing is timed. Then the settings take
turns on one fixed batch; augmentation is timed by itself. FLOP are those that each setting executes.

--row: the script of the row makes a few of the row's own steps and tests on random images, and what they take
is scaled up to the row. An early-stopped attack is timed at full length: an upper bound. AutoAttack is
estimated from the time of forwards and gradients and from the number that it makes.
"""

import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
import runs
import train_pgdat
import train_trades
from tools import report
from utils import InputError, attack_mode, batches, make_optimizer, seeded

STEPS_PER_EPOCH, EPOCHS = 391, 110  # of the paper's runs: 50,000 images in batches of 128
SQUARE = {"cpu": 2048, "cuda": 8192}  # rows of the matrices whose product's rate is the ceiling
TOLERANCE = 1e-9                    # between (a) and (b) in float64
SECONDS = 20                        # that timing something for --row may take on a CPU, about
ASSUMED = {"clean": 85, "pgd10": 54, "aa": 50}  # accuracies of rows for which the paper has none


# ---- (a) The textbook steps --------------------------------------------------------------------------------


def textbook_pgdat(model, optimizer, x, y, args, noise):
    """One PGD-AT step (Madry et al., 2018): 37 forward-equivalents an image if --bn-mode is eval."""
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


# ---- Ours, and what both take ------------------------------------------------------------------------------


def textbook(model, script, args):
    """step(x, y, noise) of (a)."""
    optimizer = make_optimizer(model, "sgd", args.lr, args.wd, args.momentum)
    step = textbook_pgdat if script is train_pgdat else textbook_trades
    return lambda x, y, noise: step(model, optimizer, x, y, args, noise)


def ours(model, forward, script, args):
    """step(x, y, noise) of (b) to (d)."""
    optimizer = make_optimizer(model, "sgd", args.lr, args.wd, args.momentum)
    attack = script.make_attack(model, forward, args)
    model.train()

    def step(x, y, noise):
        x_adv = attack(x, y, args.eps, 0, noise) if script is train_pgdat else attack(x, args.eps, noise)
        script.train_step(model, forward, optimizer, x, x_adv, y, args)
    return step


def largest_difference(script, args, steps=3):
    """Between the weights and running statistics of (a) and (b), relative to the largest of each tensor.

    Both take a few steps of `tiny` in float64.
    """
    torch.manual_seed(0)
    reference = models.build("tiny", normalize=script.NORMALIZE).double()
    model = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    takes = textbook(reference, script, args), ours(model, model, script, args)
    for i in range(steps):
        x = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=seeded("cpu", "x", i))
        y = torch.randint(10, (8,), generator=seeded("cpu", "y", i))
        for take in takes:
            take(x, y, seeded("cpu", "noise", i))
    pairs = zip(model.state_dict().values(), reference.state_dict().values())
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


# ---- Measuring ---------------------------------------------------------------------------------------------


def timed(function, device):
    """Seconds that function() takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def ceiling(device, dtype):
    """FLOP/s of the fastest of ten products of square matrices, under the precision that is set."""
    n = SQUARE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as in the convolutions
    torch.mm(a, b)
    rate = 2 * n**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(10))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


class FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas. (Its FlopCounterMode fails at gradients of a module's input.)"""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def augmentation_seconds(batch_size, device):
    """Seconds to shuffle, crop and flip one batch: the median over an epoch of ten."""
    images = torch.zeros(10 * batch_size, 32, 32, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    stream = batches(images, labels, batch_size, seeded(device, 0), padding="reflect")
    next(stream)
    return statistics.median(timed(lambda: next(stream), device) for _ in range(9))


class Setting:
    """One of (a) to (d): a model, a batch, and what its steps cost."""

    def __init__(self, name, precision, compile, options, script, args, device):
        def make(forward, compile):
            if name == "textbook":
                return textbook(self.model, script, args)
            return ours(self.model, forward, script, argparse.Namespace(**{**vars(args), "compile": compile}))

        self.name, self.precision, self.device, self.seconds = name, precision, device, []
        layout = torch.contiguous_format if name == "textbook" else torch.channels_last
        runs.set_precision(precision, device)
        torch.manual_seed(0)
        model = models.build(options.model, normalize=script.NORMALIZE)
        self.model = model.to(device, memory_format=layout)
        x = torch.rand(options.batch_size, 3, 32, 32, device=device)
        self.x = x.contiguous(memory_format=layout)
        self.y = torch.randint(10, (options.batch_size,), device=device)
        self.flop = self.count_flop(make(self.model, compile=False))
        self.take = make(runs.make_forward(self.model, precision, compile), compile)
        self.peak = self.warm_up()
        self.ceiling = ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def count_flop(self, step):
        """FLOP of a step on the batch, counted on two of its images."""
        with FlopCounter() as counter:
            step(self.x[:2], self.y[:2], seeded(self.device, "noise"))
        return counter.flop * len(self.x) / 2

    def step(self, *key):
        self.take(self.x, self.y, seeded(self.device, *key))

    def warm_up(self):
        """Take the steps that do not count. Returns the bytes that a step needs at most; None on a CPU."""
        if self.device.type != "cuda":
            return self.step("warm-up", 0)
        weights = sum(t.nbytes for t in (*self.model.state_dict().values(), self.x))
        before = torch.cuda.memory_allocated(self.device) - weights
        for i in range(3):
            self.step("warm-up", i)
        torch.cuda.reset_peak_memory_stats(self.device)  # it holds the workspaces of cuDNN's search
        self.step("memory")
        return torch.cuda.max_memory_allocated(self.device) - before

    def measure(self, i):
        runs.set_precision(self.precision, self.device)
        self.seconds.append(timed(lambda: self.step("noise", i), self.device))

    def result(self, baseline):
        """The row of the table. baseline: median seconds of (a)."""
        median, n = statistics.median(self.seconds), len(self.x)
        return {
            "setting": self.name, "precision": self.precision, "ms": 1e3 * median,
            "ms_min": 1e3 * min(self.seconds), "ms_max": 1e3 * max(self.seconds), "steps": len(self.seconds),
            "images_per_second": n / median, "ratio": baseline / median, "gflop": self.flop / 1e9,
            "tflops": self.flop / median / 1e12, "ceiling_tflops": self.ceiling / 1e12,
            "percent_of_ceiling": 100 * self.flop / median / self.ceiling,
            "peak_gb": None if self.peak is None else self.peak / 1e9,
            "hours_110_epochs": median * STEPS_PER_EPOCH * 128 / n * EPOCHS / 3600,
        }


def show(rows):
    print(f"{'setting':15} {'ms/step':>9} {'min':>9} {'max':>9} {'img/s':>8} {'x (a)':>6} {'TFLOP/s':>8} "
          f"{'% of max':>8} {'GB':>6} {'h/110 ep.':>9}")
    for r in rows:
        name = f"{r['setting']}, {r['precision']}"
        peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.2f}"
        print(f"{name:15} {r['ms']:9.1f} {r['ms_min']:9.1f} {r['ms_max']:9.1f} {r['images_per_second']:8.1f} "
              f"{r['ratio']:6.2f} {r['tflops']:8.3f} {r['percent_of_ceiling']:8.1f} {peak:>6} "
              f"{r['hours_110_epochs']:9.2f}")


# ---- A row of run_all.sh -----------------------------------------------------------------------------------


def seconds_per_image(take, batch_size, device):
    """(seconds, number of images that were timed). take(n): do the work on n images.

    On a CPU, n is less than a batch if that would take minutes.
    """
    n, repeats = 10 * batch_size, 3
    if device.type == "cuda":
        take(n)  # compiles, chooses algorithms
    else:
        take(2)
        pace = timed(lambda: take(2), device) / 2
        n = max(2, min(batch_size, int(SECONDS / pace)))
        repeats = max(2, min(10, int(SECONDS / pace / n)))
    return statistics.median(timed(lambda: take(n), device) for _ in range(repeats)) / n, n


class Work:
    """What a row's script does in training and tests, on as many random images as one asks for."""

    def __init__(self, script, args, num_classes, device, compile=False):
        # a learning rate at which weights stay as they are; no stop of the attack; tricks after their warm-up
        timed_as = {"compile": compile, "lr": 1e-9, "early_stop_pgd": None, "awp_warmup": 0}
        args = argparse.Namespace(**{**vars(args), **timed_as})
        self.script, self.args, self.device, self.num_classes = script, args, device, num_classes
        torch.manual_seed(0)
        model = models.build(args.model, num_classes, args.activation, script.NORMALIZE)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.forward = runs.make_forward(self.model, args.precision, compile)
        self.average = copy.deepcopy(self.model) if args.ema else None
        self.attack = script.make_attack(self.model, self.forward, args)
        self.optimizer = make_optimizer(self.model, args.optimizer, args.lr, args.wd, args.momentum)

    def data(self, n):
        """Images (n, 32, 32, 3) uint8, labels (n,)."""
        g = seeded(self.device, "data")
        images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, device=self.device, generator=g)
        return images, torch.randint(self.num_classes, (n,), device=self.device, generator=g)

    def train(self, n):
        self.script.train_epoch(self.model, self.forward, self.attack, self.optimizer, *self.data(n),
                                self.args, 0, self.average)

    def test(self, n):
        self.script.test(self.model, self.forward, *self.data(n), self.args, 0, "test")

    def flop(self, take):
        """FLOP an image of take, train or test; of a model that is not compiled."""
        with FlopCounter() as counter:
            take(2)
        return counter.flop / 2


def training_cost(row, options, device):
    """What training a row takes, tests included: a dict of numbers."""
    settings = {k: v for k, v in row.setting.items() if k != "script"}
    passed = {"precision": options.precision, "compile": bool(options.compile), "dry_run": True}
    args = argparse.Namespace(**{**settings, **passed})  # a dry run: of a named data set only the size
    args.precision = runs.set_precision(args.precision, device)
    script, data = report.SCRIPTS[row.setting["script"]], runs.load(args, device)
    n_train = len(data.train_labels) - args.val
    n_test = len(data.test_labels) + args.val
    counted = Work(script, args, data.num_classes, device)
    flop, flop_test = counted.flop(counted.train), counted.flop(counted.test)
    work = Work(script, args, data.num_classes, device, args.compile) if args.compile else counted
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train, n_timed = seconds_per_image(work.train, args.batch_size, device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    test, n_timed_test = seconds_per_image(work.test, args.test_batch_size, device)
    n_tests = math.ceil(args.epochs / args.eval_every)
    return {"step_s": train * args.batch_size, "images_timed": n_timed, "epoch_s": train * n_train,
            "test_batch_s": test * args.test_batch_size, "test_images_timed": n_timed_test,
            "test_s": test * n_test, "row_s": args.epochs * train * n_train + n_tests * test * n_test,
            "peak_gb": peak, "batch_size": args.batch_size, "test_batch_size": args.test_batch_size,
            "steps": math.ceil(n_train / args.batch_size), "epochs": args.epochs, "tests": n_tests,
            "test_images": n_test, "early_stop": bool(settings.get("early_stop_pgd")),
            "pflop": (args.epochs * flop * n_train + n_tests * flop_test * n_test) / 1e15}


def evaluation_cost(row, n_test, device):
    """Seconds that eval_aa.py's AutoAttack takes, roughly, and the accuracies that this is based on.

    A gradient is a forward and a backward. APGD-CE computes 100 of every image that is classified right,
    APGD-T 9 x 100 of those that withstand it, FAB-T 9 x 100, and as many forwards, of those that are left,
    and Square 5,000 forwards.
    """
    asked = row.evaluation
    runs.set_precision(asked.precision, device)
    name, activation = row.setting.get("model") or asked.model, row.setting.get("activation", "relu")
    model = models.build(name, activation=activation).to(device, memory_format=torch.channels_last)

    def forward(x):
        with torch.no_grad():
            model(x)

    def gradient(x):
        torch.autograd.grad(model(x.requires_grad_()).logsumexp(1).sum(), x)

    def pace(work):
        def take(n):
            for i in range(0, n, asked.batch_size):
                work(torch.rand(min(asked.batch_size, n - i), 3, 32, 32, device=device))
        return seconds_per_image(take, min(asked.batch_size, n), device)[0]

    n = asked.n or n_test
    with attack_mode(model, "eval"):
        f, g = pace(forward), pace(gradient)
    left = {m: row.paper[m] or ASSUMED[m] for m in ASSUMED}
    left["pgd10"] = max(left["pgd10"], left["aa"])  # an assumption where the paper has AA alone
    clean, pgd10, aa = (n * share / 100 for share in left.values())
    return {"aa_s": clean * 100 * g + pgd10 * 900 * g + aa * (900 * (g + f) + 5000 * f),
            "aa_images": n, "left": left, "assumed": row.paper["aa"] is None}


def show_cost(row, training, evaluation):
    """Print what a row costs, a line each."""
    print(f"{row.id}: {row.setting.get('script', 'eval_aa.py')}, "
          f"{report.setting_text('model', row.setting.get('model') or row.evaluation.model)}")
    def timed_on(n, batch):
        return f", timed on {n} and extrapolated linearly" if n < batch else ""

    if training:
        t = argparse.Namespace(**training)
        bound = "; the attack at full length, it may stop earlier: an upper bound" if t.early_stop else ""
        print(f"  step         {t.step_s:9.3f} s   {t.batch_size} images"
              f"{timed_on(t.images_timed, t.batch_size)}{bound}\n"
              f"  test batch   {t.test_batch_s:9.3f} s   {t.test_batch_size} images"
              f"{timed_on(t.test_images_timed, t.test_batch_size)}\n"
              f"  epoch      {runs.clock(t.epoch_s):>11}     {t.steps:,} steps\n"
              f"  test       {runs.clock(t.test_s):>11}     {t.test_images:,} images\n"
              f"  the row    {runs.clock(t.row_s):>11}     {t.epochs} epochs, {t.tests} tests\n"
              f"  arithmetic {t.pflop:11,.{0 if t.pflop >= 10 else 4}f} PFLOP")
        if t.peak_gb is not None:
            print(f"  memory     {t.peak_gb:11.2f} GB at most")
    if evaluation:
        e = argparse.Namespace(**evaluation)
        whose = "an assumption" if e.assumed else "the paper's"
        accuracies = " / ".join(f"{v:g}" for v in e.left.values())
        print(f"  AutoAttack {runs.clock(e.aa_s):>11}     roughly: {e.aa_images:,} images, from the time of "
              f"forwards and gradients and the number that the\n{'':27}standard attacks make of them if the "
              f"accuracies are {accuracies} ({whose})")


def cost_of_rows(options, device):
    """Print what the rows of --row cost on this device. Returns it, {row: ...}."""
    rows, costs = report.manifest(), {}
    for name in options.row:
        row, _ = report.row_and_seed(name)
        if row not in rows:
            raise InputError(f"run_all.sh has no row {name}")
        row = rows[row]._replace(id=name)
        training = training_cost(row, options, device) if row.setting else {}
        n_test = training.get("test_images", 10_000)
        evaluation = evaluation_cost(row, n_test, device) if row.evaluation.attacks else {}
        show_cost(row, training, evaluation)
        costs[name] = training | evaluation
    return costs


# ---- The command line --------------------------------------------------------------------------------------


def parse_args():
    p = runs.Parser(description=__doc__, prog="python -m tools.bench")
    p.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=", ".join(models.MODELS))
    p.add_argument("--batch-size", type=runs.integer(2), default=128, help="images a step")
    p.add_argument("--trades", action="store_true", help="measure TRADES instead of PGD-AT")
    p.add_argument("--bn-mode", choices=("train", "eval"),
                   help="batch norm while attacking (default: train; TRADES: eval)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                   help="arithmetic of (d) (default: bf16 on CUDA, fp32 elsewhere)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="compile the model in (d) (default: on CUDA)")
    p.add_argument("--rounds", type=runs.integer(1),
                   help="steps of each setting that count (default: 30, on a CPU 3)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--row", nargs="+", help="estimate what these rows of run_all.sh take, instead")
    args = p.parse_args()
    if args.row:
        runs.without_effect(p, args, "--row", "model", "batch_size", "trades", "bn_mode", "rounds")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        p.error(f"--json {args.json}: there is no such folder")
    return args


def main():
    options = parse_args()
    device = runs.pick_device(options.device)
    if options.row:
        about = runs.environment(device)
        print(f"{about['device']}, torch {about['versions']['torch']}")
        costs = cost_of_rows(options, device)
        if options.json:
            runs.write_json(options.json, {"rows": costs, **about})
        return
    cuda = device.type == "cuda"
    precision = options.precision or ("bf16" if cuda else "fp32")
    runs.set_precision(precision, device)  # refuses what this device cannot do
    torch.backends.cudnn.benchmark = True  # for all settings alike
    script = train_trades if options.trades else train_pgdat
    args = script.parse_args(["--bn-mode", options.bn_mode] if options.bn_mode else [])
    method, about = "TRADES" if options.trades else "PGD-AT", runs.environment(device)
    name = f"{method}, {options.model}, batch {options.batch_size}, --bn-mode {args.bn_mode}"
    print(f"{name}; {about['device']}, torch {about['versions']['torch']}")

    difference = largest_difference(script, args)
    print("(a) and (b) after three steps of tiny in float64: "
          f"weights and running statistics differ by {difference:.1e} (relative)")
    if not difference <= TOLERANCE:
        raise runs.Stopped(1, f"(b) does not take (a)'s steps: more than {TOLERANCE:g}; nothing is timed")

    which = [("textbook", "fp32", False), ("ours", "fp32", False)] + [("ours", "tf32", False)] * cuda
    compile = cuda if options.compile is None else options.compile
    if (precision, compile) not in [(p, c) for _, p, c in which]:
        which.append(("fast", precision, compile))
    settings = [Setting(*w, options, script, args, device) for w in which]
    for i in range(options.rounds or (30 if cuda else 3)):
        for setting in settings:
            setting.measure(i)
    rows = [s.result(statistics.median(settings[0].seconds)) for s in settings]
    show(rows)
    augmentation = 1e3 * augmentation_seconds(options.batch_size, device)
    share = 100 * augmentation / rows[-1]["ms"]
    print(f"augmentation: {augmentation:.2f} ms a batch, {share:.2f} % of the fastest setting's step")
    if options.json:
        runs.write_json(options.json, {"what": name, "settings": rows, "augmentation_ms": augmentation,
                                       "difference_float64": difference, **about})


if __name__ == "__main__":
    runs.run_script(main)
