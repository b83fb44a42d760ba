"""Rows about caches and states, and about drafts."""

from tests.support.features.cells import ANSWERS, NONE, Feature, expected, refused, tested

CACHES = (
    Feature(
        "prefix caching, whole blocks",
        tested(ANSWERS, starts="prefix starved mtp2"),
        tested(ANSWERS, starts="prefix prefix-no-buffer starved"),
        "enable-prefix-caching block-size prefix-caching-hash-algo",
        "disable-radix-cache mamba-radix-cache-strategy page-size mamba-track-interval",
    ),
    Feature(
        "prefix hits below a block",
        tested(ANSWERS, starts="prefix-unit mtp2-prefix-unit"),
        tested(ANSWERS, starts="standalone", why="pages of 16 tokens, states every 128"),
        "prefix-match-unit prefix-cache-retention-interval enable-mamba-shared-prefix-checkpoint",
    ),
    Feature(
        "mode of state caching other than the default",
        expected("for this layer vLLM accepts only `none` and `align`, and `none` only without prefix caching"),
        NONE,
        "mamba-cache-mode mamba-block-size",
    ),
    Feature(
        "size of the caches",
        tested("test_plan.test_vllm_blocks"),
        tested("test_plan.test_sglang_weights_and_pools"),
        "max-model-len gpu-memory-utilization kv-cache-memory-bytes num-gpu-blocks-override",
        "context-length mem-fraction-static max-total-tokens max-mamba-cache-size mamba-full-memory-ratio",
    ),
    Feature(
        "keys and values in FP8",
        tested(
            "test_vllm_loading.test_keys_and_values_are_plain_where_the_cpu_has_no_fp8_cache",
            "test_cache_scales.test_scales_are_known_under_every_name_and_reach_the_attention_layers",
            why="the flag is refused on CPUs without AVX-512",
        ),
        tested(
            "test_sglang_cpu_attention.test_an_fp8_cache_loses_what_fp8_rounds",
            "test_sglang_cpu_attention.test_scales_keep_what_fp8_alone_cannot_hold",
        ),
        "kv-cache-dtype kv-cache-dtype-skip-layers",
        "kv-cache-dtype quantization-param-path",
    ),
    Feature(
        "states in bfloat16 or float16",
        tested(
            "test_logprobs.test_half_precision_is_as_close_as_transformers",
            "test_ops_gated_delta_rule.test_a_bfloat16_state_is_rounded_only_when_stored",
            starts="bfloat16 bfloat16-mtp2 odd-d",
        ),
        tested(
            "test_ops_gated_delta_rule.test_a_bfloat16_state_is_rounded_only_when_stored", why="for single operators"
        ),
        "mamba-cache-dtype mamba-ssm-cache-dtype",
        "mamba-ssm-dtype",
    ),
    Feature(
        "stochastic rounding of states",
        expected("no effect: its kernels are for Mamba layers, and this model has none"),
        refused(
            "Stochastic rounding for the Mamba SSM cache is only",
            "sglang/srt/arg_groups/mamba_hook.py",
            "on a CPU; GPU not run",
        ),
        "enable-mamba-cache-stochastic-rounding mamba-cache-philox-rounds mamba-backend mamba-ssu-algorithm",
        "enable-mamba-cache-stochastic-rounding mamba-cache-philox-rounds mamba-backend",
    ),
    Feature(
        "ReplaySSM",
        refused("--use-replayssm is not supported for architecture", "vllm/config/vllm.py"),
        expected("a kernel of SGLang's, for GPUs; not run"),
        "use-replayssm replayssm-buffer-len",
        "enable-linear-replayssm linear-replayssm-cache-len enable-linear-replayssm-spec",
    ),
    Feature(
        "kept states rounded to 8 bits",
        NONE,
        expected("tried by hand on a CPU: with hits 1e-3 off in the mean, 0.5 at the worst"),
        "",
        "enable-int8-mamba-checkpoint int8-mamba-ckpt-size mamba-max-states-per-path",
    ),
    Feature(
        "caches beyond the device's memory: offload and hierarchical cache",
        expected(
            "not run; according to vLLM, a hybrid model does not start with a connector that cannot take caches of "
            "several kinds"
        ),
        refused("--enable-hierarchical-cache found, expected none on a CPU", "sglang_ext/cpu/platform.py"),
        "kv-offloading-size kv-offloading-backend",
        "enable-hierarchical-cache hicache-ratio hicache-size hicache-host-memory-mode hicache-host-memory-fraction "
        "hicache-write-policy hicache-io-backend hicache-mem-layout hicache-storage-backend "
        "hicache-storage-prefetch-policy hicache-storage-backend-extra-config "
        "hicache-storage-prefetch-retry-poll-interval hicache-storage-prefetch-retry-max-attempts",
    ),
    Feature(
        "which prefixes are kept, and caches of other projects",
        expected("not run. It is a connector of `--kv-transfer-config`; see disaggregated prefill"),
        expected("not run. SGLang makes the choice, and a state belongs to the node of its prefix"),
        "",
        "radix-eviction-policy radix-eviction-policy-config radix-cache-backend enable-session-radix-cache "
        "enable-unified-memory enable-page-major-kv-layout prefill-only-disable-kv-cache enable-lmcache "
        "lmcache-config-file enable-flexkv flexkv-config-file enable-unified-cache-external-linker "
        "unified-cache-external-linker-backend unified-cache-external-linker-config",
    ),
)

