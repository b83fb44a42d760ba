"""Everything that depends on the version of vLLM."""

import vllm

SUPPORTED = ((0, 32), (0, 34))


def check_engine_version(version: str | None = None) -> None:
    """``ValueError`` outside the range of vLLM versions this package is tested with."""
    version = vllm.__version__ if version is None else version
    low, high = SUPPORTED
    try:
        found = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        found = (0, 0)
    if not low <= found < high:
        raise ValueError(
            f"vLLM {version} found; qnext-plugin supports >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}. "
            "Install a supported vLLM, or set QNEXT_DISABLE=1 to serve vLLM's own model"
        )
