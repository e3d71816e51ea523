"""The machinery around the science: flags, devices and precision, torchrun, the folder of a run, the console.

The paper speaks of none of it. The scripts call it as `runs.something`, so that a reader sees at every line
whether it is about the paper (utils.py) or about running things (here).

Under torchrun every process runs the same script: it holds all the data, works on its share of every batch,
and only the first one writes and prints.
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
import pickle
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils import Dataset, InputError, load_dataset

HERE = Path(__file__).resolve().parent


# ---- Command line ------------------------------------------------------------------------------------------


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
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which all say the same
        self.exit(2, f"{self.prog}: error: {message}\n" if first else None)


def number(low, high=math.inf, open_high=False, kind=float):
    """An argparse type: a number in [low, high], or in [low, high) with open_high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high or value == math.inf or (open_high and value == high):
            interval = f"in [{low}, {high}{')' if open_high else ']'}"
            bounds = f"at least {low}" if high >= 2**31 - 1 and value < low else interval
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value
    return parse


def integer(low):
    """An argparse type: a whole number from low to 2^31 - 1."""
    return number(low, 2**31 - 1, kind=int)


def fraction(text):
    """An argparse type for eps and alpha: "8/255" or "0.031", in [0, 1]."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        problem = f'{text!r} is neither a number nor a fraction like "8/255"'
        raise argparse.ArgumentTypeError(problem) from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text} is out of range: it is on the [0, 1] scale of the images; write "8/255" for 8 levels')
    return value


def fraction_text(value):
    """The fraction of 255 that a value is, or its digits: 8/255, 0.031."""
    levels = value * 255
    whole = abs(levels - round(levels)) < 1e-9 and value not in (0, 1)
    return f"{round(levels)}/255" if whole else f"{value:g}"


def add_flags(parser):
    """Add the flags of a training script that say where and how it runs."""
    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=integer(0), default=0, help="seed of weights, batches and attacks")
    g.add_argument("--eval-every", type=integer(1), default=1, metavar="EPOCHS",
                   help="test after every so many epochs, and after the last")
    g.add_argument("--test-batch-size", type=integer(1), default=250, help="images a batch in the tests")
    g.add_argument("--out", help="the run's folder (default: runs/ and what differs from the defaults)")
    g.add_argument("--resume", action="store_true",
                   help="go on with the run in that folder, if there is one: its command, with this flag")
    g.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use")
    g.add_argument("--n-train", type=integer(1), metavar="N",
                   help="train on the first N training images (default: all)")
    g.add_argument("--time-scale", type=number(0), default=1, metavar="F",
                   help="multiply every number of epochs above by F and round it: a whole recipe, faster")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                   help="arithmetic of the model (default: tf32 on CUDA, fp32 elsewhere)")
    g.add_argument("--compile", action="store_true",
                   help="compile the model with torch.compile; on CUDA replay the attack from a CUDA graph")
    g.add_argument("--dry-run", action="store_true", help="print the resolved setting and exit")


def without_effect(parser, args, condition, *flags):
    """Refuse, with exit status 2, a flag that was set although it does nothing under this condition."""
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} has no effect with {condition}")


def resolve(parser, args, prefix):
    """Fill in a training script's defaults that depend on other flags; refuse what contradicts itself."""
    adam = args.optimizer in ("adam", "adamw")
    if adam:
        without_effect(parser, args, f"--optimizer {args.optimizer}", "momentum")
    if args.optimizer == "nesterov" and args.momentum == 0:
        parser.error("--optimizer nesterov needs a --momentum above 0")
    if isinstance(args.lr_decay_factor, list):
        if len(args.lr_decay_factor) == 1:  # kept as a number, as older runs have it
            args.lr_decay_factor, = args.lr_decay_factor
        elif len(args.lr_decay_factor) != len(args.lr_decay_epochs):
            parser.error("--lr-decay-factor takes one factor, or one for each of --lr-decay-epochs")
    if args.lr_schedule != "piecewise":
        condition = f"--lr-schedule {args.lr_schedule}"
        without_effect(parser, args, condition, "lr_decay_epochs", "lr_decay_factor")
    scale_time(parser, args)
    if args.out is None:
        args.out = f"runs/{run_name(prefix, args, parser)}"
    if not args.out:
        parser.error("--out is empty")
    if args.lr is None:
        args.lr = 1e-4 if adam else 0.1
    return args


