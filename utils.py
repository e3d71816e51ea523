"""What the scripts share: data, attack, losses, schedules, optimisers, and, at the end, what a run needs.

The science comes first and stands by itself: with `models/` it serves a loop of your own.

Conventions: images are x (B, 3, 32, 32) float32 in [0, 1]; labels y (B,) int64; eps and alpha are on that
same [0, 1] scale (8/255, not 8); time t is in epochs and may be fractional (epoch + step / steps, epochs from
0). `model` is any module from x to logits (B, K); normalisation and precision live inside it.

Every random number of a run is drawn from a generator seeded by (seed, what it is for, epoch, step). A run
can therefore be resumed at any epoch without saving a generator's state, and nothing that one trick draws
moves what another one sees.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from functools import partial
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


# ---- Data --------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64, all on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    sha256: str  # of the pixels and labels, whatever the file's compression


CIFAR10_SHA256 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"


def load_dataset(name, device="cpu", data_dir="data"):
    """The Dataset of the path of an .npz, or of "cifar10" or "cifar100", on the device.

    The file holds train_images (N, 32, 32, 3) uint8, train_labels (N,) integers from 0, test_images,
    test_labels. A named data set is data_dir/NAME.npz, which data/prepare.py fetches on first use. Raises
    InputError if there is no such data, or they are of another form.
    """
    path = Path(name)
    if name in ("cifar10", "cifar100"):
        path = Path(data_dir, f"{name}.npz")
        if not path.exists():
            fetch = [sys.executable, HERE / "data" / "prepare.py", name, "--data-dir", data_dir]
            if not fetch[1].exists() or subprocess.run(fetch).returncode:
                raise InputError(f"there is no {path}, and {fetch[1]} could not fetch it")
    elif path.suffix != ".npz":
        raise InputError(f"unknown data set {name!r}: there is cifar10, cifar100, or the path of an .npz")
    arrays, digest = read_npz(path), hashlib.sha256()
    for a in arrays.values():
        digest.update(np.ascontiguousarray(a))
    if name == "cifar10" and digest.hexdigest() != CIFAR10_SHA256:
        raise InputError(f"{path} is not CIFAR-10 (SHA-256 {digest.hexdigest()[:8]}...)")
    num_classes = 1 + max(int(arrays[k].max()) for k in ("train_labels", "test_labels"))
    tensors = [torch.from_numpy(a).to(device) for a in arrays.values()]
    return Dataset(*tensors, num_classes=num_classes, sha256=digest.hexdigest())


def read_npz(path):
    """{key: array} of a data set file: uint8 images, int64 labels. Raises InputError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {k: npz[k] for k in Dataset._fields[:4]}
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path} cannot be read as a data set: {e}") from None
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise InputError(f"{path}: {split}_images is {images.dtype} {images.shape}, "
                             "not uint8 (N, 32, 32, 3)")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not 0 <= labels.min():
            raise InputError(f"{path}: {split}_labels is not ({len(images)},) integers from 0")
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    return arrays


def hold_out(images, labels, n):
    """((images, labels) to train on, (images, labels) held out or None): the same n for every seed."""
    if n == 0:
        return (images, labels), None
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels))).to(labels.device)
    held, rest = order[:n], order[n:].sort().values
    return (images[rest], labels[rest]), (images[held], labels[held])


def training_images(data, n, n_val):
    """((images, labels) to train on, (images, labels) held out or None) of --n-train and --val."""
    n = n or len(data.train_labels)
    if n > len(data.train_labels):
        raise InputError(f"--n-train {n}: there are {len(data.train_labels):,} training images")
    if n_val >= n:
        raise InputError(f"--val {n_val} leaves nothing to train on of {n:,} images")
    return hold_out(data.train_images[:n], data.train_labels[:n], n_val)


def to_float(images):
    """uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32) in [0, 1], channels-last, which costs no copy."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def crop_flip(images, top, left, flip, padding):
    """Crops of the images padded by 4, each with its own offset, mirrored where asked; one gather in all.

    images (B, 32, 32, 3) uint8; top, left (B,) int64 in 0..8: the crop's corner in the padded image; flip
    (B,) bool; padding: "reflect" (PGD-AT) or "zero" (TRADES). Returns the same shape and type.
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


