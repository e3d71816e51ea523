"""What the training scripts and the evaluator share: data, attack, losses, schedules and optimisers, runs and checkpoints.

To copy a script into a project of your own, take it together with this file and `models/`.

Conventions: images are x (B, 3, 32, 32) float32 in [0, 1]; labels y (B,) int64; eps and alpha are on that same [0, 1]
scale (8/255, not 8); time t is measured in epochs and may be fractional (t = epoch + step / steps, epochs from 0).
Normalisation lives inside the model. `forward` is any callable from x to logits (B, K).

Every random number of a run is drawn from a generator seeded by (seed, what it is for, epoch, step). So a run can be
resumed anywhere without saving a generator's state, and nothing that one trick draws moves what another one sees.

Under torchrun every process runs the same script: it holds all the data, works on its share of every batch, and only the
first one writes.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """The user's input cannot be used. The scripts print the message as one line and exit with status 2."""


def first_line(error):
    """The first line of an exception's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

NAMED_DATASETS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}  # train and test images, classes


class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64, all on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    sha256: str  # of the pixels and labels, whatever the file's compression


def dataset_path(name_or_path, data_dir="data"):
    """The .npz of a data set. `cifar10` and `cifar100` are fetched into data_dir on first use.

    Raises InputError for an unknown name, a missing file, or a download that fails.
    """
    if name_or_path in NAMED_DATASETS:
        path = Path(data_dir) / f"{name_or_path}.npz"
        if not path.exists():
            prepare = HERE / "data" / "prepare.py"
            if not prepare.exists():
                raise InputError(f"{path} does not exist, nor does {prepare} to fetch it: give --dataset the path of an .npz")
            if subprocess.run([sys.executable, prepare, name_or_path, "--data-dir", data_dir]).returncode != 0:
                raise InputError(f"could not obtain {name_or_path} (see above)")
        return path
    if not str(name_or_path).endswith(".npz"):
        raise InputError(f"unknown data set {str(name_or_path)!r}: there is {', '.join(NAMED_DATASETS)}, or the path of an .npz")
    if not Path(name_or_path).is_file():
        raise InputError(f"no such file: {name_or_path}")
    return Path(name_or_path)


def load_dataset(name_or_path, data_dir="data", device="cpu"):
    """The Dataset behind `cifar10`, `cifar100` or the path of an .npz, on the device.

    The .npz holds train_images (N, 32, 32, 3) uint8, train_labels (N,) integers from 0, test_images, test_labels.
    Raises InputError if it does not, or cannot be read.
    """
    only_first(lambda: dataset_path(name_or_path, data_dir))  # fetched once, not by every process
    path = dataset_path(name_or_path, data_dir)
    arrays = read_npz(path)
    digest = hashlib.sha256()
    for a in arrays.values():
        digest.update(np.ascontiguousarray(a))
    num_classes = 1 + max(int(arrays[k].max()) for k in ("train_labels", "test_labels"))
    tensors = [torch.from_numpy(a).to(device) for a in arrays.values()]
    return Dataset(*tensors, num_classes=num_classes, sha256=digest.hexdigest())


def read_npz(path):
    """{key: array} of a data set file, checked: uint8 images, int64 labels. Raises InputError."""
    def check(ok, problem):
        if not ok:
            raise InputError(f"{path} is not a data set in our .npz format: {problem}")

    try:
        npz = np.load(path, allow_pickle=False)
        check(isinstance(npz, np.lib.npyio.NpzFile), "it holds a single array")
        with npz:
            missing = [k for k in Dataset._fields[:4] if k not in npz]
            check(not missing, f"it has no {', '.join(missing)}")
            arrays = {k: npz[k] for k in Dataset._fields[:4]}
    except InputError:
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path} cannot be read as a data set (truncated, or not an .npz): {first_line(e)}") from None
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        check(images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (32, 32, 3) and len(images) > 0,
              f"{split}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)")
        check(labels.dtype.kind in "iu" and labels.shape == (len(images),) and 0 <= labels.min() and labels.max() < 10_000,
              f"{split}_labels is {labels.dtype} {labels.shape}, not integers in [0, 10000) ({len(images)},)")
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    check(arrays["train_labels"].max() > 0, "all training images are of class 0")
    return arrays


def dataset_size(name_or_path, data_dir="data"):
    """(training images, test images, classes), without needing the named data sets on the disk."""
    if name_or_path in NAMED_DATASETS:
        return NAMED_DATASETS[name_or_path]
    data = load_dataset(name_or_path, data_dir)
    return len(data.train_labels), len(data.test_labels), data.num_classes


def hold_out(images, labels, n):
    """((images, labels) to train on, (images, labels) held out or None): n random images, the same ones for every seed."""
    if n == 0:
        return (images, labels), None
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels))).to(labels.device)
    held, rest = order[:n], order[n:].sort().values
    return (images[rest], labels[rest]), (images[held], labels[held])


def to_float(images):
    """uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32) in [0, 1], in channels-last memory, which costs no copy."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def crop_flip(images, top, left, flip, padding):
    """Crops of the images padded by 4, each with its own offset, mirrored where asked; one gather in all.

    images (B, 32, 32, 3) uint8; top, left (B,) int64 in 0..8: the crop's corner in the padded image; flip (B,) bool;
    padding: "reflect" (PGD-AT) or "zero" (TRADES). Returns the same shape and type.
    """
    size = images.shape[1]
    i = torch.arange(size, device=images.device)
    rows = top[:, None] + i - 4                                              # (B, 32) in -4..35
    cols = left[:, None] + torch.where(flip[:, None], size - 1 - i, i) - 4   # (B, 32)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((cols >= 0) & (cols < size))[:, None, :]
    rows = (size - 1) - ((size - 1) - rows.abs()).abs()                      # fold -1 -> 1 and 32 -> 30
    cols = (size - 1) - ((size - 1) - cols.abs()).abs()
    b = torch.arange(len(images), device=images.device)
    out = images[b[:, None, None], rows[:, :, None], cols[:, None, :]]       # (B, 32, 32, 3)
    return out * inside[..., None] if padding == "zero" else out


