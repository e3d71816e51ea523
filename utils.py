"""What the scripts share. The science comes first and stands by itself: with `models/` it is enough for a
training loop of your own. To understand the experiments, read up to "A run".

Images are x (B, 3, 32, 32) float32 in [0, 1], labels y (B,) int64; eps and alpha are on that [0, 1] scale
(8/255, not 8); time t is in epochs, from 0, and may be fractional: epoch + step / steps_per_epoch. `model` is
any module from x to logits (B, K); normalisation and precision live inside it.

Random numbers come from generators that are seeded by what they are for: (seed, "attack", epoch, step). So a
run can be resumed at any epoch, and a trick that draws random numbers does not change those of another.
"""

import argparse
import contextlib
import datetime
import errno
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
import time
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


def load_dataset(name, device="cpu", data_dir="data"):
    """The Dataset called "cifar10" or "cifar100", or that of an .npz file, on the device.

    The file holds train_images (N, 32, 32, 3) uint8, train_labels (N,) integers from 0 without a gap,
    test_images and test_labels. A named data set is data_dir/NAME.npz, which data/prepare.py fetches on first
    use.
    """
    path = Path(name)
    if name in ("cifar10", "cifar100"):
        path, prepare = Path(data_dir, f"{name}.npz"), HERE / "data" / "prepare.py"
        fetch = [sys.executable, prepare, name, "--data-dir", data_dir, "--parent", str(os.getpid())]
        if not path.exists() and subprocess.run(fetch).returncode:
            raise InputError(f"there is no {path}, and {prepare} could not fetch it")
    with np.load(path, allow_pickle=False) as npz:
        arrays = {k: npz[k] for k in Dataset._fields[:4]}
    num_classes = 1 + int(max(arrays["train_labels"].max(), arrays["test_labels"].max()))
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        n = len(labels)
        form = images.dtype, images.shape, labels.shape, labels.dtype.kind in "iu"
        if form != (np.uint8, (n, 32, 32, 3), (n,), True):
            raise InputError(f"{path}: {split}_images is {images.dtype} {images.shape} and {split}_labels "
                             f"{labels.dtype} {labels.shape}, not uint8 (N, 32, 32, 3) and integers (N,)")
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    every = np.array_equal(np.unique(arrays["train_labels"]), np.arange(num_classes))
    if not every or arrays["test_labels"].min() < 0:
        raise InputError(f"{path}: labels are not from 0 to {num_classes - 1}, each of them in train_labels")
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a) for a in arrays.values())).hexdigest()
    return Dataset(*(torch.from_numpy(a).to(device) for a in arrays.values()), num_classes, digest)


def training_images(data, n=None, n_val=0):
    """[(images, labels) to train on, (images, labels) held out]: the first n training images, or all of them,
    less n_val. Which ones are held out depends on n alone, not on the run's seed."""
    n = n or len(data.train_labels)
    if not n_val < n <= len(data.train_labels):
        raise InputError(f"--n-train {n}, --val {n_val}: there are {len(data.train_labels)} training images")
    order = torch.from_numpy(np.random.RandomState(0).permutation(n)).to(data.train_labels.device)
    parts = order[n_val:].sort().values, order[:n_val]
    return [(data.train_images[part], data.train_labels[part]) for part in parts]