def batches(images, labels, batch_size, generator, padding, shard=slice(None)):
    """One epoch in random order: yields augmented x (B, 3, 32, 32), y (B,). The last, smaller batch is kept.

    Every image gets its own crop and flip. All draws are made at the start of the epoch, on the device.
    shard: the part of every batch to yield; of several processes each takes another one.
    """
    n, device = len(images), images.device
    order = torch.randperm(n, generator=generator, device=device)
    offset = torch.randint(9, (2, n), generator=generator, device=device)
    flip = torch.randint(2, (n,), generator=generator, device=device).bool()
    for i in range(0, n, batch_size):
        index, (top, left), flipped = (t[..., i : i + batch_size][..., shard] for t in (order, offset, flip))
        yield to_float(crop_flip(images[index], top, left, flipped, padding)), labels[index]


def seeded(device, *key):
    """A generator on the device for the key: seeded(device, seed, "attack", epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---- Attack ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attack_mode(model, bn_mode):
    """While it is open, parameters are frozen (no weight gradient is computed) and the model is in train or
    eval mode.

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
    """x_adv + alpha * sign(grad), projected to the eps-ball around x and clipped to [0, 1] (Eq. 1)."""
    x_adv = x_adv + alpha * grad.sign()
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp_(0, 1)


def pgd(model, x, y, start, eps, alpha, steps, tolerance=None):
    """L-inf PGD (Madry et al., 2018): x (B, 3, 32, 32) after `steps` steps from `start` up the cross-entropy.

    Run it inside attack_mode. tolerance: None, or at which time that an image is found misclassified it is
    no longer moved, 1 being the first (early-stopped PGD, Zhang et al., 2020); the attack ends when all
    images have stopped.
    """
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if tolerance is not None:
            tolerance = tolerance - (logits.argmax(1) != y).int()
            moving = tolerance > 0
            if not moving.any():
                break
        grad, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
        with torch.no_grad():
            moved = linf_step(x, x_adv, grad, eps, alpha)
            x_adv = moved if tolerance is None else torch.where(moving[:, None, None, None], moved, x_adv)
    return x_adv.detach()


def classified_right(logits, y):
    """(B,) bool: the largest of the logits (B, K) is the label's, and all are finite."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def evaluate(model, images, labels, eps, steps=10, alpha=2 / 255, seed=0, batch_size=250):
    """Which images are classified right: two (N,) bool tensors, clean and under PGD.

    The defaults are the paper's PGD-10: one uniform start, and an image counts as robust if the last iterate
    is classified right (robust_overfitting's count, which selected the paper's checkpoints). images
    (N, 32, 32, 3) uint8. steps=0: clean alone, twice. An image's start does not depend on the batch size.
    Under torchrun every process takes its part of the images, and returns the flags of all.
    """
    n, device = len(images), images.device
    clean, robust = flags = torch.zeros(2, n, dtype=torch.bool, device=device)
    noise = torch.empty(images.shape, device=device)
    noise.uniform_(-eps, eps, generator=seeded(device, seed, "evaluation", 0))
    with attack_mode(model, "eval"):
        for index in progress(torch.arange(n, device=device)[shard()].split(batch_size), f"PGD-{steps}"):
            x, y, x_adv = to_float(images[index]), labels[index], None
            if steps:
                start = (x + noise[index].permute(0, 3, 1, 2)).clamp_(0, 1)
                x_adv = pgd(model, x, y, start, eps, alpha, steps)
            with torch.no_grad():
                clean[index] = robust[index] = classified_right(model(x), y)
                if steps:
                    robust[index] = classified_right(model(x_adv), y)
    return sum_over_processes(flags)


def percent(flags):
    """Accuracy in per cent with two decimals, as the paper prints it, of a bool tensor."""
    return round(100 * flags.sum().item() / len(flags), 2)


# ---- Losses ------------------------------------------------------------------------------------------------


def smoothed_cross_entropy(logits, y, smoothing):
    """Mean cross-entropy with target 1 - smoothing on the label and smoothing / (K-1) on each *other* class
    (Table 4).

    logits (B, K), 0 <= smoothing < 1. torch's own label_smoothing=e spreads e over all K classes: there e
    would be smoothing * K / (K-1).
    """
    log_p = F.log_softmax(logits, dim=1)
    on_label = -log_p.gather(1, y[:, None]).squeeze(1)                    # (B,)
    off_label = (-log_p.sum(1) - on_label) / (logits.shape[1] - 1)        # (B,) mean over the other classes
    return ((1 - smoothing) * on_label + smoothing * off_label).mean()


# ---- Schedules and optimisers ------------------------------------------------------------------------------

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

    piecewise: times decay_factor at each of decay_epochs (the paper's), or times a factor of each one's own.
    cosine: half a cosine from lr to 0.
    onecycle: 0 to lr over the first half of the run and back to 0 over the second (Wong et al., 2020).
    linear: from lr to 0. The first `warmup` epochs rise linearly from 0.
    """
    if schedule == "piecewise":
        decays = sum(t >= e for e in decay_epochs)
        several = isinstance(decay_factor, (list, tuple))
        rate = lr * (math.prod(decay_factor[:decays]) if several else decay_factor**decays)
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
    lr = lr_at(t, args.lr, args.lr_schedule, args.epochs, args.lr_decay_epochs, args.lr_decay_factor,
               args.warmup_lr)
    return lr, eps_at(t, args.eps, args.warmup_eps)