def batches(images, labels, batch_size, generator, padding, start=0):
    """One epoch in random order, from batch `start` on: yields augmented x (B, 3, 32, 32), y (B,). The last, smaller batch is kept.

    Every image gets its own crop and flip. All draws are made at the start of the epoch, on the device. Under torchrun
    a batch is dealt out to the processes, and each gets its share.
    """
    n, device = len(images), images.device
    order = torch.randperm(n, generator=generator, device=device)
    offset = torch.randint(9, (2, n), generator=generator, device=device)
    flip = torch.randint(2, (n,), generator=generator, device=device).bool()
    for i in range(start * batch_size, n, batch_size):
        share = slice(i + rank(), min(i + batch_size, n), world())
        index = order[share]
        yield to_float(crop_flip(images[index], offset[0, share], offset[1, share], flip[share], padding)), labels[index]


def seeded(device, *key):
    """A generator on the device whose stream depends on the key alone, e.g. seeded(device, seed, "attack", epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Attack
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attack_mode(model, bn_mode):
    """While it is open, parameters are frozen (no weight gradient is computed) and the model is in train or eval mode.

    bn_mode: "train" (batch statistics, and every forward moves the running ones) or "eval". On leaving, every
    module's mode and every parameter's requires_grad are as they were.
    """
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    model.train(bn_mode == "train")
    model.requires_grad_(False)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, requires_grad in grads:
            p.requires_grad_(requires_grad)


def random_start(x, eps, generator):
    """x + U(-eps, eps), clipped to [0, 1]."""
    return (x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)).clamp_(0, 1)


def linf_step(x, x_adv, grad, eps, alpha):
    """x_adv + alpha * sign(grad), projected to the eps-ball around x and clipped to [0, 1] (Eq. 1 of the paper)."""
    x_adv = x_adv + alpha * grad.sign()
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp_(0, 1)


def pgd(forward, x, y, start, eps, alpha, steps, loss=F.cross_entropy, tolerance=None, fooled=None):
    """L-inf PGD (Madry et al., 2018): the adversarial examples (B, 3, 32, 32) after `steps` steps from `start`.

    Run it inside attack_mode. loss: callable (logits, y, reduction="sum") to be maximised.
    tolerance: None, or the number of times that an image may be found misclassified before it is no longer moved
    (early-stopped PGD, Zhang et al., 2020); the attack ends when all images have stopped.
    fooled: None, or a (B,) bool tensor in which every image is marked whose iterate, the start included and the result
    excluded, is misclassified.
    """
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = forward(x_adv)
        if fooled is not None:
            fooled |= ~classified_right(logits, y)
        if tolerance is not None:
            tolerance = tolerance - (logits.argmax(1) != y).int()
            moving = tolerance > 0
            if not max_over_ranks(moving.any()):  # with synchronised BN no process may stop before the others
                break
        grad, = torch.autograd.grad(loss(logits, y, reduction="sum"), x_adv)
        with torch.no_grad():
            moved = linf_step(x, x_adv, grad, eps, alpha)
            x_adv = moved if tolerance is None else torch.where(moving[:, None, None, None], moved, x_adv)
    return x_adv.detach()


def classified_right(logits, y):
    """(B,) bool: the largest of the logits (B, K) is the label's, and all are finite."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def pgd_evaluate(forward, images, labels, *, eps, alpha=2 / 255, steps=10, restarts=1, loss=F.cross_entropy,
                 seed=0, batch_size=250, progress=None):
    """Which images are classified right: three (N,) bool tensors (clean, last, any), to be averaged into accuracies.

    The defaults are the paper's PGD-10; restarts=0 is clean accuracy alone. images (N, 32, 32, 3) uint8. `last`: the
    last iterate of every restart is classified right (robust_overfitting's count, which selected the paper's
    checkpoints). `any`: every iterate of every restart is, the random start included. Run it inside
    attack_mode(model, "eval"). Random starts belong to the images, whatever the batch size. progress: called with the
    number of images done, N in all for each restart. Under torchrun the batches are dealt out to the processes, and all
    return everything.
    """
    n, device = len(images), images.device
    rounds = range(0, n, world() * batch_size)
    mine = [slice(i + rank() * batch_size, i + (rank() + 1) * batch_size) for i in rounds]  # beyond n in the last round, perhaps
    clean, last, always = flags = torch.zeros(3, n, dtype=torch.int32, device=device)  # sums over processes need a number
    for batch in mine:
        if batch.start < n:
            with torch.no_grad():
                clean[batch] = classified_right(forward(to_float(images[batch])), labels[batch]).int()
            last[batch] = always[batch] = 1
    for restart in range(restarts):
        noise = torch.empty(images.shape, device=device)
        noise.uniform_(-eps, eps, generator=seeded(device, seed, "evaluation", restart))
        for i, batch in zip(rounds, mine):
            if batch.start < n:
                x, y = to_float(images[batch]), labels[batch]
                start = (x + noise[batch].permute(0, 3, 1, 2)).clamp_(0, 1)
                fooled = always[batch] == 0
                x_adv = pgd(forward, x, y, start, eps, alpha, steps, loss, fooled=fooled)
                with torch.no_grad():
                    right = classified_right(forward(x_adv), y)
                last[batch] *= right
                always[batch] = (~fooled & right).int()
            if progress is not None:  # by all processes alike: it may wait for the others
                progress(min(world() * batch_size, n - i))
    return tuple(sum_over_ranks(flags).bool())


