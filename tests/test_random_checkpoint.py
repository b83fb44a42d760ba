"""Random checkpoints: complete, loadable, deterministic, not trivial; and the command that writes them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_random import random_tensor, write_random_checkpoint
from qnext_plugin.cli import main
from qnext_plugin.config import FULL, LINEAR, QNextConfig

PROMPT = torch.tensor([[7, 250, 31, 31, 8, 99, 256, 3, 140, 77, 64, 211, 5]])
SMALL = {"num_hidden_layers": 4, "num_experts": 5, "vocab_size": 281}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "new"
    write_random_checkpoint(directory, dtype="float32")
    return directory


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(PROMPT).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("dialect", "overrides"),
    [
        ("published", {}),
        ("transformers5", {}),
        ("published", {"tie_word_embeddings": True, "attention_bias": True, "mlp_only_layers": [1]}),
        ("transformers5", {"layer_types": [FULL, LINEAR, LINEAR, FULL], "linear_num_value_heads": 6}),
        ("transformers5", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}),
    ],
)
def test_loads_in_transformers_with_no_key_missing_or_unexpected(
    dialect: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    write_random_checkpoint(tmp_path, dtype="float32", dialect=dialect, overrides=SMALL | overrides)
    config = QNextConfig.from_pretrained(tmp_path)
    check_coverage(config, read_headers(tmp_path), mtp="required")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    assert loaded.dtype == torch.float32 and loaded.config.layer_types == list(config.layer_types)
    assert loaded.config.rope_parameters["rope_theta"] == 10_000_000
    assert loaded.config.rope_parameters["rope_type"] == config.rope_parameters["rope_type"]
    logits = loaded(PROMPT).logits
    assert logits.isfinite().all()
    assert (logits.argmax(-1) == PROMPT).float().mean() < 0.2  # a token that follows itself says nothing of the layers


def test_each_dialect_has_its_own_keys_and_one_meaning(tmp_path: Path) -> None:
    for dialect in ("published", "transformers5"):
        write_random_checkpoint(tmp_path / dialect, dialect=dialect, overrides=SMALL)
    published, transformers5 = (
        json.loads((tmp_path / dialect / "config.json").read_text()) for dialect in ("published", "transformers5")
    )
    assert published.keys() - transformers5.keys() == {
        *("rope_theta", "rope_scaling", "full_attention_interval", "torch_dtype")
    }
    assert transformers5.keys() - published.keys() == {"layer_types", "rope_parameters", "dtype"}
    assert QNextConfig.from_dict(published) == QNextConfig.from_dict(transformers5)


def test_logits_spread_over_a_few_units(model: Any) -> None:
    with torch.no_grad():
        std = model(PROMPT).logits.std(-1)
    assert (std > 1.5).all() and (std < 6).all()


@pytest.mark.parametrize("part", ["recurrent state", "convolution", "attention", "experts"])
def test_every_part_moves_the_logprobs(model: Any, part: str) -> None:
    before, saved = logprobs(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if part == "recurrent state" and name.endswith(".A_log"):
                weight.fill_(20.0)  # decays to nothing at each step
            if part == "convolution" and name.endswith(".conv1d.weight"):
                weight[..., :-1] = 0
            if part == "attention" and name.endswith(".self_attn.o_proj.weight"):
                weight.zero_()
            if part == "experts" and name.endswith(".mlp.experts.down_proj"):
                weight.zero_()
    after = logprobs(model)
    model.load_state_dict(saved)
    assert (after - before).abs()[0, -1].max() > 1e-2


def test_decay_is_spread_and_router_scores_are_distinct(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    heads = 4
    prefixes = [n.removesuffix("A_log") for n in weights if n.endswith("A_log")]
    a = torch.randn(1000, heads, generator=torch.Generator().manual_seed(1))
    decay = torch.cat(
        [
            (-weights[p + "A_log"].exp() * torch.nn.functional.softplus(a + weights[p + "dt_bias"])).exp()
            for p in prefixes
        ]
    )
    assert ((decay > 0.5) & (decay < 0.999)).float().mean() > 0.8 and decay.std() > 0.05
    scores = (
        torch.randn(50, 96, generator=torch.Generator().manual_seed(2)) @ weights["model.layers.0.mlp.gate.weight"].T
    )
    assert scores.sort(-1).values.diff(dim=-1).mean() > 0.2
    assert (weights["model.layers.0.linear_attn.norm.weight"].mean() - 1).abs() < 0.1
    assert weights["model.norm.weight"].mean().abs() < 0.1 and weights["model.norm.weight"].std() > 0.05


def test_weights_follow_seed_and_name_only(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "a", seed=3, overrides=SMALL)
    write_random_checkpoint(tmp_path / "sharded", seed=3, overrides=SMALL, max_shard_size=300_000)
    write_random_checkpoint(tmp_path / "deeper", seed=3, overrides=SMALL | {"num_hidden_layers": 5})
    write_random_checkpoint(tmp_path / "other", seed=4, overrides=SMALL)
    a, deeper, other = (load_file(tmp_path / d / "model.safetensors") for d in ("a", "deeper", "other"))
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    sharded: dict[str, torch.Tensor] = {}
    for file in shards:
        sharded |= load_file(file)
    assert len(shards) > 3 and all(file.stat().st_size < 350_000 for file in shards)
    assert read_headers(tmp_path / "sharded").keys() == a.keys() == sharded.keys()
    for name, tensor in a.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, sharded[name]) and torch.equal(tensor, deeper[name]), name
        assert not torch.equal(tensor, other[name]), name
    experts = [a[f"model.layers.{i}.mlp.experts.{j}.up_proj.weight"] for i in range(4) for j in range(5)]
    assert len({tuple(expert[0].tolist()) for expert in experts}) == 20
    assert torch.equal(a["lm_head.weight"], random_tensor("lm_head.weight", (281, 96), 3).bfloat16())


@pytest.mark.parametrize(
    "text", ["plain", "naïve café ☕️ 漢字\n\t 한글 🧪", "<think>\na\n</think><tool_call>{}</tool_call>"]
)
def test_tokenizer_round_trip(tiny: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 320
    if "<" not in text:
        assert len(ids) == len(text.encode())
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [256, 257, 258]
    ended = [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text  # a tool parser needs the markup tokens
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template_renders_tools(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "2"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=True, tokenize=False)
    head, _, tail = text.partition("</tool_call><|im_end|>\n")
    assert head.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n") and json.dumps(tool) in head
    rendered = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    assert tail == (
        "<|im_start|>user\n1+1?<|im_end|>\n"
        f"<|im_start|>assistant\n{rendered}\n{rendered}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert plain == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"


def test_command_writes_what_was_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    options = "--layers 3 --experts 4 --dtype float16 --seed 9 --dialect transformers5 --max-shard-size 200KB"
    settings = ["--set", "tie_word_embeddings=true", "--set", "layer_types=" + json.dumps([FULL, LINEAR, FULL])]
    assert main(["checkpoint", "random", str(directory), *options.split(), *settings]) == 0
    config = QNextConfig.from_pretrained(directory)
    assert config.layer_types == (FULL, LINEAR, FULL) and config.num_experts == 4
    headers = read_headers(directory)
    check_coverage(config, headers, mtp="required")
    assert "lm_head.weight" not in headers and {info.dtype for info in headers.values()} == {"F16"}
    assert len({info.file for info in headers.values()}) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "7b"], "invalid choice: '7b'"),
        (["--set", "num_experts"], "'num_experts' is not KEY=JSON"),
        (["--set", "num_expert=4"], "no key num_expert, expected some of"),
        (["--set", "linear_num_key_heads=3"], "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3"),
        (["--experts", "1"], "num_experts_per_tok 2 exceeds num_experts 1"),
        (["--set", "vocab_size=null"], "missing vocab_size"),
        (["--set", "vocab_size=264"], "vocab_size is 264, expected at least the tokenizer's 265"),
        (["--max-shard-size", "5 parsecs"], "'5 parsecs' is not a size"),
        (["--max-shard-size", "0"], "max_shard_size is 0"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["checkpoint", "random", str(tmp_path / "new"), *arguments])
    except SystemExit as e:  # argparse
        status = e.code
    stderr = capsys.readouterr().err
    assert status == 2 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_only_an_empty_directory_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    for target in (tmp_path, tmp_path / "notes"):
        assert main(["checkpoint", "random", str(target)]) == 2
        assert "expected an empty or new directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ValueError, match=r"the weights need 0\.005 GB, 0\.001 GB are free"):
        write_random_checkpoint(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_help_does_not_import_torch() -> None:
    code = "import sys, qnext_plugin.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