def make_optimizer(model, name, lr, wd, momentum=0.9):
    """One of Table 5's optimisers; weight decay acts on all parameters, batch norm and biases included.

    sgd-gc and sgd-gcc centralise gradients (Yong et al., 2020): from the gradient of every parameter with
    more than one dimension (gcc: of convolutions only) its mean over all but the first dimension is
    subtracted, after weight decay has been added.
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
    # The hook adds the weight decay of the centralised parameters itself, since it has to come before the
    # mean is taken.
    centred, others = [p for p in params if p.dim() >= min_dim], [p for p in params if p.dim() < min_dim]
    groups = [{"params": centred, "weight_decay": 0.0, "decay_before_centring": wd},
              {"params": others, "weight_decay": wd}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    optimizer.register_step_pre_hook(_centralise_gradients)
    return optimizer


@torch.no_grad()
def _centralise_gradients(optimizer, args, kwargs):
    group = optimizer.param_groups[0]
    for p in group["params"]:
        p.grad.add_(p, alpha=group["decay_before_centring"])
        p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))


# ---- Tricks since the paper --------------------------------------------------------------------------------


def ema_decay(t, decay):
    """The moving average's decay at update t (from 0): smaller at first, when there is little to average."""
    return min(decay, (1 + t) / (10 + t))


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * model, of weights and of batch norm's running statistics.

    average: a copy of the model. The statistics are averaged likewise, as in the FastAT benchmark
    (github.com/fzjcdt/FastAT_Benchmark averages the whole state dict): the weights of many steps have no use
    for those of the last step alone. DeepMind's code (Gowal et al., 2020; Rebuffi et al., 2021) averages the
    weights only and tests them with the trained model's statistics. Counts of batches are copied.
    """
    for a, value in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(value, 1 - decay) if a.is_floating_point() else a.copy_(value)


def perturb_weights(model, loss, gamma):
    """Adversarial weight perturbation (Wu et al., 2020): move every layer's weights one step up the loss.

    Every tensor w with more than one dimension becomes w + gamma |w| / |g| g, where g is its gradient of
    loss(). Returns what restore_weights takes. loss() moves no running statistics: in the authors' code
    (github.com/csdongxian/AWP) a copy of the model, in train mode, computes it. With gamma 0 nothing happens.
    """
    if gamma == 0:
        return []
    weights = [p for p in model.parameters() if p.dim() > 1]
    before = [(w, w.detach().clone()) for w in weights]
    statistics = [(b, b.clone()) for b in model.buffers()]
    gradients = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for w, g in zip(weights, gradients):
            w.add_(gamma * w.norm() / (g.norm() + 1e-20) * g)
    restore_weights(statistics)
    return before


@torch.no_grad()
def restore_weights(before):
    """Put back, bit for bit, what perturb_weights has moved."""
    for tensor, value in before:
        tensor.copy_(value)


# ---- A run: command line, device, processes, files ---------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to every help text that does not speak of one."""

    def _get_help_string(self, action):
        silent = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help + ("" if silent or "default" in action.help else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, which answers a bad command line with one line and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if rank() == 0 else None)

    def refuse(self, args, condition, *flags):
        """End with status 2 if one of the flags was set although it has no effect under this condition."""
        for flag in flags:
            if getattr(args, flag) != self.get_default(flag):
                self.error(f"--{flag.replace('_', '-')} has no effect with {condition}")


