"""Rows about what a request may ask for."""

from tests.support.features.cells import ANSWERS, GPU, Feature, expected, refused, tested

ASKED = "test_sampling.test_greedy_answers_are_those_without_drafts_whatever_is_asked_for"
FORMS = "test_sampling.test_answers_with_drafts_are_of_their_form_by_every_backend"
SEVERAL = "test_load.test_several_answers_to_a_prompt_are_each_right"

SAMPLING = (
    Feature(
        "temperature, top-k, top-p, seeds, with drafts",
        tested("test_sampling.test_distribution_is_the_one_without_mtp", ANSWERS, starts="prefix mtp2"),
        tested("test_sampling.test_distribution_is_the_one_without_mtp", ANSWERS, starts="prefix mtp3"),
        "seed",
        "sampling-backend",
    ),
    Feature(
        "defaults of sampling, logits processors, watermarks",
        expected("the engine applies it to the model's logits; not run with drafts"),
        expected("the engine applies it to the model's logits; not run with drafts"),
        "generation-config override-generation-config use-fp64-gumbel logits-processors watermark-config",
        "enable-custom-logit-processor sampling-mask-max-tokens enable-watermark watermark-config sampling-defaults "
        "preferred-sampling-params speculative-accept-threshold-single speculative-accept-threshold-acc",
    ),
    Feature(
        "min-p and logit bias, with drafts",
        refused("The min_p and logit_bias sampling parameters", "vllm/sampling_params.py"),
        tested(ASKED, why="logit bias; SGLang does not apply `min_p` to verified tokens"),
    ),
    Feature(
        "penalties, stops, bad words, minimum of tokens, allowed tokens, with drafts",
        tested(ASKED, "test_hostile_requests.test_answer_is_clean_and_others_are_served"),
        tested(
            ASKED,
            "test_hostile_requests.test_answer_is_clean_and_others_are_served",
            why="stops; of the tokens of a step, SGLang counts one for penalties and for a minimum of tokens; bad "
            "words and allowed tokens are ignored, because SGLang has neither",
        ),
    ),
    Feature(
        "several answers to a prompt (`n`)",
        tested(SEVERAL),
        tested(SEVERAL),
    ),
    Feature(
        "log-probabilities of answer and prompt, with drafts",
        tested(ANSWERS, starts="eager mtp3"),
        tested(
            "test_sglang_server.test_logprobs_are_of_the_tokens_returned",
            ANSWERS,
            starts="eager mtp3",
            why="for answers with drafts, for prompts without",
        ),
        "max-logprobs logprobs-mode return-sampling-mask",
    ),
    Feature(
        "structured output, with drafts",
        tested(
            FORMS,
            "test_coder_tools.test_strict_arguments_are_of_the_schema_and_the_stream_adds_up",
            why="xgrammar, guidance and outlines; with lm-format-enforcer vLLM 0.32 answers the requests of any model "
            "with an error, because that package imports a module that vLLM no longer has",
        ),
        tested(
            FORMS,
            "test_sglang_speculation.test_grammar_holds_over_accepted_drafts",
            why="xgrammar and llguidance; outlines is refused with drafts",
        ),
        "structured-outputs-config reasoning-parser reasoning-parser-plugin reasoning-config",
        "grammar-backend disable-outlines-disk-cache",
    ),
    Feature(
        "the same bits in every batch, on CPUs",
        tested("test_ops_batch_invariance.test_products", "test_ops_batch_invariance.test_experts", why="see above"),
        tested(
            "test_ops_batch_invariance.test_products",
            "test_sglang_cpu_attention.test_a_sequence_gets_the_same_bits_in_every_batch",
            why="see above",
        ),
    ),
    Feature(
        "the engine's batch-invariant mode",
        refused(
            "VLLM batch_invariant mode is not supported for", "vllm/v1/attention/selector.py", "VLLM_BATCH_INVARIANT"
        ),
        expected("for GPUs, not run; a CPU needs no such mode"),
        "",
        "enable-deterministic-inference rl-on-policy-target",
    ),
)

BEYOND_TEXT = (
    Feature(
        "embeddings and classification",
        tested(
            "test_features.test_an_embedding_is_the_last_hidden_state_of_length_one",
            "test_features.test_a_classifier_says_what_its_own_head_makes_of_the_last_token",
        ),
        tested(
            "test_features.test_an_embedding_is_the_last_hidden_state_of_length_one",
            why="SGLang cannot convert a model to a classifier",
        ),
        "runner convert pooler-config",
        "is-embedding enable-mis",
    ),
    Feature(
        "prompts that are embeddings",
        tested("test_features.test_a_prompt_may_be_embeddings"),
        tested("test_features.test_a_prompt_may_be_embeddings"),
        "enable-prompt-embeds",
    ),
    Feature(
        "experts of each token returned",
        refused("requires Model Runner V2", "vllm/config/vllm.py", "what it asks of the model is tested"),
        tested("test_features.test_routed_experts_are_those_of_each_token"),
        "enable-return-routed-experts aux-output-config",
        "enable-return-routed-experts enable-return-indexer-topk",
    ),
    Feature(
        "hidden states",
        tested("test_features.test_hidden_states_for_an_eagle3_draft_are_the_inputs_of_the_layers"),
        tested(
            "test_features.test_hidden_states_are_those_of_prompt_and_answer",
            "test_features.test_hidden_states_for_an_eagle3_draft_are_the_inputs_of_the_layers",
        ),
        "",
        "enable-return-hidden-states return-hidden-states-mode enable-return-aux-hidden-states "
        "return-aux-hidden-state-layer-ids",
    ),
    Feature(
        "sleep, memory released and taken up",
        refused("Sleep mode is not supported", "vllm/config/model.py", "on a CPU; GPU not run"),
        expected("not on a CPU, where SGLang stops because it asks CUDA to synchronize; not run on GPUs"),
        "enable-sleep-mode sleep-mode-offload-cudagraph sleep-preserve-parameter-names enable-cumem-allocator "
        "enable-nccl-comm-suspend",
        "enable-memory-saver enable-weights-cpu-backup enable-draft-weights-cpu-backup",
    ),
    Feature(
        "new weights for a model that serves",
        tested("test_reload.test_model_is_the_one_loaded_last", "test_reload.test_draft_is_the_one_loaded_last"),
        tested("test_reload.test_model_is_the_one_loaded_last", "test_reload.test_draft_is_the_one_loaded_last"),
        "weight-transfer-config",
        "checkpoint-engine-wait-weights-before-ready startup-weight-load-mode custom-weight-loader",
    ),
    Feature(
        "LoRA",
        tested("test_lora.test_each_request_of_a_batch_is_answered_with_its_adapter"),
        tested("test_lora.test_each_request_of_a_batch_is_answered_with_its_adapter"),
        "enable-lora max-loras max-lora-rank lora-dtype max-cpu-loras lora-target-modules specialize-active-lora",
        "enable-lora max-lora-rank lora-target-modules lora-paths max-loaded-loras max-loras-per-batch "
        "lora-eviction-policy lora-strict-loading lora-drain-wait-threshold",
    ),
    Feature(
        "LoRA of experts, fully sharded, other kernels",
        refused("routed experts, with --fully-sharded-loras the input projections", "vllm_ext/lora.py"),
        GPU,
        "fully-sharded-loras enable-mixed-moe-lora-format enable-moe-shared-loras max-lora-cls-labels "
        "enable-tower-connector-lora default-mm-loras",
        "enable-lora-overlap-loading lora-backend max-lora-chunk-size experts-shared-outer-loras "
        "lora-use-virtual-experts",
    ),
)
