"""The trained demo checkpoint as a stand-in for Qwen3-Coder-Next, with tool calls in that model's dialect."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qnext_plugin.checkpoint.make_demo import write_demo_checkpoint


def write_coder_checkpoint(target: Path) -> None:
    """Write the demo checkpoint with another chat template and with a head that avoids white space.

    The engines' grammars of these calls allow white space without end around a value, and the demo would write it. To
    give the head a bias, one of the hidden dimensions becomes a constant that no layer reads or changes.
    """
    write_demo_checkpoint(target)
    tokenizer, weights = AutoTokenizer.from_pretrained(target), load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "mtp.fc.weight")):
            weight[0] = 0
        elif name.endswith(("layernorm.weight", "pre_fc_norm_hidden.weight")):
            weight[0] = -1  # of these norms, 1 is added to the weight
    head = weights["lm_head.weight"]
    weights["model.embed_tokens.weight"][:, 0], weights["model.norm.weight"][0], head[:, 0] = 1, 0, 0
    head[[i for i in range(len(tokenizer)) if tokenizer.decode([i])[:1].isspace()], 0] = -400
    head[tokenizer.encode("\n", add_special_tokens=False), 0] = -200  # where only white space is left
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    shutil.copyfile(Path(__file__).with_name("coder_template.jinja"), target / "chat_template.jinja")
