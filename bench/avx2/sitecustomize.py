"""On ``PYTHONPATH``: torch says that this CPU has AVX2 and nothing after it, so engines choose as on such a CPU."""

import torch.cpu

for name in ("avx512", "avx512_bf16", "amx_tile", "amx_fp16", "vnni"):
    setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
