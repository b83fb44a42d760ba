"""A dry run of an engine's GPU code on a machine without one: shapes, dtypes, devices; kernels compiled, not run."""
