"""The starts on a simulated GPU, and the record of what each launched, which is kept beside this file."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from tests.gpu.dry.report import summary
from tests.support.cache_scales import FORM_OF_SCALES, add_cache_scales
from tests.support.quantized import FORMS, SIZES, write_form

ROOT = Path(__file__).parents[3]
TIMEOUT = 1200
PACKAGES = "fla,causal_conv1d"


@dataclass(frozen=True)
class Engine:
    """An engine's starts by name, and the kinds of batches that are recorded, by the pattern of a phase's name."""

    name: str
    starts: dict[str, list[str]]
    phases: dict[str, str]

    @property
    def file(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.json")

    def records(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return found

    def run(self, directory: Path, arguments: Sequence[str], environment: str) -> dict[str, Any]:
        """Run a start in an environment of ``scripts/setup`` and return its report."""
        out, log = directory / "out.json", directory / "log"
        call(environment, log, f"tests.gpu.dry.{self.name}_start", out, *arguments)
        assert out.exists(), log.read_text()[-3000:]
        report: dict[str, Any] = json.loads(out.read_text())
        return report

    def repeat(self, directory: Path, name: str) -> None:
        """Run the start of this name, which must not fail; where it launches other things, record them and fail."""
        arguments = [*self.starts[name], *with_weights(directory, name)]
        found = summary(self.run(directory, arguments, environment_of(self.name, name)), self.phases)
        assert not found["failure"], found["failure"]
        records = self.records()
        if found != records.get(name):
            records[name] = found
            kept = {each: records[each] for each in self.starts if each in records}
            self.file.write_text(json.dumps(kept, indent=1) + "\n")
            raise AssertionError(f"{self.file} had no such launches for {name!r}; it has been written again")


def call(environment: str, log: Path, module: str, *arguments: str | Path) -> None:
    """Run a module of the tests in an environment of ``scripts/setup``; its output is in ``log``."""
    activate = ROOT / ".qnext" / environment / "activate"
    assert activate.exists(), f"run scripts/setup {environment} first"
    with log.open("w") as output:
        subprocess.run(
            ["bash", "-c", 'source "$0" && exec python -m "$@"', activate, module, *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            timeout=TIMEOUT,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )


def environment_of(engine: str, name: str) -> str:
    """Return the environment of ``scripts/setup`` for a start: flash-linear-attention is in that of vLLM's dry run."""
    return "dry" if engine == "vllm" or "packages" in name else engine


# The stored formats of starts with weights: arguments of vLLM, whose own choice for some asks the driver, and flags of
# SGLang.
MARLIN = {"linear_backend": "marlin", "moe_backend": "marlin"}
VLLM_FORMS: dict[str, dict[str, str]] = {"fp8-block": {}, "w4a16": MARLIN, "gptq": MARLIN, "awq": MARLIN}
SGLANG_FORMS: dict[str, list[str]] = {"fp8-block": [], "w4a16": []}
# Those that vLLM's own model is started with too. SGLang's loads neither: it wants blocks in in_proj_ba, and a plain
# in_proj_qkvz.
NATIVE_FORMS = ("fp8-block", "w4a16")


def with_weights(directory: Path, name: str) -> list[str]:
    """Write the small checkpoint of a start that is named for a stored format, and return the argument that names it.

    Ours has scales for an FP8 cache, which the engine's own model need not read.
    """
    side, _, form = name.partition(", ")
    if form not in FORMS:
        return []
    sizes = SIZES | {"max_position_embeddings": 4096, "vocab_size": 4096}
    write_random_checkpoint(directory / "source", overrides=sizes)
    write_form(directory, form)
    if side == "ours":
        add_cache_scales(directory / form, FORM_OF_SCALES[form])
    return ["--model", str(directory / form)]


SIDES: dict[str, list[str]] = {"ours": [], "native": ["--native"]}
TP = {f"{side}, TP {n}": [*flags, "--tp", str(n)] for n in (4, 8) for side, flags in SIDES.items()}
VLLM = Engine(
    "vllm",
    starts={
        name: ["--drafts", "2", *flags]
        for name, flags in {
            "ours": [],
            "native": ["--native"],
            **TP,
            "ours, sm_80": ["--capability", "80"],
            "ours, sm_100": [
                *("--capability", "100"),
                *("--args", json.dumps({"moe_backend": "triton", "attention_backend": "TRITON_ATTN"})),
            ],
            **{
                f"{side}, {form}": [*flags, "--args", json.dumps({"kv_cache_dtype": "fp8", **arguments})]
                for form, arguments in VLLM_FORMS.items()
                for side, flags in SIDES.items()
                if side == "ours" or form in NATIVE_FORMS
            },
            "ours, packages": ["--args", json.dumps({"additional_config": {"gdn_prefill_backend": PACKAGES}})],
        }.items()
    },
    phases={
        "verify, no drafts": r"^run \[1, 1\]$",
        "verify, captured": r"^capture Model ",
        "prompts": r"^run \[5, 70\]$",
        "drafts beside a prompt": r"^run \[3, 3, 1000\]$",
        "a prompt in pieces": r"^run \[773, 3\]$",
    },
)
ON_TRITON = ["--attention-backend", "triton"]
SGLANG = Engine(
    "sglang",
    starts={
        "ours": ["--drafts", "3"],
        "native": ["--drafts", "3", "--native"],
        "ours, no drafts": [],
        "native, no drafts": ["--native"],
        **{name: ["--drafts", "3", *flags] for name, flags in TP.items()},
        "ours, sm_80": ["--drafts", "3", "--capability", "80", *ON_TRITON],
        "ours, sm_100": ["--drafts", "3", "--capability", "100", *ON_TRITON, "--moe-runner-backend", "triton"],
        **{
            f"ours, {form}": ["--drafts", "3", "--kv-cache-dtype", "fp8_e4m3", *flags]
            for form, flags in SGLANG_FORMS.items()
        },
        "ours, packages": ["--linear-attn-prefill-backend", PACKAGES, "--disable-radix-cache"],
    },
    # Graphs: a step of four sequences, or 128 tokens of prompts without attention and delta rule.
    phases={
        "decode": "^capture decode 4",
        "verify 3 drafts": "^capture verify 4",
        "draft": "^capture draft 4",
        "draft extend": "^capture draft extend 4",
        "prompts": "^capture prefill 128",
        "run prompts": r"^run extend of \[5, 70\]",
    },
)
