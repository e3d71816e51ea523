"""Clean, PGD-10 and AutoAttack accuracy of a run, of one of our checkpoints, or of anyone's CIFAR checkpoint.

    python eval_aa.py runs/NAME                 its best checkpoint, all test images -> runs/NAME/result.json
    python eval_aa.py runs/NAME --which last    its last checkpoint -> runs/NAME/result_last.json
    python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize       anyone's state dict -> wrn_result.json
    python eval_aa.py runs/NAME --error 0.4     an estimate of AA with that standard error, in points

Accuracies are per cent of the images. PGD-10 counts an image as robust if the last iterate is classified
right, as the paper's checkpoints were selected. AutoAttack is the `standard` version (Croce & Hein, 2020).
Its own driver runs each attack over all images before the next, so there is no figure until the very end.
Here a batch of images goes through all attacks, and after every batch there is a figure. Images whose margin
after PGD-10 is close to 0 tend to come first: each has a weight w (see priority) and the key u / w, with u
uniform in [0, 1), and images come in the order of their keys (priority sampling: Duffield et al., 2007;
sequential Poisson sampling: Ohlsson, 1998). With t the smallest key among the images not yet done, an image
had the probability p = min(1, w t) of being done by now, and

    AA       =  PGD-10 of all N images  -  1/N   sum over the images done of (PGD-10 - AA) / p
    error^2  =                             1/N^2 sum over the images done of (PGD-10 - AA)^2 (1 - p) / p^2

where PGD-10 and AA are 1 or 0 per image. The estimate is unbiased over seeds, whatever the weights and the
order of the test set, and after the last image it is AutoAttack's figure.

result.npz says which images are done and which attacks they withstood. It is also the state of an evaluation:
the same command resumes where it stopped. `torchrun --nproc_per_node=N -- eval_aa.py ...` splits the batches
among N processes, with the same flags for every image.
"""

import argparse
import datetime
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack

import models
import utils
from utils import InputError, attack_mode, classified_right, evaluate, load_dataset, percent, seeded, to_float

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's standard version, in its order
ATTACKS = (*STANDARD, "apgd-dlr", "fab")
# The fields that identify an evaluation. A result in which one of them differs is not continued.
IDENTITY = ("weights_sha256", "data_sha256", "model", "activation", "normalize", "n", "eps", "attacks",
            "seed", "precision", "batch_size")
