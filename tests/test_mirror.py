"""The two adapters mirror each other file by file, and class by class in each."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What one adapter has and the other does not, with the reason.
ONLY = {
    "vllm_ext/gpu_kernels.py": "vLLM's GPU kernels are called by the layer; SGLang's by its own attention backend",
    "vllm_ext/cpu_kernels.py": "SGLang's are few and stand in kernels.py",
    "vllm_ext/cpu_phases.py": "the same",
    "vllm_ext/cpu_triton.py": "SGLang's are in kernels.py and cpu_speculation.py",
    "vllm_ext/norm.py": "SGLang's norm has a path for CPU that rounds once",
    "sglang_ext/quantization.py: Stored": "vLLM asks its own configuration for both",
    "sglang_ext/quantization.py: DequantisedConfig": "vLLM has kernels on CPU for some formats",
    "vllm_ext/scheduler.py": "SGLang's scheduler serves drafts on pipelines itself",
    "vllm_ext/ray_executor.py": "SGLang has no executors, and serves on CPUs without Ray",
    "vllm_ext/compat_parallel.py": "SGLang's are few and stand in compat.py",
    "vllm_ext/compat.py: ReloadSession": "SGLang copies new weights as they come",
    "vllm_ext/compat.py: KeepsBlockSize": "SGLang's processes keep their configuration",
    "sglang_ext/loading.py: Copy": "its second argument needs a name",
    "vllm_ext/mtp.py: Qwen3NextMTP": "each engine derives another architecture's name for the draft",
    "sglang_ext/mtp.py: Qwen3NextForCausalLMMTP": "the same",
    "sglang_ext/cpu_delta_rule.py": "vLLM's wheel has what SGLang's compiles here",
    "sglang_ext/cpu_products.py": "the same",
    "sglang_ext/cpu_gemm.py: Packed": "vLLM's wheel takes a packed weight for a plain one",
    "sglang_ext/cpu_gemm.py: PackedForAvx2": "the same",
    "sglang_ext/cpu_gemm.py: Plain": "vLLM has experts of its own for other data types",
    "sglang_ext/cpu_speculation.py": "vLLM has CPU versions of most of these kernels",
    "sglang_ext/cpu_platform.py": "vLLM has a CPU platform of its own",
    "sglang_ext/cpu_attention.py": "vLLM has attention for CPU of its own",
    "vllm_ext/cpu_gemm.py: PackedExperts": "SGLang's experts are a method that takes a function",
    "vllm_ext/cpu_gemm.py: CompiledExperts": "the same",
    "vllm_ext/cpu_gemm.py: PackedHeadMethod": "SGLang applies a head as a linear layer",
    "vllm_ext/cpu_gemm.py: DraftHeadMethod": "SGLang gives a draft the target's head itself",
    "vllm_ext/model.py: ExpertBookkeeping": "SGLang's load balancer asks for one property of the model",
    "sglang_ext/config.py: Qwen3NextConfig": "vLLM takes the configuration class of transformers",
    "sglang_ext/gated_delta_net.py: RMSNormGated": "vLLM's own has a CPU path",
}
# Kernels follow the interface of each engine.
SKIPPED = "kernels.py"


def contents(adapter: str) -> set[str]:
    found = set()
    for file in (ROOT / adapter).glob("*.py"):
        found.add(file.name)
        if file.name != SKIPPED:
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