def number(low, high=math.inf, kind=float):
    """An argparse type: a finite number of that kind, at least low and below high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text} is not {what} from {low}" + (f" to below {high}" if high < math.inf else ""))
        return value
    return parse


def fraction(text):
    """An argparse type for eps and alpha: "8/255" or "0.031", in [0, 1]."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text} is no number on the [0, 1] scale of the images: write "8/255" for 8 levels')
    return value


# Flags that say where and how a run happens, not what is trained: they may differ when it is resumed.
NOT_A_SETTING = ("test_batch_size", "out", "resume", "data_dir", "device", "time_scale", "dry_run")


def resolve(parser, args, prefix):
    """The flags of a training script, of which some depend on others; those without effect are refused."""
    adam = args.optimizer in ("adam", "adamw")
    if adam:
        parser.refuse(args, f"--optimizer {args.optimizer}", "momentum")
    if args.optimizer == "nesterov" and args.momentum == 0:
        parser.error("--optimizer nesterov needs a --momentum above 0")
    if args.awp == 0:
        parser.refuse(args, "--awp 0", "awp_warmup")
    if args.lr_schedule != "piecewise":
        parser.refuse(args, f"--lr-schedule {args.lr_schedule}", "lr_decay_epochs", "lr_decay_factor")
    if isinstance(args.lr_decay_factor, list):
        if len(args.lr_decay_factor) not in (1, len(args.lr_decay_epochs)):
            parser.error("--lr-decay-factor takes one factor, or one for each of --lr-decay-epochs")
        if len(args.lr_decay_factor) == 1:
            args.lr_decay_factor, = args.lr_decay_factor
    for flag in ("epochs", "lr_decay_epochs", "warmup_lr", "warmup_eps", "early_stop_pgd", "awp_warmup"):
        before = getattr(args, flag, None)
        if args.time_scale == 1 or before is None:
            continue
        epochs = before if isinstance(before, list) else [before]
        scaled = [int(v * args.time_scale + 0.5) for v in epochs]
        if any(v and not w for v, w in zip(epochs, scaled)):
            parser.error(f"--time-scale {args.time_scale:g} leaves no epoch of --{flag.replace('_', '-')}")
        setattr(args, flag, scaled if isinstance(before, list) else scaled[0])
    args.out = f"runs/{run_name(prefix, args, parser)}" if args.out is None else args.out
    if args.lr is None:
        args.lr = 1e-4 if adam else 0.1
    return args


def run_name(prefix, args, parser):
    """A readable name out of what differs from the parser's defaults: pgdat-bn-mode-eval-ls0.1."""
    changed = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in NOT_A_SETTING}
    words = [prefix, *(f"{k}-{v}" if isinstance(v, str) else f"{k}{v}" for k, v in changed.items())]
    return re.sub(r"[^\w.]+|_", "-", "-".join(words)).strip("-")


def run_script(main):
    """Run main(). What the user can mend becomes one line on stderr and exit status 2; Ctrl-C is 130."""
    status, line = 0, ""
    sys.stdout = sys.stdout if rank() == 0 else open(os.devnull, "w")
    try:
        main()
        if dist.is_initialized():
            barrier()  # no process leaves while another still needs it
            dist.destroy_process_group()
    except (InputError, OSError) as e:
        status, line = 2, f"error: {e}".splitlines()[0]
    except FloatingPointError as e:
        status, line = 1, f"stopped: {e}; last.pt, if there is one, is of the epoch before"
    except KeyboardInterrupt:
        status, line = 130, "interrupted: a run goes on with --resume, an evaluation with the same command"
    if line:  # of every process: another one's error may be its own
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