class Graphed:
    """A function of CUDA tensors, replayed from a CUDA graph: one launch instead of the thousands of an attack.

    function: its work may depend on its inputs' shapes, not on their values; it returns one tensor and may move the
    model's buffers (running statistics), but nothing else. A graph is captured for each combination of shapes. Of the
    inputs, the first is a tensor; numbers become tensors, since a graph would keep them for ever.
    """

    def __init__(self, function, model):
        self.function, self.model = function, model
        self.pool, self.graphs = torch.cuda.graph_pool_handle(), {}

    def __call__(self, *inputs):
        inputs = [x if isinstance(x, Tensor) else torch.full((), x, device=inputs[0].device) for x in inputs]
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(inputs)
        graph, static, output = self.graphs[shapes]
        for to, x in zip(static, inputs):
            to.copy_(x)
        graph.replay()
        return output.clone()  # the graphs share their memory

    def capture(self, inputs):
        """(graph, its input tensors, its output tensor) for inputs of these shapes; leaves the model's buffers as they were."""
        static = [x.clone() for x in inputs]
        before = [b.clone() for b in self.model.buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, chooses algorithms, allocates: none of it may happen while capturing
                self.function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*static)
        for b, value in zip(self.model.buffers(), before):
            b.copy_(value)  # as if it had not been run to warm up
        return graph, static, output


def replayed(function, model, compile):
    """The function itself, or, of a model on CUDA that is compiled, Graphed."""
    return Graphed(function, model) if compile and next(model.parameters()).is_cuda else function  # with one process: see split_model


def percent(flags):
    """Accuracy in per cent with two decimals, as the paper prints it, of a bool tensor."""
    return round(100 * flags.sum().item() / len(flags), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def smoothed_cross_entropy(logits, y, smoothing):
    """Mean cross-entropy with target 1 - smoothing on the label and smoothing / (K-1) on each *other* class (Table 4).

    logits (B, K), 0 <= smoothing < 1. torch's own label_smoothing=e spreads e over all K classes: there e would be
    smoothing * K / (K-1).
    """
    log_p = F.log_softmax(logits, dim=1)
    on_label = -log_p.gather(1, y[:, None]).squeeze(1)                    # (B,)
    off_label = (-log_p.sum(1) - on_label) / (logits.shape[1] - 1)        # (B,) mean over the other classes
    return ((1 - smoothing) * on_label + smoothing * off_label).mean()


def cw_loss(logits, y, reduction="mean"):
    """The margin max_{i != y} z_i - z_y of Carlini & Wagner (2017); positive means misclassified."""
    label = F.one_hot(y, logits.shape[1]).bool()
    margin = logits.masked_fill(label, -math.inf).amax(1) - logits[label]
    return margin.mean() if reduction == "mean" else margin.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and optimisers
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULES = ("piecewise", "cosine", "onecycle", "linear")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "sgd-gc", "sgd-gcc")  # the columns of Table 5


def warmup_factor(t, warmup):
    """Rises linearly from 0 at t = 0 to 1 at t = warmup (epochs) and stays there."""
    return min(1.0, t / warmup) if warmup else 1.0


def eps_at(t, eps, warmup=0):
    """The training attack's eps at time t (epochs)."""
    return eps * warmup_factor(t, warmup)


def lr_at(t, lr, schedule="piecewise", epochs=110, decay_epochs=(100, 105), decay_factor=0.1, warmup=0):
    """The learning rate at time t (epochs).

    piecewise: times decay_factor at each of decay_epochs (the paper's). cosine: half a cosine from lr to 0.
    onecycle: 0 to lr over the first half of the run and back to 0 over the second (Wong et al., 2020).
    linear: from lr to 0. The first `warmup` epochs rise linearly from 0.
    """
    if schedule == "piecewise":
        rate = lr * decay_factor ** sum(t >= e for e in decay_epochs)
    elif schedule == "cosine":
        rate = lr * 0.5 * (1 + math.cos(math.pi * t / epochs))
    elif schedule == "onecycle":
        rate = lr * (1 - abs(2 * t / epochs - 1))
    elif schedule == "linear":
        rate = lr * (1 - t / epochs)
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return rate * warmup_factor(t, warmup)