COUNTER = "num_batches_tracked"  # which old checkpoints lack
MISFIT = 0.2  # of batch norm's statistics: above it something is wrong; results/README.md has the figures
NORMALISATIONS = {"--no-normalize": None, "our own default": models.CIFAR_NORMALIZE,
                  "--std 0.2023 0.1994 0.2010": (models.CIFAR_NORMALIZE[0], (0.2023, 0.1994, 0.2010)),
                  "ImageNet's constants": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def attack_list(text):
    """An argparse type: "standard", "none" or a comma-separated list of AutoAttack's attacks, as a tuple."""
    names = {"standard": STANDARD, "none": ()}.get(text, tuple(text.split(",")))
    if not set(names) <= set(ATTACKS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not standard, none, or a list of {','.join(ATTACKS)}")
    return names


def parse_args(argv=None):
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
    g.add_argument("--mean", type=float, nargs=3, metavar="M", help="channel means that normalise its input, "
                   "with --std the deviations; default: those of CIFAR-10, as in PGD-AT")
    g.add_argument("--std", type=float, nargs=3, metavar="S", help="see --mean")

    g = p.add_argument_group("evaluation")
    g.add_argument("--eps", type=utils.fraction,
                   help="L-inf radius on the [0, 1] scale; default: the run's, or 8/255")
    g.add_argument("--attacks", type=attack_list, default="standard",
                   help=f"standard (AutoAttack), none, or a list out of {','.join(ATTACKS)} (not AA then)")
    g.add_argument("--error", type=float, default=0.0, metavar="E",
                   help="stop when the standard error of the last attack's figure, over seeds, is at most E "
                        "points; such a figure is 0.05 to 0.3 points too high in simulations")
    g.add_argument("--stop-after", type=int, metavar="N",
                   help="stop after the batch with the N-th image; the command without this flag continues")
    g.add_argument("--dataset", help="cifar10, cifar100 or an .npz's path; default: the run's, or cifar10")
    g.add_argument("--data-dir", help="folder of cifar10.npz; default: the run's, or data")
    g.add_argument("--n", type=int, help="evaluate only the first N test images")
    g.add_argument("--seed", type=int, default=0, help="seed of the attacks and of the order of the images")
    g.add_argument("--batch-size", type=int,
                   help="images per batch; default: 500 on CUDA, 250 elsewhere; most go on to later attacks")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32"),
                   help="fp32: strict; tf32: torch's own float32; default: tf32 on CUDA, fp32 elsewhere")
    args = p.parse_args(argv)
    if bool(args.mean) != bool(args.std) or args.no_normalize and args.mean:
        p.error("--mean and --std go together, and without --no-normalize")
    if not args.attacks and (args.stop_after or args.error):
        p.error("--stop-after and --error have no effect with --attacks none")
    return args


# ---- The checkpoint ----------------------------------------------------------------------------------------


def load_model(path, model=None, activation=None, no_normalize=False, mean=None, std=None):
    """(model, what the result says of it, args of its training) from a checkpoint of ours, which tells what
    it is, or from anyone's, for which the flags do. The model takes x (B, 3, 32, 32) in [0, 1]; it is in eval
    mode and frozen. Raises InputError if the file cannot be read safely, or does not fit the flags."""
    path, loaded = Path(path), utils.load_checkpoint(path)
    loaded = loaded if isinstance(loaded, dict) else {}
    if "data_sha256" in loaded:
        if model or activation or no_normalize or mean:
            raise InputError(f"{path} says what it is: flags such as --model have no effect")
        state, trained = loaded["state_dict"], loaded["args"] | {"data_sha256": loaded["data_sha256"]}
        about = {k: trained[k] for k in ("model", "activation")}
        about |= {k: loaded[k] for k in ("normalize", "num_classes", "epoch")}
    elif model is None:
        raise InputError(f"{path} does not say what it is: give --model, and --no-normalize if none is in it")
    else:
        names = list(shapes(model))
        state, trained = weights_in(loaded, names, path), {}
        about = {"model": model, "activation": activation or "relu",
                 "normalize": None if no_normalize else (mean, std) if mean else models.CIFAR_NORMALIZE,
                 "num_classes": len(state.get(names[-1], range(10))),  # of the last layer's bias
                 "epoch": None}
    found = {k: v.shape for k, v in state.items() if not k.endswith(COUNTER)}
    if found != shapes(about["model"], about["num_classes"]):
        alike = [name for name in models.MODELS if found == shapes(name, about["num_classes"])]
        raise InputError(f"{path} fits {', '.join(alike) or 'no model of ours'}, not {about['model']}")
    network = models.build(*(about[k] for k in ("model", "num_classes", "activation", "normalize")))
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False), about | {"checkpoint": path.name}, trained


def shapes(model, num_classes=10):
    """{name: shape} in the state dict of one of our architectures, without counters. It takes no memory."""
    with torch.device("meta"):
        state = models.build(model, num_classes).state_dict()
    return {k: v.shape for k, v in state.items() if not k.endswith(COUNTER)}


def weights_in(loaded, names, path):
    """The state dict in a file, which is the file or one of its values, without the prefix that all names
    share (`module.`: DataParallel), what belongs to no layer, and TRADES' sub_block1, which it never uses."""
    found = [v for v in (loaded, *loaded.values()) if isinstance(v, dict) and v
             and all(isinstance(tensor, torch.Tensor) for tensor in v.values())]
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found) or 'no'} state dicts: save one in a file of its own")
    # The shortest name that ends like our first one is the prefix and our first name.
    prefix = min((k for k in found[0] if k.endswith(names[0])), key=len, default="").removesuffix(names[0])
    state = {k.removeprefix(prefix): v for k, v in found[0].items()}
    of_layers = (".weight", ".bias", ".running_mean", ".running_var", COUNTER)
    if others := [k for k in state if not k.endswith(of_layers)]:
        print(f"note: {path}: ignored, part of no layer: {', '.join(others)}")
    return {k: v for k, v in state.items() if k not in others and not k.startswith("sub_block1.")}


@torch.no_grad()
def misfit(model, images):
    """How far batch norm's running statistics are from what the network computes on images (N, 32, 32, 3)
    uint8: about 0.1 for the function that was trained, more for another. The mean, over layers that were
    trained, of the median over channels of |log((v + eps) / (running v + eps))|, where v is the variance
    over the images. None without such a layer."""
    logs = []

    def compare(norm, inputs):
        variance = inputs[0].transpose(0, 1).flatten(1).var(1)  # (C,)
        logs.append(((variance + norm.eps) / (norm.running_var + norm.eps)).log().abs().median().item())

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(compare) for m in norms if (m.running_var != 1).any()]
    model(to_float(images).contiguous())
    for hook in hooks:
        hook.remove()
    return round(sum(logs) / len(logs), 3) if logs else None


