"""Answer a batch of prompts without a server.

python examples/offline.py vllm MODEL
python examples/offline.py sglang MODEL
"""

import sys

PROMPTS = ["The state of a linear attention layer is", "A mixture of experts is", "Speculative decoding is"]
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # Instruct's; docs/models.md has those of the other models


def with_vllm(model: str) -> list[str]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=2048)
    outputs = llm.generate(PROMPTS, SamplingParams(**SAMPLING, max_tokens=64))
    return [output.outputs[0].text for output in outputs]


def with_sglang(model: str) -> list[str]:
    import sglang

    with sglang.Engine(model_path=model, context_length=2048, log_level="info") as engine:  # says which class serves
        outputs = engine.generate(PROMPTS, SAMPLING | {"max_new_tokens": 64})
    return [output["text"] for output in outputs]


def main(engine: str, model: str) -> None:
    answers = {"vllm": with_vllm, "sglang": with_sglang}[engine](model)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt!r} -> {answer!r}")


if __name__ == "__main__":  # both engines start processes that import this file
    main(*sys.argv[1:])
