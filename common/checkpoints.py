"""Checkpoints of Qwen2, Qwen3 and Llama in the Hugging Face layout: their weights into the decoder, and out of it a
directory that `transformers` loads. Used by base, which reads every model and keeps the nano base so, and by
`--save_hf`; knows no task, no hub, and of a tokenizer only its files."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.basics import DiskError, InputError, read_json
from common.hf_config import hf_config, read_hf_config, refuse_hf
from common.hosts import fetch, leads, shard_rule
from common.model import Decoder, ModelConfig, leaf_name, leaf_names
from common.tokenizer import Tokenizer

# Where each leaf of the decoder is in a checkpoint: the tensor's name, and which axes of the leaf (of one layer, for
# stacked leaves) each of the tensor's dimensions holds. Linear weights are stored [out, in], heads flattened.
_HF_TOP = {
    "embed": ("model.embed_tokens.weight", ((0,), (1,))),
    "final_norm": ("model.norm.weight", ((0,),)),
    "head": ("lm_head.weight", ((0,), (1,))),
}
_HF_LAYER = {
    "attn_norm": ("input_layernorm.weight", ((0,),)),
    "q": ("self_attn.q_proj.weight", ((1, 2), (0,))),
    "k": ("self_attn.k_proj.weight", ((1, 2), (0,))),
    "v": ("self_attn.v_proj.weight", ((1, 2), (0,))),
    "q_bias": ("self_attn.q_proj.bias", ((0, 1),)),
    "k_bias": ("self_attn.k_proj.bias", ((0, 1),)),
    "v_bias": ("self_attn.v_proj.bias", ((0, 1),)),
    "q_norm": ("self_attn.q_norm.weight", ((0,),)),
    "k_norm": ("self_attn.k_norm.weight", ((0,),)),
    "o": ("self_attn.o_proj.weight", ((2,), (0, 1))),
    "mlp_norm": ("post_attention_layernorm.weight", ((0,),)),
    "gate": ("mlp.gate_proj.weight", ((1,), (0,))),
    "up": ("mlp.up_proj.weight", ((1,), (0,))),
    "down": ("mlp.down_proj.weight", ((1,), (0,))),
}
_HF_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # computed, but stored by old files


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint: `dims[d]` are the axes of leaf `leaf` (of its layer `layer`) that dimension d holds;
    `axes` are the sizes of those axes, by axis."""

    leaf: str
    layer: int | None
    dims: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.axes[a] for a in dim) for dim in self.dims)

    @property
    def order(self) -> list[int]:
        return [axis for dim in self.dims for axis in dim]

    def read(self, stored, bounds) -> np.ndarray:
        """The part of the leaf within `bounds`, one (start, stop) per axis, from the open safetensors slice `stored`:
        only its bytes are read. Of the axes in one dimension only the first may be cut: heads are, their channels are
        not."""
        cut = []
        for first, *rest in self.dims:
            assert all(bounds[axis] == (0, self.axes[axis]) for axis in rest), "a head's channels are never sharded"
            inner = math.prod(self.axes[axis] for axis in rest)
            cut.append(slice(bounds[first][0] * inner, bounds[first][1] * inner))
        sizes = [bounds[axis][1] - bounds[axis][0] for axis in self.order]
        return stored[tuple(cut)].reshape(sizes).transpose(np.argsort(self.order))

    def write(self, leaf, dtype) -> np.ndarray:
        """The tensor from the whole leaf."""
        array = np.asarray(fetch(leaf if self.layer is None else _take_layer(leaf, self.layer)), dtype)
        return np.ascontiguousarray(array.transpose(self.order)).reshape(self.shape)


@jax.jit
def _take_layer(leaf, i):
    return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def hf_tensors(leaves: dict[str, Any]) -> dict[str, HFTensor]:
    """{name in the checkpoint: HFTensor} of the decoder's leaves (by `leaf_names`), in the order of the layers."""
    layers = {
        f"model.layers.{i}.{theirs}": HFTensor(f"blocks/{name}", i, dims, leaves[f"blocks/{name}"].shape[1:])
        for i in range(len(leaves["blocks/q"]))
        for name, (theirs, dims) in _HF_LAYER.items()
        if f"blocks/{name}" in leaves
    }
    top = {theirs: HFTensor(n, None, dims, leaves[n].shape) for n, (theirs, dims) in _HF_TOP.items() if n in leaves}
    embed = _HF_TOP["embed"][0]
    return {embed: top.pop(embed), **layers, **top}


