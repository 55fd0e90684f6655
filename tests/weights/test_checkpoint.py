"""Reading checkpoints without running them; writing folders that are whole or absent."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stepwell.keys.checkpoint import CheckpointError, open_checkpoint
from stepwell.weights.write import new_folder, write_safetensors

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "w": torch.tensor(2.0),
}


def check_equal(checkpoint, state):
    assert sorted(checkpoint.shapes) == sorted(state)
    for name, tensor in state.items():
        assert checkpoint.shapes[name] == tuple(tensor.shape)
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_safetensors_file_and_folder(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    check_equal(open_checkpoint(tmp_path / "model.safetensors"), STATE)
    check_equal(open_checkpoint(tmp_path), STATE)


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)])
def test_shards_are_read_through_their_index(tmp_path, suffix, save):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, (name, tensor) in enumerate(STATE.items()):
        weight_map[name] = f"{stem}-{i}.{suffix}"
        save({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_equal(open_checkpoint(tmp_path), STATE)
    (tmp_path / weight_map["w"]).unlink()
    assert "1 of 3 shards are missing" in refusal(tmp_path)


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, escape):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": escape}}))
    assert "outside its folder" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "not an index" in refusal(tmp_path)


@pytest.mark.parametrize("container", [None, "state_dict", "model", "module"])
def test_torch_containers(tmp_path, container):
    torch.save(STATE if container is None else {container: STATE, "epoch": 3}, tmp_path / "x.pth")
    check_equal(open_checkpoint(tmp_path / "x.pth"), STATE)


def test_averaged_weights_are_left_alone_and_said_so(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save(
        {"model_ema": other, "model": STATE, "args": argparse.Namespace(lr=np.float64(0.1))},
        tmp_path / "x.pth",
    )
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    check_equal(checkpoint, STATE)
    assert checkpoint.notes == ["x.pth: weights taken from 'model'; not used: args, model_ema"]


@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.float32(0.5), np.int64(7), np.bool_(True), np.float16(1)]
)
def test_numpy_numbers_may_lie_beside_the_weights(tmp_path, number):
    torch.save({"state_dict": STATE, "best": number}, tmp_path / "x.pth")
    check_equal(open_checkpoint(tmp_path / "x.pth"), STATE)


class Trap:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": STATE, "extra": Trap(tmp_path / "ran")}, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert "torch.save(state_dict" in message
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    assert "bare pickle" in refusal(tmp_path / "bare.pth")
    assert not (tmp_path / "ran").exists()


def test_code_hidden_from_the_listing_is_refused_by_the_loader(tmp_path):
    """Text opcodes that torch's writer never uses must not slip past the listing of globals."""
    torch.save(STATE, tmp_path / "x.pth")
    program = b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR."
    with zipfile.ZipFile(tmp_path / "x.pth") as good, zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad:
        for entry in good.infolist():
            bad.writestr(entry.filename, program if entry.filename.endswith("data.pkl") else good.read(entry))
    refusal(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_files_are_refused(tmp_path, kind, keep):
    path = tmp_path / f"x.{kind}"
    state = {f"t{i}": torch.zeros(100, 10) for i in range(5)}
    torch.save(state, path) if kind == "pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_things_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [2**63, 10**9, 200])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":{}}')
    refusal(tmp_path / "x.safetensors")


def test_archives_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
    assert "compressed" in refusal(tmp_path / "bomb.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme", b"")
    assert "not one that torch.save or np.savez wrote" in refusal(tmp_path / "zip.pth")


def test_numpys_archives(tmp_path):
    arrays = {"a/kernel": np.arange(6.0).reshape(2, 3), "b": np.ones(4, np.float32)}
    np.savez(tmp_path / "x.npz", **arrays)
    check_equal(open_checkpoint(tmp_path), {name: torch.from_numpy(array) for name, array in arrays.items()})
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    assert "compressed" in refusal(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=np.array([print], dtype=object))
    assert "damaged or cut short: Object arrays cannot be loaded" in refusal(tmp_path / "x.npz")


