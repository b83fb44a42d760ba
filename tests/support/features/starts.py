"""Rows about how an engine is started."""

from tests.support.features.cells import ANSWERS, GPU, OTHER_LAYERS, Feature, expected, tested

PARALLELISM = (
    Feature(
        "tensor parallelism",
        tested(ANSWERS, "test_nodes.test_two_nodes_answer_as_transformers", starts="tp2 tp2-mtp2"),
        tested(ANSWERS, "test_nodes.test_two_nodes_answer_as_transformers", starts="tp2 tp2-mtp2"),
        "tensor-parallel-size nnodes node-rank master-addr master-port distributed-executor-backend "
        "disable-custom-all-reduce enable-batch-sharded-sampling",
        "tp-size nnodes node-rank dist-init-addr disable-custom-all-reduce enable-layernorm-sp "
        "enable-attn-tp-input-scattered enable-tp-lm-head-all-to-all",
    ),
    Feature(
        "pipeline parallelism",
        tested(ANSWERS, starts="pp2 pp2-mtp2"),
        tested(ANSWERS, starts="pp2 pp2-mtp2"),
        "pipeline-parallel-size",
        "pp-size pp-max-micro-batch-size pp-async-batch-depth",
    ),
    Feature(
        "expert parallelism",
        tested(ANSWERS, "test_vllm_executors.test_data_parallel", starts="ep2-mtp2 bfloat16-ep2-mtp2"),
        tested("test_sglang_quantized.test_a_quantized_checkpoint_is_served_by_two_processes"),
        "enable-expert-parallel all2all-backend enable-ep-weight-filter expert-placement-strategy",
        "ep-size moe-a2a-backend moe-dense-tp-size moe-dp-size deepep-mode deepep-config deepep-v2-mode fuseep-mode "
        "deepep-dispatcher-output-dtype flashinfer-a2a-dispatch-type enable-shared-experts-attn-tp "
        "shared-experts-tp-size enable-dense-mlp-attn-tp",
    ),
    Feature(
        "balance of experts among ranks, spare experts, elastic ranks",
        expected("EPLB refuses CPUs. On GPUs it is the engine's own and was not run"),
        tested(
            "test_sglang_gpu_branches.test_experts_are_found_where_the_load_balancer_has_put_them",
            why="which experts each rank loads and looks up; the balancer itself needs CUDA and was not run",
        ),
        "enable-eplb eplb-config enable-elastic-ep elastic-ep-max-dp-size",
        "enable-eplb eplb-algorithm eplb-rebalance-num-iterations eplb-rebalance-layers-per-chunk "
        "eplb-min-rebalancing-utilization-threshold ep-num-redundant-experts ep-dispatch-algorithm "
        "init-expert-location expert-distribution-recorder-mode expert-distribution-recorder-buffer-size "
        "expert-balancedness-report-mode elastic-ep-backend enable-elastic-expert-backup elastic-ep-join-mode "
        "elastic-ep-join-rank-offset elastic-ep-initial-size elastic-ep-scale-timeout max-ep-size enable-waterfill "
        "mooncake-ib-device",
    ),
    Feature(
        "data parallelism",
        tested("test_vllm_executors.test_data_parallel"),
        tested(
            "test_sglang_gpu_branches.test_shared_expert_is_whole_where_ranks_route_their_own_tokens",
            why="for ranks that route their own tokens; not run on GPUs",
        ),
        "data-parallel-size data-parallel-rank data-parallel-start-rank data-parallel-size-local "
        "data-parallel-address data-parallel-rpc-port data-parallel-backend data-parallel-hybrid-lb "
        "data-parallel-external-lb data-parallel-multi-port-external-lb dp-sync-interval "
        "disable-nccl-for-dp-synchronization",
        "dp-size attn-dp-size enable-dp-attention enable-dp-attention-local-control-broadcast enable-dp-lm-head "
        "disable-attn-tp-gather load-balance-method",
    ),
    Feature(
        "context parallelism and a cache shared out over ranks",
        expected("not run. vLLM divides only keys and values among ranks, and every rank computes all states"),
        expected("not run. SGLang's own, for other kinds of attention"),
        "decode-context-parallel-size prefill-context-parallel-size dcp-comm-backend dcp-q-replicate "
        "dcp-kv-cache-interleave-size cp-kv-cache-interleave-size enable-hc-sp",
        "dcp-size dcp-comm-backend dcp-replicate-q-proj attn-cp-size enable-prefill-cp cp-strategy "
        "enable-dsa-cache-layer-split enable-cp-decode-attn-tp enable-kv-cache-sharding "
        "dwdp-size",
    ),
    Feature(
        "two batches beside each other",
        expected("vLLM turns it off on a CPU, and does not support it for hybrid models"),
        expected("this model has no such schedule; not run"),
        "enable-dbo ubatch-size dbo-decode-token-threshold dbo-prefill-token-threshold",
        "enable-two-batch-overlap enable-single-batch-overlap tbo-token-distribution-threshold enable-pdmux "
        "pdmux-config-path sm-group-num",
    ),
    Feature(
        "disaggregated prefill",
        expected("not run. A connector has to transfer states along with keys and values; vLLM stops if it does not"),
        expected("not run. SGLang sends states as it does for its own model of this architecture"),
        "kv-transfer-config kv-events-config ec-transfer-config ec-manager-config disable-hybrid-kv-cache-manager",
        "disaggregation-mode disaggregation-decode-allocation-policy disaggregation-transfer-backend "
        "disaggregation-enable-kv-checksum disaggregation-bootstrap-port disaggregation-ib-device "
        "disaggregation-decode-enable-radix-cache disaggregation-decode-enable-offload-kvcache "
        "disaggregation-decode-retraction-backup num-reserved-decode-tokens disaggregation-decode-extra-slots "
        "disaggregation-decode-polling-interval disaggregation-decode-host-receive-threshold enable-pd-role-switch "
        "optimistic-prefill-attempts decoupled-spec-bind-endpoint decoupled-spec-connect-endpoints "
        "decoupled-spec-rank decoupled-spec-role",
    ),
    Feature(
        "another way to exchange tensors among GPUs",
        expected("only through `--additional-config` and the environment; not run"),
        GPU,
        "",
        "boundary-reduction enable-nccl-nvls enable-symm-mem enable-mscclpp enable-torch-symm-mem pre-warm-nccl "
        "enable-quant-communications enable-flashinfer-allreduce-fusion flashinfer-allreduce-fusion-backend "
        "enforce-disable-flashinfer-allreduce-fusion enable-aiter-allreduce-fusion enable-p2p-check "
        "disable-aiter-allreduce-fusion-in-prefill disable-aiter-allreduce-fusion-in-decode",
    ),
)

