"""Whether a model that was loaded again is, module by module, one that was loaded afresh."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain attributes, and what a packed linear makes of one row of ones."""
    held = {**module._parameters, **module._buffers, **vars(module)}
    found = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    if hasattr(module, "cpu_linear"):
        size = getattr(module, "input_size_per_partition", None) or getattr(module, "input_size", None)
        ones = torch.ones(1, size or module.embedding_dim, dtype=module.weight.dtype)
        found["linear"] = module.cpu_linear(ones, module.weight, None)
    return found


def differences(ours: nn.Module, fresh: nn.Module) -> list[str]:
    modules, different = dict(fresh.named_modules()), []
    for name, module in ours.named_modules():
        expected = tensors(modules[name])
        assert tensors(module).keys() == expected.keys(), name
        different += [f"{name}.{n}" for n, t in tensors(module).items() if not torch.equal(t, expected[n])]
    return different


def check(pairs: list[tuple[str, str]]) -> int:
    """Of each pair of checkpoints the second, loaded over the first; an assertion names what differs.

    Besides parameters that is what vLLM and the model derive from them: packed copies. Returns the number of pairs.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.model_loader.reload.inplace import reload_weights
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()

    def load(directory: str) -> tuple[Any, nn.Module]:
        # "auto" would make bfloat16 of float32.
        dtype = json.loads((Path(directory) / "config.json").read_text())["torch_dtype"]
        config = EngineArgs(model=directory, dtype=dtype, skip_tokenizer_init=True).create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{Path(directory)}/rendezvous", 0, "gloo")
                initialize_model_parallel()
            return config, get_model(vllm_config=config)

    for old, new in pairs:
        (config, model), (_, other), (_, fresh) = load(old), load(old), load(new)
        assert not differences(model, other) and differences(model, fresh)
        assert not hasattr(fresh.get_submodule("model.embed_tokens"), "cpu_linear"), "an embedding has a packed copy"
        with set_current_vllm_config(config):
            reload_weights(config, model, None, new, True)
        assert not differences(model, fresh), differences(model, fresh)
    return len(pairs)