def scale_time(parser, args):
    """Multiply what is a number of epochs of the recipe by --time-scale, and round it to whole epochs.

    --eval-every is not of the recipe. Refused if nothing is left of an epoch or more.
    """
    def scaled(flag, value):
        whole = int(value * args.time_scale + 0.5)
        if value and not whole:
            parser.error(f"--time-scale {args.time_scale:g} leaves nothing of --{flag.replace('_', '-')} {value:g}")
        return whole

    if args.time_scale == 1:
        return
    for flag in ("epochs", "lr_decay_epochs", "warmup_lr", "warmup_eps", "early_stop_pgd", "awp_warmup"):
        value = getattr(args, flag, None)
        if value is not None:
            several = isinstance(value, list)
            setattr(args, flag, [scaled(flag, v) for v in value] if several else scaled(flag, value))


# Flags that say where and how a run happens, not what is trained: they may differ when it is resumed.
NOT_A_SETTING = ("test_batch_size", "time_scale", "out", "resume", "data_dir", "device", "dry_run")


def run_name(prefix, args, parser):
    """A readable name out of what differs from the parser's defaults: pgdat-bn-mode-eval-ls0.1."""
    def text(v):
        return "" if v is True else Path(v).stem if isinstance(v, str) else f"{v:.10g}"

    parts = [prefix]
    for key, value in vars(args).items():
        if value != parser.get_default(key) and key not in NOT_A_SETTING:
            values = value if isinstance(value, list) else [value]
            dash = "-" if isinstance(value, str) else ""
            parts.append(key.replace("_", "-") + dash + "-".join(map(text, values)))
    return "-".join(parts)


def differences(before, now, parser):
    """Which settings differ between two runs' arguments, in words. The data set's name is none.

    A setting that the older arguments do not know has the parser's default.
    """
    now = json.loads(json.dumps(now))  # as it was written
    settings = [k for k in sorted(before | now) if k not in (*NOT_A_SETTING, "dataset")]
    pairs = [(k, before.get(k, parser.get_default(k)), now.get(k)) for k in settings]
    return [f"--{k.replace('_', '-')} was {old}, is {new}" for k, old, new in pairs if old != new]


class Stopped(Exception):
    """Ends the script with a line on stderr and an exit status."""

    def __init__(self, status, line):
        self.status, self.line = status, line


def command_line():
    """The script and its arguments, without the folder that the script is in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def run_script(main):
    """Run main(). What the user can mend becomes one line on stderr and exit status 2; Ctrl-C is 130."""
    def end(status, line):
        if rank() == 0:
            print(line, file=sys.stderr)
        sys.exit(status)

    script = Path(sys.argv[0]).name
    try:
        main()
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
        if dist.is_initialized():
            barrier()  # no process leaves while another still needs it
            dist.destroy_process_group()
    except BrokenPipeError:  # what we were piped into has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as e:
        message = str(e) if isinstance(e, InputError) or not e.filename else f"{e.filename}: {e.strerror}"
        end(2, f"{script}: error: {message}")
    except Stopped as e:
        end(e.status, f"{script}: {e.line}")
    except KeyboardInterrupt:
        end(130, f"{script}: interrupted")


def first_line(error):
    """The first line of an exception's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- Device, precision, compilation ------------------------------------------------------------------------


def start(args):
    """The torch.device of --device. Joins torchrun's processes and settles --precision in args."""
    device = pick_device(args.device)
    join_processes(device)
    args.precision = set_precision(args.precision, device)
    return device