def checked_misfit(model, images):
    """The misfit. If it is high, a warning names the normalisation under which it is lowest."""
    value, given, tried = misfit(model, images), model.normalize, {}
    if value is None or value <= MISFIT:
        return value
    for name, constants in NORMALISATIONS.items():
        model.normalize = models.Normalize(*constants).to(images.device) if constants else torch.nn.Identity()
        tried[name] = misfit(model, images)
    model.normalize, best = given, min(tried, key=tried.get)
    print("warning: are model, activation and normalisation those of its training? Batch norm's statistics "
          f"do not fit: misfit {value:.2f}, expected below {MISFIT}; with {best} it is {tried[best]:.2f}")
    return value


# ---- The evaluation ----------------------------------------------------------------------------------------


def priority(pgd10, margin, seed):
    """(weight, key) of each image, (N,) float64 each, from which withstand PGD-10 and their margins after it.

    AutoAttack breaks what came close to being broken: the weight falls with the rank in [0, 1) of |margin|,
    among the images that withstand PGD-10 and among the others, of which a few withstand another attack.
    Weights decide how precise the estimate is, not its mean; these were chosen by hand."""
    weight = np.empty(len(pgd10))
    for group, scale, least in ((pgd10, 1, 0), (~pgd10, 0.3, 0.2)):
        rank = abs(margin[group]).argsort(kind="stable").argsort() / max(1, group.sum())
        weight[group] = np.maximum(least, scale / (0.05 + rank))
    uniform = torch.rand(len(pgd10), dtype=torch.float64, generator=seeded("cpu", seed, "order")).numpy()
    return weight, uniform / weight


def estimate(pgd10, robust, done, weight, key):
    """(accuracy, its standard error over seeds), in per cent, by the formula at the top; (N,) arrays. robust
    is known where done. The error is at least as if one difference were still unseen, on an image of median
    weight among those to come that withstand PGD-10."""
    if done.all():
        return percent(torch.from_numpy(robust)), 0.0
    t, difference = key[~done].min(), pgd10[done].astype(float) - robust[done]
    p = np.minimum(1, weight[done] * t)
    to_come = ~done & pgd10 if (~done & pgd10).any() else ~done
    q = t * np.median(weight[to_come])  # below 1: their keys u / w are at least t
    variance = max((difference**2 * (1 - p) / p**2).sum(), (1 - q) / q**2)
    value, error = pgd10.sum() - (difference / p).sum(), math.sqrt(variance)
    return round(100 * value / len(done), 2), max(0.01, round(100 * error / len(done), 2))


def describe(model, images, labels, eps, path, attacks):
    """The fields that identify an evaluation. Two images' logits are among them, since the same weights can
    belong to different functions. Raises InputError if an argument is not as autoattack's docstring says."""
    given = {"images (N, H, W, 3) torch.uint8": images.dtype == torch.uint8 and images.shape[3:] == (3,),
             "labels (N,) torch.int64": labels.dtype == torch.int64 and labels.shape == images.shape[:1],
             "an eps below 1, such as 8 / 255": 0 <= eps < 1,
             "a path that ends in .json": path.suffix == ".json",
             f"attacks out of {','.join(ATTACKS)}": set(attacks) <= set(ATTACKS)}
    if not all(given.values()):
        raise InputError(f"autoattack takes {', '.join(what for what in given if not given[what])}")
    x = to_float(images[:2]).contiguous()
    with torch.no_grad():
        together, alone = (torch.cat([model(part) for part in x.split(size)]).float().nan_to_num().cpu()
                           for size in (2, 1))
    classes = together.shape[1]
    if not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"labels are from {labels.min()} to {labels.max()}, but there are {classes} logits")
    if (together - alone).abs().max() > 0.01 * together.abs().max():
        raise InputError("the model's logits are random, or depend on the other images of the batch")
    weights = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    data = {"images": images, "labels": labels}
    return {"weights_sha256": sha256_of(weights), "data_sha256": sha256_of(data), "num_classes": classes,
            "logits": together.tolist(), "n": len(labels), "eps": eps, "attacks": attacks}


