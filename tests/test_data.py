"""Data sets: crops against numpy's padding, epochs, and files that are refused."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils


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
    ({"train_labels": np.arange(4)[:, None]}, r"train_labels int64 \(4, 1\)"),  # as MedMNIST's
    ({"train_labels": np.arange(1, 5)}, "labels"),                       # as SVHN's
    ({"test_labels": np.array([0, 5])}, "labels")])
def test_foreign_files_are_refused_by_what_is_wrong(tmp_path, changes, shown):
    write(tmp_path / "d.npz", **changes)
    with pytest.raises(utils.InputError, match=f"d.npz.*{shown}"):
        utils.load_dataset(tmp_path / "d.npz")


def test_a_named_data_set_is_fetched_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HERE", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.py").write_text(
        "import os, sys\nname, flag, folder, *parent = sys.argv[1:]\n"
        "assert [flag, *parent] == ['--data-dir', '--parent', str(os.getppid())]\n"
        "os.rename(f'{folder}/spare.npz', f'{folder}/{name}.npz')")
    write(tmp_path / "spare.npz")
    for _ in range(2):
        assert len(utils.load_dataset("cifar100", data_dir=tmp_path).train_labels) == 4
    with pytest.raises(utils.InputError, match="could not fetch"):  # there is no second spare.npz
        utils.load_dataset("cifar10", data_dir=tmp_path)
