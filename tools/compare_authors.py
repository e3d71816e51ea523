"""Are our training steps and networks the authors' own? Their code and ours, compared in float64 on a CPU.

    git clone https://github.com/P2333/Bag-of-Tricks-for-AT
    git clone https://github.com/ShawnXYang/AT_HE
    python -m tools.compare_authors Bag-of-Tricks-for-AT --trades AT_HE

A row of the first table is a setting: both sides start from the same weights and take three steps on the
same images with the same noise. It shows the largest absolute differences: of lr and eps as each side
schedules them (both then take theirs), of adversarial images, weights and batch norm's running statistics.
A row of the second table is a network: its logits in train and eval mode, and its running statistics.

PGD-AT: main() of their train_cifar.py runs on its own flags; stand-ins hand it weights, data, noise and epoch
and keep its files off the disk. TRADES: AT_HE's trades_loss. Nothing in the clones is copied or changed.

Exit status 1 if what should be equal differs by more than 1e-9. "on purpose" marks a schedule of ours that
deviates by choice. "planted" gives our side a mistake that has to be seen: a blind comparison fails too.
Cost: a minute and a half, 2 GB of memory.
"""

import contextlib
import importlib
import io
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.optim import optimizer as optim

import models
import train_pgdat
import train_trades
import utils
from utils import lr_at, make_optimizer, warmup

TOLERANCE = 1e-9
STEPS = 3
SEED = 0      # the attack then fools images after 0 to 10 steps, and no forward pass is saturated
NOISE = 1000  # step i draws the attack's noise with seed NOISE + i

# Our name -> theirs. The last stands for WRN-34-20, which is the same code at 3 GB.
NETWORKS = {
    "preactresnet-18": "PreActResNet18", "preactresnet-50": "PreActResNet50", "resnet-18": "ResNet18",
    "resnet-50": "ResNet50", "senet-18": "SENet18", "densenet-121": "DenseNet121",
    "densenet-201": "DenseNet201", "googlenet": "GoogLeNet", "dpn-26": "DPN26", "dpn-92": "DPN92",
    "resnext-29": "ResNeXt29_2x64d", "regnetx-200mf": "RegNetX_200MF", "regnetx-400mf": "RegNetX_400MF",
    "wrn-34-10": "WideResNet", "wrn-34-2": "WideResNet",
}
ACTIVATIONS = ("LeakyReLU", "ELU", "CELU", "SELU", "GELU", "Softplus", "Tanh")  # theirs; ours are lower case


class Setting(NamedTuple):
    """A row: the flags of their script and of ours that ask for the same thing."""

    name: str
    theirs: str
    ours: str
    network: str = "wrn-10-1"
    epoch: int = 0
    expect: str = "equal"  # or "on purpose", if our lr or eps deviates by choice, or "planted"


SMOOTH = "--labelsmooth --labelsmoothvalue"
EARLY = ("--earlystopPGD --earlystopPGDepoch1 40 --earlystopPGDepoch2 70", "--early-stop-pgd 40 70")
WARMUP = ("--warmup_lr --warmup_lr_epoch 15 --warmup_eps --warmup_eps_epoch 15",
          "--warmup-lr 15 --warmup-eps 15")