def open_result(path, about):
    """(result, arrays) of the evaluation in the .json and .npz, or of one that begins. arrays (N,): "clean",
    "pgd10", an attack's name: which images withstood it and those before; "done"; "margin" after PGD-10.
    Raises InputError if the files are of another evaluation."""
    npz = path.with_suffix(".npz")
    if not path.exists() and not npz.exists():
        return about, {}
    with np.load(npz, allow_pickle=False) as file:
        arrays = dict(file)
    result = json.loads(str(arrays.pop("result", "{}")))
    differ = [f"{k} was {result.get(k)}, is {about.get(k)}" for k in IDENTITY
              if result.get(k) != about.get(k)]
    was, now = np.array(result.get("logits", about["logits"])), np.array(about["logits"])
    if was.shape != now.shape or (abs(was - now) > 1e-3 * abs(now).max()).any():
        differ.append("the same weights gave other logits")
    if not differ and not result["complete"] and "margin" not in arrays:
        differ = ["an older version took the images in another order"]
    if differ:
        raise InputError(f"{path} is of another evaluation ({'; '.join(differ)}): choose another --out, or "
                         f"delete it and {npz}")
    return result, arrays


def report(path, result, arrays, left=""):
    """Bring the figures up to date, write both files, each whole or not at all, and print the figures: clean
    82.16 / PGD-10 53.31 / AA 48.71 +- 0.45 (2,000 of 10,000 images)."""
    n_done, attacks, classes = int(arrays["done"].sum()), result["attacks"], result["num_classes"]
    order = priority(arrays["pgd10"], arrays["margin"], result["seed"])
    figures = {a: estimate(arrays["pgd10"], arrays[a], arrays["done"], *order) for a in attacks if n_done}
    is_aa = tuple(attacks) == STANDARD
    aa, error = figures.get(STANDARD[-1], (None, None)) if is_aa else (None, None)
    result |= {k: percent(torch.from_numpy(arrays[k])) for k in ("clean", "pgd10")}
    result |= {"n_done": n_done, "complete": not attacks or n_done == result["n"], "left": figures, "aa": aa,
               "aa_error": error}
    whole = {**arrays, "result": json.dumps(result)}
    utils.write_whole(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **whole))
    utils.write_json(path, result)
    text = f"clean {result['clean']:.2f} / PGD-10 {result['pgd10']:.2f}"
    if figures:
        value, error = figures[attacks[-1]]
        name = "AA" if classes >= 10 else f"AA, {classes - 1} targets"
        text += f" / {name if is_aa else ','.join(attacks) + ' (not AA)'} {max(value, 0):.2f}"
        if not result["complete"]:
            text += f" +- {error:.2f} ({n_done:,} of {result['n']:,} images){left}"
    utils.tqdm.write(text)


def sha256_of(tensors):
    """SHA-256 of a dict's tensors and their names."""
    values = {k: v.cpu().contiguous().flatten().view(torch.uint8).numpy() for k, v in tensors.items()}
    return hashlib.sha256(b"".join(k.encode() + values[k].tobytes() for k in sorted(values))).hexdigest()


def make_autoattack(model, eps, seed, device, targets=9):
    """AutoAttack's standard version, on any module. targets: how many classes the targeted attacks try."""
    def forward(x):  # AutoAttack calls .view on the gradient of x, which flatten makes contiguous
        return model(x.flatten(1).unflatten(1, x.shape[1:]))

    torch.backends.cudnn.benchmark = False  # batches shrink as images are broken
    aa = AutoAttack(forward, norm="Linf", eps=eps, seed=seed, version="standard", device=device)
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = targets
    return aa


def withstood(aa, attacks, x, y):
    """Yields (attack, which images of the batch withstand it and those before it, (B,) bool); x in [0, 1]."""
    with torch.no_grad():
        robust = classified_right(aa.get_logits(x), y)
    for attack in attacks:
        index = robust.nonzero().squeeze(1)
        if len(index):  # the package raises where there is no image
            aa.attacks_to_run = [attack]
            _, predicted = aa.run_standard_evaluation(x[index], y[index], batch_size=len(index))
            robust[index] = predicted == y[index]
        yield attack, robust.clone()