def schedule(t, args):
    """(learning rate, eps) that the flags of a training script give at time t (epochs)."""
    lr = lr_at(t, args.lr, args.lr_schedule, args.epochs, args.lr_decay_epochs, args.lr_decay_factor, args.warmup_lr)
    return lr, eps_at(t, args.eps, args.warmup_eps)


def make_optimizer(model, name, lr, wd, momentum=0.9):
    """One of Table 5's optimisers; weight decay acts on all parameters, batch norm and biases included.

    sgd-gc and sgd-gcc centralise gradients (Yong et al., 2020): from the gradient of every parameter with more than one
    dimension (gcc: of convolutions only) its mean over all but the first dimension is subtracted, after weight decay
    has been added.
    """
    params = list(model.parameters())
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, weight_decay=wd)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=wd)
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=wd, nesterov=name == "nesterov")
    if name not in ("sgd-gc", "sgd-gcc"):
        raise ValueError(f"unknown optimiser {name!r}")
    min_dim = 2 if name == "sgd-gc" else 4
    # The hook adds the weight decay of the centralised parameters itself, since it has to come before the mean is taken.
    groups = [{"params": [p for p in params if p.dim() >= min_dim], "weight_decay": 0.0, "decay_before_centring": wd},
              {"params": [p for p in params if p.dim() < min_dim], "weight_decay": wd}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    optimizer.register_step_pre_hook(_centralise_gradients)
    return optimizer


@torch.no_grad()
def _centralise_gradients(optimizer, args, kwargs):
    group = optimizer.param_groups[0]
    for p in group["params"]:
        p.grad.add_(p, alpha=group["decay_before_centring"])
        p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Command line, device and precision
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that answers a bad command line with one line and exit status 2, and takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self._negative_number_matcher = re.compile(r"-\d")  # so that -1e-4 is a (bad) value, not an unknown flag

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(low, high=math.inf, kind=float, open_high=False):
    """An argparse type: a number in [low, high], or in [low, high) with open_high."""
    if kind is int:
        high = min(high, 2**31 - 1)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not low <= value <= high or value == math.inf or (open_high and value == high):
            interval = f"at least {low:g}" if high >= 2**31 - 1 else f"in [{low:g}, {high:g}{')' if open_high else ']'}"
            raise argparse.ArgumentTypeError(f"{text} is not {interval}")
        return value
    return parse


def without_effect(parser, args, condition, *flags):
    """Refuses, with exit status 2, a flag that was set although it does nothing under this condition."""
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} has no effect with {condition}")


def resolve(parser, args, prefix):
    """Fills in the defaults of a training script's flags that depend on others, and refuses what contradicts itself."""
    adam = args.optimizer in ("adam", "adamw")
    if adam:
        without_effect(parser, args, f"--optimizer {args.optimizer}", "momentum")
    if args.optimizer == "nesterov" and args.momentum == 0:
        parser.error("--optimizer nesterov needs a --momentum above 0")
    if args.lr_schedule != "piecewise":
        without_effect(parser, args, f"--lr-schedule {args.lr_schedule}", "lr_decay_epochs", "lr_decay_factor")
    if args.out is None:
        args.out = f"runs/{run_name(prefix, args, parser)}"
    if not args.out:
        parser.error("--out is empty")
    if args.lr is None:
        args.lr = 1e-4 if adam else 0.1
    return args


