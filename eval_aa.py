"""Clean, PGD-10 and AutoAttack accuracy of a run, of one of our checkpoints, or of anyone's CIFAR checkpoint.

    python eval_aa.py runs/NAME                 its best checkpoint, all test images -> runs/NAME/result.json
    python eval_aa.py runs/NAME --which last    its last checkpoint -> runs/NAME/result_last.json
    python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize       anyone's state dict -> wrn_result.json
    python eval_aa.py runs/NAME --stop-after 2000                   an estimate of AA in a fifth of the time

Accuracies are per cent of the images. PGD-10 counts an image as robust if the last iterate is classified
right, as the paper's checkpoints were selected. AutoAttack is the `standard` version (Croce & Hein, 2020).
Its own driver runs an attack over all images before the next one starts, so that a figure exists at the very
end only. Here a batch of images goes through all attacks, each on the images that withstood those before,
and after every batch there is a figure:

    AA  =  PGD-10 of all N images  -  mean over the n images done of (PGD-10 - AA),  each 1 or 0 per image,

whose standard error is s sqrt((1 - n / N) / n) with s the standard deviation of these differences: PGD-10 is
known for all images after minutes and correlates with AA, so the error is half that of a plain mean. After
the last image it is 0 and the figure AutoAttack's. (CIFAR-10's test images are in random order.)

result.npz says which images are done and which withstood what; it is also the state of an evaluation in
progress: the same command goes on where it was stopped. `torchrun --nproc_per_node=N -- eval_aa.py ...` deals
the batches out to N processes, with the same figures.
"""

import argparse
import datetime
import hashlib
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack

import models
import utils
from utils import InputError, attack_mode, evaluate, load_dataset, percent, to_float

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's standard version, in its order
# The classes that each attack needs, and about how many passes it makes per image, forward or backward.
ATTACKS = {"apgd-ce": (2, 200), "apgd-dlr": (3, 200), "fab": (2, 1200), "square": (2, 5000),
           "apgd-t": (4, 1800), "fab-t": (4, 2700)}
# What decides an evaluation's figures: a result of another one is refused.
IDENTITY = ("weights_sha256", "data_sha256", "model", "activation", "normalize", "n", "eps", "attacks",
            "seed", "precision", "batch_size")