def to_float(images):
    """uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32) in [0, 1], channels-last, which costs no copy."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def crop_flip(x, top, left, flip, padding):
    """Random crops of the images padded by 4, each with its own offset and mirrored if flip says so.

    x (B, 3, 32, 32); top, left (B,) int64 in 0..8: the crop's corner in the padded image; flip (B,) bool;
    padding: "reflect" (PGD-AT) or "constant", with zeros (TRADES). Returns the same shape, channels-last.
    """
    i = torch.arange(32, device=x.device)
    rows = top[:, None] + i                                         # (B, 32) in 0..39
    cols = left[:, None] + torch.where(flip[:, None], 31 - i, i)
    b = torch.arange(len(x), device=x.device)[:, None, None]
    padded = F.pad(x, (4, 4, 4, 4), padding)                        # (B, 3, 40, 40)
    return padded[b, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def batches(images, labels, batch_size, rng, padding, shard=slice(None)):
    """One epoch in random order: yields augmented x (B, 3, 32, 32), y (B,). The last, smaller batch is kept.
    x is channels-last: a module that calls x.view needs x.contiguous().

    Every image gets its own crop and flip, drawn on the device at the start of the epoch. shard: the part of
    every batch to yield, another one for each of several processes.
    """
    n, device = len(images), images.device
    order = torch.randperm(n, generator=rng, device=device)
    offset = torch.randint(9, (2, n), generator=rng, device=device)
    flip = torch.randint(2, (n,), generator=rng, device=device).bool()
    for i in range(0, n, batch_size):
        index, (top, left), flipped = (t[..., i : i + batch_size][..., shard] for t in (order, offset, flip))
        yield crop_flip(to_float(images[index]), top, left, flipped, padding), labels[index]


def seeded(device, *key):
    """A generator on the device for the key: seeded(device, seed, "attack", epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---- Attack ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attack_mode(model, bn_mode):
    """Inside, the model is in train or eval mode and its parameters are frozen, so that no backward pass
    computes weight gradients. Afterwards all is as before.

    bn_mode: "train" (batch statistics, and every forward pass moves the running ones) or "eval".
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


def random_start(x, eps, rng):
    """x + U(-eps, eps), clipped to [0, 1]."""
    return (x + torch.empty_like(x).uniform_(-eps, eps, generator=rng)).clamp_(0, 1)


def linf_step(x, x_adv, grad, eps, alpha):
    """x_adv + alpha * sign(grad), projected to the eps-ball around x and clipped to [0, 1] (Eq. 1)."""
    x_adv = x_adv + alpha * grad.sign()
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp_(0, 1)


def pgd(model, x, y, x_start, eps, alpha, steps, tolerance=None):
    """L-inf PGD (Madry et al., 2018): images (B, 3, 32, 32), `steps` steps from x_start that increase the
    cross-entropy. Call it inside attack_mode.

    tolerance, for early-stopped PGD (Zhang et al., 2020): an image stops moving once it has been
    misclassified that many times, and the attack ends when all have stopped.
    """
    x_adv = x_start
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


def evaluate(model, images, labels, eps, steps=10, alpha=2 / 255, seed=0, batch_size=250, shard=slice(None)):
    """(clean, robust, margin), (N,) each: which images are classified right, as they are and under PGD, and
    the label's logit less the largest other one under PGD (-inf if one is not finite).

    The defaults are the paper's PGD-10: one uniform start, and an image counts as robust if the last iterate
    is classified right (as in robust_overfitting; the paper's checkpoints were chosen like that). images
    (N, 32, 32, 3) uint8. steps=0 leaves PGD out. An image's start does not depend on the batch size. shard:
    the images to evaluate; the others stay False and 0.
    """
    n, device = len(images), images.device
    clean, robust = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))
    margin = torch.zeros(n, device=device)
    noise = torch.empty(images.shape, device=device)
    noise.uniform_(-eps, eps, generator=seeded(device, seed, "evaluation", 0))
    parts = torch.arange(n, device=device)[shard].split(batch_size)
    with attack_mode(model, "eval"):
        for index in progress(parts, f"PGD-{steps}"):
            x, y = to_float(images[index]).contiguous(), labels[index]  # anyone's module may call .view
            with torch.no_grad():
                logits = model(x)
            clean[index] = classified_right(logits, y)
            if steps:
                x_start = (x + noise[index].permute(0, 3, 1, 2)).clamp_(0, 1)
                x_adv = pgd(model, x, y, x_start, eps, alpha, steps)
                with torch.no_grad():
                    logits = model(x_adv)
            robust[index] = classified_right(logits, y)
            others = logits.scatter(1, y[:, None], -math.inf).max(1).values
            at_label = logits.gather(1, y[:, None]).squeeze(1)
            margin[index] = (at_label - others).float().where(logits.isfinite().all(1), -math.inf)
    return clean, robust, margin


def classified_right(logits, y):
    """(B,) bool: the label's logit is the largest, and all of the image's logits (B, K) are finite."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def percent(flags):
    """The share of True in a bool tensor, in per cent with two decimals, as the paper prints accuracies."""
    return round(100 * flags.sum().item() / len(flags), 2)


# ---- Loss, schedules, optimisers ---------------------------------------------------------------------------

SCHEDULES = ("piecewise", "cosine", "onecycle")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "sgd-gc", "sgd-gcc")  # the columns of Table 5


def smoothed_cross_entropy(logits, y, smoothing):
    """Mean cross-entropy with target 1 - smoothing on the label and smoothing / (K-1) on each *other* class
    (Table 4).

    logits (B, K), 0 <= smoothing < 1. torch's own label_smoothing=e spreads e over all K classes, so it gives
    the same with e = smoothing * K / (K-1).
    """
    log_p = F.log_softmax(logits, dim=1)
    on_label = -log_p.gather(1, y[:, None]).squeeze(1)                    # (B,)
    off_label = (-log_p.sum(1) - on_label) / (logits.shape[1] - 1)        # (B,) mean over the other classes
    return ((1 - smoothing) * on_label + smoothing * off_label).mean()


def warmup(t, epochs):
    """A factor that rises linearly from 0 at t = 0 to 1 at t = epochs and stays there (Table 2)."""
    return min(1.0, t / epochs) if epochs else 1.0


def lr_at(t, lr, schedule="piecewise", epochs=110, decay_epochs=(100, 105), decay_factor=0.1):
    """The learning rate at time t (epochs).

    piecewise, the paper's: multiplied at each of decay_epochs by decay_factor, or by its own of several
    factors; epochs has no effect. cosine: half a cosine from lr to 0 over the epochs. onecycle: from 0 to lr
    in the first half of the epochs and back to 0 in the second (Wong et al., 2020).
    """
    if schedule == "piecewise":
        factors = np.broadcast_to(decay_factor, len(decay_epochs)).tolist()
        return lr * math.prod(factor for epoch, factor in zip(decay_epochs, factors) if t >= epoch)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * t / epochs))
    if schedule == "onecycle":
        return lr * (1 - abs(2 * t / epochs - 1))
    raise ValueError(f"unknown schedule {schedule!r}")


