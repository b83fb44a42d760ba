"""flash-linear-attention's kernels for prompts, as we call them, against the oracle, in Triton's interpreter.

python -m tests.gpu.fla_oracle OUT.json
"""

import json
import sys
from pathlib import Path

from tests.gpu import interpreter

interpreter.enable_triton()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from qnext_plugin import ops  # noqa: E402
from qnext_plugin.ops import packages  # noqa: E402

# Key heads, value heads, K, V; lengths; type; whether the kernel normalizes.
CASES = {
    "equal heads": (2, 2, 16, 16, (3, 64, 3), torch.float32, False),
    "grouped heads": (1, 2, 16, 32, (1, 70), torch.float32, False),
    "normalized by the kernel": (1, 3, 32, 16, (5, 64, 65), torch.float32, True),
    "bfloat16": (1, 2, 16, 16, (3, 67), torch.bfloat16, True),
}


def differences(
    key_heads: int, heads: int, k_dim: int, v_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, norm: bool
) -> list[float]:
    """Return the largest differences of outputs and of final states from those in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = sum(lengths)
    q, k, v = (random(tokens, n, d).to(dtype) for n, d in ((key_heads, k_dim), (key_heads, k_dim), (heads, v_dim)))
    if not norm:
        q, k = (ops.l2norm(x).to(dtype) for x in (q, k))
    g, beta = -random(tokens, heads).abs(), random(tokens, heads).sigmoid()
    state = random(len(lengths), heads, v_dim, k_dim)
    out, final = packages.chunk_gated_delta_rule(
        *(x[None] for x in (q, k, v)),
        g=g[None],
        beta=beta[None],
        initial_state=state,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=norm,
    )
    expected, expected_final = ops.chunk_gated_delta_rule(
        *(x.float() for x in (q, k, v)),
        g=g,
        beta=beta,
        initial_state=state.mT,
        cu_seqlens=starts,
    )
    pairs = ((out[0].float(), expected), (final, expected_final.mT))
    return [float((ours - theirs).abs().max()) for ours, theirs in pairs]


def main() -> None:
    from fla.ops.common import chunk_delta_h

    packages.load("fla")
    interpreter.repair("fla", chunk_delta_h)
    Path(sys.argv[1]).write_text(json.dumps({name: differences(*case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
