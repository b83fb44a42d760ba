"""Loops compiled for CPUs: what a start compiles, once on a machine, and in which folders the result is kept."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import carray
from numba.core.caching import CacheImpl

from qnext_plugin.ops.cpu import jit
from tests.support.imports import ROOT

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="wants AVX2")

START = """
import logging

import torch
from numba.core import event

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
compiled = event.RecordingListener()
with event.install_listener("numba:compile", compiled):
    from qnext_plugin.checkpoint.layer_codes import Codes
    from qnext_plugin.ops.cpu import quantized, stored

    codes = Codes("i8", torch.float32, 8)
    form, packed = stored.pack(codes, codes.zeros(16, 8) | {"weight": torch.ones(16, 8, dtype=torch.uint8)})
    quantized.linear(form, torch.ones(1, 8).bfloat16(), packed, None, 16)
functions = [e.data["dispatcher"] for _, e in compiled.buffer if e.is_start]
print(*sorted(f.py_func.__name__ for f in functions if f.py_func.__module__.startswith("qnext_plugin.")))
"""


def start(folder):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", START], env=environment, cwd=ROOT, text=True, **pipes)


def result(process):
    """Return the names of the functions that it compiled, and the lines of its log."""
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return out.split(), log.splitlines()


def test_several_ranks_compile_once_and_the_next_start_nothing(tmp_path):
    """Few functions, each for one type of its arguments; only numbers are transposed in four types.

    Where each rank compiles one of the two loops, both compile what these have in common.
    """
    ranks = [result(rank) for rank in [start(tmp_path), start(tmp_path)]]
    for names, _ in ranks:
        assert len(names) <= 27 and len(names) == len({*names}) + 3 * ("_transpose" in names), names
    assert 10 < len({name for names, _ in ranks for name in names}) <= 24
    lines = [line for _, log in ranks for line in log]
    assert len(lines) == 4 and sum("INFO compiling" in line for line in lines) == 2, lines
    assert result(start(tmp_path)) == ([], [])


def test_where_no_folder_is_writable_it_is_compiled_and_said_so_once(monkeypatch, caplog):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    jit._warn_of_no_cache.cache_clear()
    runs, seen = [jit.in_parallel.__wrapped__(region) for region in (add_one, add_two)], np.zeros(1, np.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs:
            run(seen)
    finally:
        torch.set_num_threads(before)
    assert seen.tolist() == [3]
    assert ["NUMBA_CACHE_DIR" in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]


def add_one(data):
    carray(data, 1, np.int64)[0] += 1


def add_two(data):
    carray(data, 1, np.int64)[0] += 2