def fraction(text):
    """An argparse type for eps and alpha: "8/255" or "0.031", in [0, 1]."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number nor a fraction like "8/255"') from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is out of range: it is on the [0, 1] scale of the images; write "8/255" for 8 grey levels')
    return value


def fraction_text(value):
    """The fraction of 255 that a value is, or its digits: 8/255, 0.031."""
    levels = value * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 and value not in (0, 1) else f"{value:g}"


def run_script(main):
    """Runs main(); bad input and files that cannot be used become one line on stderr and exit status 2, Ctrl-C 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script's background job would ignore it
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            barrier()  # no process leaves while another still needs it
            dist.destroy_process_group()
    except BrokenPipeError:  # what we were piped into has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as e:
        message = str(e) if isinstance(e, InputError) or not e.filename else f"{e.filename}: {e.strerror}"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """The torch.device of "auto" (a GPU if there is one), "cpu", "cuda" (the current one) or "cuda:N"; a GPU becomes the current one.

    Raises InputError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise InputError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if under_torchrun() and name != "cuda":
        raise InputError(f"--device {name}: under torchrun every process takes a GPU of its own, give --device cuda or none")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here")
    index = os.environ["LOCAL_RANK"] if under_torchrun() else match[1] or torch.cuda.current_device()
    device, n = torch.device("cuda", int(index)), torch.cuda.device_count()
    if device.index >= n:
        raise InputError(f"--device {device}: there is only cuda:0" + (f" to cuda:{n - 1}" if n > 1 else ""))
    try:
        torch.cuda.set_device(device)  # streams and CUDA graphs are the current device's
        torch.zeros(1, device=device)
    except RuntimeError as e:  # out of memory, in exclusive use ...
        raise InputError(f"--device {device} cannot be used: {first_line(e)}") from None
    return device


def set_precision(precision, device):
    """Sets the process up for "fp32" (strict), "tf32" (torch's default: TF32 convolutions, on CUDA) or "bf16" (autocast).

    None means tf32 on CUDA and fp32 elsewhere. Returns the name in force. Raises InputError for tf32 without CUDA.
    """
    if precision is None:
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"--precision tf32 exists on CUDA only, not on {device.type}")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("highest")  # torch's default, unless the environment says otherwise
    return precision


def make_forward(model, precision="fp32", compile=False):
    """forward(x) -> float32 logits of the model: under bf16 autocast, or compiled, where asked.

    Parameters, batch-norm statistics and everything outside the model stay float32. Raises InputError if this machine
    cannot compile.
    """
    device = next(model.parameters()).device.type
    torch.backends.cudnn.benchmark = True  # shapes are few here, unlike AutoAttack's
    net = model
    if compile:
        # One graph for each of: attack (frozen, train or eval), update, clean pass, test; times the batch sizes.
        torch._dynamo.config.recompile_limit = 64
        try:
            torch.compile(torch.neg)(torch.ones(2, device=device))
        except Exception as e:  # inductor raises whatever its toolchain raises
            raise InputError(f"--compile does not work here: {first_line(e)}") from None
        net = torch.compile(model, dynamic=False)

    def forward(x):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return net(x).float()
    return forward


# ---------------------------------------------------------------------------------------------------------------------
# Processes and signals
# ---------------------------------------------------------------------------------------------------------------------


def under_torchrun():
    """Whether torchrun has started several processes of which this is one."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def join_processes(device):
    """Under `torchrun --nproc_per_node=N`, joins the N processes; of these only the first prints."""
    if not under_torchrun():
        return
    patience = datetime.timedelta(days=7)  # of a process for the others: a batch of AutoAttack can take an hour
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def rank():
    """Which of torchrun's processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until all processes are here."""
    max_over_ranks(torch.zeros(1))


def only_first(function):
    """Calls function() in the first process while the others wait; if it raises there, they end quietly with status 2."""
    if rank() > 0:
        if max_over_ranks(torch.zeros(1)):
            sys.exit(2)
        return
    try:
        function()
    except BaseException:
        max_over_ranks(torch.ones(1))
        raise
    barrier()


def sum_over_ranks(tensor):
    """The tensor's sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(flag):
    """The largest of the processes' numbers (), waiting for all of them; as a Python number."""
    if not dist.is_initialized():
        return flag.item()
    largest = flag.detach().float().reshape(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def split_model(model, device, n_train, batch_size, compile=False):
    """The model for a batch that is split over the processes: with synchronised batch norm, which torch has on CUDA only.

    On the CPU each process normalises by its own share, and running statistics are the first process's, as under
    DataParallel, with which the paper's authors trained. Raises InputError if a batch has fewer images than processes, or
    for --compile on several GPUs, which synchronised batch norm has not been tried under.
    """
    smallest = n_train % batch_size or batch_size
    if smallest < world():
        raise InputError(f"{world()} processes cannot share a batch of {smallest} (the last of an epoch): choose another --batch-size")
    if world() == 1:
        return model
    if device.type == "cuda":
        if compile:
            raise InputError("--compile is not supported on several GPUs")
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"note: {world()} processes on the CPU: batch norm is not synchronised, each normalises by its own {batch_size // world()} images")
    return model


def backward(loss, model, images):
    """loss.backward(); under torchrun, every gradient is that of the mean loss over the whole batch.

    loss (): the mean over this process's share of the batch, which has `images` images.
    """
    if not dist.is_initialized():
        loss.backward()
        return
    (loss * images).backward()  # of sums, since synchronised batch norm adds up the processes' gradients as they are
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_full((1,), images)])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat[:-1] / flat[-1]).split([g.numel() for g in grads])):
        g.copy_(mean.view(g.shape))


def share_statistics(model):
    """Under torchrun on the CPU: all processes go on with the first one's running statistics."""
    if dist.is_initialized() and not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class Stopped(Exception):
    """SIGTERM or SIGINT has asked to stop; args[0] is its number."""


_asked = []  # the signals that have arrived


def catch_signals():
    """From now on SIGTERM and SIGINT only leave a note, for stop_if_asked; a second Ctrl-C ends a single process at once."""
    def note(number, frame):
        if number == signal.SIGINT and number in _asked and world() == 1:
            raise KeyboardInterrupt
        _asked.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def stop_if_asked(model=None, meter=None):
    """Raises Stopped if a signal has arrived, at any of the processes: all of them stop at the same step.

    model, meter: of an epoch under way, which is only worth saving if it is finite (check_finite).
    """
    number = int(max_over_ranks(torch.tensor(_asked[0] if _asked else 0)))
    if number:
        if model is not None:
            check_finite(model, meter)
        raise Stopped(number)