def open_safetensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple[pathlib.Path, Any]]:
    """{tensor name: (its file, the open file)} of model.safetensors, of the files that model.safetensors.index.json
    names, or of the *.safetensors there are; closed with `stack`."""
    import safetensors

    index = directory / "model.safetensors.index.json"
    promised = None  # {tensor: file} of an index
    if (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        promised = read_json(index).get("weight_map")
        if not isinstance(promised, dict) or not promised or not all(isinstance(f, str) for f in promised.values()):
            raise InputError(f"{index}: its weight_map names no files; download it again")
        names = sorted({*promised.values()})
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise InputError(f"{directory}: no *.safetensors there; convert the checkpoint or choose another --model")
    tensors = {}
    for path in (directory / name for name in names):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except (OSError, safetensors.SafetensorError) as e:
            raise InputError(f"{path}: cannot be read ({e}); download it again") from None
        for tensor in file.keys():  # noqa: SIM118 (not a dict)
            if tensor in tensors:
                raise InputError(f"{path}: {tensor} is also in {tensors[tensor][0].name}; remove one of the files")
            tensors[tensor] = (path, file)
    for tensor, name in (promised or {}).items():
        if tensor not in tensors or tensors[tensor][0].name != name:
            raise InputError(f"{directory / name}: {tensor} is missing ({index.name} promises it); download it again")
    return tensors


def check_hf_tensors(found, wanted: dict[str, HFTensor], directory: pathlib.Path) -> None:
    """InputError unless the checkpoint holds the tensors that its config.json means: no more, no less, of the right
    shape. Tolerated: rotary buffers and the copy of a tied embedding."""
    for name, tensor in wanted.items():
        if name not in found:
            files = sorted({path.name for path, _ in found.values()})
            where = directory / files[0] if len(files) == 1 else directory / "*.safetensors"
            raise InputError(f"{where}: {name} is missing, which config.json asks for; download the checkpoint again")
        path, file = found[name]
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != tensor.shape:
            raise InputError(
                f"{path}: {name} has the shape {stored.get_shape()}, config.json means {[*tensor.shape]};"
                " take both from one checkpoint"
            )
        if stored.get_dtype() not in ("F32", "BF16", "F16"):
            refuse_hf(path, f"{name} of type {stored.get_dtype()}")
    head, embed = _HF_TOP["head"][0], _HF_TOP["embed"][0]
    for name, (path, file) in found.items():
        if name in wanted or _HF_BUFFER.fullmatch(name):
            continue
        if name != head:
            raise InputError(f"{path}: {name} is unexpected, config.json knows no such weight; choose another --model")
        if not same_tensor(file.get_slice(head), found[embed][1].get_slice(embed)):
            raise InputError(
                f"{path}: {head} differs from {embed}, but config.json ties them; set tie_word_embeddings to false"
            )


def same_tensor(a, b, rows: int = 8192) -> bool:
    """Whether two open safetensors slices [V, D] are equal, compared `rows` rows at a time."""
    shape = a.get_shape()
    return shape == b.get_shape() and all(
        np.array_equal(a[i : min(i + rows, shape[0])], b[i : min(i + rows, shape[0])]) for i in range(0, shape[0], rows)
    )


def load_hf_weights(directory: pathlib.Path, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> nnx.State:
    """The decoder's parameters, float32 and sharded by `shard_rule`, from a checkpoint of any float type.

    Leaf by leaf and layer by layer: only the slices that this host's devices hold are read, so the host's memory holds
    one leaf's shards beside the model on the devices, and one layer of them in the file's type.
    """
    abstract = nnx.eval_shape(lambda: nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param))
    wanted = hf_tensors(leaf_names(abstract))
    with contextlib.ExitStack() as stack:
        found = open_safetensors(directory, stack)
        check_hf_tensors(found, wanted, directory)

        def load(path, leaf, sharding):
            name = leaf_name(path)
            parts = {t.layer: (t, found[theirs][1].get_slice(theirs)) for theirs, t in wanted.items() if t.leaf == name}

            def shard(index) -> np.ndarray:
                bounds = [s.indices(n)[:2] for s, n in zip(index, leaf.shape)]
                out = np.empty([stop - start for start, stop in bounds], np.float32)
                if None in parts:  # not stacked
                    tensor, stored = parts[None]
                    out[:] = tensor.read(stored, bounds)
                    return out
                for row, layer in zip(out, range(*bounds[0])):
                    tensor, stored = parts[layer]
                    row[:] = tensor.read(stored, bounds[1:])
                return out

            # waited for: one leaf at a time on the host
            return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, shard))

        return jax.tree_util.tree_map_with_path(load, abstract, shard_rule(mesh, abstract))