DRAFTS = (
    Feature(
        "the checkpoint's own MTP",
        tested(ANSWERS, starts="mtp2 mtp3 mtp2-starved tp2-mtp2 pp2-mtp2 bfloat16-mtp2"),
        tested(ANSWERS, starts="mtp3 mtp2-starved mtp3-tree mtp1-no-buffer tp2-mtp2 pp2-mtp2"),
        "speculative-config spec-method spec-tokens",
        "speculative-algorithm speculative-num-steps speculative-eagle-topk speculative-num-draft-tokens",
    ),
    Feature(
        "n-grams",
        tested(ANSWERS, starts="ngram3 ngram3-starved"),
        tested(
            ANSWERS,
            "test_sglang_config.test_ngrams_drafts_differ_where_a_tree_is_filled_up",
            starts="ngram",
            why="a breadth of 1 is refused",
        ),
        "",
        "speculative-ngram-min-bfs-breadth speculative-ngram-max-bfs-breadth speculative-ngram-match-type "
        "speculative-ngram-max-trie-depth speculative-ngram-capacity speculative-ngram-external-corpus-path "
        "speculative-ngram-external-sam-budget speculative-ngram-external-corpus-max-tokens",
    ),
    Feature(
        "suffixes",
        expected(
            "takes the same path through the model as n-grams; tried by hand, because its package is published as "
            "source only, with a build that installs torch 2.7 with CUDA (docs/mtp.md shows one without)"
        ),
        NONE,
    ),
    Feature(
        "a draft model",
        refused(
            "only with these are the states of Gated DeltaNet layers tested",
            "vllm_ext/config.py",
            "vLLM writes its keys and values to the blocks of states",
        ),
        tested(ANSWERS, starts="standalone"),
        "spec-model",
        "speculative-draft-model-path speculative-draft-model-revision speculative-draft-load-format "
        "speculative-draft-model-quantization speculative-token-map",
    ),
    Feature(
        "an EAGLE3 head",
        tested(ANSWERS, starts="eagle3-head"),
        tested(ANSWERS, starts="eagle3"),
    ),
    Feature(
        "DFlash, DSpark, UNO, several MTP layers",
        tested(ANSWERS, starts="dflash-head", why="DFlash; the others are refused"),
        refused(
            "only with these are the states of Gated DeltaNet layers tested",
            "sglang_ext/config.py",
            "with DFLASH on a CPU SGLang would answer sampled requests greedily; GPU not run",
        ),
        "",
        "uno-lora-path enable-multi-layer-eagle speculative-dflash-block-size speculative-domino-candidate-pool-size "
        "speculative-dspark-block-size speculative-dspark-sps-table-path speculative-dspark-confidence-sts-path "
        "speculative-dspark-align-verify-tokens-to-graph-tier speculative-draft-window-size "
        "speculative-draft-sink-size",
    ),
    Feature(
        "numbers of drafts that follow the batch or the acceptance",
        tested(ANSWERS, starts="mtp3-by-batch", why="the batch, with MTP"),
        tested(ANSWERS, starts="mtp3-adaptive", why="with NEXTN"),
        "",
        "speculative-adaptive speculative-adaptive-config",
    ),
    Feature(
        "another way to verify or to sample drafts",
        refused(
            "nothing else is tested with this", "vllm_ext/config.py", "drafts drawn at random ignore a request's seed"
        ),
        refused("--speculative-use-rejection-sampling found", "sglang_ext/config.py", "on a CPU; GPU not run"),
        "",
        "speculative-use-rejection-sampling speculative-use-block-verification",
    ),
)
