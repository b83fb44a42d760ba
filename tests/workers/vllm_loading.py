"""Checkpoints loaded as every rank of larger groups would load them, in one process."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import mtp_arguments
from qnext_plugin.ops.cpu import stored as stored_codes
from tests.support.adapters import added
from tests.support.cache_scales import FORM_OF_SCALES, NAMES, SETTINGS, scale
from tests.support.dequantized import dequantized
from tests.support.reads import Reads
from tests.support.shards import OUTER_RANKS, RANKS, attention_and_experts, checkpoints, expected, weights_of

READ = ("plain", "fp8-channel")
WORDS = ("w4a16", "awq", "gptq")
# Expert parallelism, its load balancer, and how many experts that has twice.
WAYS = {"TP 2": (False, False, 0), "EP 2": (True, False, 0), "EP 2, balanced": (True, True, 4)}
# Of the layers that are compared: two input projections and an output one, qkv and o, router, gate_up and down.
ADAPTED = 8


def check_adapter(model: nn.Module, vllm_config: Any, directory: Path, config: QNextConfig, rank: int, tp: int) -> None:
    """What an adapter adds to each of this rank's weights is the rank's shard of what it adds to the whole."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    worker = LRUCacheWorkerLoRAManager(vllm_config, torch.device("cpu"), model.embedding_modules)
    worker.create_lora_manager(model, vllm_config)
    worker.add_adapter(LoRARequest("adapter", 1, str(directory.parent / "adapter")))
    deltas = added(directory.parent / "adapter")
    shards = expected(load_file(directory / "model.safetensors") | deltas, config, rank, tp)
    checked = 0
    for name, layer in model.lora_manager.modules.items():
        if f"{name}.weight" in shards:
            checked += 1
            pairs = zip(layer.lora_b_stacked, layer.lora_a_stacked, strict=True)
            actual = torch.cat([b[0, 0] @ a[0, 0] for b, a in pairs])
            where = f"adapter: {name}, rank {rank} of {tp}"
            torch.testing.assert_close(actual, shards[f"{name}.weight"], rtol=1e-5, atol=1e-6, msg=where)
    assert checked == ADAPTED, checked


def load(
    directory: Path,
    tensors: dict[str, Tensor],
    quantization: dict[str, Any],
    ranks: Sequence[tuple[int, int]] = RANKS,
) -> dict[str, list[str]]:
    """Check every rank's parameters, target and draft; by rank, the layers that are served as stored."""
    from vllm.config import set_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_ext.model import Qwen3NextForCausalLM
    from vllm_ext.mtp import Qwen3NextMTP

    vllm_config = configuration(directory)
    stored = list(load_file(directory / "model.safetensors").items())
    config = QNextConfig.from_pretrained(directory)
    if not quantization:
        vllm_config.lora_config = LoRAConfig(max_lora_rank=8, lora_dtype=torch.get_default_dtype())
    as_stored = {}
    for tp, rank in ranks:
        group = SimpleNamespace(world_size=tp, rank_in_group=rank, unique_name="tp", device_group=None)
        names = {}
        vllm_config.parallel_config.tensor_parallel_size = tp
        for model_class in (Qwen3NextForCausalLM, Qwen3NextMTP):
            vllm_config.compilation_config.static_forward_context.clear()
            with set_current_vllm_config(vllm_config), patch.object(parallel_state, "_TP", group):
                model = initialize_model(vllm_config, model_class=model_class)
                used = [pair for pair in stored if not model.is_unused_checkpoint_weight(pair[0])]
                assert 0 < len(used) < len(stored), f"{len(used)} of {len(stored)} tensors are used"
                model.load_weights(iter(used))
            if model_class is Qwen3NextForCausalLM:
                shards = expected(tensors, config, rank, tp)
            else:
                mtp_shards = attention_and_experts(
                    tensors, config, rank, tp, "mtp.layers.0.self_attn.", "mtp.layers.0.mlp."
                ) | {"mtp.fc.weight": tensors["mtp.fc.weight"].chunk(tp)[rank]}
                shards = {name.replace("mtp.", "model."): shard for name, shard in mtp_shards.items()}
            if quantization:
                check_cache_scales(model, directory)
            for name, shard in shards.items():
                where = f"{directory.name}, {model_class.__name__}: {name}, rank {rank} of {tp}"
                actual, is_quantized = weights_of(model, name, quantization)
                if is_quantized:
                    torch.testing.assert_close(actual, shard.float(), rtol=1e-6, atol=0, msg=where)
                    names[f"{model_class.__name__}.{name}"] = None
                else:
                    # NVFP4's product of two scales is rounded in another place.
                    rtol = 2**-7 if quantization.get("quant_method") == "modelopt" else 0
                    # The router's is float32 on a CPU, of what the served type holds.
                    served = shard.to(torch.get_default_dtype()).to(actual.dtype)
                    torch.testing.assert_close(actual, served, rtol=rtol, atol=0, msg=where)
            if not quantization and model_class is Qwen3NextForCausalLM:
                check_adapter(model, vllm_config, directory, config, rank, tp)
        as_stored[f"{rank} of {tp}"] = list(names)
    return as_stored


