"""The two adapters mirror each other file by file, and class by class in each."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What one adapter has and the other does not, with the reason.
ONLY = {
    "vllm_ext/gpu_kernels.py": "vLLM's GPU kernels are called by the layer; SGLang's by its own attention backend",
    "vllm_ext/gpu_prefill.py: GpuPrefill": "the same",
    "vllm_ext/placeholders.py": "SGLang pads no prompt with placeholders for drafts",
    "vllm_ext/norm.py: ZeroCenteredRMSNorm": "SGLang's own serves as it is",
    "sglang_ext/norm.py: RMSNormGated": "vLLM's own has a CPU path",
    "sglang_ext/quantization.py: DequantizedConfig": "vLLM has kernels on CPU for some formats",
    "vllm_ext/scheduler.py": "a name that users type; SGLang's scheduler serves drafts on pipelines itself",
    "vllm_ext/ray_executor.py": "a name that users type; SGLang has no executors, and serves on CPUs without Ray",
    "vllm_ext/compat.py: ReloadSession": "SGLang copies new weights as they come",
    "vllm_ext/compat.py: KeepsBlockSize": "SGLang's processes keep their configuration",
    "vllm_ext/config.py: CheckedConfig": "SGLang has no hook for a model's configuration",
    "vllm_ext/state.py: DeltaNetLayer": "SGLang's attention backend holds the layer's weights and caches",
    "sglang_ext/guards.py": "vLLM answers such requests and updates itself",
    "sglang_ext/streams.py": "vLLM's own expert layer runs the shared expert beside the others",
    "sglang_ext/compat.py: Uses": "vLLM has one configuration object, which says it",
    "vllm_ext/mtp.py: Qwen3NextMTP": "each engine derives another architecture's name for the draft",
    "sglang_ext/mtp.py: Qwen3NextForCausalLMMTP": "the same",
    "vllm_ext/model.py: ExpertBookkeeping": "SGLang's load balancer asks for one property of the model",
}


def contents(adapter: str) -> set[str]:
    found = set()
    for file in (ROOT / adapter).glob("*.py"):
        found.add(file.name)
        nodes = ast.parse(file.read_text()).body
        classes = (node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name[0] != "_")
        found |= {f"{file.name}: {name}" for name in classes}
    return found


def test_adapters_have_the_same_files_and_classes() -> None:
    vllm, sglang = contents("vllm_ext"), contents("sglang_ext")
    different = {f"vllm_ext/{name}" for name in vllm - sglang} | {f"sglang_ext/{name}" for name in sglang - vllm}
    own_files = {name for name in ONLY if ":" not in name}
    different -= {name for name in different if ": " in name and name.split(": ")[0] in own_files}
    assert different == ONLY.keys()
