"""Checkpoints are read and written, and those that run code are refused."""

import argparse
import builtins
import struct
import tarfile
import zipfile
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from bcn_flax import interop

pytestmark = pytest.mark.torch

STATE_DICT = {
    "weight": torch.tensor([[1.0, -0.0], [float("nan"), float("-inf")]]),
    "half": torch.tensor([1.5, 65504.0]).half(),
    "brain": torch.tensor([1.5, 3e38]).bfloat16(),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "num_batches_tracked": torch.tensor(2**60),
}


def kinds(state_dict):
    return {key: (str(x.dtype).removeprefix("torch."), *x.shape) for key, x in state_dict.items()}


def as_numbers(state_dict):
    return {key: np.asarray(torch.as_tensor(x).double()) for key, x in state_dict.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar"])
def test_a_file_of_torch_save_is_loaded_as_tensors(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    interop.save(path, STATE_DICT)
    loaded = interop.load(path)
    assert kinds(loaded) == kinds(STATE_DICT)
    for key, tensor in STATE_DICT.items():
        assert torch.equal(loaded[key].nan_to_num(3), tensor.nan_to_num(3)), key


def test_a_safetensors_file_is_read_by_pytorch_and_loaded_as_arrays(tmp_path):
    path = tmp_path / "model.safetensors"
    interop.save(path, STATE_DICT)
    by_torch, loaded = safetensors.torch.load_file(path), interop.load(path)
    assert kinds(by_torch) == kinds(loaded) == kinds(STATE_DICT)
    assert all(isinstance(x, np.ndarray) for x in loaded.values())
    for key, tensor in STATE_DICT.items():
        expected = tensor.double().numpy()
        np.testing.assert_array_equal(loaded[key].astype(np.float64), expected)
        np.testing.assert_array_equal(by_torch[key].double().numpy(), expected)


def test_arrays_of_jax_are_written_like_tensors(tmp_path):
    state_dict = {"weight": jnp.ones((2, 3), jnp.bfloat16), "bias": np.zeros(2, np.float16)}
    for name in ("a.safetensors", "a.pt"):
        interop.save(tmp_path / name, state_dict)
        assert kinds(interop.load(tmp_path / name)) == kinds(state_dict)


def test_a_module_in_a_file_computes_the_same_in_flax(tmp_path):
    module, like = torch.nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "a.safetensors")
    moved = interop.module_from_torch(interop.load(tmp_path / "a.safetensors"), like)
    np.testing.assert_array_equal(moved.kernel[...].T, module.weight.detach().numpy())


class Harmful:
    """Leaves a mark when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return builtins.open, (self.mark, "w")


def test_a_file_that_would_run_code_is_refused_before_it_does(tmp_path):
    path, mark = tmp_path / "model.pth", tmp_path / "mark"
    torch.save({"weight": torch.ones(2), "extra": Harmful(str(mark))}, path)
    with pytest.raises(ValueError, match=r"save its state_dict alone"):
        interop.load(path)
    assert not mark.exists()
    with torch.load(path, weights_only=False)["extra"]:  # it would have
        assert mark.exists()


def test_a_class_beside_the_weights_is_named_and_may_be_allowed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": STATE_DICT, "args": argparse.Namespace(epochs=3)}, path)
    allow = (
        r"holds argparse\.Namespace.*torch\.serialization\.safe_globals\(\[argparse\.Namespace\]"
    )
    with pytest.raises(ValueError, match=allow):
        interop.load(path, key="model")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert kinds(interop.load(path, key="model")) == kinds(STATE_DICT)


def test_a_nested_part_is_named_with_a_dot(tmp_path):
    path = tmp_path / "checkpoint.pt"
    optimizer = {"state": {0: {"momentum": torch.ones(2)}}}
    torch.save({"optimizer": optimizer, "net": {"model": STATE_DICT, "ema": STATE_DICT}}, path)
    with pytest.raises(ValueError, match=r"part: key='net\.model' or key='net\.ema'\.$"):
        interop.load(path)
    assert kinds(interop.load(path, key="net.model")) == kinds(STATE_DICT)


def test_flax_variables_are_not_saved_as_a_state_dict(tmp_path):
    with pytest.raises(ValueError, match="state_dict_from_variables makes a state_dict"):
        interop.save(tmp_path / "model.pt", {"params": {"kernel": np.ones(2)}})
    with pytest.raises(ValueError, match="state_dict_from_variables makes a state_dict"):
        interop.save(tmp_path / "model.pt", nnx.Linear(3, 2, rngs=nnx.Rngs(0)))


def test_a_part_of_a_checkpoint_must_be_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": STATE_DICT}, path)
    with pytest.raises(ValueError, match="Choose a part: key='model'"):
        interop.load(path)
    with pytest.raises(ValueError, match="holds no state_dict under 'epoch'"):
        interop.load(path, key="epoch")
    assert kinds(interop.load(path, key="model")) == kinds(STATE_DICT)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="No part of it is a state_dict"):
        interop.load(path)


def test_the_name_of_a_file_must_show_its_format(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors or one of .*model\.npz"):
        interop.load(tmp_path / "model.npz")
    with pytest.raises(ValueError, match=r"model\.npz"):
        interop.save(tmp_path / "model.npz", STATE_DICT)
    with pytest.raises(ValueError, match="leave key='model' out"):
        interop.load(tmp_path / "model.safetensors", key="model")
    (tmp_path / "model.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"is no file of torch\.save"):
        interop.load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("package", "name", "way_out"),
    [
        ("torch", "a.pt", r'pip install "batch-channel-norm\[torch\]"'),
        ("safetensors.numpy", "a.safetensors", "pip install safetensors"),
    ],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, package, name, way_out):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=way_out):
        interop.load(name)
    with pytest.raises(ImportError, match=way_out):
        interop.save(name, {"weight": np.ones(3, ml_dtypes.bfloat16)})


def nested_file(path, levels=5000):
    """A file of torch.save in which a dictionary is nested more deeply than Python can follow."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    pickled = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * levels + b"K\x01" + b"s" * levels + b"."
    with zipfile.ZipFile(path, "w") as file:
        for name, part in parts.items():
            file.writestr(name, pickled if name.endswith("data.pkl") else part)


def tar_file(path):
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("tensors"))


