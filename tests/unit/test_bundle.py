"""A bundle scores as its checkpoint, and is refused by the name of the file that is broken."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from scalerec import checkpoint
from scalerec.errors import InputError
from scalerec.inference import bundle, golden
from scalerec.inference.compiled import compiled, package
from scalerec.inference.export import compiler, dense_inputs
from tests.contract.world import make_world
from tests.unit.bundles import CONFIGS, refused, runs_and_bundles, signed_again


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs_and_bundles(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy_of(made, tmp_path):
    """A bundle that a test may spoil."""

    def copied(name: str = "rankmixer") -> Path:
        return Path(shutil.copytree(made[name][1], tmp_path / name))

    return copied


# -- what is in a bundle


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bundle_scores_as_its_checkpoint(made, name):
    run, folder = made[name]
    saved = checkpoint.load(run)
    model, found = saved.model(), bundle.load(folder)
    batch = make_world().batch
    with torch.no_grad():
        assert torch.equal(found.model(batch).logits, model(batch).logits)
        if model.retrieves:
            assert torch.equal(found.vectors, model.catalogue())
        else:
            assert found.vectors is None
    assert found.encoder.same_as(saved.encoder) and found.layout == saved.layout and found.run == saved.run
    assert found.fusion == {"click": 1.0, "buy": 0.0} and found.name == "tiny" and len(found.version) == 12
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_models_load_in_fewer_bits_with_room_to_spare(made, name, kind):
    """The sample's error is at most half of what is allowed, and more than rounding of fp32: it was converted."""
    found = bundle.load(made[name][1], kind)
    sample = json.loads((found.folder / "golden.json").read_text())
    layers, logits = golden.run(found.model, golden.batch_of(sample, found.encoder))
    allowed = golden.TOLERANCES[kind]
    worst = max(golden.departure(layers[layer], kept) for layer, kept in sample["layers"].items())
    assert golden.TOLERANCES["fp32"].layers < worst < allowed.layers / 2
    if found.model.ranks:
        want = torch.tensor(sample["logits"]).sigmoid()
        assert float((logits.sigmoid() - want).abs().max()) < allowed.scores / 2


def test_fusion_names_tasks(made, tmp_path):
    run, folder = made["dcnv2"]
    assert bundle.export(run, tmp_path / "b", name="mine", fusion={"buy": 2}).fusion == {"click": 0.0, "buy": 2.0}
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["name"] == "mine"
    with pytest.raises(InputError, match="no task 'sell'"):
        bundle.export(run, tmp_path / "c", fusion={"sell": 1})
    with pytest.raises(InputError, match="already there"):
        bundle.export(run, folder)
    assert not (tmp_path / "c").exists()


# -- broken files


def test_every_file_is_watched(made, tmp_path):
    """Each file cut off, with one bit turned, or gone: one line that names it."""
    folder = made["hstu_joint"][1]
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert len(names) >= 8
    for number, name in enumerate(names):
        for spoil in ("cut", "turned", "gone"):
            copied = Path(shutil.copytree(folder, tmp_path / f"{number}{spoil}"))
            content = bytearray((copied / name).read_bytes())
            if spoil == "gone":
                (copied / name).unlink()
            elif spoil == "cut":
                (copied / name).write_bytes(content[: len(content) // 2])
            else:
                content[len(content) // 2] ^= 1
                (copied / name).write_bytes(content)
            refused(copied, name)
            if spoil == "cut":  # even where nothing is verified, or the manifest was written over it
                with pytest.raises(InputError, match=name):
                    bundle.load(copied, verify=False)
                with pytest.raises(InputError):
                    bundle.load(signed_again(copied))


def test_other_manifests(copy_of, tmp_path):
    folder = copy_of()
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    for changed, words in (
        ({**manifest, "format": 2}, ("format 2", "reads 1")),
        ({}, ("format None",)),
        ([], ("format None",)),
        ({**manifest, "tasks": 3}, ("tasks",)),
        ({**manifest, "ranks": False}, ("another model",)),
        ({**manifest, "files": {**manifest["files"], "../x": {"size": 1, "sha256": ""}}}, ("outside",)),
        ({**manifest, "files": {"config.json": manifest["files"]["config.json"]}}, ("does not list",)),
        ({**manifest, "tolerance": {}}, ("golden.json",)),
    ):
        (folder / "manifest.json").write_text(json.dumps(changed))
        refused(folder, *words)
    for content in (text[:100].encode(), b"\xff\xfe", b""):
        (folder / "manifest.json").write_bytes(content)
        refused(folder, "manifest.json", "not readable")
    (folder / "manifest.json").write_text(text)
    shutil.copy(folder / "vocabulary" / "0000.parquet", folder / "vocabulary" / "0009.parquet")
    refused(folder, "0009.parquet")
    with pytest.raises(InputError, match="no bundle there"):
        bundle.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="one of fp32, bf16, int8"):
        bundle.load(folder, "fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["save_file", "pq.write_table", "os.fsync", "Path.rename"])
def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "Path.rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        owner, _, name = f"bundle.{where}".rpartition(".")
        monkeypatch.setattr(eval(owner), name, full)
    with pytest.raises(InputError, match=r"not exported, the disk is full") as caught:
        bundle.export(made["hstu_joint"][0], tmp_path / "b")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# -- compiled


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
def test_compiled_packages_are_checked_and_made_again(made, tmp_path):
    found = bundle.load(made["rankmixer"][1])
    dense = compiled(found, tmp_path)
    path = package(found, tmp_path)
    batch = make_world().batch
    with torch.no_grad():
        user, items = found.model.embeddings(batch.user, batch.items)
        scores = dense(*dense_inputs(user, items, batch.user_of_row))
        torch.testing.assert_close(scores, found.model(batch).logits, rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    stamp = path.stat().st_mtime_ns
    compiled(found, tmp_path)
    assert path.stat().st_mtime_ns == stamp  # from the cache
    path.write_bytes(path.read_bytes()[:1000])
    compiled(found, tmp_path)
    assert path.stat().st_size > 10_000  # made again
    assert package(bundle.load(made["rankmixer"][1], "bf16"), tmp_path) != path


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
def test_a_compiled_package_of_other_weights_is_thrown_away(made, tmp_path):
    found = bundle.load(made["dcnv2"][1])
    with torch.no_grad():
        found.model.heads.out.bias.add_(0.01)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="compiled, scores depart"):
        compiled(found, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_says_so(made, tmp_path):
    with pytest.raises(InputError, match="not one graph"):
        compiled(bundle.load(made["hstu_joint"][1]), tmp_path)
    with pytest.raises(InputError, match="int8"):
        compiled(bundle.load(made["dcnv2"][1], "int8"), tmp_path)