# ---------------------------------------------------------------------------------------------------------------------
# Runs and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside path, flushes it to the disk and renames it: whole or not at all.

    Under torchrun only the first process writes.
    """
    if rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    """value as indented JSON, atomically."""
    write_atomically(path, lambda f: f.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path, types):
    """The JSON object in a file; types: {key: type} that it must hold. Raises InputError if it does not."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as e:
        raise InputError(f"{path} cannot be read: {first_line(e)}") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(k), t) for k, t in types.items()):
        raise InputError(f"{path} was not written by this program: it should hold {', '.join(types)}")
    return value


def save_checkpoint(path, checkpoint):
    """A dict of tensors and plain values, atomically; load_checkpoint reads it back."""
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU: ours, {"state_dict": ...}, or a bare state dict (returned as {"state_dict": it}).

    Only tensors and plain values are unpickled (weights_only=True). A `module.` prefix (DataParallel) and the
    `sub_block1.*` keys of WideResNets, which no forward pass uses, are dropped. Raises InputError for a file that is
    missing, cut short, holds other objects, or holds no state dict.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (PermissionError, IsADirectoryError):
        raise  # the message says it all
    except pickle.UnpicklingError:
        raise InputError(f"{path} is refused: it is no checkpoint, or pickles more than tensors and plain values") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path} cannot be read as a checkpoint (cut short?): {first_line(e)}") from None
    if isinstance(loaded, dict) and not isinstance(loaded.get("state_dict"), dict):
        loaded = {"state_dict": loaded}
    state = loaded["state_dict"] if isinstance(loaded, dict) else {}
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path} holds no state dict")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    loaded["state_dict"] = {k: v for k, v in state.items() if not k.startswith("sub_block1.")}
    return loaded


def load_weights(model, state, path):
    """model.load_state_dict(state), strictly but for `num_batches_tracked`, which old checkpoints lack.

    Raises InputError, naming the first keys that differ, or if a weight is not finite.
    """
    own = model.state_dict()
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    different = [f"{k} missing" for k in own if k not in state]
    different += [f"{k} unexpected" for k in state if k not in own]
    different += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
                  for k in own if k in state and state[k].shape != own[k].shape]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(f"{path} is of another architecture: {', '.join(different[:3])}{more}")
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # sparse, quantised ...
        raise InputError(f"{path} cannot be loaded: {first_line(e)}") from None
    broken = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise InputError(f"{path} holds NaN or infinite weights: {', '.join(broken[:3])}")


def environment(device):
    """What a reader needs to know about where numbers come from: commit, versions, device."""
    def git(*args):
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:  # no git on this machine
        commit = changes = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "cuda": torch.version.cuda if device.type == "cuda" else None},
        "device": name,
        "processes": world(),
    }


@contextlib.contextmanager
def run_folder(out, lock=".lock"):
    """Makes the folder and holds a lock in it while open; a killed process frees it. Raises InputError if another has it.

    Under torchrun the first process holds it, and the others wait for that.
    """
    def take(f):
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is working in {out}") from None
        except OSError as e:
            raise InputError(f"the file system of {out} has no locks ({e.strerror}): choose an --out elsewhere") from None

    out.mkdir(parents=True, exist_ok=True)
    with open(out / lock, "w") as f:
        only_first(lambda: take(f))
        yield


def run_name(prefix, args, parser):
    """A readable name out of what differs from the parser's defaults: pgdat-bn-mode-eval-ls0.1."""
    def text(v):
        return "" if v is True else Path(v).stem if isinstance(v, str) else f"{v:.10g}"

    parts = [prefix]
    for key, value in vars(args).items():
        if value != parser.get_default(key) and key not in NOT_A_SETTING:
            values = value if isinstance(value, list) else [value]
            parts.append(key.replace("_", "-") + ("-" if isinstance(value, str) else "") + "-".join(map(text, values)))
    return "-".join(parts)


# Flags that say where and how a run happens, not what is trained: they may differ when it is resumed.
NOT_A_SETTING = ("test_batch_size", "out", "resume", "data_dir", "device", "dry_run")


def open_run(out, args, data_sha256, device):
    """Readies the folder of a run, under its lock: writes args.json, or with --resume checks it. Returns last.pt's dict or None.

    Raises InputError if the folder already holds a run and --resume was not given, or if the run there was started with
    other arguments or data.
    """
    only_first(lambda: check_run(out, args, data_sha256, device))
    return load_checkpoint(out / "last.pt") if (out / "last.pt").exists() else None


