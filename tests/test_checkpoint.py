"""The weight-name schema against what `transformers` writes, and every way a checkpoint can be incomplete."""

import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext_plugin.checkpoint.coverage import RefusedUpdate, UpdateCheck, check_coverage
from qnext_plugin.checkpoint.headers import TensorInfo, read_headers
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import KEYS, QNextConfig

RAW = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "full_attention_interval": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "intermediate_size": 22,
    "num_experts": 11,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 9,
    "shared_expert_intermediate_size": 13,
}
CONFIG = QNextConfig.from_dict(RAW)
ODD = QNextConfig.from_dict(RAW | {"mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True})
EXPERT = "model.layers.1.mlp.experts"
LINEAR = "model.layers.1.linear_attn"


def headers_of(tensors: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, dtype, Path("model.safetensors")) for name, shape in tensors.items()}


def hugging_face_model(config: QNextConfig) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    raw = {name: getattr(config, name) for name in KEYS}
    raw |= {"layer_types": list(config.layer_types), "mlp_only_layers": list(config.mlp_only_layers)}
    return AutoModelForCausalLM.from_config(Qwen3NextConfig(**raw))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["sparse", "dense-layer-bias-tied"])
def test_schema_is_what_transformers_saves(config: QNextConfig, fused: bool, tmp_path: Path) -> None:
    hugging_face_model(config).save_pretrained(tmp_path, save_original_format=not fused)
    headers = read_headers(tmp_path)
    expected = expected_tensors(config, mtp=False, fused_experts=fused)
    assert {name: info.shape for name, info in headers.items()} == expected
    check_coverage(config, headers)


def test_mtp_is_one_full_attention_moe_layer() -> None:
    tensors = expected_tensors(CONFIG)
    mtp = {name: shape for name, shape in tensors.items() if name.startswith("mtp.")}
    trunk = {n.replace("model.layers.2.", "mtp.layers.0."): s for n, s in tensors.items() if ".layers.2." in n}
    norms = {f"mtp.{name}.weight": (24,) for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")}
    assert mtp == trunk | norms | {"mtp.fc.weight": (24, 48)}
    assert tensors["mtp.layers.0.self_attn.q_proj.weight"] == (120, 24)


def test_split_projections_are_accepted_layer_by_layer() -> None:
    split = expected_tensors(CONFIG, split_in_proj=True)
    shapes = {part: split[f"{LINEAR}.in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a")}
    assert shapes == {"qkv": (62, 24), "z": (42, 24), "b": (6, 24), "a": (6, 24)}
    check_coverage(CONFIG, headers_of(split))
    mixed = {n: s for n, s in expected_tensors(CONFIG).items() if not n.startswith(f"{LINEAR}.in_proj")}
    mixed |= {n: s for n, s in split.items() if n.startswith(f"{LINEAR}.in_proj")}
    check_coverage(CONFIG, headers_of(mixed))
    mixed[f"{LINEAR}.in_proj_qkvz.weight"] = (104, 24)
    with pytest.raises(ValueError, match=r"missing 1: .*in_proj_ba.weight \[12, 24\]\nunexpected 4: .*in_proj_a"):
        check_coverage(CONFIG, headers_of(mixed))


def test_tied_lm_head_may_be_stored_or_not() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    assert "lm_head.weight" not in expected_tensors(tied)
    check_coverage(tied, headers_of(expected_tensors(CONFIG)))
    with pytest.raises(ValueError, match=r"missing 1: lm_head.weight \[37, 24\]"):
        check_coverage(CONFIG, headers_of(expected_tensors(tied)))


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.norm.weight", {}, r"missing 1: model\.norm\.weight \[24\]"),
        (
            f"{EXPERT}.*.up_proj.weight",
            {},
            r"missing 11: model\.layers\.1\.mlp\.experts\.\{0\.\.10\}\.up_proj\.weight \[",
        ),
        (f"{EXPERT}.[37].up_proj.weight", {}, r"missing 2: .*experts\.\{3,7\}\.up_proj\.weight \[9, 24\]"),
        ("*.mlp.gate.weight", {}, r"missing 5: model\.layers\.\{0\.\.3\}\.mlp.gate.weight \[11, 24\]; mtp"),
        ("", {"model.layers.4.A_log": (6,)}, r"unexpected 1: model\.layers\.4\.A_log"),
        ("", {f"{EXPERT}.11.up_proj.weight": (9, 24)}, r"unexpected 1: .*experts\.11\.up_proj"),
        (
            "",
            {f"{LINEAR}.conv1d.weight": (62, 3)},
            r"wrongly shaped 1: .*conv1d.weight \[62, 3\], expected \[62, 1, 3\]",
        ),
        ("", {f"{LINEAR}.out_proj.weight": (42, 24)}, r"out_proj.weight \[42, 24\], expected \[24, 42\]"),
        ("mtp.fc.weight", {}, r"missing 1: mtp\.fc\.weight \[24, 48\]"),
        ("mtp.layers.0.mlp.experts.*", {}, r"missing 33: mtp\.layers\.0\.mlp\.experts\.\{0\.\.10\}"),
        ("", {f"{LINEAR}.norm.weight_scale": (1,)}, r"unexpected 1: .*norm\.weight_scale"),
        ("", {f"{LINEAR}.out_proj_2.weight_scale": (1,)}, r"unexpected 1: .*out_proj_2\.weight_scale"),
        ("", {f"{LINEAR}.out_proj.my_weight_scale": (1,)}, r"unexpected 1: .*my_weight_scale"),
        (f"{LINEAR}.out_proj.weight", {f"{LINEAR}.out_proj.weight_scale": (1,)}, r"missing 1: .*out_proj\.weight"),
    ],
)
def test_coverage_names_what_is_wrong(remove: str, add: dict[str, tuple[int, ...]], message: str) -> None:
    from fnmatch import fnmatchcase

    tensors = {name: shape for name, shape in expected_tensors(CONFIG).items() if not fnmatchcase(name, remove)}
    with pytest.raises(ValueError, match=message):
        check_coverage(CONFIG, headers_of(tensors | add))