def progress(iterable, name, total=None):
    """The iterable, under a progress bar if stderr is a terminal."""
    return tqdm(iterable, desc=name, total=total, leave=False, disable=True if rank() else None)


def show_setting(args):
    """Print every flag as it is resolved, and warn of decays of the learning rate that never come."""
    for key, value in vars(args).items():
        print(f"  --{key.replace('_', '-'):17} {value}")
    late = [e for e in args.lr_decay_epochs if e >= args.epochs]
    if args.lr_schedule == "piecewise" and late:
        print(f"warning: the run ends, after {args.epochs} epochs, before the learning rate decays at {late}")


def start_device(args):
    """The torch.device of --device, printed. Joins torchrun's processes; settles --precision in args."""
    device = pick_device(args.device)
    if world() > 1:
        patience = datetime.timedelta(days=7)  # with each other: a batch of AutoAttack can take an hour
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    args.precision = set_precision(args.precision, device)
    if "test_batch_size" in args and args.test_batch_size is None:
        args.test_batch_size = 1000 if device.type == "cuda" else 250
    print(f"device {device}: {device_name(device)}, torch {torch.__version__}, {args.precision}", flush=True)
    if device.type == "cpu" and Path("/dev/nvidia0").exists():
        print("warning: there is a GPU, but torch runs on the CPU: because of --device, or of a driver that "
              f"is too old for torch's CUDA {torch.version.cuda}", file=sys.stderr)
    return device


def pick_device(name):
    """The torch.device of "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; a GPU becomes the
    current one. Raises InputError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"--device {name} is not auto, cpu, cuda or cuda:N")
    if world() > 1 and name != "cuda":
        raise InputError(f"--device {name}: under torchrun each process has a GPU of its own: --device cuda")
    if world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        index = torch.cuda.current_device() if name == "cuda" else int(name[5:])
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)  # which takes no device without an index
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # no GPU, no such GPU, out of memory, in exclusive use ...
        raise InputError(f"--device {name} cannot be used: {e}") from None
    return device


def device_name(device):
    """The name of the GPU, or of the processor and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.search(r"^model name\s*:\s*(.*)", cpu_info(), re.M)
    return f"{name[1] if name else platform.machine()} CPU, {torch.get_num_threads()} threads"