def check_run(out, args, data_sha256, device):
    """What open_run says about args.json and its errors; done by the first process."""
    record, last = out / "args.json", out / "last.pt"
    now = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **environment(device)}
    if not record.exists():
        remains = [f for f in ("last.pt", "best.pt", "interrupted.pt", "log.jsonl") if (out / f).exists()]
        if remains:
            raise InputError(f"{out} holds {remains[0]} but no args.json: choose another --out")
        write_json(record, {"args": vars(args), **now, "data_sha256": data_sha256, "resumed": []})
        return
    if not args.resume:
        raise InputError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    before = read_json(record, {"args": dict, "command": list, "data_sha256": str, "resumed": list})
    differ = differences(before["args"], vars(args))
    if before["command"][0] != now["command"][0]:
        differ.insert(0, f"the script was {before['command'][0]}")
    if before["data_sha256"] != data_sha256:
        differ.append("the data are other data")
    if differ:
        raise InputError(f"{out} was started with other arguments: {'; '.join(differ)}")
    checkpoint = load_checkpoint(last) if last.exists() else None
    if checkpoint and ("optimizer" not in checkpoint or differences(checkpoint["args"], vars(args))):
        raise InputError(f"{last} is not a checkpoint of this run")
    before["resumed"].append({"epoch": checkpoint["epoch"] if checkpoint else 0, **now})
    write_json(record, before)


def differences(before, now):
    """Which settings differ between the arguments of a run's start and of now, in words. The data set's name is none."""
    now = json.loads(json.dumps(now))  # as it was written
    return [f"--{k.replace('_', '-')} was {before.get(k)}, is {now.get(k)}" for k in sorted(before | now)
            if k not in (*NOT_A_SETTING, "dataset") and before.get(k) != now.get(k)]


def trim_log(path, epoch):
    """Drops from log.jsonl what a killed run had written beyond its last checkpoint (of `epoch` epochs), torn lines too."""
    if path.exists():
        lines = path.read_text().splitlines()[:epoch]
        write_atomically(path, lambda f: f.write("".join(f"{line}\n" for line in lines).encode()))


def append_log(path, entry):
    """One JSON line, on the disk when this returns; under torchrun written by the first process only."""
    if rank() > 0:
        return
    with open(path, "a") as f:
        f.write(json.dumps(entry) + "\n")
        f.flush()
        os.fsync(f.fileno())


def restore(checkpoint, model, optimizer, meter, out):
    """Puts a run back where it was: last.pt's dict or None, and interrupted.pt, if that was written in the epoch after it.

    Fills model, optimiser and meter. Returns (epochs done, log entry of the best epoch or None).
    """
    done, best = 0, None
    if checkpoint:
        load_weights(model, checkpoint["state_dict"], out / "last.pt")
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
        done, best = checkpoint["epoch"], checkpoint.pop("best")
        if best == checkpoint["log"]:
            save_checkpoint(out / "best.pt", checkpoint)  # the run may have been killed just before
    middle = load_checkpoint(out / "interrupted.pt") if (out / "interrupted.pt").exists() else None
    if middle and not {"epoch", "meter", "optimizer"} <= middle.keys():
        raise InputError(f"{out / 'interrupted.pt'} is not a checkpoint of this run")
    if middle and middle["epoch"] == done:
        load_weights(model, middle["state_dict"], out / "interrupted.pt")
        optimizer.load_state_dict(middle["optimizer"])
        meter.load_state(middle["meter"])
    return done, best


def save_step(out, epoch, meter, model, optimizer, about):
    """Puts the middle of an epoch (counted from 0) on the disk as interrupted.pt, from which restore goes on at the very step."""
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    save_checkpoint(out / "interrupted.pt", {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": epoch,
                                             "meter": meter.state(), **about})


def save_epoch(out, entry, best, model, optimizer, about):
    """Puts an epoch on the disk: its line in log.jsonl, last.pt, and best.pt if it is the best one.

    entry, best: log entries of this epoch and of the best one so far; about: what else rebuilding the model takes.
    Whatever the moment a run is killed at, log and best.pt agree with last.pt once it has been resumed: trim_log drops
    a line that last.pt does not know of, restore writes a best.pt that is missing.
    """
    append_log(out / "log.jsonl", entry)
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    checkpoint = {"state_dict": state, "epoch": entry["epoch"], "log": entry, **about}
    save_checkpoint(out / "last.pt", {**checkpoint, "optimizer": optimizer.state_dict(), "best": best})
    if best is entry:
        save_checkpoint(out / "best.pt", checkpoint)
    if rank() == 0:
        (out / "interrupted.pt").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Console
# ---------------------------------------------------------------------------------------------------------------------


