"""The science that the scripts share: data, attack, losses, schedules, optimisers.

It needs torch and numpy and nothing else of this repository: with `models/` it serves a loop of your own.

Conventions: images are x (B, 3, 32, 32) float32 in [0, 1]; labels y (B,) int64; eps and alpha are on that
same [0, 1] scale (8/255, not 8); time t is in epochs and may be fractional (epoch + step / steps, epochs from
0). Normalisation lives inside the model. `forward` is any callable from x to logits (B, K): the model itself,
or the model under autocast, compiled ...

Every random number of a run is drawn from a generator seeded by (seed, what it is for, epoch, step). A run
can therefore be resumed at any epoch without saving a generator's state, and nothing that one trick draws
moves what another one sees.
"""

import contextlib
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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


def load_dataset(path, device="cpu"):
    """The Dataset in an .npz file, on the device.

    The file holds train_images (N, 32, 32, 3) uint8, train_labels (N,) integers from 0, test_images,
    test_labels. Raises InputError if it does not, or cannot be read.
    """
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

    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {k: npz[k] for k in Dataset._fields[:4] if k in npz}
    except Exception:  # a damaged file can raise nearly anything
        raise InputError(f"{path} cannot be read as a data set: it is damaged, or not an .npz") from None
    missing = [k for k in Dataset._fields[:4] if k not in arrays]
    check(not missing, f"it has no {', '.join(missing)}")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        check(images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and len(images) > 0,
              f"{split}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)")
        check(labels.dtype.kind in "iu" and labels.shape == (len(images),),
              f"{split}_labels is {labels.dtype} {labels.shape}, not integers ({len(images)},)")
        check(0 <= labels.min() and labels.max() < 10_000,
              f"{split}_labels reach from {labels.min()} to {labels.max()}, not within 0 and 9,999")
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    check(arrays["train_labels"].max() > 0, "all training images are of class 0")
    return arrays


def hold_out(images, labels, n):
    """((images, labels) to train on, (images, labels) held out or None): the same n for every seed."""
    if n == 0:
        return (images, labels), None
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels))).to(labels.device)
    held, rest = order[:n], order[n:].sort().values
    return (images[rest], labels[rest]), (images[held], labels[held])


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


def batches(images, labels, batch_size, generator, padding, share=slice(None)):
    """One epoch in random order: yields augmented x (B, 3, 32, 32), y (B,). The last, smaller batch is kept.

    Every image gets its own crop and flip. All draws are made at the start of the epoch, on the device.
    share: the part of every batch to yield; of several processes each takes another one.
    """
    n, device = len(images), images.device
    order = torch.randperm(n, generator=generator, device=device)
    offset = torch.randint(9, (2, n), generator=generator, device=device)
    flip = torch.randint(2, (n,), generator=generator, device=device).bool()
    for i in range(0, n, batch_size):
        index, (top, left), flipped = (t[..., i : i + batch_size][..., share] for t in (order, offset, flip))
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


def pgd(forward, x, y, start, eps, alpha, steps, loss=F.cross_entropy, tolerance=None, fooled=None):
    """L-inf PGD (Madry et al., 2018): the adversarial examples (B, 3, 32, 32) after `steps` steps from
    `start`.

    Run it inside attack_mode. loss: callable (logits, y, reduction="sum") to be maximised. tolerance: None,
    or the number of times that an image may be found misclassified before it is no longer moved
    (early-stopped PGD, Zhang et al., 2020); the attack ends when all images have stopped. fooled: None, or a
    (B,) bool tensor in which every image is marked whose iterate, the start included and the result excluded,
    is misclassified.
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
            if not moving.any():
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
                 seed=0, batch_size=250, share=slice(None), progress=None):
    """Which images are classified right: a (3, N) bool tensor (clean, last, worst), to be averaged into
    accuracies.

    The defaults are the paper's PGD-10; restarts=0 is clean accuracy alone. images (N, 32, 32, 3) uint8.
    last: the last iterate of every restart is classified right (robust_overfitting's count, which selected
    the paper's checkpoints). worst: every iterate of every restart is, the random start included. Random
    starts belong to the images, whatever the batch size. Run it inside attack_mode(model, "eval"). share:
    which of the images to look at; the flags of the others are False, so that those of several processes add
    up. progress: called with a number of images done, for each restart.
    """
    n, device = len(images), images.device
    indices = torch.arange(n, device=device)[share].split(batch_size)
    flags = torch.zeros(3, n, dtype=torch.bool, device=device)
    clean, last, worst = flags
    for index in indices:
        with torch.no_grad():
            clean[index] = classified_right(forward(to_float(images[index])), labels[index])
        last[index] = worst[index] = True
    for restart in range(restarts):
        noise = torch.empty(images.shape, device=device)
        noise.uniform_(-eps, eps, generator=seeded(device, seed, "evaluation", restart))
        for index in indices:
            x, y = to_float(images[index]), labels[index]
            start = (x + noise[index].permute(0, 3, 1, 2)).clamp_(0, 1)
            fooled = ~worst[index]
            x_adv = pgd(forward, x, y, start, eps, alpha, steps, loss, fooled=fooled)
            with torch.no_grad():
                right = classified_right(forward(x_adv), y)
            last[index] &= right
            worst[index] = ~fooled & right
            if progress is not None:
                progress(len(index))
    return flags


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


def cw_loss(logits, y, reduction="mean"):
    """The margin max_{i != y} z_i - z_y of Carlini & Wagner (2017); positive means misclassified."""
    label = F.one_hot(y, logits.shape[1]).bool()
    margin = logits.masked_fill(label, -math.inf).amax(1) - logits[label]
    return margin.mean() if reduction == "mean" else margin.sum()


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
