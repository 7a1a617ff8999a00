"""The shapes of the parameters of well-known models, and of models in files, without their weights.

Every model has the shapes that the published one has, so that its total is the published number of parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

__all__ = [
    "MODELS", "Shapes", "add_model_arguments", "asked_shapes", "bert", "elements", "gpt2", "llama", "lora",
    "model_shapes", "read_shapes", "resnet50", "sharded", "vit",
]  # fmt: skip

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
#: Far above any model, and far below what lists of shapes would fill the memory.
MOST_LAYERS, MOST_TENSORS = 10_000, 1_000_000


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(map(math.prod, shapes))


def transformer(layers: int, width: int) -> Shapes:
    """Layers with biases everywhere, and the norm after the last."""
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    feed_forward = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return (*(norm + attention + norm + feed_forward) * layers, *norm)


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2, its head tied to the token embedding; the defaults are those of the smallest."""
    return ((vocabulary, width), (context, width), *transformer(layers, width))


def vit(layers: int = 24, width: int = 1024, image: int = 224, patch: int = 16, classes: int = 1000) -> Shapes:
    """A vision transformer with a class token; the defaults are ViT-L/16."""
    embedding = ((1, 1, width), (1, (image // patch) ** 2 + 1, width), (width, 3, patch, patch), (width,))
    return (*embedding, *transformer(layers, width), (classes, width), (classes,))


def bert(layers: int = 12, width: int = 768, vocabulary: int = 30522, context: int = 512) -> Shapes:
    """BERT with its pooler; the defaults are the uncased base model."""
    norm, square = ((width,), (width,)), ((width, width), (width,))
    feed_forward = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    layer = (*square * 4, *norm, *feed_forward, *norm)
    return ((vocabulary, width), (context, width), (2, width), *norm, *layer * layers, *square)


def llama(
    layers: int = 32, width: int = 4096, inner: int = 14336, heads: int = 32, vocabulary: int = 128256,
    tied: bool = False,
) -> Shapes:  # fmt: skip
    """Llama 3, of 8 heads of keys and values; the head is its own, or `tied` to the embedding. The defaults: the 8B."""
    narrow = width // heads * 8
    attention = ((width, width), (narrow, width), (narrow, width), (width, width))
    layer = (*attention, (inner, width), (inner, width), (width, inner), (width,), (width,))
    head = () if tied else ((vocabulary, width),)
    return ((vocabulary, width), *layer * layers, (width,), *head)


def lora(layers: int = 32, width: int = 4096, inner: int = 11008, rank: int = 16) -> Shapes:
    """LoRA's A and B on the seven projections of every layer; the defaults are a Llama 2 7B's: 448 matrices."""
    projections = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return tuple(matrix for rows, columns in projections for matrix in ((rank, columns), (rows, rank))) * layers


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet, with its batch norms."""

    def convolution(to: int, of: int, size: int) -> Shapes:
        return ((to, of, size, size), (to,), (to,))

    found, of = [*convolution(64, 3, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += convolution(width, of, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:  # the way around it
                found += convolution(4 * width, of, 1)
            of = 4 * width
    return (*found, (1000, of), (1000,))


#: By the name that commands take; but for resnet50, each takes a number of layers.
MODELS: dict[str, Callable[..., Shapes]] = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt2-medium": partial(gpt2, 24, 1024),
    "gpt2-xl": partial(gpt2, 48, 1600),
    "llama-1b": partial(llama, 16, 2048, 8192, tied=True),
    "llama-8b": llama,
    "llama-70b": partial(llama, 80, 8192, 28672, 64),
    "lora-7b": lora,
    "resnet50": resnet50,
    "vit-b": partial(vit, 12, 768),
    "vit-l": vit,
}


def model_shapes(name: str, layers: int | None = None) -> Shapes:
    """The shapes of a model of MODELS; of so many layers, where it is told.

    Raises ValueError, where there is no such model, or it has not so many layers.

    Example:
        >>> elements(model_shapes("gpt2"))
        124439808
        >>> elements(model_shapes("llama-8b", layers=2))
        1486901248
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: known are {', '.join(MODELS)}; others by --shapes FILE")
    make = MODELS[name]
    if layers is None:
        return make()
    if make is resnet50:
        raise ValueError(
            f"layers={layers} of resnet50: its blocks differ from each other, so it is whole or not at all"
        )
    if not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"layers={layers}: allowed are 1 to {MOST_LAYERS}")
    if not isinstance(make, partial):
        return make(layers)
    shapes: Shapes = make.func(layers, *make.args[1:], **make.keywords)
    return shapes


def sharded(shapes: Sequence[tuple[int, ...]], ranks: int) -> Shapes:
    """What the first of so many ranks has of tensors that are cut along the first dimension, as `fully_shard` does.

    The first has the most: whole chunks of the rows divided by the ranks, rounded up.

    Example:
        >>> sharded([(10, 3), (2,)], 4)
        ((3, 3), (1,))
    """
    if ranks < 1:
        raise ValueError(f"shard={ranks}: allowed are 1 and more")
    return tuple((-(-shape[0] // ranks), *shape[1:]) if shape else shape for shape in shapes)


# What a command is asked for ------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say which tensors there are."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model", metavar="NAME[/SHARDS]", help=f"a known model: {', '.join(MODELS)}; llama-8b/64 is --shard 64 of it"
    )
    which.add_argument(
        "--shapes", metavar="FILE", type=Path,
        help="lines such as '768x3072 *12', or a model: .safetensors, .pt, .json; weights are not loaded",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers of the model")
    parser.add_argument(
        "--shard", type=int, metavar="N", help="what one of so many ranks has, under fully_shard: the first, the most"
    )


def asked_shapes(arguments: argparse.Namespace) -> tuple[str, Shapes]:
    """What the tensors are called, and their shapes. Raises OSError or ValueError."""
    ranks: int | None = arguments.shard
    if arguments.shapes is not None:
        if arguments.layers is not None:
            raise ValueError("--layers is of --model: a file has the tensors that it has")
        label, shapes = arguments.shapes.name, read_shapes(arguments.shapes)
    else:
        label, slash, number = arguments.model.partition("/")
        if slash and (ranks is not None or not number.isdecimal()):
            raise ValueError(f"--model {arguments.model}: expected NAME, with --shard N, or NAME/N")
        ranks = int(number) if slash else ranks
        shapes = model_shapes(label, arguments.layers)
        label += "" if arguments.layers is None else f", layers: {arguments.layers}"
    if not elements(shapes):
        raise ValueError(f"{label} has no elements")
    if ranks is not None:
        label, shapes = f"{label}, one of {ranks} shards", sharded(shapes, ranks)
    return label, shapes


# Files ----------------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"(?:\S+\s+)?(\d+(?:x\d+)*)(?:\s*\*\s*(\d+))?")


def read_shapes(path: Path) -> Shapes:
    """The shapes of the parameters in a file; of a model's weights, from its header alone.

    Args:
        path: lines of text, each a shape, with a name before it, a number of times after it and a comment, if wanted:
            ``mlp.up 768x3072 *12  # a layer each``. Or ``.safetensors``; ``.pt``, ``.pth``, ``.bin`` of torch.save (a
            state dict, or a dict with one as "state_dict" or "model"); ``.json``: of names and shapes, a list of
            shapes, or the index of a model in several .safetensors files.

    Integer tensors are left out, and so is what shares the memory of another in a .pt file: they are no parameters.
    Raises OSError or ValueError, naming the file, and the line.
    """
    read = {".safetensors": _of_safetensors, ".json": _of_json}.get(path.suffix, _of_text)
    found = tuple((_of_torch if path.suffix in (".pt", ".pth", ".bin") else read)(path))
    if not found:
        raise ValueError(f"{path} has no shapes")
    return found


def _of_text(path: Path) -> Iterator[tuple[int, ...]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text; allowed are text, .json, .safetensors, .pt, .pth, .bin") from error
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}, line {number}: {line.strip()!r}; expected [NAME] 768x3072 [*12] [# comment]")
        times = int(match[2] or 1)
        if times > MOST_TENSORS:
            raise ValueError(f"{path}, line {number}: {times} times; allowed are up to {MOST_TENSORS}")
        yield from [tuple(map(int, match[1].split("x")))] * times


def _of_safetensors(path: Path) -> Iterator[tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is no .safetensors file: its header would be longer than it is")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no .safetensors file: its header is no JSON") from error
    if not isinstance(header, Mapping):
        raise ValueError(f"{path} is no .safetensors file: its header is a {type(header).__name__}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (
            not isinstance(entry, Mapping)
            or not isinstance(entry.get("dtype"), str)
            or not _is_shape(entry.get("shape"))
        ):
            raise ValueError(f"{path} is no .safetensors file: {name!r} has no dtype and shape in its header")
        if not re.match("I|U|BOOL", entry["dtype"]):
            yield tuple(entry["shape"])


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _of_json(path: Path) -> Iterator[tuple[int, ...]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(held, Mapping) and isinstance(held.get("weight_map"), Mapping):
        for file in sorted(set(map(str, held["weight_map"].values()))):
            yield from _of_safetensors(path.parent / file)
        return
    named = held.items() if isinstance(held, Mapping) else enumerate(held) if isinstance(held, list) else [("", held)]
    for name, shape in named:
        if not _is_shape(shape):
            raise ValueError(f"{path}, entry {name!r}: {shape!r}; expected a list of whole numbers, [768, 3072]")
        yield tuple(shape)


def _of_torch(path: Path) -> Iterator[tuple[int, ...]]:
    try:
        held: Any = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ValueError(f"{path} is not read by torch.load(mmap=True, weights_only=True): {error}") from error
    for key in ("state_dict", "model"):
        held = held.get(key, held) if isinstance(held, Mapping) and isinstance(held.get(key), Mapping) else held
    if not isinstance(held, Mapping) or not any(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(f"{path} is no state dict, and has none as 'state_dict' or 'model'")
    seen = set()
    for value in held.values():
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            if value.layout != torch.strided:
                shape = tuple(value.shape)
                raise ValueError(f"{path}: a tensor of {shape} is {value.layout}, which no step here takes")
            lies = (value.untyped_storage()._cdata, value.storage_offset(), value.shape)
            if lies not in seen:
                yield tuple(value.shape)
            seen.add(lies)