_STREAMED = (
    "`runai_streamer` by hand, with runai-model-streamer 0.17.1 and `qnext verify`, drafts included; "
    "`fastsafetensors` and `instanttensor` ask for CUDA"
)
LOADING = (
    Feature(
        "load formats",
        tested("test_files.test_every_load_format_is_known_to_read_safetensors_or_other_files", why=_STREAMED),
        tested("test_files.test_every_load_format_is_known_to_read_safetensors_or_other_files", why=_STREAMED),
        "load-format download-dir safetensors-load-strategy safetensors-prefetch-num-threads "
        "safetensors-prefetch-block-size model-loader-extra-config ignore-patterns pt-load-map-location",
        "load-format model-loader-extra-config download-dir weight-loader-disable-mmap "
        "weight-loader-prefetch-checkpoints weight-loader-prefetch-num-threads weight-loader-drop-cache-after-load "
        "remote-instance-weight-loader-seed-instance-ip remote-instance-weight-loader-seed-instance-service-port "
        "remote-instance-weight-loader-send-weights-group-ports remote-instance-weight-loader-backend "
        "remote-instance-weight-loader-start-seed-via-transfer-engine modelexpress-config weight-cache-mode "
        "weight-cache-socket weight-cache-timeout",
    ),
    Feature(
        "quantized checkpoints",
        tested("test_vllm_quantized.test_a_quantized_checkpoint_is_served_as_transformers_computes_it"),
        tested("test_sglang_quantized.test_a_quantized_checkpoint_is_served_as_transformers_computes_it"),
        "quantization quantization-config allow-deprecated-quantization",
        "quantization modelopt-quant modelopt-checkpoint-restore-path modelopt-checkpoint-save-path "
        "modelopt-export-path quantize-and-serve rl-quant-profile",
    ),
    Feature(
        "weights in the host's memory, experts among them",
        expected(
            "the engine's own, for GPUs; not run. The input projections are then two products instead of one. Experts "
            "are a layer of vLLM's, which other plugins that offload experts replace; none was tried beside this one"
        ),
        expected(
            "the engine's own, for GPUs; not run. Experts are a layer of SGLang's, which other plugins that offload "
            "experts replace; none was tried beside this one"
        ),
        "offload-backend cpu-offload-gb cpu-offload-params offload-group-size offload-num-in-group "
        "offload-prefetch-step offload-params",
        "cpu-offload-gb offload-group-size offload-num-in-group offload-prefetch-step offload-mode "
        "enable-paged-experts paged-experts-num-resident kt-weight-path kt-method kt-cpuinfer kt-threadpool-count "
        "kt-num-gpu-experts kt-max-deferred-experts-per-token",
    ),
)

