"""Data sets: crops against numpy's padding, epochs, and files that are refused."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils


@pytest.mark.parametrize("padding, numpy_mode", [("reflect", "reflect"), ("zero", "constant")])
def test_every_crop_and_flip_is_that_of_a_padded_image(padding, numpy_mode):
    rng = np.random.default_rng(0)
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = rng.integers(0, 256, (len(corners), 32, 32, 3), dtype=np.uint8)
    top, left, flip = (torch.tensor(c) for c in zip(*corners))
    got = utils.crop_flip(torch.from_numpy(images), top, left, flip, padding).numpy()
    for image, (t, l, f), result in zip(images, corners, got):
        want = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode=numpy_mode)[t : t + 32, l : l + 32]
        np.testing.assert_array_equal(result, want[:, ::-1] if f else want)


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
    crops = utils.batches(dot, torch.zeros(len(dot)), 512, utils.seeded("cpu", 1), "zero")
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
    assert data.train_images.shape == (2000, 32, 32, 3) and data.test_images.shape == (500, 32, 32, 3)
    assert data.train_labels.bincount().tolist() == [200] * 10
    assert data.test_labels.bincount().tolist() == [50] * 10
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3] and data.num_classes == 10
    assert data.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert (ROOT / "data" / "cifar10_mini.npz").stat().st_size < 8e6


def write(path, **changes):
    arrays = {"train_images": np.zeros((4, 32, 32, 3), np.uint8), "train_labels": np.arange(4),
              "test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.arange(2), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


EMPTY = np.zeros((0, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("changes, problem", [
    ({"test_labels": None}, ""), ({"train_images": np.zeros((4, 32, 32, 3), np.float32)}, ""),
    ({"train_images": np.zeros((4, 3, 32, 32), np.uint8)}, ""), ({"train_labels": np.arange(3)}, ""),
    ({"train_labels": np.array([0, 1, -1, 2])}, ""), ({"test_labels": np.zeros(2)}, ""),
    ({"train_labels": np.array([0, 1, 2, None], dtype=object)}, ""),
    ({"train_images": EMPTY, "train_labels": np.arange(0)}, r"train_images is uint8 \(0, 32, 32, 3\), not"),
    ({"test_images": EMPTY, "test_labels": np.arange(0)}, r"test_images is uint8 \(0, 32, 32, 3\), not"),
    ({"train_labels": np.arange(1, 5)}, "train_labels has 1 to 4, not every class from 0 to 4"),  # as SVHN's
    ({"train_labels": np.array([1, 0, 255, 3])}, "has 0 to 1, 3, 255, not every class from 0 to 255"),
    ({"test_labels": np.array([0, 5])}, "has 0 to 3, not every class from 0 to 5")])
def test_foreign_files_are_refused(tmp_path, changes, problem):
    write(tmp_path / "d.npz", **changes)
    with pytest.raises(utils.InputError, match=f"d.npz.*{problem}"):
        utils.load_dataset(tmp_path / "d.npz")


def test_damaged_missing_and_unknown_data_are_refused(tmp_path):
    write(tmp_path / "cifar10.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cifar10.npz").read_bytes()[:5000])
    for name in (tmp_path / "cut.npz", tmp_path / "none.npz", "cifar11", "cifar10"):
        with pytest.raises(utils.InputError, match=str(name)):
            utils.load_dataset(name, data_dir=tmp_path)
    assert len(utils.load_dataset(tmp_path / "cifar10.npz").train_labels) == 4  # by path it is just a file


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