def pick_device(name):
    """The torch.device of "auto" (a GPU if there is one), "cpu", "cuda" (the current one) or "cuda:N".

    A GPU becomes the current one. Raises InputError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise InputError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if under_torchrun() and name != "cuda":
        raise InputError(f"--device {name}: under torchrun each process has a GPU of its own: --device cuda")
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
    """Set the process up for "fp32" (strict), "tf32" (torch's default: TF32 convolutions, on CUDA) or "bf16".

    bf16 means autocast, which make_forward adds. None means tf32 on CUDA and fp32 elsewhere. Returns the name
    in force. Raises InputError for tf32 without CUDA.
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

    Parameters, batch-norm statistics and everything outside the model stay float32. Raises InputError if this
    machine cannot compile.
    """
    device = next(model.parameters()).device.type
    torch.backends.cudnn.benchmark = True  # shapes are few here, unlike AutoAttack's
    net = model
    if compile:
        # A graph each for attack (frozen, train or eval), update, clean pass, test; times the batch sizes.
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


class Graphed:
    """Calls a function of CUDA tensors by replaying a CUDA graph: one launch instead of thousands.

    A graph is captured for each combination of input shapes. function: takes a tensor and then tensors or
    numbers, and returns one tensor. Its work may depend on the shapes of its inputs, not on their values. It
    may move the model's buffers (running statistics) and nothing else. A number is passed on as a tensor,
    because a graph would keep its first value for ever.
    """

    def __init__(self, function, model):
        self.function, self.model = function, model
        self.pool, self.graphs = torch.cuda.graph_pool_handle(), {}

    def __call__(self, *inputs):
        device = inputs[0].device
        inputs = [x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs]
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(inputs)
        graph, static, output = self.graphs[shapes]
        for to, x in zip(static, inputs):
            to.copy_(x)
        graph.replay()
        return output.clone()  # the next replay, of any of the graphs, overwrites it

    def capture(self, inputs):
        """(graph, its input tensors, its output tensor) for these shapes. The model's buffers do not move."""
        static = [x.clone() for x in inputs]
        before = [b.clone() for b in self.model.buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compile, choose algorithms, allocate: none of that may happen in a capture
                self.function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*static)
        for b, value in zip(self.model.buffers(), before):
            b.copy_(value)  # the warm-up moved the running statistics
        return graph, static, output


def graphed(function, model, compile):
    """Replay the function from a CUDA graph if the model is compiled and on CUDA; else call it as it is."""
    return Graphed(function, model) if compile and next(model.parameters()).is_cuda else function


# ---- Processes ---------------------------------------------------------------------------------------------


def under_torchrun():
    """Whether torchrun has started several processes of which this is one."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def join_processes(device):
    """Under `torchrun --nproc_per_node=N`, join the N processes, of which only the first prints."""
    if not under_torchrun():
        return
    patience = datetime.timedelta(days=7)  # with each other: a batch of AutoAttack can take an hour
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def rank():
    """Which of torchrun's processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share():
    """The slice of a batch, or of the test images, that this process works on."""
    return slice(rank(), None, world())


def sum_over_processes(tensor):
    """The sum of the processes' tensors of numbers or flags."""
    if not dist.is_initialized():
        return tensor
    total = tensor.int() if tensor.dtype == torch.bool else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def max_over_processes(tensor):
    """The largest of the processes' numbers (), as a Python number."""
    if not dist.is_initialized():
        return tensor.item()
    tensor = tensor.detach().float().reshape(1)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def barrier():
    """Wait until all processes are here."""
    max_over_processes(torch.zeros(1))


def only_first(function):
    """Call function() in the first process while the others wait; if it raises, they end with status 2."""
    if rank() > 0:
        if max_over_processes(torch.zeros(1)):
            sys.exit(2)
        return
    try:
        function()
    except BaseException:
        max_over_processes(torch.ones(1))
        raise
    barrier()


def check_split(args, n_train, device):
    """Raise InputError for what several processes cannot do: share a batch unevenly, compile on GPUs."""
    for size in (args.batch_size, n_train % args.batch_size):
        if size % world():
            raise InputError(f"{world()} processes cannot share a batch of {size} images evenly (the last of "
                             f"an epoch has {n_train % args.batch_size or args.batch_size})")
    if world() > 1 and args.compile and device.type == "cuda":  # not tried with synchronised batch norm
        raise InputError("--compile is not supported on several GPUs")


def sync_batch_norm(model, device):
    """The model for several processes: its batch norm takes the statistics of the whole batch, on CUDA.

    torch has no such layer for the CPU. There each process normalises by its own share, and the running
    statistics are the first process's (share_statistics), as under DataParallel, with which the paper's
    authors trained.
    """
    if world() == 1:
        return model
    if device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print("note: on the CPU batch norm is not synchronised, each process normalises by its own share")
    return model


def share_statistics(model):
    """Under torchrun on the CPU, let all processes go on with the first one's running statistics."""
    if dist.is_initialized() and not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(optimizer):
    """Under torchrun, let every step of the optimiser use the gradient of the whole batch's mean loss."""
    def average(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / world()).split([g.numel() for g in grads])):
            g.copy_(mean.view(g.shape))

    if dist.is_initialized():
        optimizer.register_step_pre_hook(average)