PGDAT = [
    Setting("BN train", "", "", "preactresnet-18"),
    Setting("BN eval", "--BNeval", "--bn-mode eval", "preactresnet-18"),
    Setting("BN train, WRN-34-10 narrowed", "", "", "wrn-34-1"),
    Setting("BN train, SGD", "", ""),
    Setting("BN eval, SGD", "--BNeval", "--bn-mode eval"),
    Setting("BN eval, label smoothing 0.1", f"--BNeval {SMOOTH} 0.1", "--bn-mode eval --ls 0.1"),
    Setting("label smoothing 0.3", f"{SMOOTH} 0.3", "--ls 0.3"),
    Setting("early-stopped attack, tolerance 1", *EARLY, epoch=10),
    Setting("early-stopped attack, tolerance 2", *EARLY, epoch=50),
    Setting("early-stopped attack, tolerance 3", *EARLY, epoch=80),
    Setting("Nesterov", "--optimizer Nesterov", "--optimizer nesterov"),
    Setting("Adam", "--optimizer Adam --lr-max 1e-4", "--optimizer adam"),
    Setting("AdamW", "--optimizer AdamW --lr-max 1e-4", "--optimizer adamw"),
    Setting("SGD-GC", "--optimizer SGD_GC", "--optimizer sgd-gc"),
    Setting("SGD-GCC", "--optimizer SGD_GCC", "--optimizer sgd-gcc"),
    Setting("Softplus, beta 10", "--activation Softplus --softplus_beta 10", "--activation softplus"),
    Setting("standard training", "--attack none", "--attack none"),
    Setting("first of 15 warm-up epochs", *WARMUP, epoch=0, expect="on purpose"),
    Setting("last of 15 warm-up epochs", *WARMUP, epoch=14, expect="on purpose"),
    Setting("last epoch before lr decays", "", "", epoch=99, expect="on purpose"),
    # torch's label_smoothing=0.1 spreads the mass over all ten classes: 0.09 over the other nine
    Setting("smoothing over all K classes", f"{SMOOTH} 0.1", "--ls 0.09", expect="planted"),
    Setting("one clean pass fewer", "", "--bn-clean-passes 1", expect="planted"),
    Setting("tolerance 3 instead of 2", EARLY[0], "--early-stop-pgd 10 30", epoch=50, expect="planted"),
]
TRADES = [Setting(f"TRADES, eps {eps}, step {alpha}", "", f"--eps {eps} --alpha {alpha}")
          for eps, alpha in (("0.031", "0.007"), ("8/255", "2/255"))]


@contextlib.contextmanager
def float64_on_cpu():
    """While it is open, new tensors are float64, and code written for CUDA stays on the CPU."""
    torch.set_default_dtype(torch.float64)  # normalisation constants too: in float32 they soon flip signs
    with mock.patch.object(torch.Tensor, "cuda", lambda self: self), \
            mock.patch.object(torch.nn.Module, "cuda", lambda self: self), \
            mock.patch.object(torch.nn, "DataParallel", lambda model: model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their calls that torch has deprecated since
        yield
    torch.set_default_dtype(torch.float32)


def load(folder, *names):
    """Modules from a folder of theirs. Some are called as ours: afterwards these names mean ours again."""
    with mock.patch.dict(sys.modules, torchvision=mock.MagicMock()), \
            mock.patch.object(sys, "path", [str(folder), *sys.path]), \
            mock.patch.object(sys, "dont_write_bytecode", True):
        own = {path.stem for path in folder.iterdir()}
        for name in [name for name in sys.modules if name.split(".")[0] in own]:
            del sys.modules[name]
        return [importlib.import_module(name) for name in names]


def commit(clone):
    """The commit of a clone, with "-dirty" behind it if its files differ."""
    # told where the repository is, git takes none further up
    command = ["git", f"--git-dir={clone}/.git", f"--work-tree={clone}", "describe", "--always",
               "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def wrn_size(network):
    """{"depth": 34, "widen_factor": 10} of "wrn-34-10"; {} of a network that is no WideResNet."""
    numbers = map(int, network.split("-")[1:]) if network.startswith("wrn-") else ()
    return dict(zip(("depth", "widen_factor"), numbers))


def load_weights(model, state):
    """Their model with our weights. Names must agree, but for a block that their WideResNet never uses."""
    unused = {k: v for k, v in model.state_dict().items() if k.startswith("sub_block1.")}
    model.load_state_dict(unused | state)
    return model


def tensors(model):
    """Its parameters, and batch norm's running means and variances, by name."""
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    return {"weights": {k: v for k, v in state.items() if "running_" not in k},
            "statistics": {k: v for k, v in state.items() if "running_" in k}}


def their_pgdat(script, setting, state, batches):
    """What main() of their train_cifar.py does: lr, eps, images by step, weights and statistics by name."""
    lr, eps, images, made, their_attack = [], [], [], [], script.attack_pgd

    def attack(model, x, y, epsilon, *args, **kwargs):
        torch.manual_seed(NOISE + len(images))
        delta, counts = their_attack(model, x, y, epsilon, *args, **kwargs)
        images.append(x + delta.detach())
        eps.append(epsilon)
        return delta, counts

    def build(original, *args, **kwargs):
        made.append(load_weights(original(**kwargs | wrn_size(setting.network)), state))
        return made[-1]

    def loader(dataset, batch_size, shuffle, **kwargs):
        # their main() ends where it begins to test
        return [{"input": x, "target": y} for x, y in batches] if shuffle else iter(sys.exit, None)

    split = {"data": torch.zeros(1, 32, 32, 3).numpy(), "labels": [0]}
    stand_ins = {
        "attack_pgd": attack, "Batches": loader, "cifar10": lambda folder: {"train": split, "test": split},
        **{name: partial(build, getattr(script, name)) for name in ("PreActResNet18", "WideResNet")},
        # of all their loops, only the one over the epochs gives two bounds
        "range": lambda *bounds: [setting.epoch] if len(bounds) == 2 else range(*bounds),
        "os": mock.MagicMock(), "logging": mock.MagicMock()}
    argv = ["train_cifar.py", "--model", NETWORKS.get(setting.network, "WideResNet"), *setting.theirs.split()]
    with mock.patch.multiple(script, create=True, **stand_ins), mock.patch.object(sys, "argv", argv), \
            optim.register_optimizer_step_pre_hook(lambda o, *_: lr.append(o.param_groups[0]["lr"])), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        script.main()
    by_step = {"lr": lr, "eps": eps, "images": images}
    return {k: dict(enumerate(map(torch.as_tensor, v))) for k, v in by_step.items()} | tensors(made[-1])


def their_trades(losses, wideresnet, setting, state, batches):
    """What AT_HE's trades_loss does, with SGD as in their script."""
    args = train_trades.parse_args(setting.ours.split())
    model = load_weights(wideresnet.WideResNet(**wrn_size(setting.network), i_normalize=False), state).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, inputs = {}, []
    model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach()))
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(NOISE + i)
        losses.trades_loss(model, x, y, optimizer, args.alpha, args.eps, args.steps, args.beta).backward()
        images[i] = inputs[-1]  # the loss ends with the forward pass of the adversarial images
        optimizer.step()
    return {"lr": {}, "eps": {}, "images": images, **tensors(model)}