def make_optimizer(model, name, lr, wd, momentum=0.9):
    """One of Table 5's optimisers; weight decay acts on all parameters, batch norm and biases included.

    sgd-gc and sgd-gcc centralise gradients (Yong et al., 2020): from the gradient of every parameter with
    more than one dimension (gcc: of convolutions only) its mean over all but the first dimension is
    subtracted, after weight decay has been added.
    """
    params = list(model.parameters())
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(params, lr=lr, weight_decay=wd)
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=wd, nesterov=name == "nesterov")
    if name not in ("sgd-gc", "sgd-gcc"):
        raise ValueError(f"unknown optimiser {name!r}")
    min_dim = 2 if name == "sgd-gc" else 4
    centred, others = [p for p in params if p.dim() >= min_dim], [p for p in params if p.dim() < min_dim]

    @torch.no_grad()
    def centralise(optimizer, args, kwargs):
        for p in centred:
            p.grad.add_(p, alpha=wd)  # SGD would add it after the mean has been subtracted
            p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True))

    groups = [{"params": centred, "weight_decay": 0.0}, {"params": others, "weight_decay": wd}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    optimizer.register_step_pre_hook(centralise)
    return optimizer


# ---- Tricks since the paper --------------------------------------------------------------------------------


@torch.no_grad()
def update_average(average, model, decay, n):
    """average <- d * average + (1 - d) * model, of the weights and of batch norm's running statistics.

    average: a copy of the model. n: how many updates came before; d = min(decay, (1 + n) / (10 + n)), since
    there is little to average at first. The FastAT benchmark (github.com/fzjcdt/FastAT_Benchmark) averages
    the statistics too, as here; DeepMind's code (Gowal et al., 2020) tests averaged weights with the trained
    model's statistics.
    """
    decay = min(decay, (1 + n) / (10 + n))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    averaged, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()])
    torch._foreach_lerp_(averaged, values, 1 - decay)  # few launches instead of one a tensor
    for a, value in pairs:
        if not a.is_floating_point():  # batch norm's counters
            a.copy_(value)


