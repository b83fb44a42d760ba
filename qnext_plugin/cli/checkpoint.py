"""``qnext checkpoint`` makes checkpoints, and the index of one."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser("checkpoint", help="make checkpoints, or the index of one")
    group = parser.add_subparsers(required=True, metavar="ACTION")
    demo = group.add_parser("demo", help="write the small trained checkpoint that comes with the package")
    demo.set_defaults(run=_demo)
    demo.add_argument("directory", metavar="DIR", help="an empty or new directory")
    random = group.add_parser("random", help="write a complete checkpoint with random weights")
    random.set_defaults(run=_random)
    random.add_argument("directory", metavar="DIR", help="an empty or new directory")
    random.add_argument("--preset", default="tiny", choices=("tiny", "80b"), help="model dimensions (default: tiny)")
    random.add_argument("--layers", type=int, metavar="N", help="num_hidden_layers")
    random.add_argument("--experts", type=int, metavar="N", help="num_experts")
    random.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    random.add_argument("--seed", type=int, default=0, metavar="N")
    random.add_argument("--dialect", default="published", choices=("published", "transformers5"), help="of config.json")
    random.add_argument("--max-shard-size", type=_size, default=_size("5GB"), metavar="BYTES", help="such as 500MB")
    random.add_argument("--format", choices=_FORMATS, help="quantized, as quantize would write it (default: plain)")
    _add_group_size(random)
    random.add_argument(
        "--set",
        action="append",
        type=_override,
        default=[],
        metavar="KEY=JSON",
        help="another value for a key of config.json, such as tie_word_embeddings=true; may be repeated",
    )

    quantize = group.add_parser("quantize", help="write a quantized copy, rounded to nearest, to test a server with")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("source", metavar="SRC", help="a local unquantized checkpoint")
    quantize.add_argument("target", metavar="DST", help="an empty or new directory")
    quantize.add_argument("--format", required=True, choices=_FORMATS)
    _add_group_size(quantize)

    index = group.add_parser("index", help="write the index of all safetensors files in a directory, over an old one")
    index.set_defaults(run=_index)
    index.add_argument("directory", metavar="DIR")


def _add_group_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group-size", type=int, default=32, metavar="N", help="inputs with one scale (4 bits)")


def _index(args: argparse.Namespace) -> None:
    from qnext_plugin.checkpoint.headers import write_index  # imports torch

    write_index(Path(args.directory))


# The keys of ``make_quantized.FORMATS``, which imports torch.
_FORMATS = (
    *("fp8-block", "fp8-channel", "w8a8", "w4a16", "mxfp8", "mxfp4", "nvfp4-llm-compressor"),
    *("awq", "gptq", "gptq-int8", "nvfp4", "mxfp4-quark"),
)


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