def test_a_tensor_larger_than_what_is_stored_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "x.pth")
    assert "stored in fewer" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"w": torch.eye(3).to_sparse()}, "sparse or quantised"),
        (lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "sparse or quantised"),
        (lambda: [torch.ones(3)], "holds a list"),
        (lambda: {"epoch": 3}, "no tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, on sparse and quantised tensors
def test_contents_that_are_not_named_dense_tensors(tmp_path, content, words):
    torch.save(content(), tmp_path / "x.pth")
    assert words in refusal(tmp_path / "x.pth")


def test_a_name_in_two_shards_is_refused(tmp_path):
    for shard in "ab":
        save_file({"w": torch.ones(1), shard: torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {shard: f"{shard}.safetensors" for shard in "ab"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'w' is in both a.safetensors and b.safetensors" in refusal(tmp_path)


def test_what_is_read_is_a_private_dense_copy(tmp_path):
    torch.save({"w": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    read = checkpoint.read("w")
    assert read.is_contiguous()
    read.zero_()
    assert checkpoint.read("w")[2, 1] == 5
    meta = checkpoint.meta("w")
    assert (meta.shape, meta.dtype, meta.device.type) == ((3, 2), torch.float32, "meta")


def test_folders_without_one_clear_checkpoint(tmp_path):
    assert "found 0" in refusal(tmp_path)
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
    assert "zero_to_fp32" in refusal(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    state = {f"t{i}": torch.full((2**20,), float(i)) for i in range(32)}
    torch.save(state, path) if kind == "pth" else save_file(state, path)
    del state
    checkpoint = open_checkpoint(path, window=8 << 20)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak = resident(), 0
    for i, name in enumerate(f"t{i}" for i in range(32)):
        assert checkpoint.read(name)[0] == i
        peak = max(peak, resident())
    assert peak - before < 40 << 20  # the file is 128 MiB


def test_written_shards_stay_under_the_limit_and_hold_everything(tmp_path):
    state = {f"t{i}": torch.randn(100) for i in range(10)} | {"big": torch.randn(1000)}
    written = []

    def make(name):
        written.append(len(os.listdir(tmp_path)))
        return state[name]

    weight_map = write_safetensors(tmp_path, state, make, max_shard_bytes=1000)
    assert [written.count(i) for i in range(6)] == [2, 2, 2, 2, 1, 2]  # a shard's tensors at a time
    assert sorted(os.listdir(tmp_path)) == sorted({*weight_map.values(), "model.safetensors.index.json"})
    for file in set(weight_map.values()):
        loaded = load_file(tmp_path / file)
        assert len(loaded) == 1 or sum(t.nbytes for t in loaded.values()) <= 1000
        assert {name for name, where in weight_map.items() if where == file} == set(loaded)
    check_equal(open_checkpoint(tmp_path), state)


def test_a_small_model_is_one_file(tmp_path):
    write_safetensors(tmp_path, STATE, STATE.__getitem__)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    check_equal(open_checkpoint(tmp_path), STATE)


def test_shards_are_split_by_what_is_written_not_by_what_a_view_stands_on(tmp_path):
    views = {f"t{i}": torch.zeros(1000, device="meta")[:100] for i in range(2)}
    write_safetensors(tmp_path, views, lambda name: torch.zeros(1000)[:100], max_shard_bytes=1000)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size < 1200


def test_a_shard_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"could not write model\.safetensors to "):
        write_safetensors(tmp_path / "nowhere" / "out", STATE, STATE.__getitem__)


def test_a_failed_write_leaves_nothing(tmp_path):
    def make(name):
        if name == "w":
            raise OSError(28, "No space left on device")
        return STATE[name]

    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space"), new_folder(out) as folder:
        write_safetensors(folder, STATE, make, max_shard_bytes=1)
    assert os.listdir(tmp_path) == []


def test_a_link_to_an_empty_folder_leads_to_the_new_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("")
    assert os.listdir(tmp_path / "there") == ["new"]
    assert (tmp_path / "link").is_symlink()


def test_a_full_folder_is_only_replaced_when_asked_and_when_it_is_a_model(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError), new_folder(out, overwrite=overwrite):
            raise AssertionError("the block must not start")
    (out / "config.json").write_text("{}")
    save_file(STATE, out / "old.safetensors")
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError
    assert (out / "thesis.txt").exists()
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]
