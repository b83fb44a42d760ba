"""What the starts on a simulated GPU recorded: ours against each engine's own model, and the figures of the document.

``tests/engines/test_*_dry_run.py`` runs the starts again and compares them with this record.
"""

from pathlib import Path

import pytest

from tests.gpu.dry.report import ATTENTION, DELTA_NET, EXPERTS, PARTS
from tests.gpu.dry.starts import NATIVE_FORMS, SGLANG, SGLANG_FORMS, VLLM, VLLM_FORMS
from tests.gpu.dry.trace import GPUS
from tests.support.cache_scales import scale

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}
RECORDS = {name: engine.records() for name, engine in ENGINES.items()}
STARTS = [(name, start) for name, engine in ENGINES.items() for start in engine.starts]
PAIRS = [
    (engine, start)
    for engine, start in STARTS
    if start.startswith("ours") and start.replace("ours", "native") in ENGINES[engine].starts
]
QUANTIZED = [(engine, form) for engine, forms in (("vllm", VLLM_FORMS), ("sglang", SGLANG_FORMS)) for form in forms]
MODELS = {
    ("vllm", "ours"): "vllm_ext.model",
    ("vllm", "native"): "vllm.model_executor.models.qwen3_next",
    ("sglang", "ours"): "sglang_ext.model",
    ("sglang", "native"): "sglang.srt.models.qwen3_next",
}
# Launches of a layer's part in SGLang's graphs; there are no copies.
BUDGETS = {
    "decode": {DELTA_NET: 6, ATTENTION: 6, EXPERTS: 11},
    "verify 3 drafts": {DELTA_NET: 7, ATTENTION: 6, EXPERTS: 11},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_start_has_a_record(engine):
    assert RECORDS[engine].keys() == ENGINES[engine].starts.keys()


@pytest.mark.parametrize(("engine", "start"), STARTS)
def test_every_start_serves_and_compiles_every_kernel(engine, start):
    found = RECORDS[engine][start]
    capability = int(start.partition("sm_")[2] or 90)
    assert not found["failure"] and not found["kernels that do not compile"] and not found["waits in graphs"]
    assert found["kernels"] > 30 and found["largest shared memory"] <= GPUS[capability][3]
    assert found["served"]["unfinished"] == 0
    assert found["served"]["model"] == MODELS[engine, start.split(",")[0]]


@pytest.mark.parametrize(("engine", "start"), PAIRS)
def test_ours_launches_and_copies_at_most_as_much(engine, start):
    every, of_native = (RECORDS[engine][name]["phases"] for name in (start, start.replace("ours", "native")))
    assert every and every.keys() == of_native.keys()
    for phase, ours in every.items():
        native = of_native[phase]
        assert ours["between ranks"] <= native["between ranks"], phase
        if engine == "sglang":  # vLLM's own leaves its norms to torch.compile, which is off
            assert ours["launches"] <= native["launches"] and ours["copies"] <= native["copies"], phase
        for part in ours["parts"].keys() & native["parts"].keys():
            for what in ("launches", "copies"):
                assert ours["parts"][part][what] <= native["parts"][part][what], (phase, part, what)


@pytest.mark.parametrize("form", NATIVE_FORMS)
def test_no_layer_is_served_unquantized_that_vllms_own_model_serves_as_stored(form):
    ours, native = (RECORDS["vllm"][f"{side}, {form}"]["served"]["classes"] for side in ("ours", "native"))
    assert ours == native


@pytest.mark.parametrize(("engine", "form"), QUANTIZED)
def test_every_layer_that_is_stored_quantized_is_served_so(engine, form):
    """Four layers and a draft have 20 linear layers that are stored quantized, and five times experts."""
    classes = RECORDS[engine][f"ours, {form}"]["served"]["classes"]
    experts = [n for name, n in classes.items() if "MoE" in name]
    assert (experts, sum(classes.values())) == ([5], 25), classes


@pytest.mark.parametrize(("engine", "form"), QUANTIZED)
def test_a_cache_in_fp8_is_written_and_read_with_the_checkpoints_scales(engine, form):
    """The operators are handed the attention layers' own tensors, and these hold what the checkpoint stores."""
    caches = RECORDS[engine][f"ours, {form}"]["served"]["cache"]
    stored = {
        "model.layers.1.self_attn.attn": "model.layers.1.self_attn",
        "model.layers.3.self_attn.attn": "model.layers.3.self_attn",
        "draft:model.layers.0.self_attn.attn": "mtp.layers.0.self_attn",
    }
    assert caches.keys() == stored.keys()
    for name, layer in stored.items():
        scales = f"k {scale(layer, 'k')}, v {scale(layer, 'v')}"
        kind = "fp8" if engine == "vllm" else "float8_e4m3fn"
        assert caches[name] == {"attention": [f"float8_e4m3fn, {scales}"], "write": [f"{kind}, {scales}"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_add_one_sum_to_a_part_of_a_layer(engine):
    alone, first = (RECORDS[engine][start]["phases"] for start in ("ours", "ours, TP 4"))
    for phase in alone.keys() & first.keys():
        for part, each in first[phase]["parts"].items():
            before = alone[phase]["parts"][part]
            assert each["launches"] <= before["launches"] + 1 and each["copies"] == before["copies"], (phase, part)


@pytest.mark.parametrize("phase", BUDGETS)
def test_sglangs_graphs_stay_in_the_budget(phase):
    found = RECORDS["sglang"]["ours, no drafts" if phase == "decode" else "ours"]["phases"][phase]["parts"]
    assert {part: each["launches"] for part, each in found.items()} == BUDGETS[phase]
    assert not any(each["copies"] for each in found.values())
    assert found[DELTA_NET]["streams"] == found[EXPERTS]["streams"] == 2


def test_a_prompt_is_one_step_where_it_is_one_with_vllms_own_model():
    ours, native = (RECORDS["vllm"][side]["served"] for side in ("ours", "native"))
    assert ours["block_size"] == native["block_size"] == 576
    assert ours["first_chunks"] == native["first_chunks"] == {str(n): n for n in (500, 1000, 2000, 4000)}


def vllm_table():
    rows = [
        "| Batch | Part of a layer | Ours | of them copies | vLLM's own | of them copies |",
        "|---|---|---|---|---|---|",
    ]
    ours, native = (RECORDS["vllm"][side]["phases"] for side in ("ours", "native"))
    for phase in ours:
        for part, name in PARTS.items():
            cells = [each[phase]["parts"][part][what] for each in (ours, native) for what in ("launches", "copies")]
            rows.append(f"| {phase} | {name} | {' | '.join(map(str, cells))} |")
    return rows


def sglang_table():
    rows = ["| Launches in a graph | ours | SGLang's own |", "|---|---|---|"]
    for phase in ("decode", "verify 3 drafts", "draft", "draft extend", "prompts"):
        more = ", no drafts" if phase in ("decode", "prompts") else ""
        ours, native = (RECORDS["sglang"][side + more]["phases"][phase] for side in ("ours", "native"))

        def row(what, value, phase=phase, ours=ours, native=native):
            rows.append(f"| {phase}: {what} | {value(ours)} | {value(native)} |")

        if phase in BUDGETS:
            for part in (DELTA_NET, EXPERTS):
                row(f"`{part}`", lambda each, part=part: each["parts"][part]["launches"])
            row("48 layers", lambda each: each["in all layers"])
        else:
            row("1 layer" if phase.startswith("draft") else "4 layers", lambda each: each["launches"])
        row("copies in 4 layers", lambda each: each["copies"])
    return rows


def formats_table():
    rows = [
        "| Engine | Format | Ours | The engine's own | Classes for the weights, and layers |",
        "|---|---|---|---|---|",
    ]
    for engine, form in QUANTIZED:
        phase = "verify, captured" if engine == "vllm" else "verify 3 drafts"
        ours, native = (RECORDS[engine].get(f"{side}, {form}") for side in ("ours", "native"))
        launches = " | ".join(str(each["phases"][phase]["launches"]) if each else "-" for each in (ours, native))
        classes = ", ".join(f"`{name}` {n}" for name, n in ours["served"]["classes"].items())
        rows.append(f"| {'vLLM' if engine == 'vllm' else 'SGLang'} | `{form}` | {launches} | {classes} |")
    return rows


TABLES = [("vllm", vllm_table), ("sglang", sglang_table), ("formats", formats_table)]


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_the_document_has_the_figures(name, table):
    """Where the record has others, this writes them and fails."""
    old = DOCUMENT.read_text()
    before, begin, rest = old.partition(f"<!-- dry run: {name} -->\n")
    _, end, after = rest.partition("\n<!-- end of dry run -->")
    new = before + begin + "\n".join(table()) + end + after
    if new != old:
        DOCUMENT.write_text(new)
        pytest.fail(f"{DOCUMENT} had other figures; it has been written again")