SCHEDULING = (
    Feature(
        "prompts in pieces",
        tested(ANSWERS, starts="chunked starved"),
        tested(ANSWERS, starts="chunked starved"),
        "max-num-batched-tokens max-num-scheduled-tokens enable-chunked-prefill long-prefill-token-threshold "
        "long-prefill-token-threshold-adaptive prefill-schedule-interval",
        "chunked-prefill-size max-prefill-tokens enable-mixed-chunk enable-dynamic-chunking prefill-max-requests "
        "prefill-decode-interval prefill-decode-interval-min-bs enable-prefill-delayer "
        "prefill-delayer-max-delay-passes prefill-delayer-token-usage-low-watermark "
        "prefill-delayer-forward-passes-buckets prefill-delayer-wait-seconds-buckets prefill-delayer-queue-min-ratio "
        "prefill-delayer-max-delay-ms min-free-slots-delay",
    ),
    Feature(
        "scheduling ahead of the results",
        tested(
            ANSWERS,
            starts="second-runner second-runner-mtp2 second-runner-gpu",
            why="vLLM's second model runner, in Triton's interpreter; vLLM turns it off on a CPU",
        ),
        tested(ANSWERS, starts="prefix ngram eagle3 mtp3-tree"),
        "async-scheduling",
        "disable-overlap-schedule num-continuous-decode-steps scheduler-recv-interval",
    ),
    Feature(
        "requests that wait, are preempted or dropped",
        tested(ANSWERS, starts="starved mtp2-starved"),
        tested(ANSWERS, starts="starved mtp2-starved"),
        "max-num-seqs max-num-active-seqs max-num-queued-reqs max-num-queued-tokens scheduling-policy "
        "scheduler-reserve-full-isl watermark scheduler-cls",
        "max-running-requests max-queued-requests schedule-policy enable-priority-scheduling "
        "disable-priority-preemption default-priority-value abort-on-priority-when-disabled "
        "schedule-low-priority-values-first priority-scheduling-preemption-threshold retraction-policy "
        "schedule-conservativeness",
    ),
    Feature(
        "compiled and captured graphs",
        tested(ANSWERS, "test_vllm_dry_run.test_a_start_launches_what_is_recorded", starts="bfloat16-compiled"),
        tested("test_sglang_dry_run.test_a_start_launches_what_is_recorded", why="the GPU path, on a simulated GPU"),
        "enforce-eager compilation-config cudagraph-capture-sizes max-cudagraph-capture-size optimization-level "
        "performance-mode",
        "disable-cuda-graph cuda-graph-config enable-torch-compile enable-torch-compile-debug-mode "
        "torch-compile-max-bs cuda-graph-backend-decode cuda-graph-backend-prefill cuda-graph-max-bs-decode "
        "cuda-graph-max-bs-prefill cuda-graph-max-seq-len-prefill cuda-graph-bs-decode cuda-graph-bs-prefill "
        "cuda-graph-prefill-max-context disable-prefill-cuda-graph disable-decode-cuda-graph "
        "disable-cuda-graph-padding enable-profile-cuda-graph enable-cudagraph-gc debug-cuda-graph",
    ),
    Feature(
        "another kernel by flag: attention, DeltaNet, experts, linear layers",
        tested(
            "test_vllm_gpu_check.test_gpu_kernels_agree_with_the_oracle_in_the_interpreter", why="the default kernels"
        ),
        tested(
            "test_sglang_gpu_branches.test_doctor_names_the_kernels_that_sglang_takes_on_a_gpu",
            why="only which kernels are chosen",
        ),
        "attention-backend attention-config gdn-prefill-backend moe-backend linear-backend kernel-config "
        "ir-op-priority enable-flashinfer-autotune disable-cascade-attn",
        "attention-backend decode-attention-backend prefill-attention-backend linear-attn-backend "
        "linear-attn-decode-backend linear-attn-prefill-backend linear-attn-verify-backend moe-runner-backend "
        "speculative-attention-mode speculative-draft-attention-backend speculative-moe-runner-backend "
        "speculative-moe-a2a-backend speculative-draft-kv-cache-dtype fp8-gemm-backend "
        "fp4-gemm-backend bf16-gemm-backend disable-flashinfer-autotune flashinfer-autotune-skip-ops "
        "triton-attention-reduce-in-fp32 triton-attention-num-kv-splits triton-attention-split-tile-size "
        "enable-lean-attention enable-fused-qk-norm-rope prefill-kv-cache-dequant-dtype disable-shared-experts-fusion "
        "enforce-shared-experts-fusion enable-fused-moe-sum-all-reduce flashinfer-mxfp4-moe-precision "
        "disable-flashinfer-cutlass-moe-fp4-allgather enable-fp32-lm-head enable-tf32-matmul",
    ),
)