def test_one_error_lists_every_kind_and_stays_short() -> None:
    tensors = expected_tensors(CONFIG)
    del tensors["lm_head.weight"]
    tensors |= {f"extra_{i}": (1,) for i in range(20)} | {"model.norm.weight": (25,)}
    with pytest.raises(ValueError, match="missing 1: lm_head") as error:
        check_coverage(CONFIG, headers_of(tensors))
    assert "unexpected 20: extra_0;" in str(error.value) and "and 12 more patterns" in str(error.value)
    assert "model.norm.weight [25], expected [24]" in str(error.value)


def test_mtp_is_optional_as_a_whole_unless_required() -> None:
    headers = headers_of(expected_tensors(CONFIG, mtp=False))
    check_coverage(CONFIG, headers)
    with pytest.raises(ValueError, match=r"drafts are requested, and the checkpoint has no mtp\.\* tensors"):
        check_coverage(CONFIG, headers, mtp="required")


def test_a_draft_may_have_its_own_number_of_experts() -> None:
    wide, narrow = (expected_tensors(replace(CONFIG, mtp_num_experts=count)) for count in (17, 5))
    trunk = expected_tensors(CONFIG, mtp=False)
    for found in (wide, narrow):
        headers = headers_of(found)
        assert {name for name in found if not name.startswith("mtp.")} == trunk.keys()
        config = Checkpoint(RAW, headers, None).complete(CONFIG)
        check_coverage(config, headers, mtp="required")
        assert replace(config, mtp_num_experts=None) == CONFIG
        with pytest.raises(ValueError, match=r"mtp\.layers\.0\.mlp\.experts"):
            check_coverage(CONFIG, headers)
    with pytest.raises(ValueError, match=r"missing 51: mtp\.layers\.0\.mlp\.experts\.\{0\.\.16\}"):
        pruned = {name: shape for name, shape in wide.items() if ".experts." not in name or "mtp" not in name}
        check_coverage(Checkpoint(RAW, headers_of(pruned), None).complete(CONFIG), headers_of(pruned))
    with pytest.raises(ValueError, match="num_experts_per_tok 3 does not fit the 2 experts of mtp"):
        Checkpoint(RAW, headers_of({"mtp.layers.0.mlp.gate.weight": (2, 24)}), None).complete(CONFIG)


@pytest.mark.parametrize(("announced", "present"), [(2, 1), (1, 2), (3, 2)])
def test_draft_layers_that_are_not_as_announced_matter_only_to_drafts(announced: int, present: int) -> None:
    headers = headers_of(expected_tensors(replace(CONFIG, num_nextn_predict_layers=present)))
    config = replace(CONFIG, num_nextn_predict_layers=announced)
    check_coverage(config, headers)
    with pytest.raises(
        ValueError, match=rf"the draft has {present} layers in mtp\.\*, and config.json says \w+ {announced};"
    ):
        check_coverage(config, headers, mtp="required")
    del headers[f"mtp.layers.{present - 1}.input_layernorm.weight"]
    with pytest.raises(ValueError, match=r"missing 1: mtp\.layers\.\d\.input_layernorm"):
        check_coverage(config, headers)


def pruned_to(counts: list[int]) -> dict[str, TensorInfo]:
    """A trunk whose layers have these numbers of experts."""
    tensors: dict[str, tuple[int, ...]] = {}
    for layer, count in enumerate(counts):
        of_all = expected_tensors(replace(CONFIG, num_experts=count), mtp=False)
        mine = {n: s for n, s in of_all.items() if n.startswith(f"model.layers.{layer}.") or ".layers." not in n}
        tensors |= mine
    return headers_of(tensors)


