"""The oracle: Qwen3-Next written from its formulas, slow, in float64 (or float32), independent of ``ops``."""

from qnext_plugin.reference.model import ReferenceModel

__all__ = ["ReferenceModel"]
