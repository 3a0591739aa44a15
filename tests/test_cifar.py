"""CIFAR-100: both layouts on disk and the validation split."""

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import package

from pqk_fast.data.cifar import Cifar, CifarSplit, load_cifar100
from pqk_fast.data.cifar_batches import CifarBatches


def random_split(count: int, num_classes: int = 5, seed: int = 0) -> CifarSplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return CifarSplit(images, torch.arange(count) % num_classes)


def write_folders(root: Path, split: CifarSplit, part: str) -> None:
    package("PIL")
    from PIL import Image

    for i, (pixels, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        folder = root / part / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_folders(tmp_path, random_split(50), "train")
    write_folders(tmp_path, random_split(15, seed=1), "test")
    return tmp_path


def test_reads_class_folders(folders: Path) -> None:
    (folders / "train" / "class_0" / "notes.txt").write_text("not an image")
    data = load_cifar100(folders, validation_fraction=0.2)
    assert (len(data.train), len(data.validation), len(data.testing)) == (40, 10, 15)
    assert data.classes == tuple(f"class_{i}" for i in range(5))
    written = random_split(15, seed=1)
    order = written.labels.argsort(stable=True)
    assert torch.equal(data.testing.images, written.images[order])
    assert torch.equal(data.testing.labels, written.labels[order])


def test_validation_is_balanced_disjoint_and_depends_on_the_seed(folders: Path) -> None:
    def pixels(split: CifarSplit) -> list[bytes]:
        return [image.numpy().tobytes() for image in split.images]

    def load(seed: int) -> Cifar:
        return load_cifar100(folders, validation_fraction=0.3, seed=seed)

    data, again, other = load(0), load(0), load(1)
    assert data.validation.labels.bincount().tolist() == [3] * 5
    assert data.train.labels.bincount().tolist() == [7] * 5
    parts = pixels(data.train) + pixels(data.validation)
    assert sorted(parts) == sorted(pixels(load_cifar100(folders, validation_fraction=0.0).train))
    assert pixels(data.validation) == pixels(again.validation) != pixels(other.validation)
    assert pixels(data.testing) == pixels(other.testing)


def test_no_validation(folders: Path) -> None:
    data = load_cifar100(folders, validation_fraction=0.0)
    assert data.validation.images.shape == (0, 3, 32, 32)
    assert len(data.train) == 50
    batches = CifarBatches(data.validation, batch_size=4, train=False)
    assert len(batches) == len(list(batches)) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_refuses_bad_fractions(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"validation_fraction must be in \[0, 1\)"):
        load_cifar100(tmp_path, validation_fraction=fraction)


def test_refuses_to_leave_a_class_without_training_images(tmp_path: Path) -> None:
    write_folders(tmp_path, random_split(5), "train")
    write_folders(tmp_path, random_split(5), "test")
    with pytest.raises(ValueError, match=r"class 'class_0' has 1 training image"):
        load_cifar100(tmp_path)


def test_missing_data_names_both_layouts_and_the_download(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/ \(--download.*train/<class>/ and .*test/<class>/"):
        load_cifar100(tmp_path)


def test_refuses_bad_folders(folders: Path) -> None:
    from PIL import Image

    path = folders / "test" / "class_3" / "9999.png"
    Image.new("RGB", (16, 32)).save(path)
    with pytest.raises(ValueError, match=r"9999.png must be 32x32 pixels, got 16x32"):
        load_cifar100(folders)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"cannot read .*9999.png"):
        load_cifar100(folders)
    path.unlink()
    (folders / "test" / "class_9").mkdir()
    with pytest.raises(ValueError, match=r"class_9 has no .png images"):
        load_cifar100(folders)
    Image.new("RGB", (32, 32)).save(folders / "test" / "class_9" / "0.png")
    with pytest.raises(ValueError, match=r"must have the same classes; only one has: class_9"):
        load_cifar100(folders)
    shutil.rmtree(folders / "train")
    (folders / "train").mkdir()
    with pytest.raises(ValueError, match=r"train has no class folders"):
        load_cifar100(folders)


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, CifarSplit, CifarSplit]:
    """Tiny files in the official format, and torchvision told their checksums."""
    package("torchvision")
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()

    def write(name: str, entry: dict) -> str:
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    train, testing = random_split(20), random_split(10, seed=1)
    for name, split in (("train", train), ("test", testing)):
        entry = {"data": split.images.flatten(1).numpy(), "fine_labels": split.labels.tolist()}
        monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, write(name, entry)]])
    names = {"fine_label_names": [f"class_{i}" for i in range(5)]}
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": write("meta", names)})
    return tmp_path, train, testing


def test_reads_the_official_files(official: tuple[Path, CifarSplit, CifarSplit]) -> None:
    root, train, testing = official
    data = load_cifar100(root, validation_fraction=0.0)
    assert data.classes == tuple(f"class_{i}" for i in range(5))
    for got, written in ((data.train, train), (data.testing, testing)):
        assert torch.equal(got.images, written.images)
        assert torch.equal(got.labels, written.labels)
        assert got.images.is_contiguous()


def test_refuses_damaged_official_files(official: tuple[Path, CifarSplit, CifarSplit]) -> None:
    root, _, _ = official
    (root / "cifar-100-python" / "test").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match=r"cannot read CIFAR-100 in .*cifar-100-python.*--download"):
        load_cifar100(root)


@pytest.mark.parametrize(("module", "folder"), [("torchvision.datasets", "cifar-100-python"), ("PIL", "train")])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / "test").mkdir()
    monkeypatch.setitem(sys.modules, module, None)
    expected = r"torchvision 0.26.0 goes with torch 2.11.0" if folder != "train" else r"pip install pillow"
    with pytest.raises(ImportError, match=expected):
        load_cifar100(tmp_path)


def test_refuses_other_tensors() -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, 32, 32\], got torch.float32 \[2, 3, 32, 32\]"):
        CifarSplit(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\].*got torch.int64 \[3\]"):
        CifarSplit(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


@pytest.mark.slow
def test_real_test_images(shared_data: Path, tmp_path: Path) -> None:
    """The 10 000 real test images, standing in for both parts, have the normalisation's mean and deviation."""
    archive = shared_data.resolve() / "cifar100-test.tar"
    package("PIL")
    # unpack.py takes every archive beside it: give it this one only
    (tmp_path / archive.name).symlink_to(archive)
    script = shutil.copy(archive.with_name("unpack.py"), tmp_path)
    subprocess.run([sys.executable, script, "cifar100", str(tmp_path / "data")], check=True)
    (tmp_path / "data" / "train").symlink_to(tmp_path / "data" / "test")
    data = load_cifar100(tmp_path / "data")
    assert (len(data.train), len(data.validation), len(data.testing)) == (9000, 1000, 10_000)
    assert data.classes[:3] == ("apple", "aquarium_fish", "baby")
    assert data.validation.labels.bincount().tolist() == [10] * 100
    images = torch.cat([x for x, _ in CifarBatches(data.testing, batch_size=500, train=False)])
    variance, mean = torch.var_mean(images, (0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(variance.sqrt(), torch.ones(3), rtol=0, atol=0.02)