# ---- Files -------------------------------------------------------------------------------------------------

# Training images, test images, classes.
NAMED_DATASETS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}
CIFAR10_SHA256 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"  # of utils.Dataset


def fetch(name, data_dir="data"):
    """The path of a data set's .npz; `cifar10` and `cifar100` are fetched into data_dir on first use.

    Raises InputError for an unknown name or a download that fails.
    """
    if name in NAMED_DATASETS:
        path = Path(data_dir) / f"{name}.npz"
        only_first(lambda: path.exists() or download(name, path))
        return path
    if not str(name).endswith(".npz"):
        known = ", ".join(NAMED_DATASETS)
        raise InputError(f"unknown data set {str(name)!r}: there is {known}, or the path of an .npz")
    head = re.fullmatch(r"cifar10_head(\d+)\.npz", Path(name).name)
    if head and not Path(name).exists():
        raise InputError(f"no such file: {name} (python data/prepare.py head --n {head[1]} makes it)")
    return Path(name)


def load_named(name, data_dir, device):
    """The Dataset of a name or path, on the device. Raises InputError if a named one has another size."""
    path = fetch(name, data_dir)
    data = load_dataset(path, device)
    size = (len(data.train_labels), len(data.test_labels), data.num_classes)
    if size != NAMED_DATASETS.get(name, size):
        raise InputError(f"{path} is not {name}: it holds {size[0]:,} training and {size[1]:,} test images "
                         f"of {size[2]} classes")
    return data


def download(name, path):
    """Let data/prepare.py make the .npz. Raises InputError if it cannot."""
    prepare = HERE / "data" / "prepare.py"
    if not prepare.exists():
        raise InputError(f"there is neither {path} nor {prepare} to fetch it: give --dataset an .npz's path")
    module = runpy.run_path(prepare)
    try:
        module["obtain"](name, path.parent)
    except module["Failed"] as e:
        raise InputError(f"could not obtain {name}: {e}") from None


def load(args, device):
    """The Dataset of --dataset, fetched on first use; with --dry-run a named one is only of the right size.

    Raises InputError if --val leaves nothing to train on.
    """
    if args.dry_run and args.dataset in NAMED_DATASETS:
        n_train, n_test, num_classes = NAMED_DATASETS[args.dataset]
        train, test = torch.empty(n_train, device="meta"), torch.empty(n_test, device="meta")
        data = Dataset(train, train, test, test, num_classes, sha256="")
    else:
        data = load_named(args.dataset, args.data_dir, device)
    if args.n_train:
        if args.n_train > len(data.train_labels):
            raise InputError(f"--n-train {args.n_train}: there are {len(data.train_labels):,} training images")
        head = slice(args.n_train)
        data = data._replace(train_images=data.train_images[head], train_labels=data.train_labels[head])
    if args.val >= len(data.train_labels):
        raise InputError(f"--val {args.val} leaves nothing to train on of {len(data.train_labels):,} images")
    return data