def cpu_info():
    """What Linux says of the processor; elsewhere nothing."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def set_precision(precision, device):
    """Set torch up for "fp32" (strict), "tf32" (torch's default on CUDA: TF32 in convolutions) or "bf16".

    bf16 is autocast, which the model enters by itself (models.Network). None means tf32 on CUDA and fp32
    elsewhere. Returns the name in force. Raises InputError for what the device cannot do.
    """
    if precision is None:
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 exists on CUDA only")
    # The kernel lists what the processor has and the system lets programs use. Without such instructions
    # torch computes in bf16 all the same, many times slower than in fp32.
    if precision == "bf16" and device.type == "cpu" \
            and not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu_info()):
        raise InputError("--precision bf16: this CPU has no AVX512-BF16, AMX or Arm BF16 instructions")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True  # training and PGD-10 have few shapes
    torch.set_float32_matmul_precision("highest")  # torch's default, unless the environment says otherwise
    return precision


def compile_training(model, attack, args, device):
    """Compile the model in place. Returns the attack to train with: on CUDA, captured in a CUDA graph."""
    model.compile(dynamic=False)
    if device.type != "cuda":
        return attack
    if getattr(args, "attack", "pgd") == "none" or getattr(args, "early_stop_pgd", None):
        print("note: there is no CUDA graph: with --attack none there is nothing to capture, and with "
              "--early-stop-pgd the host decides at every step whether to go on")
        return attack
    return Replayed(attack, model)


def uncompiled(condition=True):
    """A context in which compiled models run uncompiled, if the condition holds: to compile for the last,
    smaller batch of an epoch, or for the tests, takes longer than it saves."""
    return torch.compiler.set_stance("force_eager") if condition else contextlib.nullcontext()


class Replayed:
    """attack(*tensors, eps) -> x' as one launch: captured in a CUDA graph at the first call with tensors of
    these shapes, and replayed from then on.

    The host takes longer to launch an attack's thousands of kernels than a GPU takes to run them. The graph
    reads weights and running statistics where they lie, and moves the latter; a capture leaves these as they
    were. x' is overwritten by the next replay. attack: a function of tensors alone. Raises InputError if the
    graph, which has memory of its own, does not fit.
    """

    def __init__(self, attack, model):
        self.attack, self.model, self.graphs, self.replays = attack, model, {}, 0

    def __call__(self, *arguments):
        x, eps = arguments[0], arguments[-1]
        tensors = *arguments[:-1], torch.full((), eps, dtype=x.dtype, device=x.device)
        shapes = tuple(t.shape for t in tensors)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture([t.clone() for t in tensors])
        graph, inputs, x_adv = self.graphs[shapes]
        for captured, given in zip(inputs, tensors):
            captured.copy_(given)
        graph.replay()
        self.replays += 1
        return x_adv

    def capture(self, inputs):
        """(a graph, the inputs that it reads, the x' that it writes)."""
        before = [(b, b.clone()) for b in self.model.buffers()]
        try:
            graph, x_adv = cuda_graph(partial(self.attack, *inputs))
        except torch.OutOfMemoryError:
            raise InputError("the GPU's memory does not hold the CUDA graph of the attack: train without "
                             "--compile, or with a smaller --batch-size") from None
        restore_weights(before)
        return graph, inputs, x_adv


def cuda_graph(function):
    """(a CUDA graph of function(), the tensor that every replay of it writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation and cuDNN's search for algorithms, which no graph can hold
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


# `torchrun --nproc_per_node=N -- SCRIPT` starts N processes. Every one holds all data and works on its part
# of every batch; the first one alone prints and writes.


def world():
    """How many processes torchrun started; 1 without it, whatever RANK and WORLD_SIZE a cluster sets."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank():
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def shard():
    """The slice of a batch, or of the test images, that this process works on."""
    return slice(rank(), None, world())


def sum_over_processes(tensor):
    """The sum of the processes' tensors of numbers or flags."""
    if world() == 1:
        return tensor
    total = tensor.int() if tensor.dtype == torch.bool else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def barrier():
    """Wait until all processes are here."""
    sum_over_processes(torch.zeros(1))


def check_processes(args, n_train, device):
    """Raise InputError for what several processes cannot do, and for a --compile that compiles nothing."""
    if args.compile and n_train < args.batch_size:
        raise InputError(f"--compile has no effect: {n_train} images make no whole batch of "
                         f"{args.batch_size}, and smaller ones run uncompiled")
    last = n_train % args.batch_size or args.batch_size
    if args.batch_size % world() or last % world():
        raise InputError(f"{world()} processes cannot share batches of {args.batch_size} images, and one of "
                         f"{last} at the end of an epoch, evenly")
    if world() > 1 and args.compile and device.type == "cuda":  # not tried with synchronised batch norm
        raise InputError("--compile is not supported on several GPUs")
    if world() > 1 and args.awp:
        raise InputError("--awp takes one process: each of several would perturb the weights in its own way")
    if world() > 1 and getattr(args, "early_stop_pgd", None):
        raise InputError("--early-stop-pgd takes one process: the attacks of several end at different steps")


def sync_batch_norm(model, device):
    """The model; of several processes on CUDA, its batch norm takes the statistics of the whole batch.

    torch has no such layer for the CPU: there each process normalises by its own part, and goes on with the
    first one's running statistics (broadcast_statistics), as under DataParallel, which the authors used.
    """
    if world() > 1 and device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if world() > 1:
        print("note: on the CPU batch norm is not synchronised, each process normalises by its own part")
    return model


def broadcast_statistics(model):
    if world() > 1 and not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(optimizer):
    """Let every step of the optimiser use the gradient of the whole batch's mean loss."""
    def average(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / world()).split([g.numel() for g in grads])):
            g.copy_(mean.view(g.shape))

    if world() > 1:
        optimizer.register_step_pre_hook(average)


class Meter:
    """Sums over an epoch, kept on the device so that a training step never waits for the host."""

    def __init__(self, device):
        self.steps = 0
        self.sums = torch.zeros(4, device=device)  # loss, right on adversarial, right on clean images; images
        self.bad_step = torch.full((), torch.inf, device=device)  # the first step whose loss was not finite

    @torch.no_grad()
    def add(self, loss, y, logits, clean_logits=None):
        """Count a step. loss (): the batch mean; logits (B, K) on adversarial, clean_logits on clean x."""
        right = (logits.argmax(1) == y).sum()
        right_clean = torch.zeros_like(right) if clean_logits is None else (clean_logits.argmax(1) == y).sum()
        self.sums += torch.stack([loss * len(y), right, right_clean, torch.full_like(right, len(y))])
        self.bad_step = torch.where(loss.isfinite(), self.bad_step, self.bad_step.clamp(max=self.steps))
        self.steps += 1

    def read(self, epoch):
        """Mean loss, adversarial and clean accuracy in per cent, over all processes. Waits for the device.

        Raises FloatingPointError, which names the first step (from 0) whose loss was not finite, if any.
        """
        if self.bad_step < torch.inf:
            step = int(self.bad_step)
            raise FloatingPointError(f"the loss is not finite at step {step} of epoch {epoch}")
        loss, adv, clean, images = sum_over_processes(self.sums).tolist()
        return round(loss / images, 5), round(100 * adv / images, 2), round(100 * clean / images, 2)


def write_whole(path, data):
    """Write bytes to a temporary file and rename it: whole or not at all. The first process does."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)


def write_json(path, value):
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def save_checkpoint(path, checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write_whole(path, file.getbuffer())


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU: ours, {"state_dict": ...}, or a bare state dict made that.

    Only tensors and plain values are unpickled (weights_only=True). A `module.` prefix (DataParallel) and the
    `sub_block1.*` keys of WideResNets, which no forward pass uses, are dropped. Raises InputError for a file
    that is missing, cut short, holds other objects, or holds no state dict.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as e:  # more than tensors and plain values, a damaged file ...
        raise InputError(f"{path} is refused as a checkpoint: {e}") from None
    if isinstance(loaded, dict) and not isinstance(loaded.get("state_dict"), dict):
        loaded = {"state_dict": loaded}
    state = loaded["state_dict"] if isinstance(loaded, dict) else {}
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    loaded["state_dict"] = {k: v for k, v in state.items() if not k.startswith("sub_block1.")}
    return loaded


def lock(folder, name=".lock"):
    """Make the folder and lock it, until the file that is returned is closed. Raises InputError if it is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder, name), "w")
    try:
        if rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is working in {folder}") from None
    return file


