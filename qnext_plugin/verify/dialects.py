"""How servers of vLLM and of SGLang are asked for log-probabilities, and what they say about their start."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from qnext_plugin.engines.client import Client, Refused, ServerFailed
from qnext_plugin.verify.scenarios import Prompt
from qnext_plugin.verify.server import Entries, Facts, Server

_LEAST = -9999.0  # what vLLM sends for a log-probability of minus infinity
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class VllmServer(Server):
    """A server of vLLM. More is known of one that was started with ``VLLM_SERVER_DEV_MODE=1``."""

    engine = "vllm"
    path = "/v1/completions"

    @classmethod
    def facts_of(cls, client: Client, version: str) -> Facts:
        card = client.json("/v1/models")["data"][0]
        metrics = _metrics(client)
        cache = next((labels for name, labels, _ in metrics if name == "vllm:cache_config_info"), {})
        config = (client.ask("/server_info?config_format=json") or {}).get("vllm_config", {})
        blocks, block_size = cache.get("num_gpu_blocks", ""), cache.get("block_size", "")
        return Facts(
            version=version,
            model=card["id"],
            max_model_len=card["max_model_len"],
            dtype=_dtype(config.get("model_config", {}).get("dtype")),
            architectures=None,
            drafts=any(name == "vllm:spec_decode_num_drafts_total" for name, _, _ in metrics) if cache else None,
            prefix_caching=cache["enable_prefix_caching"] == "True" if cache else None,
            block_size=int(block_size) if block_size.isdecimal() else None,
            cache_tokens=int(blocks) * int(block_size) if blocks.isdecimal() and block_size.isdecimal() else None,
            step_tokens=config.get("scheduler_config", {}).get("max_num_batched_tokens"),
            ours=_ours(client),
        )

    def request(self, prompt: Prompt, max_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self.facts.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": self.salt,
            **sampling,
        }

    def logprobs(self, k: int, of_prompt: bool) -> dict[str, Any]:
        return {"logprobs": k} | ({"prompt_logprobs": k} if of_prompt else {})

    def parse(self, answer: dict[str, Any]) -> tuple[list[int], list[Entries], list[Entries], int | None]:
        (choice,) = answer["choices"]
        rows = [
            {int(name.removeprefix("token_id:")): logprob for name, logprob in row.items()}
            for row in choice["logprobs"]["top_logprobs"]
        ]
        prompt_rows = [
            {int(token): max(entry["logprob"], _LEAST) for token, entry in row.items()}
            for row in list(choice.get("prompt_logprobs") or ())[1:]
        ]
        details = answer["usage"].get("prompt_tokens_details") or {}
        return choice["token_ids"], prompt_rows, rows, details.get("cached_tokens")

    def counts(self) -> dict[str, Any]:
        metrics = _metrics(self.client)
        by_position: dict[int, int] = {}
        for name, labels, value in metrics:
            if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                position = int(labels["position"])
                by_position[position] = by_position.get(position, 0) + int(value)
        return {
            "num_preemptions": _total(metrics, "vllm:num_preemptions_total"),
            "num_drafts": _total(metrics, "vllm:spec_decode_num_drafts_total") or 0,
            "num_accepted": [by_position[position] for position in sorted(by_position)],
        }


class SglangServer(Server):
    """A server of SGLang. It counts preemptions only if it was started with ``--enable-metrics``."""

    engine = "sglang"
    path = "/generate"
    num_drafts = 0

    @classmethod
    def facts_of(cls, client: Client, info: dict[str, Any]) -> Facts:
        card = client.json("/v1/models")["data"][0]
        architectures = (client.ask("/model_info") or {}).get("architectures")
        drafts, chunk = info.get("speculative_algorithm"), info.get("chunked_prefill_size")
        # Room for a step's drafts is taken off what a request may ask for.
        room = (info.get("speculative_num_draft_tokens") or 0) if drafts else 0
        return Facts(
            version=info["version"],
            model=card["id"],
            max_model_len=card["max_model_len"] - room,
            dtype=_dtype(info.get("dtype")),
            architectures=tuple(architectures) if architectures else None,
            drafts=bool(drafts),
            prefix_caching=not info.get("disable_radix_cache"),
            block_size=max(64, info.get("page_size") or 1),  # of a prompt's states, every 64th token's can be kept
            cache_tokens=info.get("max_total_num_tokens"),
            step_tokens=chunk if chunk and chunk > 0 else card["max_model_len"],
            ours=None,
        )

    def request(self, prompt: Prompt, max_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        params = {"max_new_tokens": max_tokens, "ignore_eos": True, **sampling}
        return {"input_ids": prompt, "sampling_params": params, "extra_key": self.salt}

    def logprobs(self, k: int, of_prompt: bool) -> dict[str, Any]:
        return {"return_logprob": True, "top_logprobs_num": k, "logprob_start_len": 0 if of_prompt else -1}

    def parse(self, answer: dict[str, Any]) -> tuple[list[int], list[Entries], list[Entries], int | None]:
        meta = answer["meta_info"]
        self.num_drafts += meta.get("spec_verify_ct", 0)
        rows, prompt_rows = (
            [{token: logprob for logprob, token, _ in row} for row in found]
            for found in (meta["output_top_logprobs"], list(meta.get("input_top_logprobs") or ())[1:])
        )
        return [row[1] for row in meta["output_token_logprobs"]], prompt_rows, rows, meta.get("cached_tokens")

    def counts(self) -> dict[str, Any]:
        preemptions = _total(_metrics(self.client), "sglang:num_retracted_requests_total")
        return {"num_preemptions": preemptions, "num_drafts": self.num_drafts, "num_accepted": []}


def connect(url: str, vocab_size: int) -> Server:
    """Return the server at ``url``, which must have a vocabulary of that size.

    Raises ``ServerFailed`` if nothing answers there, and ``ValueError`` if something does that cannot be judged.
    """
    client = Client.at(url)
    info = client.ask("/server_info") or {}
    found = (client.ask("/version") or {}).get("version")
    try:
        if "internal_states" in info:
            return SglangServer(client, SglangServer.facts_of(client, info), vocab_size)
        if isinstance(found, str):
            return VllmServer(client, VllmServer.facts_of(client, found), vocab_size)
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(f"{client.url}: its description of itself lacks something ({type(e).__name__}: {e})") from None
    raise ValueError(f"{client.url}: neither vLLM nor SGLang answers there; expected the root of their server")


def _ours(client: Client) -> bool | None:
    """Return whether our classes serve on vLLM, which lists the names of classes in its development mode only."""
    try:
        found = client.json("/collective_rpc", {"method": "get_model_inspection"})["results"]
    except ServerFailed:
        return None
    return all(re.search(r"\bGatedDeltaNet\b", listed) for listed in found)


def _dtype(name: Any) -> str | None:
    """Return a dtype's name without ``torch.``; None for ``auto`` and what else is none."""
    plain = str(name).removeprefix("torch.")
    return plain if isinstance(getattr(torch, plain, None), torch.dtype) else None


def _metrics(client: Client) -> list[tuple[str, dict[str, str], float]]:
    """Return the samples of the server's metrics as name, labels and value; none from a server without metrics."""
    try:
        text = client.text("/metrics")
    except Refused:
        return []
    return [(name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _SAMPLE.findall(text)]


def _total(metrics: Sequence[tuple[str, dict[str, str], float]], name: str) -> int | None:
    """Return the sum of a counter over its labels; None if there is none of that name."""
    values = [value for found, _, value in metrics if found == name]
    return int(sum(values)) if values else None