@contextlib.contextmanager
def perturbed_weights(model, loss, gamma):
    """Adversarial weight perturbation (Wu et al., 2020): inside, the weights are moved up the loss; then they
    are put back, bit for bit. Call backward() inside and optimizer.step() afterwards.

    Every tensor w with more than one dimension becomes w + gamma |w| / |g| g, where g is the gradient of
    loss() by w. Computing it leaves the running statistics alone: the authors' code
    (github.com/csdongxian/AWP) uses a copy of the model for it, in train mode.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    weights_before, statistics_before = copy_values(weights), copy_values(model.buffers())
    gradients = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for w, g in zip(weights, gradients):
            w.add_(gamma * w.norm() / (g.norm() + 1e-20) * g)
    put_back(statistics_before)
    try:
        yield
    finally:
        put_back(weights_before)


def copy_values(tensors):
    return [(t, t.detach().clone()) for t in tensors]


@torch.no_grad()
def put_back(copied):
    for tensor, value in copied:
        tensor.copy_(value)


# ---- A run -------------------------------------------------------------------------------------------------

# `torchrun --nproc_per_node=N -- SCRIPT` starts N processes. Every one holds all data and works on its shard
# of every batch; only the first one prints and writes. Without torchrun a cluster's own RANK is ignored.
WORLD, RANK = (int(os.environ[key]) if dist.is_torchelastic_launched() else default
               for key, default in (("WORLD_SIZE", 1), ("RANK", 0)))
SHARD = slice(RANK, None, WORLD)
# A bar if stderr is a terminal. A closed stderr is None.
progress = partial(tqdm, leave=False, disable=True if RANK or sys.stderr is None else None)


# The command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and shows each flag's default, except None and False."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


# {(low, high): the flags, of all scripts, whose numbers have to be at least low and below high}
BOUNDS = {
    (0, 1): "eps alpha momentum ls ema",
    (0, math.inf): "lr wd beta awp awp_warmup warmup_lr warmup_eps lr_decay_epochs lr_decay_factor "
                   "early_stop_pgd time_scale val mean error",
    (1, math.inf): "epochs batch_size test_batch_size steps n_train eval_every eval_from n stop_after",
    (1e-6, math.inf): "std",
    (0, 2**63): "seed",
}


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags. A bad command line ends with one line and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, *argv):
        args = super().parse_args(*argv)
        for (low, high), flags in BOUNDS.items():
            for flag in flags.split():
                values = getattr(args, flag, None)
                if values is not None and not all(low <= v < high for v in np.ravel(values)):  # nor NaN
                    below = f" and below {high:g}" if high < math.inf else ""
                    self.error(f"--{flag.replace('_', '-')} has to be at least {low:g}{below}")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def changed(self, args):
        """{flag: value} of what differs from a command line without flags."""
        defaults = vars(self.parse_args([]))
        return {flag: value for flag, value in vars(args).items() if value != defaults[flag]}

    def refuse(self, args, condition, *flags):
        """End with status 2 if one of the flags was set although it has no effect under this condition."""
        for flag in self.changed(args):
            if flag in flags:
                self.error(f"--{flag.replace('_', '-')} has no effect with {condition}")


def fraction(text):
    """An argparse type for eps and alpha: "8/255" or "0.031". It refuses 1 too, which is a typo for 1/255."""
    top, _, bottom = text.partition("/")
    value = float(top) / (float(bottom or 1) or math.nan)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not on the [0, 1] scale of the images: write "8/255"')
    return value


# Flags that say where and how a run happens, not what is trained. They may change when it is resumed.
NOT_A_SETTING = ("test_batch_size", "out", "resume", "data_dir", "device", "time_scale", "dry_run")


def settle(parser, args, prefix):
    """What both training scripts do with their flags: refuse those that would have no effect, apply
    --time-scale, and choose --lr and --out if they are not given."""
    adam = args.optimizer in ("adam", "adamw")
    if np.size(args.lr_decay_factor) == 1:
        args.lr_decay_factor = np.ravel(args.lr_decay_factor)[0].item()  # [0.1] is the default, 0.1
    if adam:
        parser.refuse(args, f"--optimizer {args.optimizer}", "momentum")
    if args.awp == 0:
        parser.refuse(args, "--awp 0", "awp_warmup")
    if args.lr_schedule != "piecewise":
        parser.refuse(args, f"--lr-schedule {args.lr_schedule}", "lr_decay_epochs", "lr_decay_factor")
    if np.size(args.lr_decay_factor) not in (1, len(args.lr_decay_epochs)):
        parser.error("--lr-decay-factor takes one factor, or one for each of --lr-decay-epochs")

    def scaled(epochs):
        if isinstance(epochs, list):
            return [scaled(e) for e in epochs]
        rounded = int(epochs * args.time_scale + 0.5)
        if epochs and not rounded:
            parser.error(f"--time-scale {args.time_scale:g} leaves nothing of {epochs:g} epochs")
        return rounded

    if args.time_scale != 1:
        for flag in ("epochs", "lr_decay_epochs", "warmup_lr", "warmup_eps", "early_stop_pgd", "awp_warmup"):
            if epochs := getattr(args, flag, None):
                setattr(args, flag, scaled(epochs))
    for flag in ["early_stop_pgd"] + ["lr_decay_epochs"] * (args.lr_schedule == "piecewise"):
        epochs = getattr(args, flag, None) or []
        if epochs != sorted(set(epochs)):
            parser.error(f"--{flag.replace('_', '-')} has to rise, but is {epochs}, scaled by --time-scale")

    if args.out is None:  # flags that differ, joined by "-", a number without: runs/pgdat-ls0.1-bn-mode-eval
        changed = {k: v for k, v in parser.changed(args).items() if k not in NOT_A_SETTING}
        words = [f"{k}-{v}" if isinstance(v, str) else f"{k}{v}" for k, v in changed.items()]
        args.out = "runs/" + re.sub(r"[^\w.]+|_", "-", "-".join([prefix, *words])).strip("-")
    if args.lr is None:
        args.lr = 1e-4 if adam else 0.1
    return args


def show_setting(args, defaults):
    """Print the flags that differ from the defaults. args.json has all of them."""
    print("setting:", ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items()
                                if v != getattr(defaults, k)) or "the defaults")
    late = [e for e in args.lr_decay_epochs if e >= args.epochs]
    if args.lr_schedule == "piecewise" and late:
        print(f"warning: the run ends, after {args.epochs} epochs, before the learning rate decays at {late}")


def run_script(main):
    """Run main(). Exit status: 2 for errors that the user can fix, with one line on stderr; 1 if training
    diverges; 130 after Ctrl-C."""
    def stop(status, line):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(status)

    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows every line at once
    try:
        main()
        if dist.is_initialized():
            sum_over_processes(torch.zeros(1))  # wait for the other processes
            dist.destroy_process_group()
    except (InputError, OSError) as e:
        stop(2, f"error: {e}")
    except FloatingPointError as e:
        stop(1, f"stopped: {e}; the last checkpoint, if there is one, is of an earlier epoch")
    except KeyboardInterrupt:
        stop(130, "interrupted: to continue, add --resume; an evaluation needs no flag")
    except RuntimeError as e:
        if not isinstance(e, torch._dynamo.exc.BackendCompilerFailed):
            raise
        stop(2, f"error: --compile: {str(e).splitlines()[0]}")  # no C++ compiler, for example
    finally:
        LOCKS.clear()


# The device, and several processes


def start_device(args):
    """The torch.device of --device. Connects torchrun's processes, and fills in the flags that depend on the
    device: --precision and --test-batch-size."""
    device = pick_device(args.device)
    if WORLD > 1:
        patience = datetime.timedelta(days=7)  # one may wait an hour for another's batch of AutoAttack
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    args.precision = set_precision(args.precision, device)
    if "test_batch_size" in args and args.test_batch_size is None:
        args.test_batch_size = 1000 if device.type == "cuda" else 250
    print(f"device {device}: {device_name(device)}, torch {torch.__version__}, {args.precision}")
    return device


def pick_device(name):
    """The torch.device called "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Under torchrun
    "cuda" means a different GPU in each process. Raises InputError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK'] if WORLD > 1 else 0}"
    try:
        if name != "cpu":
            torch.cuda.set_device(name)
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as e:  # no GPU, no such GPU, out of memory ...
        raise InputError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def device_name(device):
    """The GPU; or the CPU with its instruction set and the threads, which decide the last digits there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.search(r"^model name\s*:\s*(.*)", cpu_info(), re.M)
    return (f"{name[1] if name else platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads")


def cpu_info():
    """Linux' description of the processor; elsewhere an empty string."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def set_precision(precision, device):
    """Make torch compute in "fp32" (strict), "tf32" (torch's default on CUDA: TF32 in convolutions) or "bf16"
    (autocast, inside models.Network). None means tf32 on CUDA, fp32 elsewhere. Returns the name."""
    precision = precision or ("tf32" if device.type == "cuda" else "fp32")
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 exists on CUDA only")
    has_bf16 = device.type == "cuda" or re.search(r"avx512_bf16|amx_bf16|\bbf16", cpu_info())
    if precision == "bf16" and not has_bf16:  # torch could, but many times slower than in fp32
        raise InputError("--precision bf16: this CPU has no AVX512-BF16, AMX or Arm BF16 instructions")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True  # training and PGD-10 have few shapes
    torch.set_float32_matmul_precision("highest")  # torch's default, unless the environment says otherwise
    return precision