def sha256_of(state):
    """SHA-256 of a state dict's tensors and their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def environment(device):
    """What a reader needs to know about where numbers come from: commit, versions, device."""
    def git(command):  # None where there is no git, or no repository
        done = subprocess.run(f"git {command}", shell=True, cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status --porcelain")
    return {"git_commit": git("rev-parse HEAD"), "git_dirty": None if changes is None else bool(changes),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__,
                         "cuda": torch.version.cuda if device.type == "cuda" else None},
            "device": device_name(device), "processes": world()}


def differences(before, now, defaults):
    """Which settings differ between two runs' arguments, in words. The data set's path is none.

    A setting that one of them does not know has its default.
    """
    keys = [k for k in sorted(before | now) if k not in (*NOT_A_SETTING, "dataset")]
    pairs = [(k, before.get(k, defaults.get(k)), now.get(k, defaults.get(k))) for k in keys]
    return [f"--{k.replace('_', '-')} was {old}, is {new}" for k, old, new in pairs if old != new]


def resume(args, defaults, state, about):
    """Start the run in the folder args.out, or go on with it: its log, an entry for every epoch that is done.

    defaults: the setting of a command line without flags. state, about: as save() takes them; the state is
    put back as last.pt holds it. Raises InputError if the folder holds a run and --resume was not given, or
    a run of other settings or data.
    """
    out, device = Path(args.out), next(state["model"].parameters()).device
    now = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **environment(device)}
    record, log = {"args": vars(args), **now, "data_sha256": about["data_sha256"], "resumed": []}, []
    if (out / "args.json").exists():
        if not args.resume:
            raise InputError(f"{out} already holds a run: --resume to go on, or choose another --out")
        before, mine = json.loads((out / "args.json").read_text()), json.loads(json.dumps(record))
        differ = differences(before["args"], mine["args"], vars(defaults))
        if before["command"][0] != mine["command"][0]:
            differ = [f"the script was {before['command'][0]}"]
        if before["data_sha256"] != mine["data_sha256"]:
            differ.append("it was with other data")
        if differ:
            raise InputError(f"{out} was started with other arguments: {'; '.join(differ)}")
        log = restore(out, state, about["measure"], args.epochs)
        record = {**before, "resumed": [*before["resumed"], {"epoch": len(log), **now}]}
    elif (out / "last.pt").exists() or (out / "best.pt").exists():
        raise InputError(f"{out} holds a checkpoint but no args.json: choose another --out")
    barrier()  # every process has looked before the first one writes
    if log:
        print(f"{out} has finished" if len(log) == args.epochs else
              f"going on with {out} after epoch {len(log)}")
    if len(log) < args.epochs:
        write_json(out / "args.json", record)
    return log


def restore(out, state, measure, epochs):
    """Put the state back and return the log. Whatever the moment a run was killed at, best.pt and log.jsonl
    agree with last.pt afterwards. Raises InputError if there is more of a run, but no last.pt any more."""
    if not (out / "last.pt").exists():
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        if len(lines) == epochs:  # finished; its checkpoints were deleted to save disk
            return [json.loads(line) for line in lines]
        if lines or (out / "best.pt").exists():
            raise InputError(f"{out} holds no last.pt any more and cannot go on: choose another --out")
        return []  # killed in its first epoch
    checkpoint = load_checkpoint(out / "last.pt")
    state.get("average", state["model"]).load_state_dict(checkpoint["state_dict"])
    for name, saved in checkpoint.pop("others").items():
        state[name].load_state_dict(saved)
    write_best_and_log(out, checkpoint, measure)
    return checkpoint["log"]


def save(out, state, log, about):
    """Put an epoch on the disk: last.pt, best.pt if it is the best so far, and log.jsonl.

    state: {"model", "optimizer" ...: what --resume restores}; "average", if there is one, is what is tested,
    and then the checkpoint's state_dict. log: an entry an epoch. about: what else eval_aa.py has to know;
    "measure" is the key of log entries that chooses the best. Raises FloatingPointError if a weight is not
    finite.
    """
    if rank() > 0:
        return
    tested = state.get("average", state["model"])
    weights = {k: v.cpu() for k, v in tested.state_dict().items()}
    if not all(v.isfinite().all() for v in weights.values()):
        raise FloatingPointError(f"a weight is not finite at the end of epoch {len(log)}")
    checkpoint = {"state_dict": weights, "epoch": len(log), "log": log, **about}
    others = {k: v.state_dict() for k, v in state.items() if v is not tested}
    save_checkpoint(Path(out, "last.pt"), {**checkpoint, "others": others})
    write_best_and_log(Path(out), checkpoint, about["measure"])


def write_best_and_log(out, checkpoint, measure):
    if best(checkpoint["log"], measure) is checkpoint["log"][-1]:
        save_checkpoint(out / "best.pt", checkpoint)
    write_whole(out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in checkpoint["log"]).encode())


def best(log, measure):
    """The entry of the best epoch, the first of equals, or None if none was tested."""
    return max((e for e in log if e.get(measure) is not None), key=lambda e: e[measure], default=None)


def show_epoch(log, args, measure):
    """Print a line for the last epoch of the log, starred if it is the best so far."""
    entry, (split, _) = log[-1], measure.split("_")
    keys = ("train_adv_acc", "train_clean_acc", f"{split}_clean", f"{split}_pgd10")
    adv, clean, test_clean, pgd10 = ("   -  " if entry.get(k) is None else f"{entry[k]:6.2f}" for k in keys)
    left = datetime.timedelta(seconds=round(entry["seconds"] * (args.epochs - entry["epoch"])))
    print(f"{entry['epoch']:4}/{args.epochs}  lr {entry['lr']:.1e}  loss {entry['train_loss']:.4f}  "
          f"train adv {adv} clean {clean}  {split} clean {test_clean} PGD-10 {pgd10} "
          f"{'*' if best(log, measure) is entry else ' '}  {entry['seconds']:.0f} s, {left} left", flush=True)