_HF_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


MADE_BY = "made_by.txt"  # in a checkpoint's directory: the run that wrote it


def check_save_hf(directory: pathlib.Path) -> None:
    """InputError if there is something at `--save_hf` already; to be called before training, too."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise InputError(f"--save_hf {directory}: exists and is not empty; choose a new directory")


def write_hf_meta(
    directory: pathlib.Path, cfg: ModelConfig, tokenizer: Tokenizer, source: pathlib.Path | None, dtype: str
) -> None:
    """config.json and the tokenizer's files: of `source`, the checkpoint that training began with, or new ones."""
    dump = lambda name, value: (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if source is None:
        token = tokenizer.inner.id_to_token
        dump("config.json", hf_config(cfg, tokenizer) | {"torch_dtype": dtype})
        dump("generation_config.json", {"eos_token_id": [*tokenizer.eos_ids], "pad_token_id": tokenizer.pad_id})
        names = {"eos_token": token(tokenizer.eos_id), "pad_token": token(tokenizer.pad_id)}
        # the class that takes tokenizer.json as it is; cleaning up would change spaces before punctuation
        how = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        dump("tokenizer_config.json", names | how)
        (directory / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
        return
    if read_hf_config(source) != cfg:
        raise InputError(f"{source / 'config.json'}: has changed since the weights were read; restore it")
    config = read_json(source / "config.json")
    dump("config.json", config | {"dtype" if "dtype" in config else "torch_dtype": dtype})
    for name in _HF_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_hf_weights(directory: pathlib.Path | None, params, max_shard_bytes: int, dtype) -> None:
    """model.safetensors, or numbered files of at most max_shard_bytes each (or one tensor) and their index; without a
    directory only the gathering from all hosts."""
    import huggingface_hub
    import safetensors.numpy

    leaves = leaf_names(params)
    tensors = hf_tensors(leaves)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda tensor: dtype.itemsize * math.prod(tensor.shape),
        max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name].write(leaves[tensors[name].leaf], dtype) for name in names}
        if directory:
            safetensors.numpy.save_file(part, directory / file, {"format": "pt"})  # transformers 4 asks for the format
        del part  # before the next file's tensors are made
    if directory and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_hf(
    directory: pathlib.Path,
    cfg: ModelConfig,
    params,
    tokenizer: Tokenizer,
    source: pathlib.Path | None = None,
    max_shard_bytes: int = 4 * 10**9,
    flag: str = "--save_hf",
    dtype: str = "float32",
    made_by: str = "",
) -> None:
    """Write a directory that `transformers` loads with the same logits: weights of `dtype`, config and tokenizer.

    `source` is the checkpoint that training began with, whose config and tokenizer files are copied; None for nano. All
    or nothing: written beside `directory` and renamed. The host's memory holds one file's tensors at a time. `flag` is
    what an error tells the user to change; `made_by` stands in the directory, as MADE_BY.
    """
    import safetensors

    directory = pathlib.Path(directory).absolute()
    check_save_hf(directory)
    # no process id in the name: another host's or container's may be the same
    tmp = directory.with_name(f".{directory.name}.{os.urandom(4).hex()}.tmp")
    if not leads():  # it only takes part in the gathering
        write_hf_weights(None, params, max_shard_bytes, jnp.dtype(dtype))
        return
    try:
        tmp.mkdir(parents=True)
        write_hf_meta(tmp, cfg, tokenizer, source, dtype)
        write_hf_weights(tmp, params, max_shard_bytes, jnp.dtype(dtype))
        if made_by:
            (tmp / MADE_BY).write_text(made_by, encoding="utf-8")
        os.replace(tmp, directory)
    except (OSError, safetensors.SafetensorError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError.at(f"{flag} {directory}", e) from None
        raise InputError(f"{flag} {directory}: cannot be written ({e}); choose another directory") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