def write_atomically(path, data):
    """Write bytes to a temporary file beside path, flush it to the disk and rename it: whole or not at all.

    Under torchrun only the first process writes. Raises OSError with the file's name; nothing is left behind.
    """
    if rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def fits(value, form):
    """Whether a value has the form: a type or types, {key: form} (at least), or [form of items]."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(k in value and fits(value[k], v) for k, v in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(v, form[0]) for v in value)
    return isinstance(value, form)


def read_json(path, form):
    """The JSON value in a file, or the list of a .jsonl's lines. Raises InputError if it has another form."""
    path = Path(path)
    try:
        parts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [json.loads(part) for part in parts]
        value = values if path.suffix == ".jsonl" else values[0]
    except ValueError as e:  # not JSON, or not UTF-8
        raise InputError(f"{path} cannot be read: {first_line(e)}") from None
    if not fits(value, form):
        keys = ", ".join(form[0] if isinstance(form, list) else form)
        raise InputError(f"{path} was not written by this program: it should hold {keys}")
    return value


# What Run writes into args.json and log.jsonl.
RECORD = {"args": {"model": str, "activation": str, "dataset": str, "eps": (int, float), "epochs": int},
          "command": [str], "device": str, "versions": dict, "data_sha256": str, "resumed": list}
ENTRY = {"epoch": int, "lr": (int, float), "train_loss": (int, float), "seconds": (int, float)}


def digest(value):
    """SHA-256 of tensors and plain values in dicts and lists. A result names its weights by that of them."""
    h = hashlib.sha256()

    def add(v):
        if isinstance(v, dict):
            for k in sorted(v, key=str):
                h.update(str(k).encode())
                add(v[k])
        elif isinstance(v, (list, tuple)):
            for item in v:
                add(item)
        elif isinstance(v, Tensor):
            h.update(v.cpu().flatten().view(torch.uint8).numpy())
        else:
            h.update(repr(v).encode())

    add(value)
    return h.hexdigest()


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values with its digest, atomically; load_checkpoint reads it back."""
    file = io.BytesIO()  # torch's own writer hides what the disk says
    torch.save({**checkpoint, "digest": digest(checkpoint)}, file)
    write_atomically(path, file.getbuffer())


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU: ours, {"state_dict": ...}, or a bare state dict made that.

    Only tensors and plain values are unpickled (weights_only=True). A `module.` prefix (DataParallel) and the
    `sub_block1.*` keys of WideResNets, which no forward pass uses, are dropped. Raises InputError for a file
    that is missing, cut short, holds other objects, or holds no state dict.
    """
    if not Path(path).is_file():
        raise InputError(f"{'not a file' if Path(path).exists() else 'no such file'}: {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise  # the message says it all
    except pickle.UnpicklingError:
        raise InputError(f"{path} is refused: no checkpoint, or more than tensors and plain values") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path} cannot be read as a checkpoint (cut short?): {first_line(e)}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("digest"), str):
        if loaded.pop("digest") != digest(loaded):
            raise InputError(f"{path} is damaged: its contents are not what was written")
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

    Raises InputError, naming the first key that differs, or if a weight is not finite.
    """
    tracked = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**tracked, **state})
    except RuntimeError as e:  # line 2: what is missing, unexpected or of another size, the first key first
        first = str(e).splitlines()[1].strip().split('", ')[0]
        raise InputError(f"{path} is of another architecture: {first} ...") from None
    broken = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise InputError(f"{path} holds NaN or infinite weights: {broken[0]}")


def git(*args):
    """What git says in the folder of this code, or None."""
    try:
        done = subprocess.run(["git", "-C", HERE, *args], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device):
    """What a reader needs to know about where numbers come from: commit, versions, device."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    cuda = device.type == "cuda"
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "cuda": torch.version.cuda if cuda else None},
        "device": torch.cuda.get_device_name(device) if cuda else
                  f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "processes": world(),
    }


# ---- The folder of a run -----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_folder(out, lock=".lock"):
    """Make the folder and hold a lock in it while open; the lock ends with the process.

    Raises InputError if another process holds it. Where the file system has no locks, say so and go on.
    """
    def take(f):
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is working in {out}") from None
        except OSError as e:
            print(f"note: {out} cannot be locked ({e.strerror}): see that no other process works in it")

    out.mkdir(parents=True, exist_ok=True)
    with open(out / lock, "w") as f:
        only_first(lambda: take(f))
        yield