MISFIT = 0.2  # of batch norm's statistics: above it something is wrong; results/README.md has the figures
NORMALISATIONS = (None, models.CIFAR_NORMALIZE, (models.CIFAR_NORMALIZE[0], (0.2023, 0.1994, 0.2010)),
                  ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # the last one is ImageNet's


def attack_list(text):
    """An argparse type: "standard", "none" or a comma-separated list of AutoAttack's attacks, as a tuple."""
    names = {"standard": STANDARD, "none": ()}.get(text, tuple(text.split(",")))
    if not set(names) <= set(ATTACKS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not standard, none, or a list of {','.join(ATTACKS)}")
    return names


def parse_args(argv=None):
    """The arguments of a command line. One that contradicts itself is refused with exit status 2."""
    p = utils.Parser(description=__doc__)
    p.add_argument("target", type=Path, help="a run's folder or a checkpoint file")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run's folder")
    p.add_argument("--out", type=Path, help="file of the result, beside which an .npz is written; default: "
                   "result.json in the run's folder, CHECKPOINT_result.json beside another checkpoint")

    g = p.add_argument_group("a checkpoint from elsewhere, which does not say what it is")
    g.add_argument("--model", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g.add_argument("--activation", choices=models.ACTIVATIONS, metavar="NAME",
                   help=f"{', '.join(models.ACTIVATIONS)}; default: relu")
    g.add_argument("--no-normalize", action="store_true", help="it takes images in [0, 1] as they are")
    g.add_argument("--mean", type=utils.number(0), nargs=3, metavar="M",
                   help="channel means that normalise its input; default: PGD-AT's, of CIFAR-10")
    g.add_argument("--std", type=utils.number(1e-6), nargs=3, metavar="S",
                   help="channel standard deviations, likewise; default: PGD-AT's, of CIFAR-10")

    g = p.add_argument_group("attacks")
    g.add_argument("--eps", type=utils.fraction,
                   help="L-inf radius on the [0, 1] scale; default: the run's, or 8/255")
    g.add_argument("--attacks", type=attack_list, default="standard",
                   help=f"standard (AutoAttack), none, or a list out of {','.join(ATTACKS)}, which is no AA")
    g.add_argument("--stop-after", type=utils.number(1, kind=int), metavar="N",
                   help="stop after the batch with the N-th image; the command without this flag continues")

    g = p.add_argument_group("run")
    g.add_argument("--dataset",
                   help="cifar10, cifar100 or the path of an .npz; default: the run's, or cifar10")
    g.add_argument("--data-dir",
                   help="folder of cifar10.npz, which is fetched on first use; default: the run's, or data")
    g.add_argument("--n", type=utils.number(1, kind=int), help="evaluate the first N test images alone")
    g.add_argument("--seed", type=utils.number(0, 2**63, int), default=0, help="seed of the attacks")
    g.add_argument("--batch-size", type=utils.number(1, kind=int),
                   help="images per batch, of which later attacks see about half; default: 500 on CUDA, "
                        "250 elsewhere")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32"),
                   help="fp32: strict; tf32: torch's own float32; default: tf32 on CUDA, fp32 elsewhere")
    args = p.parse_args(argv)
    if args.no_normalize and (args.mean or args.std):
        p.error("--no-normalize contradicts --mean and --std")
    if bool(args.mean) != bool(args.std):
        p.error("--mean and --std go together")
    if args.stop_after and not args.attacks:
        p.error("--stop-after has no effect with --attacks none")
    return args


def locate(args):
    """(checkpoint file, result file) of the target."""
    target, name = args.target, "result.json" if args.which == "best" else "result_last.json"
    if target.is_dir():
        target = target / f"{args.which}.pt"
    elif args.which == "best":
        name = f"{target.stem}_{name}"
    else:
        raise InputError("--which chooses in a run's folder, but the target is a file")
    if args.out and args.out.suffix != ".json":
        raise InputError(f"--out {args.out} does not end in .json")
    return target, args.out or target.with_name(name)


# ---- The checkpoint ----------------------------------------------------------------------------------------


def weights_in(loaded, last, path):
    """The dict of tensors in a file: the file itself, or one of its values. (An optimiser's lie deeper.) Of
    several dicts it is the one with the last layer's bias. Raises InputError if there is none, or two."""
    values = {"the file": loaded, **(loaded if isinstance(loaded, dict) else {})}
    found = {name: v for name, v in values.items() if isinstance(v, dict) and v
             and all(isinstance(k, str) and isinstance(tensor, torch.Tensor) for k, tensor in v.items())}
    if len(found) > 1:
        found = {name: v for name, v in found.items() if any(k.endswith(last) for k in v)}
    if len(found) != 1:
        which = ", ".join(map(str, found))
        raise InputError(f"{path} holds " + (f"several state dicts: save one of {which} in a file of its own"
                                             if found else "no state dict"))
    return found.popitem()[1]


def rename(state, names, path):
    """A state dict under our model's names.

    The prefix that most of them have in the file, such as `module.` (DataParallel), is dropped, and so is
    what no layer could hold: the buffers of a normalisation, counters.
    """
    ends = names[0], names[-1]
    prefixes = [k.removesuffix(end) for end in ends for k in state if k.endswith(end)]
    prefix = max(prefixes, key=lambda p: sum(p + name in state for name in names), default="")
    state = {k.removeprefix(prefix): v for k, v in state.items()}
    # WideResNets from TRADES have a sub_block1 that no forward pass uses.
    state = {k: v for k, v in state.items() if not k.startswith("sub_block1.")}
    of_layers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    others = {k: state.pop(k) for k in list(state) if k.split(".")[-1] not in of_layers}
    triples = ["{} {:.4g} {:.4g} {:.4g}".format(k, *v.flatten()) for k, v in others.items() if v.numel() == 3]
    if others:
        print(f"note: {path}: no layer holds {', '.join(others)}: ignored"
              + (f". Are these what --mean and --std should be: {', '.join(triples)}?" if triples else ""))
    return state


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
    if not all(v.isfinite().all() for v in state.values()):
        raise InputError(f"{path} holds NaN or infinite weights")


def load_model(path, model=None, activation=None, no_normalize=False, mean=None, std=None):
    """(model, what the result says of it, args of its training) from a checkpoint of ours, which tells what
    it is, or from anyone's, for which the flags tell it.

    The model takes x (B, 3, 32, 32) in [0, 1], and is in eval mode and frozen. Raises InputError if the file
    cannot be read safely, or does not fit the flags.
    """
    path, loaded = Path(path), utils.load_checkpoint(path)
    ours = {"state_dict": dict, "args": dict, "num_classes": int, "epoch": int, "data_sha256": str}
    if isinstance(loaded, dict) and all(isinstance(loaded.get(k), kind) for k, kind in ours.items()):
        if model or activation or no_normalize or mean:
            raise InputError("--model, --activation, --no-normalize, --mean and --std have no effect: "
                             f"{path} says what it is itself")
        state, trained, epoch = loaded["state_dict"], loaded["args"], loaded["epoch"]
        model, activation = trained["model"], trained["activation"]
        normalize, num_classes = loaded["normalize"], loaded["num_classes"]
    else:
        if model is None:
            raise InputError(f"{path} does not name its architecture: give --model (and --no-normalize if it "
                             "takes plain images)")
        with torch.device("meta"):  # without memory, for the names alone
            names = list(models.build(model).state_dict())
        state = rename(weights_in(loaded, names[-1], path), names, path)
        trained, epoch = {"dataset": "cifar10", "eps": 8 / 255}, None
        num_classes = len(state.get(names[-1], range(10)))  # the last layer's biases
        normalize = None if no_normalize else (mean, std) if mean else models.CIFAR_NORMALIZE
        activation = activation or "relu"
    network = models.build(model, num_classes, activation, normalize)
    load_weights(network, state, path)
    about = {"model": model, "activation": activation, "normalize": normalize, "num_classes": num_classes,
             "checkpoint": path.name, "epoch": epoch}
    return network.eval().requires_grad_(False), about, trained


@torch.no_grad()
def misfit(model, images):
    """How far batch norm's running statistics are from what the network computes on images (N, 32, 32, 3)
    uint8: about 0.1 in the function that was trained, more with another activation or normalisation.

    The mean, over batches and over layers that have seen one, of the median over channels of
    |log((v + eps) / (running v + eps))|, where v is the variance in the batch. None without such a layer.
    """
    logs = []

    def compare(norm, inputs):
        variance = inputs[0].transpose(0, 1).flatten(1).var(1)  # (C,)
        logs.append(((variance + norm.eps) / (norm.running_var + norm.eps)).log().abs().median().item())

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(compare) for m in norms if (m.running_var != 1).any()]
    for x in to_float(images).split(250):
        model(x)
    for hook in hooks:
        hook.remove()
    return round(sum(logs) / len(logs), 3) if logs else None


def warn_of_misfit(model, images, value):
    """Warn that the misfit is high, and name the normalisation under which it is lowest."""
    given, tried = model.normalize, {}
    for constants in NORMALISATIONS:
        model.normalize = models.Normalize(*constants).to(images.device) if constants else torch.nn.Identity()
        tried[misfit(model, images)] = constants
    model.normalize, lowest = given, min(tried)
    mean, std = (" ".join(map(str, triple)) for triple in tried[lowest] or ("", ""))
    flags = f"--mean {mean} --std {std}" if mean else "--no-normalize"
    print("warning: are model, activation and normalisation those of its training? Batch norm's statistics "
          f"do not fit: misfit {value:.2f}, expected below {MISFIT}"
          + (f"; with {flags} it is {lowest:.2f}" if lowest < 0.8 * value else ""))


def sha256_of(tensors):
    """SHA-256 of a dict's tensors and their names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- The result --------------------------------------------------------------------------------------------


def open_result(path, about):
    """(result, flags) of the evaluation in the .json and the .npz beside it, or of one that begins.

    flags: {"clean", "pgd10", an attack's name: which images withstood it and those before, "done"}, (N,) bool
    each. Raises InputError if a file is of another evaluation, or not ours.
    """
    npz = path.with_suffix(".npz")
    if not path.exists() and not npz.exists():
        return {**about, "seconds": {"pgd10": 0, "autoattack": 0}}, {}
    try:
        with np.load(npz, allow_pickle=False) as file:
            flags = dict(file)
        result = json.loads(str(flags.pop("result")))
        differ = [f"{k} was {result.get(k)}, is {about.get(k)}" for k in IDENTITY
                  if result.get(k) != about.get(k)]
    except Exception:  # gone, damaged, an .npz of something else ...
        differ = [f"{npz} says nothing of it"]
    if differ:
        raise InputError(f"{path} is of another evaluation ({'; '.join(differ)}): choose another --out, or "
                         f"delete it and {npz}")
    return result, flags


def estimate(pgd10, robust, done):
    """(accuracy, its standard error), per cent, from flags (N,): pgd10 of all images, robust of those done.

    See the formula at the top; while all differences are equal, the error is that of one that is not. At
    least one image has to be done.
    """
    total, n = len(done), done.sum()
    difference = pgd10[done].astype(float) - robust[done]
    spread = max(((difference - difference.mean()) ** 2).sum() / max(n - 1, 1), 1 / n)
    error = math.sqrt((1 - n / total) * spread / n)
    return round(100 * (pgd10.mean() - difference.mean()), 2), round(100 * error, 2)


def report(path, result, flags):
    """Bring the figures up to date, write both files, each whole or not at all, and print the figures: clean
    82.16 / PGD-10 53.31 / AA 48.71 +- 0.45 (2,000 of 10,000 images)."""
    n_done, attacks, classes = int(flags["done"].sum()), result["attacks"], result["num_classes"]
    figures = {a: estimate(flags["pgd10"], flags[a], flags["done"]) for a in attacks if n_done}
    aa, error = figures.get(STANDARD[-1], (None, None)) if tuple(attacks) == STANDARD else (None, None)
    result |= {k: percent(torch.from_numpy(flags[k])) for k in ("clean", "pgd10")}
    result |= {"n_done": n_done, "complete": not attacks or n_done == result["n"], "left": figures, "aa": aa,
               "aa_error": error}
    arrays = {**flags, "result": json.dumps(result)}
    utils.write_whole(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays))
    utils.write_json(path, result)
    text = f"clean {result['clean']:.2f} / PGD-10 {result['pgd10']:.2f}"
    if figures:
        value, error = figures[attacks[-1]]
        name = "AA" if classes >= 10 else f"AA, {classes - 1} targets"
        text += f" / {name if aa is not None else ','.join(attacks) + ' (not AA)'} {value:.2f}"
        if not result["complete"]:
            text += f" +- {error:.2f} ({n_done:,} of {result['n']:,} images)"
    utils.say(text)


# ---- Attacks -----------------------------------------------------------------------------------------------


def make_autoattack(model, eps, seed, device, targets=9):
    """AutoAttack's standard version on a model in any memory format. targets: how many classes the targeted
    attacks try."""
    def forward(x):  # AutoAttack calls .view on the gradient of x, which flat memory makes contiguous
        return model(x.flatten(1).unflatten(1, x.shape[1:]))

    said = set()

    def once(record):  # warnings come again with every batch
        new = record.getMessage() not in said
        said.add(record.getMessage())
        return new

    logging.getLogger("auto-attack").filters = [once]  # of this evaluation: another one is told anew
    torch.backends.cudnn.benchmark = False  # batches shrink as images are broken
    aa = AutoAttack(forward, norm="Linf", eps=eps, seed=seed, version="standard", device=device)
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = targets
    return aa


def withstood(aa, attacks, x, y):
    """Yields (attack, which images of the batch withstand it and those before it), (B,) bool.

    x (B, 3, 32, 32) in [0, 1], y (B,).
    """
    with torch.no_grad():
        robust = aa.get_logits(x).argmax(1) == y
    for attack in attacks:
        index = robust.nonzero().squeeze(1)
        if len(index):  # the package raises where there is no image
            aa.attacks_to_run = [attack]
            _, predicted = aa.run_standard_evaluation(x[index], y[index], batch_size=len(index))
            robust[index] = predicted == y[index]
        yield attack, robust.clone()


@torch.enable_grad()  # evaluation code often stands under no_grad
def autoattack(model, images, labels, eps, path, attacks=STANDARD, seed=0, batch_size=250, stop_after=None,
               about=None):
    """Clean, PGD-10 and AutoAttack accuracy of any module from x (B, 3, 32, 32) in [0, 1] to logits (B, K).

    images (N, 32, 32, 3) uint8 and labels (N,) int64 on the model's device; eps on the [0, 1] scale; path:
    the result's .json, which is written after every batch with the .npz beside it, and from which a second
    call with the same weights and data goes on; attacks: names out of ATTACKS; stop_after: end after the
    batch with that image; about: what else the result says. Returns the result, a dict. Raises InputError if
    an attack needs more classes, or if the files are of another evaluation.
    """
    path, device, total = Path(path), images.device, len(labels)
    if (images.dtype, labels.dtype) != (torch.uint8, torch.int64):
        raise InputError(f"images are {images.dtype}, labels {labels.dtype}: torch.uint8 (N, 32, 32, 3) and "
                         "torch.int64 (N,) are needed")
    with utils.lock(path.parent, f".{path.stem}.lock"), attack_mode(model, "eval"):
        with torch.no_grad():
            classes = model(to_float(images[:1]).contiguous()).shape[1]
        if any(ATTACKS[a][0] > classes for a in attacks):
            fewer = ",".join(a for a, (needed, _) in ATTACKS.items() if needed <= classes)
            raise InputError(f"{classes} classes are too few for {','.join(attacks)}: try --attacks {fewer}")
        about = {"weights_sha256": sha256_of(model.state_dict()), "num_classes": classes, "n": total,
                 "data_sha256": sha256_of({"images": images, "labels": labels}), "eps": eps,
                 "attacks": attacks, "seed": seed, "batch_size": batch_size, **utils.environment(device),
                 **(about or {})}
        result, flags = open_result(path, json.loads(json.dumps(about)))
        if not flags:
            began = time.time()
            pgd10 = evaluate(model, images, labels, eps, seed=seed, batch_size=batch_size, shard=utils.SHARD)
            flags = dict(zip(("clean", "pgd10"), utils.sum_over_processes(pgd10).cpu().numpy()))
            flags |= {name: np.zeros(total, dtype=bool) for name in (*attacks, "done")}
            result["seconds"]["pgd10"] = round(time.time() - began, 1)
        report(path, result, flags)
        if attacks:
            aa = make_autoattack(model, eps, seed, device, min(9, classes - 1))
            run_attacks(aa, images, labels, result, flags, stop_after, path)
    if result["aa"] is not None:
        show_late(flags)
    return result


def run_attacks(aa, images, labels, result, flags, stop_after, path):
    """Send the batches that are not done through all attacks; report after each round of the processes."""
    n, size, attacks = result["n"], result["batch_size"], result["attacks"]
    starts = [i for i in range(0, min(n, stop_after or n), size) if not flags["done"][i]]
    rounds = [starts[i : i + utils.WORLD] for i in range(0, len(starts), utils.WORLD)]
    for of_all in utils.progress(rounds, "AutoAttack", len(rounds)):
        began = time.time()
        new = torch.zeros(len(attacks) + 1, n, dtype=torch.bool, device=labels.device)
        for i in of_all[utils.RANK : utils.RANK + 1]:
            batch = slice(i, i + size)
            x, y = to_float(images[batch]).contiguous(), labels[batch]
            for k, (_, robust) in enumerate(withstood(aa, attacks, x, y)):
                new[k, batch] = robust
                if k == 0 and of_all is rounds[0]:
                    share = robust.sum().item() / max(1, flags["clean"][batch].sum())
                    forecast(attacks, time.time() - began, len(y), share, len(rounds))
            new[-1, batch] = True
        for name, values in zip((*attacks, "done"), utils.sum_over_processes(new).cpu().numpy()):
            flags[name] |= values
        result["seconds"]["autoattack"] = round(result["seconds"]["autoattack"] + time.time() - began, 1)
        report(path, result, flags)


def forecast(attacks, seconds, images, share, rounds):
    """Say how long everything will take, when the first attack on the first batch of images has shown it, and
    which share of those it attacked is left for the other attacks."""
    passes = [ATTACKS[a][1] for a in attacks]
    total = rounds * seconds * (1 + share * sum(passes[1:]) / passes[0])
    utils.say(f"{attacks[0]} took {seconds:.0f} s for the first {images} images; in all this takes about "
        f"{datetime.timedelta(seconds=round(total))}")


def show_late(flags):
    """Print which images only FAB and Square break, and warn if they are many: a sign of masked gradients."""
    late = np.flatnonzero(flags["apgd-t"] & ~flags["square"] & flags["done"])
    share = 100 * len(late) / flags["done"].sum()
    utils.say(f"fab-t and square alone break {len(late)} of the images ({share:.2f} %) {late.tolist() or ''}"
        + ("\nwarning: that is many: are gradients masked?" if share > 0.5 else ""))


def main():
    args = parse_args()
    device = utils.start_device(args)
    path, out = locate(args)
    model, about, trained = load_model(
        path, args.model, args.activation, args.no_normalize, args.mean, args.std)
    dataset = args.dataset or trained["dataset"]
    data = load_dataset(dataset, device, args.data_dir or trained.get("data_dir", "data"))
    n, eps = args.n or len(data.test_labels), trained["eps"] if args.eps is None else args.eps
    if data.num_classes != about["num_classes"]:
        raise InputError(f"{path} knows {about['num_classes']} classes, but the data set has "
                         f"{data.num_classes}")
    if n > len(data.test_labels):
        raise InputError(f"--n {n}: there are {len(data.test_labels):,} test images")
    print(f"{path}: {about['model']}, {n:,} test images, eps {255 * eps:.4g}/255")
    model.to(device, memory_format=torch.channels_last)
    about |= {"data_sha256": data.sha256, "precision": args.precision}
    if args.model:
        first = data.test_images[:1000]
        about["misfit"] = misfit(model, first)
        if (about["misfit"] or 0) > MISFIT and dataset in ("cifar10", "cifar100"):  # not on one's own data
            warn_of_misfit(model, first[:250], about["misfit"])
    size = args.batch_size or (500 if device.type == "cuda" else 250)
    autoattack(model, data.test_images[:n], data.test_labels[:n], eps, out, args.attacks, args.seed, size,
               args.stop_after, about)
    print(f"written to {out}" + (f", of the first {n:,} of {len(data.test_labels):,} test images"
                                 if n < len(data.test_labels) else ""))


if __name__ == "__main__":
    utils.run_script(main)