@torch.inference_mode(False)  # gradients, even if the caller is under inference_mode or no_grad
def autoattack(model, images, labels, eps, path, attacks=STANDARD, seed=0, batch_size=250, stop_after=None,
               error=0.0, about=None):
    """Clean, PGD-10 and AutoAttack accuracy of any module from x (B, 3, H, W) in [0, 1] to logits (B, K).

    images (N, H, W, 3) uint8 and labels (N,) int64, on the model's device; eps on the [0, 1] scale; path: the
    result's .json. It is written after every batch with the .npz beside it, and a second call with the same
    function and data goes on from there. attacks: out of ATTACKS; stop_after: end after the batch with that
    image; error: end when the last attack's standard error is at most this many points; about: what else the
    result says. Returns the result, a dict. Raises InputError if an argument is not as described here, if the
    logits of an image depend on the others of its batch, or if the files are of another evaluation.
    """
    path, images, labels = Path(path), images.clone(), labels.clone()  # clones are ordinary tensors
    with utils.lock(path.parent, f".{path.stem}.lock"), attack_mode(model, "eval"):
        about = {**describe(model, images, labels, eps, path, attacks), **utils.environment(images.device),
                 "seed": seed, "batch_size": batch_size, **(about or {})}
        result, arrays = open_result(path, json.loads(json.dumps(about)))  # as it would be read back
        if not arrays:
            began = time.time()
            found = evaluate(model, images, labels, eps, seed=seed, batch_size=batch_size, shard=utils.SHARD)
            found = (utils.sum_over_processes(t.cpu()).numpy() for t in found)
            arrays = dict(zip(("clean", "pgd10", "margin"), found))
            arrays |= {name: np.zeros(len(labels), dtype=bool) for name in (*attacks, "done")}
            result["seconds"] = {"pgd10": round(time.time() - began, 1), "autoattack": 0}
        if "margin" in arrays:  # not in an old evaluation, which has come to its end
            report(path, result, arrays)
        if result["complete"]:
            return result

        order = torch.from_numpy(priority(arrays["pgd10"], arrays["margin"], seed)[1].argsort())
        aa = make_autoattack(model, eps, seed, images.device, min(9, result["num_classes"] - 1))
        starts = range(result["n_done"], min(len(labels), stop_after or len(labels)), batch_size)
        rounds = [starts[i : i + utils.WORLD] for i in range(0, len(starts), utils.WORLD)]  # one a process
        bar, began = utils.progress(total=len(rounds) * len(attacks), desc="AutoAttack"), time.time()
        for number, of_all in enumerate(rounds, 1):
            if result["n_done"] and result["left"][attacks[-1]][1] <= error:
                break
            started, new = time.time(), torch.zeros(len(attacks) + 1, len(labels)).bool()
            for i in of_all[utils.RANK : utils.RANK + 1]:
                batch = order[i : i + batch_size]
                x, y = to_float(images[batch]).contiguous(), labels[batch]
                for row, (attack, robust) in zip(new, withstood(aa, attacks, x, y)):
                    row[batch] = robust.cpu()
                    bar.update()
                    if bar.disable and number == 1:  # no terminal: a sign of life
                        print(f"{attack}: {robust.sum()} of {len(y)} left, {time.time() - started:.0f} s")
                new[-1, batch] = True
            for name, values in zip((*attacks, "done"), utils.sum_over_processes(new).numpy()):
                arrays[name] |= values
            seconds = result["seconds"]
            seconds["autoattack"] = round(seconds["autoattack"] + time.time() - started, 1)
            left = datetime.timedelta(seconds=round((time.time() - began) / number * (len(rounds) - number)))
            report(path, result, arrays, f", {'at most ' if error else ''}{left} left")
        bar.close()
    return result


def main():
    args = parse_args()
    device = utils.start_device(args)
    path, name = args.target, f"{args.target.stem}_result.json"
    if path.is_dir():
        path, name = path / f"{args.which}.pt", "result.json" if args.which == "best" else "result_last.json"
    out = args.out or path.with_name(name)
    model, about, trained = load_model(
        path, args.model, args.activation, args.no_normalize, args.mean, args.std)
    dataset = args.dataset or trained.get("dataset", "cifar10")
    data = load_dataset(dataset, device, args.data_dir or trained.get("data_dir", "data"))
    eps = trained.get("eps", 8 / 255) if args.eps is None else args.eps
    n, total = args.n or len(data.test_labels), len(data.test_labels)
    if n > total or data.num_classes != about["num_classes"]:
        raise InputError(f"{dataset} has {data.num_classes} classes and {total:,} test images, not "
                         f"{about['num_classes']} and {n:,}")
    print(f"{path}: {about['model']}, {n:,} of {total:,} test images, eps {255 * eps:.4g}/255")
    if trained.get("data_sha256", data.sha256) != data.sha256:
        print(f"note: {dataset} differs from the data it was trained on (SHA-256)")
    model.to(device, memory_format=torch.channels_last)
    if not trained and dataset in ("cifar10", "cifar100"):  # one's own images may be distributed differently
        about["misfit"] = checked_misfit(model, data.test_images[:250])
    about |= {"data_sha256": data.sha256, "precision": args.precision}
    size = args.batch_size or (500 if device.type == "cuda" else 250)
    autoattack(model, data.test_images[:n], data.test_labels[:n], eps, out, args.attacks, args.seed, size,
               args.stop_after, args.error, about)
    print(f"written to {out}")


if __name__ == "__main__":
    utils.run_script(main)
