"""What the engines' command lines call the same thing."""

import json


def mtp_flags(engine: str, num_draft_tokens: int) -> list[str]:
    """Draft so many tokens a step with the model's own MTP; none for 0."""
    if not num_draft_tokens:
        return []
    if engine == "vllm":
        mtp = {"method": "qwen3_next_mtp", "num_speculative_tokens": num_draft_tokens}
        return ["--speculative-config", json.dumps(mtp, separators=(",", ":"))]
    steps, chain = str(num_draft_tokens), str(num_draft_tokens + 1)
    flags = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", steps]
    return [*flags, "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", chain]