def sum_over_processes(tensor):
    """The sum of a tensor over the processes. For bool tensors: where it is True in any of them."""
    if WORLD == 1:
        return tensor
    total = tensor.int() if tensor.dtype == torch.bool else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def share_training(model, optimizer, args, n_train):
    """If torchrun started several processes, let them train the model together.

    On CUDA batch norm uses the statistics of the whole batch. torch has no such layer for the CPU: there
    every process normalises by its own part, and all use the first one's running statistics, as with
    DataParallel, which the authors used.
    """
    if WORLD == 1:
        return
    if args.batch_size % WORLD or n_train % args.batch_size % WORLD:
        raise InputError(f"{WORLD} processes cannot split batches of {args.batch_size} of {n_train} images, "
                         "and the last one of an epoch, evenly")
    if args.awp or args.compile or getattr(args, "early_stop_pgd", None):
        raise InputError("--awp, --early-stop-pgd and --compile run in one process only")

    def take_first_ones_statistics(model, x, logits):
        if model.training:
            for buffer in model.buffers():
                dist.broadcast(buffer.data, 0)  # .data: unseen by autograd

    def average_gradients(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= WORLD

    if next(model.parameters()).device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        model.register_forward_hook(take_first_ones_statistics)
    optimizer.register_step_pre_hook(average_gradients)


# The training attack in a CUDA graph


def uncompiled(condition):
    """A context in which compiled models run uncompiled, if the condition holds. For the last, smaller batch
    of an epoch, and for the tests, compiling takes longer than it saves."""
    return torch.compiler.set_stance("force_eager") if condition else contextlib.nullcontext()


class CapturedAttack:
    """attack(*tensors, eps) -> x' in one launch. The first call with tensors of certain shapes captures the
    attack in a CUDA graph; every call replays it.

    Launching thousands of kernels takes the host longer than running them takes the GPU. The graph uses the
    model's weights and running statistics in place. The next call overwrites x'.
    """

    def __init__(self, attack, model):
        self.attack, self.model, self.graphs = attack, model, {}

    def __call__(self, *arguments):
        *tensors, eps = arguments
        tensors.append(torch.full((), eps, dtype=tensors[0].dtype, device=tensors[0].device))
        shapes = tuple(t.shape for t in tensors)
        if shapes not in self.graphs:
            inputs, statistics = [t.clone() for t in tensors], copy_values(self.model.buffers())
            self.graphs[shapes] = inputs, *capture(partial(self.attack, *inputs))
            put_back(statistics)  # which the warm-up in capture() moved
        inputs, graph, x_adv = self.graphs[shapes]
        for captured, given in zip(inputs, tensors):
            captured.copy_(given)
        graph.replay()
        return x_adv


def capture(function):
    """(a CUDA graph of function(), the tensor that its replays write)."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm-up: compilation and cuDNN's choice of algorithms cannot be captured
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        return graph, function()


# The figures of an epoch


class Meter:
    """Sums over the steps of an epoch. They stay on the device, so that no step waits for the host."""

    def __init__(self, device):
        self.sums = torch.zeros(4, device=device)  # loss, correct adversarial, correct clean, all images

    @torch.no_grad()
    def add(self, loss, y, adv_logits, clean_logits):
        """Count a step: mean loss, labels (B,), logits (B, K) of adversarial and of clean images, or None."""
        self.known = adv_logits is not None, clean_logits is not None
        correct = [(logits.argmax(1) == y).sum() if logits is not None else torch.zeros_like(loss)
                   for logits in (adv_logits, clean_logits)]
        self.sums += torch.stack([loss * len(y), *correct, torch.full_like(loss, len(y))])

    def read(self):
        """The training figures for the log. Raises FloatingPointError if a loss was not finite."""
        loss, *correct, images = sum_over_processes(self.sums).tolist()  # waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError("the loss is not finite")
        adv, clean = (round(100 * n / images, 2) if known else None for n, known in zip(correct, self.known))
        return {"train_loss": round(loss / images, 5), "train_adv_acc": adv, "train_clean_acc": clean}


def test_pgd10(model, splits, args, epoch):
    """Test figures for the log, of {split: (images, labels)}; {} if --eval-from and --eval-every leave this
    epoch (from 1) out. The last one is always tested. After standard training PGD-10 is left out."""
    if epoch < args.epochs and (epoch < args.eval_from or epoch % args.eval_every):
        return {}
    figures = {}
    steps = 0 if getattr(args, "attack", "pgd") == "none" else 10  # train_trades.py has no --attack
    for split, (images, labels) in splits.items():
        with uncompiled(args.compile):
            flags = evaluate(model, images, labels, args.eps, steps, seed=(args.seed, epoch - 1),
                             batch_size=args.test_batch_size, shard=SHARD)[:2]
        clean, robust = (percent(sum_over_processes(f)) for f in flags)
        figures |= {f"{split}_clean": clean, f"{split}_pgd10": robust if steps else None}
    return figures


def best(log):
    """The log entry of the best epoch, or None if none was tested: the first with the highest PGD-10 accuracy
    (after standard training: clean accuracy) on the held-out images, or if there are none on the test set."""
    for key in ("val_pgd10", "val_clean", "test_pgd10", "test_clean"):
        if tested := [e for e in log if e.get(key) is not None]:
            return max(tested, key=lambda e: e[key])


def show_epoch(args, log):
    """Print a line for the last epoch of the log, starred if it is the best so far, with the time left."""
    entry, split = log[-1], "val" if args.val else "test"
    keys = ("train_adv_acc", "train_clean_acc", f"{split}_clean", f"{split}_pgd10")
    adv, clean, test_clean, pgd10 = ("   -  " if entry.get(k) is None else f"{entry[k]:6.2f}" for k in keys)
    left = (args.epochs - len(log)) * np.mean([e["seconds"] for e in log])
    print(f"{entry['epoch']:4}/{args.epochs}  lr {entry['lr']:.1e}  loss {entry['train_loss']:.4f}  "
          f"train adv {adv} clean {clean}  {split} clean {test_clean} PGD-10 {pgd10} "
          f"{'*' if best(log) is entry else ' '}  {entry['seconds']:.0f} s, "
          f"{datetime.timedelta(seconds=round(left))} left")


# Files. last.pt is the run: its setting, log and state. It is written first, and --resume writes best.pt and
# log.jsonl again, so that they agree with it whenever the run was killed.

LOCKS = []  # files that are open, and locked, until the script ends


def start_or_resume(args, saved, defaults):
    """Start a run in the folder args.out, or resume the one that is there. Returns its log, [] at the start.

    saved: what checkpoints hold, by name. To resume, every object with a state_dict is loaded from last.pt;
    setting, versions and device are added here. defaults: the args of a command line without flags, for flags
    that did not exist when the run was started. Raises InputError if the folder holds a run and --resume is
    not given, or if that run has another setting.
    """
    out, log = Path(args.out), []
    now = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]],
           **environment(next(saved["state_dict"].parameters()).device)}
    saved |= {"args": vars(args), **now, "resumed": []}
    LOCKS.append(lock(out))
    if any((out / name).exists() for name in ("last.pt", "best.pt", "log.jsonl")):
        if not args.resume:
            raise InputError(f"{out} already holds a run: --resume to go on, or choose another --out")
        before = load_checkpoint(out / "last.pt")
        was, is_now = ({**run["args"], "script": run["command"][0], "data": run["data_sha256"]}
                       for run in (before, saved))
        if differ := differences(was, is_now, vars(defaults)):
            raise InputError(f"{out} was started with other arguments: {'; '.join(differ)}")
        log = before["log"]
        saved |= {k: before[k] for k in ("args", *now)}  # as it was started; "resumed" says how it went on
        saved["resumed"] = [*before["resumed"], {"epoch": len(log), **now}]
        for name, part in saved.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(before[name])
        write_best_and_log(out, before)
        print(f"{out} " + ("has finished" if len(log) == args.epochs else f"resumes after epoch {len(log)}"))
    if len(log) < args.epochs:
        write_json(out / "args.json", {k: v for k, v in saved.items() if not hasattr(v, "state_dict")})
    return log


def differences(before, now, defaults):
    """Which settings differ between the args of two runs, in words. A flag that a run does not know counts
    as its default. The path of the data set is not a setting."""
    keys = [k for k in sorted(before | now) if k not in (*NOT_A_SETTING, "dataset")]
    pairs = [(k, before.get(k, defaults.get(k)), now.get(k, defaults.get(k))) for k in keys]
    return [f"--{k.replace('_', '-')} was {old}, is {new}" for k, old, new in pairs if old != new]


def save(args, saved, log):
    """Write last.pt, best.pt if the last epoch of the log is the best, and log.jsonl. That is done after the
    first epoch, a best one and the last one, and otherwise once a minute. Raises FloatingPointError if a
    weight is not finite."""
    last = Path(args.out, "last.pt")
    due = len(log) == args.epochs or best(log) is log[-1] or not last.exists()
    if RANK > 0 or not due and time.time() - last.stat().st_mtime < 60:
        return
    checkpoint = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in saved.items()}
    weights = {k: v.cpu() for k, v in checkpoint["state_dict"].items()}  # for machines without a GPU
    if not all(v.isfinite().all() for v in weights.values()):
        raise FloatingPointError("a weight is not finite")
    checkpoint |= {"state_dict": weights, "epoch": len(log), "log": log}
    write_whole(last, partial(torch.save, checkpoint))
    write_best_and_log(last.parent, checkpoint)


def write_best_and_log(out, checkpoint):
    log = checkpoint["log"]
    if best(log) is log[-1]:
        checkpoint = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
        write_whole(out / "best.pt", partial(torch.save, checkpoint))
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_whole(out / "log.jsonl", lambda file: file.write(lines.encode()))


def load_checkpoint(path):
    """What torch.save wrote, on the CPU. Raises InputError if the file is damaged, or holds more than tensors
    and plain values: unpickling it could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        reason = (f"it holds an object of {foreign[1]}, which could run code: save the state dict alone"
                  if foreign else "it is damaged, or not a file of torch.save")
        raise InputError(f"{path} cannot be read as a checkpoint: {reason}") from None


def write_json(path, value):
    write_whole(path, lambda file: file.write(f"{json.dumps(value, indent=2)}\n".encode()))


def write_whole(path, write):
    """Let write(file) fill a temporary file, then rename it: a kill leaves the old file or the new one. Only
    the first process writes. Raises InputError if the disk is full."""
    if RANK > 0:
        return
    path, whole = Path(path), io.BytesIO()
    write(whole)  # not into the file: torch.save would hide a full disk, or a Ctrl-C
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            try:
                os.fsync(file.fileno())  # where a full disk or quota may show first
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # no fsync here
                    raise
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {e.strerror}") from None
    os.replace(temporary, path)


def lock(folder, name=".lock"):
    """Make the folder and lock it. Returns the file that holds the lock until it is closed. Raises InputError
    if another process has locked it."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{folder} is a link to {folder.readlink()}, which is not there")
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, "w")
    try:
        if RANK == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is working in {folder}") from None
    except OSError:
        pass  # the file systems of many clusters have no locks
    return file


def environment(device):
    """Where numbers come from: commit, versions, device."""
    def git(command):  # None where there is no git, or no repository
        done = subprocess.run(f"git {command}", shell=True, cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status --porcelain")
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                "cuda": torch.version.cuda if device.type == "cuda" else None}
    return {"git_commit": git("rev-parse HEAD"), "git_dirty": None if changes is None else bool(changes),
            "versions": versions, "device": device_name(device), "processes": WORLD}
