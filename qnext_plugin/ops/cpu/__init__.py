"""Kernels compiled for CPUs; they know no engine."""
