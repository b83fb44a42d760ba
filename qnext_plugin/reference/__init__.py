"""The oracle: a slow Qwen3-Next in float64 (or float32), written from the formulas and independent of ``ops``."""

from qnext_plugin.reference.model import ReferenceModel

__all__ = ["ReferenceModel"]