def form_of_scales(directory: Path) -> str:
    return FORM_OF_SCALES["gptq" if directory.name == "auto-round" else directory.name.removesuffix("-mixed")]


def check_cache_scales(model: nn.Module, directory: Path) -> None:
    """Each attention layer uses the checkpoint's scales, in a cache of FP8."""
    from vllm.model_executor.layers.attention import Attention

    form = form_of_scales(directory)
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    assert layers
    for layer in layers:
        assert layer.kv_cache_dtype.startswith("fp8"), layer.kv_cache_dtype
        layer.quant_method.process_weights_after_loading(layer)
        outer = layer.layer_name.removesuffix(".attn")
        for x in NAMES[form]:
            used = (getattr(layer, f"_{x}_scale").item(), getattr(layer, f"_{x}_scale_float"))
            assert used == (scale(outer, x),) * 2, f"{directory.name}: {layer.layer_name}, {x}: {used}"


def without_fp8_cache(directory: Path) -> dict[str, Any]:
    """What becomes of a checkpoint that asks for an FP8 cache on a CPU with AVX2 only, and of a flag for one."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_ext.model import Qwen3NextForCausalLM
    from vllm_ext.tools.doctor import risks

    with (
        patch.object(torch.cpu, "_is_avx512_supported", return_value=False),
        patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False),
    ):
        vllm_config = configuration(directory)
        with set_current_vllm_config(vllm_config):
            model = initialize_model(vllm_config, model_class=Qwen3NextForCausalLM)
        try:
            configuration(directory, kv_cache_dtype="fp8_e5m2")
            refused = ""
        except ValueError as e:
            refused = str(e)
        return {
            "layers": sorted({m.kv_cache_dtype for m in model.modules() if hasattr(m, "kv_cache_dtype")}),
            "refused": refused,
            "risks": risks(vllm_config),
        }


def configuration(directory: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    asks = directory.name == "plain" or form_of_scales(directory) in SETTINGS
    args = EngineArgs(
        model=str(directory),
        dtype=dtype,
        skip_tokenizer_init=True,
        **{"kv_cache_dtype": "auto" if asks else "fp8"} | mtp_arguments("vllm", 1) | options,
    )
    return args.create_engine_config()


def read(directory: Path, quantized: bool) -> dict[str, Any]:
    """By way to split, what the second of two ranks reads of each tensor, and allocates, in loading the model."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_ext.model import Qwen3NextForCausalLM

    stored = list(load_file(directory / "model.safetensors").items())
    tensors = dequantized(directory) if quantized else dict(stored)
    device_group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    group = SimpleNamespace(world_size=2, rank_in_group=1, unique_name="tp", device_group=device_group)
    found = {}
    for way, changed in WAYS.items():
        vllm_config = configuration(directory)
        parallel = vllm_config.parallel_config
        parallel.tensor_parallel_size = 2
        # Set here, because vLLM refuses its load balancer on a CPU.
        parallel.enable_expert_parallel, parallel.enable_eplb, parallel.eplb_config.num_redundant_experts = changed
        with (
            set_current_vllm_config(vllm_config),
            patch.object(parallel_state, "_TP", group),
            patch.object(parallel_state, "_EP", group),
        ):
            model = initialize_model(vllm_config, model_class=Qwen3NextForCausalLM)
            with Reads(stored) as reads:
                model.load_weights(iter(reads.stored))
        experts = model.model.layers[0].mlp.experts.routed_experts
        count = QNextConfig.from_pretrained(directory).num_experts
        physical = [i % count for i in range(experts.global_num_experts)]
        mine = physical[len(physical) // 2 :] if parallel.enable_expert_parallel else physical
        read_experts = mine
        if parallel.enable_eplb:
            mine = rearranged(model, mine)
        for held, logical in zip(experts.w2_weight, mine, strict=True):
            down = tensors[f"model.layers.0.mlp.experts.{logical}.down_proj.weight"].to(held.dtype)
            down = down if parallel.enable_expert_parallel else down.chunk(2, 1)[1]
            torch.testing.assert_close(held, down, rtol=0, atol=0)
        found[way] = reads.summary(read_experts)
    return found


def rearranged(model: nn.Module, old: list[int]) -> list[int]:
    """Let vLLM's load balancer move the experts of a rank about; which ones it then has."""
    from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    layers, alone, new = model.num_moe_layers, torch.distributed.group.WORLD, sorted(old)[-2:] + sorted(old)[::-2] + [0]
    model.set_eplb_state(
        torch.zeros(layers, 2 * len(old)), torch.zeros(layers, max(old) + 1, 2), torch.ones(layers, max(old) + 1)
    )
    rearrange_expert_weights_inplace(
        torch.tensor([old] * layers),
        torch.tensor([new] * layers),
        model.expert_weights,
        [torch.empty_like(weight) for weight in model.expert_weights[0]],
        alone,
        TorchDistGlooStagedEplbCommunicator(alone),
    )
    return new


def check(root: str) -> dict[str, Any]:
    """By checkpoint below ``root``, for every rank which layers are served as stored; ``read NAME`` for what is read.

    An assertion names the parameter whose shard is not the expected one.
    """
    found: dict[str, Any] = {}
    from vllm import _custom_ops
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    import vllm_ext.quantization

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{root}/rendezvous", 0, "gloo")
        initialize_model_parallel()
    with patch.object(stored_codes, "multiplies_codes", lambda: False):
        for name in (name for name in READ if (Path(root) / name).exists()):
            torch.set_default_dtype(torch.float32 if name == "plain" else torch.bfloat16)
            directory = Path(root) / name
            found[f"read {name}"] = read(directory, name != "plain")
    # As on a CPU that has every kernel of vLLM's: what is loaded is what counts here, nothing runs.
    with (
        patch.object(stored_codes, "multiplies_codes", lambda: False),
        patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True),
        patch.object(_custom_ops, "_supports_cpu_fp8_w8a16", True),
        patch.object(vllm_ext.quantization, "cpu_has_amx_fp8", lambda: True),
    ):
        for directory, tensors, quantization in checkpoints(Path(root)):
            # GPTQ and AWQ store scales in float16, which vLLM converts to the type it serves in.
            half = (
                torch.float16 if quantization.get("quant_method") in ("gptq", "awq", "auto-round") else torch.bfloat16
            )
            torch.set_default_dtype(half if quantization else torch.float32)
            ranks = OUTER_RANKS if directory.name == "auto-round" else RANKS
            found[directory.name] = load(directory, tensors, quantization, ranks)
            if directory.name in FORMATS:
                torch.set_default_dtype(torch.bfloat16)
                with patch.object(stored_codes, "serves", lambda: True):
                    found[f"{directory.name}, codes"] = load(directory, tensors, quantization, ranks=[(1, 0), (8, 7)])
                torch.set_default_dtype(half)
            if directory.name in ("fp8-channel", "nvfp4"):
                found[f"{directory.name}, no FP8 cache"] = without_fp8_cache(directory)
            if directory.name in WORDS:
                with patch.object(vllm_ext.quantization, "has_cpu_wna16", lambda: False):
                    found[f"{directory.name}, AVX2"] = load(directory, tensors, quantization, ranks=[(2, 1)])
    return found