def show_setting(args, model, n_train, n_test):
    """Prints everything that decides a training run."""
    for key, value in vars(args).items():
        print(f"  --{key.replace('_', '-'):18}{fraction_text(value) if key in ('eps', 'alpha') else value}")
    steps = math.ceil(n_train / args.batch_size)
    held_out = f" (and {args.val:,} held out)" if args.val else ""
    print(f"data   {args.dataset}: {n_train:,} training images{held_out}, {n_test:,} test images")
    print(f"model  {args.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"steps  {args.epochs} epochs of {steps:,}: {args.epochs * steps:,}")
    for flag in ("warmup_lr", "warmup_eps", "early_stop_pgd"):
        value = getattr(args, flag, None)
        if value and (max(value) if isinstance(value, list) else value) > args.epochs:
            print(f"warning: --{flag.replace('_', '-')} reaches beyond the run's {args.epochs} epochs")
    late = [f"{e:g}" for e in args.lr_decay_epochs if e >= args.epochs]
    if args.lr_schedule == "piecewise" and late:
        print(f"warning: the learning rate never drops at {', '.join(late)}, for the run ends after {args.epochs} epochs")


def show_epoch(entry, split, epochs, is_best, seconds_left):
    """One aligned line for a log entry, the best so far starred; with no entry, the header. split: "test" or "val"."""
    def cell(value):
        return f"{'-' if value is None else f'{value:.2f}':>6}"

    if entry is None:
        print(f"    epoch        lr    loss | train adv  clean | {split:>4} clean PGD-10   |     time     left")
        return
    print(f"{entry['epoch']:4}/{epochs:<4} {entry['lr']:9.2e} {entry['train_loss']:7.4f} | "
          f"   {cell(entry['train_adv_acc'])} {cell(entry['train_clean_acc'])} | "
          f"    {cell(entry.get(split + '_clean'))} {cell(entry.get(split + '_pgd10'))} {'*' if is_best else ' '} | "
          f"{clock(entry['seconds']):>8} {clock(seconds_left):>8}", flush=True)


def stop_diverged(step, epoch, steps, args):
    """Ends the process, with status 1, because loss or weights are not finite (step and epoch counted from 0)."""
    lr, _ = schedule(epoch + step / steps, args)
    good = f"the last good checkpoint is {Path(args.out) / 'last.pt'}, of epoch {epoch}" if epoch else "there is no good checkpoint yet"
    if rank() > 0:
        sys.exit(1)
    sys.exit(f"{Path(sys.argv[0]).name}: stopped: loss or weights not finite at step {step} of epoch {epoch + 1}, lr {lr:g}; {good}")


def stop_interrupted(number, out, epoch, meter, model, optimizer, about):
    """Puts the middle of an epoch (counted from 0) on the disk and ends the process as its signal would have."""
    save_step(out, epoch, meter, model, optimizer, about)
    print(f"stopped by {signal.Signals(number).name} after {meter.steps} steps of epoch {epoch + 1}; to go on: the same command with --resume", flush=True)
    barrier()  # torchrun ends all processes when one has ended
    sys.exit(128 + number)


def progress_bar(total, name, done=0):
    """A tqdm bar over images; invisible if stderr is no terminal, and for all of torchrun's processes but the first."""
    return tqdm(total=total, initial=done, desc=name, unit=" img", leave=False, mininterval=0.5, disable=True if rank() else None)


def show_progress(bar, images, meter):
    """Moves the bar on. Figures so far are shown with it, but not at every step: reading them waits for the device."""
    due = bar.update(min(images, bar.total - bar.n)) and world() == 1
    if due or meter.steps % 100 == 0:
        loss, adv_acc, _ = meter.read()
        bar.set_postfix_str(f"loss {loss:.3f}, adv acc {adv_acc:.1f} %", refresh=False)


def check_finite(model, meter):
    """What meter.read returns; raises FloatingPointError(step), from 0, if a loss or a weight has become NaN or infinite."""
    figures = meter.read()
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise FloatingPointError(meter.steps - 1)
    return figures


class Meter:
    """Sums over an epoch, kept on the device so that a training step never waits for the host."""

    def __init__(self, device):
        self.steps = 0
        self.seconds = 0.0                                 # that the epoch took before it was interrupted
        self.sums = torch.zeros(4, device=device)          # loss, right on adversarial, right on clean images; images
        self.bad_step = torch.full((), -1, device=device)  # the first step whose loss was not finite

    @torch.no_grad()
    def add(self, loss, y, logits, clean_logits=None):
        """A step. loss (): the batch mean; logits (B, K) on the adversarial images; clean_logits (B, K) or None."""
        right = (logits.argmax(1) == y).sum()
        right_clean = torch.zeros_like(right) if clean_logits is None else (clean_logits.argmax(1) == y).sum()
        self.sums += torch.stack([loss * len(y), right, right_clean, torch.full_like(right, len(y))])
        self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(loss), self.steps, self.bad_step)
        self.steps += 1

    def read(self):
        """Mean loss, adversarial and clean accuracy in per cent, over all processes. Waits for the device.

        Raises FloatingPointError(step) with the first step whose loss was not finite.
        """
        bad_step = int(max_over_ranks(self.bad_step))
        if bad_step >= 0:
            raise FloatingPointError(bad_step)
        loss, adv, clean, images = sum_over_ranks(self.sums.clone()).tolist()
        return round(loss / images, 5), round(100 * adv / images, 2), round(100 * clean / images, 2)

    def state(self):
        """What load_state takes: tensors and plain values, the sums over all processes."""
        return {"steps": self.steps, "seconds": self.seconds, "sums": sum_over_ranks(self.sums.clone()).cpu()}

    def load_state(self, state):
        self.steps, self.seconds = state["steps"], state["seconds"]
        if rank() == 0:
            self.sums.copy_(state["sums"])


def clock(seconds):
    """1:02:03 or 2:03."""
    m, s = divmod(int(seconds + 0.5), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