def safetensors_file(path, header):
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))


FLOAT8 = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
BROKEN = {
    "empty.pt": lambda path: path.write_bytes(b""),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "cut.pt": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "other.safetensors": lambda path: path.write_bytes(b"no tensors at all"),
    "tar.pth.tar": tar_file,
    "nested.pt": nested_file,
    "list.safetensors": partial(safetensors_file, header=b'{"a": 3}'),
    "nested.safetensors": partial(safetensors_file, header=b'{"a":' * 999),
    "float8.safetensors": partial(safetensors_file, header=FLOAT8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_reason(tmp_path, name):
    path = tmp_path / name
    interop.save(path, {"a": np.ones(3)})
    BROKEN[name](path)
    with pytest.raises(ValueError, match=rf"{name} (cannot be read: \w+|holds no state_dict)"):
        interop.load(path)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of TorchScript.
def test_torchscript_is_named_with_a_way_out(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path)
    with pytest.raises(ValueError, match=r"script\.pt cannot be read: .* save the state_dict"):
        interop.load(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    narrow = np.ones(3, ml_dtypes.float8_e4m3fn)
    path = tmp_path / "a.safetensors"
    with pytest.raises(
        ValueError, match=r"a\.safetensors must be readable .*\n  x of float8_e4m3fn"
    ):
        interop.save(path, {"x": narrow})
    assert not path.exists()
    interop.save(tmp_path / "a.pt", {"x": narrow})
    assert kinds(interop.load(tmp_path / "a.pt")) == {"x": ("float8_e4m3fn", 3)}
    for values in (np.ones(3, ml_dtypes.int4), np.ones(3, ml_dtypes.float8_e3m4)):
        with pytest.raises(ValueError, match=rf"no place for:\n  x of {values.dtype}"):
            interop.save(tmp_path / "b.pt", {"x": values})
