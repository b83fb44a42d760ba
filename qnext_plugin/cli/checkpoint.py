"""``qnext checkpoint`` makes checkpoints, and the index of one."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

# The keys of ``quantizers.FORMATS``, which imports torch.
_FORMATS = (
    *("fp8-block", "fp8-channel", "w8a8", "w4a16", "mxfp8", "mxfp4", "nvfp4-llm-compressor"),
    *("awq", "gptq", "gptq-int8", "nvfp4", "mxfp4-quark"),
)
_LIST = ", ".join(_FORMATS)
_NEW = "an empty or new directory"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="make checkpoints: demo, random, quantized; or an index",
        description="Make checkpoints to test with, or the index of a checkpoint.",
        epilog="qnext checkpoint ACTION --help explains an action and shows examples.",
    )
    group = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    demo = group.add_parser(
        "demo",
        help="write the small trained checkpoint that comes with the package",
        description="Write the small trained checkpoint that comes with the package; scripts/demo serves it.",
        examples=("qnext checkpoint demo demo-checkpoint",),
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("directory", metavar="DIR", help=_NEW)
    random = group.add_parser(
        "random",
        help="write a complete checkpoint with random weights",
        description="Write a complete checkpoint with random weights, with a tokenizer.",
        examples=(
            "qnext checkpoint random tiny",
            "qnext checkpoint random small --layers 8 --experts 16 --set tie_word_embeddings=true",
        ),
    )
    random.set_defaults(run=_random)
    random.add_argument("directory", metavar="DIR", help=_NEW)
    random.add_argument(
        "--preset", default="tiny", choices=("tiny", "80b"), help="model dimensions (default: %(default)s)"
    )
    random.add_argument("--layers", type=int, metavar="N", help="number of layers (default: the preset's)")
    random.add_argument("--experts", type=int, metavar="N", help="number of experts in a layer (default: the preset's)")
    random.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the weights (default: %(default)s)",
    )
    random.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: %(default)s)")
    random.add_argument(
        "--dialect",
        default="published",
        choices=("published", "transformers5"),
        help="form of config.json: as published, or as transformers 5 writes it (default: %(default)s)",
    )
    random.add_argument(
        "--max-shard-size",
        type=_size,
        default=_size("5GB"),
        metavar="BYTES",
        help="most bytes in a file, such as 500MB (default: 5GB)",
    )
    random.add_argument("--format", choices=_FORMATS, metavar="FORMAT", help=f"quantize the weights: {_LIST}")
    _add_group_size(random)
    random.add_argument(
        "--set",
        action="append",
        type=_override,
        default=[],
        metavar="KEY=JSON",
        help="another value for a key of config.json, such as tie_word_embeddings=true; may be repeated",
    )

    quantize = group.add_parser(
        "quantize",
        help="write a quantized copy of a checkpoint, rounded to nearest",
        description="Write a quantized copy of a checkpoint, to test a server with. Values are rounded to nearest, so "
        "it is less accurate than what a calibrated quantizer writes.",
        examples=("qnext checkpoint quantize tiny tiny-awq --format awq",),
    )
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("source", metavar="SRC", help="a local unquantized checkpoint")
    quantize.add_argument("target", metavar="DST", help=_NEW)
    quantize.add_argument("--format", required=True, choices=_FORMATS, metavar="FORMAT", help=f"one of {_LIST}")
    _add_group_size(quantize)

    index = group.add_parser(
        "index",
        help="write model.safetensors.index.json for the files in a directory",
        description="Write model.safetensors.index.json for all safetensors files in a directory; it replaces an "
        "older one.",
        examples=("qnext checkpoint index downloaded-checkpoint",),
    )
    index.set_defaults(run=_index)
    index.add_argument("directory", metavar="DIR", help="the directory of a checkpoint")


def _add_group_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size",
        type=int,
        default=32,
        metavar="N",
        help="inputs that share a scale, in formats of 4 bits (default: %(default)s)",
    )


def _index(args: argparse.Namespace) -> None:
    from qnext_plugin.checkpoint.headers import write_index  # imports torch

    write_index(Path(args.directory))


def _quantize(args: argparse.Namespace) -> None:
    from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint  # imports torch

    quantize_checkpoint(args.source, args.target, format=args.format, group_size=args.group_size)


def _demo(args: argparse.Namespace) -> None:
    from qnext_plugin.checkpoint.make_demo import write_demo_checkpoint  # imports torch

    write_demo_checkpoint(args.directory)


def _random(args: argparse.Namespace) -> None:
    from qnext_plugin.checkpoint.make_random import write_random_checkpoint  # imports torch

    counts = {"num_hidden_layers": args.layers, "num_experts": args.experts}
    write_random_checkpoint(
        args.directory,
        preset=args.preset,
        dtype=args.dtype,
        seed=args.seed,
        dialect=args.dialect,
        overrides={k: v for k, v in counts.items() if v is not None} | dict(args.set),
        max_shard_size=args.max_shard_size,
        format=args.format,
        group_size=args.group_size,
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes or a decimal unit, such as 500MB")
    return int(match[1]) * _UNITS[match[2]]


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON; quote strings, as in KEY='\"text\"'") from None