OTHERS = Feature(
    "attention, caches and layers that other models have",
    OTHER_LAYERS,
    OTHER_LAYERS,
    "kv-sharing-fast-prefill swa-bounded-replay disable-sliding-window disable-chunked-mm-input diffusion-config "
    "engram-config kda-prefill-backend kda-decode-backend sparse-indexer-topk-backend",
    "enable-decoder-swa-bounded-replay enable-encoder-swa-bounded-replay swa-full-tokens-ratio swa-prefix-tails "
    "c128-page-size disable-hybrid-swa-memory disable-chunked-prefix-cache enable-hisparse hisparse-config "
    "enable-linker-mla-dedup dsa-prefill-backend dsa-decode-backend dsa-paged-mqa-logits-backend dsa-topk-backend "
    "dsa-triton-union dsv4-attn-backend dsv4-prefill-backend enable-deepseek-v4-fp4-indexer enable-dsa-fused-indexer "
    "enable-amd-monokernel monokernel-backend enable-nvidia-megakernel enable-precise-embedding-interpolation "
    "flashinfer-mla-disable-ragged enable-scattered-sconv enable-w4a4-mxfp4-megamoe enable-megamoe-for-layernorm-sp "
    "speculative-enable-w4a4-mxfp4-megamoe speculative-dsa-topk-backend qsa-indexer-dtype dllm-algorithm "
    "dllm-algorithm-config dllm-fdfo ple-offload-embedding ple-offload-backend ple-offload-dir encoder-only "
    "language-only language-model-only encoder-transfer-backend encoder-urls encoder-bootstrap-port "
    "encoder-register-urls enable-adaptive-dispatch-to-encoder",
)