def check_folder(args, parser):
    """The args.json in the folder of --out, or None if a run can start there.

    Raises InputError if the folder holds a run and --resume was not given, or one of other settings.
    """
    out = Path(args.out)
    if args.dry_run:
        return None
    if not (out / "args.json").exists():
        remains = [f for f in ("last.pt", "best.pt", "log.jsonl") if (out / f).exists()]
        if remains:
            raise InputError(f"{out} holds {remains[0]} but no args.json: choose another --out")
        return None
    if not args.resume:
        raise InputError(f"{out} already holds a run: --resume to go on, or choose another --out")
    record = read_json(out / "args.json", RECORD)
    differ = differences(record["args"], vars(args), parser)
    if record["command"][0] != command_line()[0]:
        differ.insert(0, f"the script was {record['command'][0]}")
    if differ:
        raise InputError(f"{out} was started with other arguments: {'; '.join(differ)}")
    return record


def epoch_of(path):
    """The epoch that a checkpoint is of, or None if it is missing, damaged or not ours."""
    try:
        return load_checkpoint(path).get("epoch")
    except InputError:
        return None


class Run:
    """The folder of a training run: args.json, log.jsonl, last.pt and best.pt; locked while it is open.

    state: {name: what is saved}, each with state_dict() and load_state_dict(). tested: the one of them whose
    weights are tested and end up in best.pt, by default the model; its keys have to be the model's, as a
    copy's are. about: what else eval_aa.py needs to rebuild it. measure: the key in a log entry that chooses
    the best epoch. parser: the script's, for the defaults of settings that an older run does not know.

    log: an entry for each epoch that is done. last.pt holds all of it, and log.jsonl repeats it for readers.
    """

    def __init__(self, args, parser, state, about, data_sha256, measure, tested=None):
        self.args, self.parser, self.state, self.about = args, parser, state, {"args": vars(args), **about}
        self.data_sha256, self.measure, self.tested = data_sha256, measure, tested or state["model"]
        self.split = measure.partition("_")[0]
        self.others = {k: v for k, v in state.items() if v is not self.tested}
        self.out, self.log, self.record = Path(args.out), [], None
        device = next(self.tested.parameters()).device
        self.now = {"command": command_line(), **environment(device)}

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.log)

    @property
    def best(self):
        """The log entry of the best of them, the first of equals, or None."""
        tested = [entry for entry in self.log if entry.get(self.measure) is not None]
        return max(tested, key=lambda entry: entry[self.measure], default=None)

    def __enter__(self):
        """Lock the folder, write args.json or, with --resume, check it and go on from last.pt.

        Raises InputError if the folder holds a run and --resume was not given, a run of other settings, or
        what is left of one.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked_folder(self.out))
            only_first(self.claim)
            if (self.out / "last.pt").exists():
                self.restore()
            else:
                self.look_for_remains()
            self.stack = stack.pop_all()
        if self.epoch == self.args.epochs:
            print(f"{self.out} has finished")
        else:
            if self.record:
                resumed = [*self.record["resumed"], {"epoch": self.epoch, **self.now}]
                write_json(self.out / "args.json", {**self.record, "resumed": resumed})
            self.show_header()
        self.started = self.saved = time.time()
        self.done_before = self.epoch
        return self

    def __exit__(self, kind, error, traceback):
        self.stack.close()
        if kind is KeyboardInterrupt:
            command = shlex.join(["python", *command_line()]) + ("" if self.args.resume else " --resume")
            command = command if world() == 1 else "the same command with --resume"
            line = f"interrupted in epoch {self.epoch + 1}, which will start again; to go on: {command}"
            raise Stopped(130, line) from None
        if kind is FloatingPointError:
            good = f"the last good checkpoint is {self.out / 'last.pt'}, of epoch {self.epoch}"
            good = good if self.epoch else "there is no good checkpoint yet"
            raise Stopped(1, f"stopped: {error} of epoch {self.epoch + 1}; {good}") from None
        if kind is None:
            self.show_best()

    def claim(self):
        """Write args.json, or check that it is this run's and keep it as `record`."""
        self.record = check_folder(self.args, self.parser)
        if self.record is None:
            settings = {"args": vars(self.args), **self.now, "git_diff": git("diff", "HEAD") or None,
                        "data_sha256": self.data_sha256}
            write_json(self.out / "args.json", {**settings, "resumed": []})
        elif self.record["data_sha256"] != self.data_sha256:
            raise InputError(f"{self.out} was started with other data")

    def restore(self):
        """Put state and log back where last.pt has them; see that best.pt and log.jsonl agree."""
        last, best, log = (self.out / name for name in ("last.pt", "best.pt", "log.jsonl"))
        checkpoint = load_checkpoint(last)
        ours = fits(checkpoint, {"args": dict, "log": [ENTRY], "others": dict.fromkeys(self.others, dict)})
        if not ours or differences(checkpoint["args"], vars(self.args), self.parser):
            raise InputError(f"{last} is not a checkpoint of this run")
        load_weights(self.tested, checkpoint["state_dict"], last)
        others = checkpoint.pop("others")
        for name, value in self.others.items():
            value.load_state_dict(others[name])
        self.log, finished = checkpoint["log"], len(checkpoint["log"]) == self.args.epochs
        if not finished:
            print(f"going on with {self.out} after epoch {self.epoch}")
        if self.best and epoch_of(best) != self.best["epoch"]:
            if self.best is self.log[-1]:
                save_checkpoint(best, checkpoint)  # the run was killed just before
            elif not finished:
                raise InputError(f"{best} is not the checkpoint of epoch {self.best['epoch']}, the best, and "
                                 "cannot be restored: choose another --out")
        before, lines = log.read_bytes() if log.exists() else b"", self.log_lines()
        if before != b"".join(lines[:-1]) and not before.startswith(b"".join(lines)):  # no kill does that
            print(f"note: {log} was damaged and is restored from last.pt")
        write_atomically(log, b"".join(lines))

    def look_for_remains(self):
        """Without last.pt: know a finished run, refuse what is left of another, or start over."""
        log = self.out / "log.jsonl"
        lines = log.read_bytes().splitlines() if log.exists() else []
        if len(lines) == self.args.epochs:
            self.log = read_json(log, [ENTRY])
            return
        if len(lines) > 1 or (self.out / "best.pt").exists():
            raise InputError(f"{self.out} holds a run without its last.pt, which cannot go on: evaluate its "
                             "best.pt, or choose another --out")

    def log_lines(self):
        return [(json.dumps(entry) + "\n").encode() for entry in self.log]

    def save(self, entry):
        """Put an epoch on the disk: last.pt, best.pt if it is the best so far, and its line in log.jsonl.

        entry: what the log says of it: lr, train_loss, the measured accuracies ... Whatever the moment a run
        is killed at, best.pt and log agree with last.pt once it has been resumed. Raises FloatingPointError
        if a weight is NaN or infinite.
        """
        weights = {k: v.cpu() for k, v in self.tested.state_dict().items()}
        if not all(v.isfinite().all() for v in weights.values()):
            raise FloatingPointError("a weight is not finite at the end")
        self.log.append({"epoch": self.epoch + 1, **entry, "seconds": round(time.time() - self.saved, 2)})
        self.saved = time.time()
        checkpoint = {"state_dict": weights, "epoch": self.epoch, "log": self.log, **self.about}
        others = {k: v.state_dict() for k, v in self.others.items()}
        save_checkpoint(self.out / "last.pt", {**checkpoint, "others": others})
        if self.best is self.log[-1]:
            save_checkpoint(self.out / "best.pt", checkpoint)
        write_atomically(self.out / "log.jsonl", b"".join(self.log_lines()))
        self.show(self.log[-1])

    def show_header(self):
        print(f"    epoch        lr    loss | train adv  clean | "
              f"{self.split:>4} clean PGD-10   |     time     left")

    def show(self, entry):
        """Print an aligned line for an epoch, starred if it is the best so far."""
        def cell(key):
            value = entry.get(key)
            return f"{'-' if value is None else f'{value:.2f}':>6}"

        left = (self.saved - self.started) / (self.epoch - self.done_before) * (self.args.epochs - self.epoch)
        print(f"{self.epoch:4}/{self.args.epochs:<4} {entry['lr']:9.2e} {entry['train_loss']:7.4f} | "
              f"   {cell('train_adv_acc')} {cell('train_clean_acc')} | "
              f"    {cell(f'{self.split}_clean')} {cell(f'{self.split}_pgd10')} "
              f"{'*' if self.best is entry else ' '} | "
              f"{clock(entry['seconds']):>8} {clock(left):>8}", flush=True)

    def show_best(self):
        robust = self.best[f"{self.split}_pgd10"]
        figures = f"clean {self.best[f'{self.split}_clean']:.2f}"
        figures += "" if robust is None else f", PGD-10 {robust:.2f}"
        print(f"best of {self.args.epochs} epochs on the {self.split} set: epoch {self.best['epoch']}, "
              f"{figures}: {self.out / 'best.pt'}\nevaluate it with: python eval_aa.py {self.out}")


