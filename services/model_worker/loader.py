"""Weights from a Hugging Face folder (safetensors, in one file or sharded) straight onto the device.

Everything is checked from the files' headers before a byte of weights is read, and every failure is a ModelError with a stable code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.model_worker.models.config import ModelConfig, ModelError, read_json
from services.model_worker.models.decoder import Weights, assemble, parameter_shapes
from services.model_worker.models.families import Destination, destination, ignorable

Progress = Callable[[float, str], None]

_FLOAT_TYPES = {"F32", "F16", "BF16", "F64"}
_READERS = 4  # page faults of one reader hide behind the copies of another


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint tensor and where it goes."""

    file: Path
    name: str
    shape: tuple[int, ...]
    target: Destination


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> Weights:
    """Raises ModelError: weights_missing (file or folder), weights_corrupt (truncated, not safetensors), weights_missing_tensor,
    weights_unexpected_tensor, weights_wrong_shape, unsupported_dtype."""
    if config.tied and _has_own_head(folder):
        config = replace(config, tied=False)
    shapes = parameter_shapes(config)
    sources = _plan(folder, config, shapes)
    parameters = {path: torch.empty(shape, dtype=dtype, device=device) for path, shape in shapes.items()}
    total = sum(prod(source.shape) for source in sources)
    done = 0
    chunks = [sources[start : start + 16] for start in range(0, len(sources), 16)]
    with ThreadPoolExecutor(_READERS) as readers:
        for elements in readers.map(lambda chunk: _read(chunk, parameters), chunks):
            done += elements
            if progress is not None:
                progress(done / total, f"loading weights, {done * dtype.itemsize / 1e9:.1f} GB")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return assemble(parameters, config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all present. Raises ModelError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError("weights_corrupt", f"{index} has no weight_map, or one that names no files")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [single]
    for file in files:
        if not file.is_file():
            raise ModelError("weights_missing", f"{file} does not exist")
    return files


def tokenizer_vocabulary(folder: Path) -> dict[str, int] | list[Any] | None:
    """The tokens of a model's tokenizer.json, None if it has none. Raises ModelError."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    vocabulary: dict[str, int] | list[Any] | None = read_json(file).get("model", {}).get("vocab")
    return vocabulary


def _has_own_head(folder: Path) -> bool:
    """The output matrix is there and is no copy of the embedding, though the config ties them: then transformers does not, either."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in {"lm_head.weight", "model.embed_tokens.weight"}.intersection(tensors.keys()):
                    found[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError("weights_corrupt", f"{file} cannot be read: {error}") from None
    if len(found) < 2:
        return False
    head, embedding = found.values()
    return head.shape != embedding.shape or not torch.equal(head, embedding.to(head.dtype))


def _plan(folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[_Source]:
    """Reads the headers and matches them with what the model needs."""
    sources: dict[tuple[str, int], _Source] = {}
    unexpected = []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    entry = tensors.get_slice(name)
                    if ignorable(name, config):
                        continue
                    target = destination(name, config)
                    if target is None or target.path not in shapes:
                        unexpected.append(name)
                        continue
                    if entry.get_dtype() not in _FLOAT_TYPES:
                        raise ModelError("unsupported_dtype", f"{name} is {entry.get_dtype()}, not a float type")
                    source = _Source(file, name, tuple(entry.get_shape()), target)
                    wanted = shapes[target.path]
                    if target.rows:
                        wanted = (target.rows, *wanted[1:])
                    if source.shape != wanted:
                        raise ModelError("weights_wrong_shape", f"{name} is {source.shape}, the config says {wanted}")
                    sources[target.path, target.first] = source
        except (SafetensorError, OSError) as error:
            raise ModelError("weights_corrupt", f"{file} cannot be read: {error}") from None
    if unexpected:
        raise ModelError("weights_unexpected_tensor", f"{_some(unexpected)}: no such tensor in this architecture")
    missing = []
    for path, shape in shapes.items():
        rows = sum(source.shape[0] for (owner, _), source in sources.items() if owner == path)
        if rows != shape[0]:
            missing.append(path)
    if missing:
        raise ModelError("weights_missing_tensor", f"the checkpoint lacks {_some(missing)}, in whole or in part")
    return list(sources.values())


@torch.inference_mode()  # a mode of the thread, and this runs on readers' threads
def _read(sources: list[_Source], parameters: dict[str, Tensor]) -> int:
    """Copies checkpoint tensors to their places, converting the dtype on the device; returns the number of elements."""
    elements = 0
    for file, of_file in groupby(sources, key=lambda source: source.file):
        with safe_open(file, framework="pt") as tensors:
            for source in of_file:
                target = parameters[source.target.path]
                if source.target.rows:
                    target = target.narrow(0, source.target.first, source.target.rows)
                target.copy_(tensors.get_tensor(source.name).to(target.device))
                elements += target.numel()
    return elements


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
