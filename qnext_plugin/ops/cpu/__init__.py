"""Kernels that are compiled for CPUs and do not depend on an engine."""