def test_pruned_experts_are_accepted_in_all_layers_alike_only() -> None:
    check_coverage(replace(CONFIG, num_experts=6), pruned_to([6] * 4))
    with pytest.raises(ValueError, match=r"the routers have 6 experts, and config\.json says num_experts 11") as error:
        check_coverage(CONFIG, pruned_to([6] * 4))
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError,
        match=r"differs between layers \(5 in model\.layers\.3, 6 in model\.layers\.1, 11 in model\.layers\.0\)",
    ) as error:
        check_coverage(CONFIG, pruned_to([11, 6, 11, 5]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("replaced", "companions"),
    [
        ("weight", ("weight_scale_inv",)),
        ("weight", ("weight_scale", "weight_scale_2", "input_scale")),
        ("qweight", ("qzeros", "scales", "g_idx")),
        ("weight_packed", ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")),
        ("weight_packed", ("weight_scale", "weight_global_scale", "input_global_scale")),
    ],
)
def test_quantized_modules_keep_their_companions(replaced: str, companions: tuple[str, ...]) -> None:
    tensors = headers_of(expected_tensors(CONFIG))
    for module in (f"{EXPERT}.3.up_proj", "model.layers.2.self_attn.q_proj", f"{LINEAR}.in_proj_qkvz", "mtp.fc"):
        del tensors[f"{module}.weight"]
        tensors |= headers_of({f"{module}.{replaced}": (3, 5)}, "U8")
        tensors |= headers_of({f"{module}.{companion}": (1,) for companion in companions})
    tensors |= headers_of({"model.layers.2.self_attn.k_scale": (1,), "model.layers.2.self_attn.v_proj.v_scale": (1,)})
    check_coverage(CONFIG, tensors)


def test_rotary_frequencies_are_ignored() -> None:
    tensors = expected_tensors(CONFIG) | {"model.layers.2.self_attn.rotary_emb.inv_freq": (2,)}
    check_coverage(CONFIG, headers_of(tensors))
    with pytest.raises(ValueError, match=r"unexpected 1: model\.my_rotary_emb\.inv_freq"):
        check_coverage(CONFIG, headers_of(tensors | {"model.my_rotary_emb.inv_freq": (2,)}))


def test_collapse_merges_experts_then_layers() -> None:
    names = [f"l.{i}.e.{j}.up" for i in (0, 1, 4) for j in (0, 1, 2, 5)] + ["l.9.e.5.up", "l.7.norm", "l.10.norm", "x"]
    assert collapse(names) == ["l.{0..1,4}.e.{0..2,5}.up", "l.9.e.5.up", "l.{7,10}.norm", "x"]


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors files found"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "update",
    [
        {f"{LINEAR}.A_log": (6,)},
        {f"{LINEAR}.in_proj_z.weight": (42, 24), "mtp.fc.weight": (24, 48)},
        {f"{EXPERT}.gate_up_proj": (11, 18, 24)},
        {f"{EXPERT}.3.up_proj.weight": (9, 24), f"{EXPERT}.3.up_proj.weight_scale": (9, 1)},
        {"lm_head.weight": (37, 24), "model.rotary_emb.inv_freq": (2,)},
        expected_tensors(CONFIG),
    ],
)
def test_update_may_be_any_part_in_any_form(update: dict[str, tuple[int, ...]]) -> None:
    check = UpdateCheck(replace(CONFIG, tie_word_embeddings=True))
    check((name, torch.zeros(shape)) for name, shape in update.items())


def test_update_that_does_not_fit_is_refused_by_name() -> None:
    tensors = {
        f"{LINEAR}.A_log": torch.zeros(7),
        f"{LINEAR}.A_logs": torch.zeros(6),
        "mtp.norm.weight": torch.zeros(24),
    }
    message = rf"unexpected 1: {LINEAR}\.A_logs\nwrongly shaped 1: {LINEAR}\.A_log \[7\], expected \[6\]"
    with pytest.raises(RefusedUpdate, match=message):
        UpdateCheck(CONFIG)(tensors.items())


def test_time_to_check_an_update_does_not_depend_on_the_size_of_the_model() -> None:
    large = replace(CONFIG, num_experts=2048)
    update = [(f"{LINEAR}.A_log", torch.zeros(6))]

    def seconds(check: UpdateCheck) -> float:
        return min(timeit.repeat(lambda: check(update), number=20, repeat=5))

    assert len(expected_tensors(large)) > 20 * len(expected_tensors(CONFIG))
    assert seconds(UpdateCheck(large)) < 5 * seconds(UpdateCheck(CONFIG))