def our_model(network, activation="relu", normalize=None):
    with mock.patch.dict(models.MODELS):
        if network.startswith("wrn-"):
            models.MODELS[network] = partial(models.WideResNet, *wrn_size(network).values())
        return models.build(network, 10, activation, normalize)


def our_steps(script, setting, state, batches, theirs):
    """What train_pgdat or train_trades does at their lr and eps."""
    args = script.parse_args(setting.ours.split())
    model = our_model(setting.network, args.activation, script.NORMALIZE).train()
    model.load_state_dict(state)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    lr, eps, images = {}, {}, []

    def attack(*arguments, **tolerance):
        images.append(script.training_attack(model, args, *arguments, **tolerance))
        return images[-1]

    for i, (x, y) in enumerate(batches):
        t = setting.epoch + i / len(batches)
        rate = lr_at(t, args.lr, args.lr_schedule, args.epochs, args.lr_decay_epochs, args.lr_decay_factor)
        lr[i] = torch.tensor(warmup(t, args.warmup_lr) * rate)
        eps[i] = torch.tensor(warmup(t, args.warmup_eps) * args.eps)
        for group in optimizer.param_groups:
            group["lr"] = theirs["lr"].get(i, lr[i]).item()
        radius, rng = theirs["eps"].get(i, eps[i]).item(), torch.Generator().manual_seed(NOISE + i)
        script.train_step(model, optimizer, attack, x, y, radius, setting.epoch, rng, args)
    return {"lr": lr, "eps": eps, "images": dict(enumerate(images)), **tensors(model)}