# ---- Console -----------------------------------------------------------------------------------------------


def show_setting(args, model, data):
    """Print everything that decides a training run."""
    n_train, n_test = len(data.train_labels) - args.val, len(data.test_labels)
    for key, value in vars(args).items():
        print(f"  --{key.replace('_', '-'):18}{fraction_text(value) if key in ('eps', 'alpha') else value}")
    steps = math.ceil(n_train / args.batch_size)
    held_out = f" (and {args.val:,} held out)" if args.val else ""
    known = " (CIFAR-10's pixels)" if data.sha256 == CIFAR10_SHA256 else f" (SHA-256 {data.sha256[:8]}...)"
    print(f"data   {args.dataset}: {n_train:,} training images{held_out}, {n_test:,} test images"
          f"{known if data.sha256 else ''}, {data.num_classes} classes")
    print(f"model  {args.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"steps  {args.epochs} epochs of {steps:,}: {args.epochs * steps:,}")
    late = [f"{e:g}" for e in args.lr_decay_epochs if e >= args.epochs]
    if args.lr_schedule == "piecewise" and late:
        print(f"warning: the learning rate never drops at {', '.join(late)}, "
              f"for the run ends after {args.epochs} epochs")
    for flag in ("warmup_lr", "warmup_eps", "awp_warmup"):
        if getattr(args, flag, 0) >= args.epochs:
            print(f"warning: --{flag.replace('_', '-')} lasts until the end of the run, {args.epochs} epochs")
    if args.dry_run:
        print("time   ./run_all.sh cost ROW, or python -m tools.bench, says what it takes on this machine")


def progress_bar(total, name):
    """A tqdm bar over images, shown on a terminal by the first process."""
    hidden = True if rank() else None  # None: hidden unless stderr is a terminal
    return tqdm(total=total, desc=name, unit=" img", leave=False, mininterval=0.5, disable=hidden)


def progress(stream, n, name, meter):
    """Yield the stream's (x, y) under a progress bar over n images that shows the meter's figures.

    Reading them now and then also ends the run early whose loss has become NaN.
    """
    with progress_bar(n, name) as bar:
        for x, y in stream:
            yield x, y
            due = bar.update(world() * len(y)) and world() == 1
            if due or meter.steps % 100 == 0:  # not at every step: reading the figures waits for the device
                loss, adv_acc, _ = meter.read()
                bar.set_postfix_str(f"loss {loss:.3f}, adv acc {adv_acc:.1f} %", refresh=False)


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

    def read(self):
        """Mean loss, adversarial and clean accuracy in per cent, over all processes. Waits for the device.

        Raises FloatingPointError, which names the first step (from 0) whose loss was not finite.
        """
        bad_step = -max_over_processes(-self.bad_step)
        if bad_step < torch.inf:
            raise FloatingPointError(f"the loss is not finite at step {bad_step:g}")
        loss, adv, clean, images = sum_over_processes(self.sums).tolist()
        return round(loss / images, 5), round(100 * adv / images, 2), round(100 * clean / images, 2)


def clock(seconds):
    """1:02:03 or 2:03."""
    m, s = divmod(int(seconds + 0.5), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