@torch.no_grad()
def with_trained_batch_norm(model):
    """The model with batch norms as if trained: as initialised they are alike, one could pass for another."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(0, 0.1)
        m.momentum = 1.0  # one forward pass fills in the running statistics
    model.train()(torch.rand(4, 3, 32, 32))
    for m in norms:
        m.momentum = 0.1
    return model


def problem(network):
    """The initial state dict, and the batches of x (B, 3, 32, 32) and y (B,), that both sides take."""
    torch.manual_seed(SEED)
    model = with_trained_batch_norm(our_model(network, normalize=models.CIFAR_NORMALIZE))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    n, batches = 2 if network == "preactresnet-18" else 8, []
    for _ in range(STEPS):
        x, y = torch.rand(n, 3, 32, 32), torch.randint(10, (n,))
        # the network is right about three images of four: of misclassified ones, early-stopped attacks let go
        batches.append((x, torch.where(torch.arange(n) % 4 > 0, model(x).argmax(1), y)))
    return state, batches


def judged(about, theirs, ours, expect="equal"):
    """A row: what it is about, the largest absolute difference of each part, and a verdict."""
    row = dict(about)
    for part in ours:
        differences = [(theirs[part][k] - v).abs().max() for k, v in ours[part].items() if k in theirs[part]]
        row[part] = torch.stack(differences).max().item() if differences else None
    compared = [row[part] for part in ours if expect != "on purpose" or part not in ("lr", "eps")]
    equal = all(d is None or d <= TOLERANCE for d in compared)  # NaN is not
    if expect == "planted":
        return row | {"ok": not equal, "verdict": "NOT SEEN" if equal else "planted, seen"}
    return row | {"ok": equal, "verdict": expect if equal else "DIFFERS"}


def compare_steps(setting, theirs, ours):
    """The row of a setting. theirs maps (setting, state, batches) to what happens; ours takes that too."""
    state, batches = problem(setting.network)
    a = theirs(setting, state, batches)
    about = {"network": setting.network, "setting": setting.name, "their_flags": setting.theirs,
             "our_flags": setting.ours}
    return judged(about, a, ours(setting, state, batches, a), setting.expect)


@torch.no_grad()
def compare_networks(network, activation, theirs, ours):
    """The row of a network: its logits of two images in train mode, then in eval mode."""
    load_weights(theirs, with_trained_batch_norm(ours).state_dict())
    x = torch.rand(2, 3, 32, 32)
    a, b = ({"train": {0: model.train()(x)}, "eval": {0: model.eval()(x)},
             "statistics": tensors(model)["statistics"]} for model in (theirs, ours))
    return judged({"network": network, "setting": activation}, a, b)


def network_rows(script):
    """The rows of all networks, and of PreActResNet-18 with every activation."""
    pairs = [(network, "ReLU") for network in NETWORKS] + [("preactresnet-18", a) for a in ACTIVATIONS]
    for network, activation in pairs:
        torch.manual_seed(SEED)
        flags = {} if activation == "ReLU" else {"activation": activation, "softplus_beta": 10}
        with contextlib.redirect_stdout(io.StringIO()):  # their models announce themselves
            theirs = getattr(script, NETWORKS[network])(**wrn_size(network), **flags)
        yield compare_networks(network, activation, theirs, our_model(network, activation.lower()))


def show(rows, *columns):
    """Prints rows as they come, and returns them as a list."""
    print(f"\n{'network, setting':52}" + "".join(f"{c:>11}" for c in columns))
    shown = []
    for row in rows:
        cells = "".join(f"{'-' if row[c] is None else f'{row[c]:.1e}':>11}" for c in columns)
        print(f"{row['network'] + ', ' + row['setting']:52}{cells}  {row['verdict']}", flush=True)
        shown.append(row)
    return shown


def main():
    p = utils.Parser(description=__doc__, prog="python -m tools.compare_authors")
    p.add_argument("clone", type=Path, metavar="BAG_OF_TRICKS_CLONE",
                   help="clone of github.com/P2333/Bag-of-Tricks-for-AT")
    p.add_argument("--trades", type=Path, metavar="AT_HE_CLONE",
                   help="clone of github.com/ShawnXYang/AT_HE: compare TRADES too")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = p.parse_args()
    torch.set_num_threads(1)  # a second gains little on tensors this small, and waits on a busy machine
    with float64_on_cpu():
        clones = {"Bag-of-Tricks-for-AT": commit(options.clone)}
        script, = load(options.clone, "train_cifar")
        pairs = [(s, partial(their_pgdat, script), partial(our_steps, train_pgdat)) for s in PGDAT]
        if options.trades:
            clones["AT_HE"] = commit(options.trades)
            theirs = partial(their_trades, *load(options.trades / "CIFAR-10", "losses", "models.wideresnet"))
            pairs += [(s, theirs, partial(our_steps, train_trades)) for s in TRADES]
        print(*(f"{name} at {version}" for name, version in clones.items()), sep="\n")
        print(f"largest absolute differences in float64, torch {torch.__version__}")
        settings = show((compare_steps(*p) for p in pairs), "lr", "eps", "images", "weights", "statistics")
        networks = show(network_rows(script), "train", "eval", "statistics")

    failed = sum(not row["ok"] for row in settings + networks)
    result = f"{failed} rows not as expected" if failed else f"equal to within {TOLERANCE:g}, or as marked"
    print(f"\n{len(settings)} settings, {len(networks)} networks: {result}")
    if options.json:
        utils.write_json(options.json, {"clones": clones, "tolerance": TOLERANCE, "settings": settings,
                                        "networks": networks, **utils.environment(torch.device("cpu"))})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    utils.run_script(main)
