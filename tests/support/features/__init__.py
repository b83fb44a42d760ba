"""What engines can do besides plain answers, and whether that works with this model: the table of docs/features.md.

``scripts/feature_table.py`` writes the page. Tests compare it, and look for a row of every flag of both engines that
touches caches, states, drafts, experts or sampling.
"""

from tests.support.features.requests import BEYOND_TEXT, SAMPLING
from tests.support.features.starts import LOADING, OTHERS, PARALLELISM, SCHEDULING
from tests.support.features.states import CACHES, DRAFTS

SECTIONS = {
    "Caches": CACHES,
    "Drafts": DRAFTS,
    "Sampling": SAMPLING,
    "Beyond text": BEYOND_TEXT,
    "Parallelism": PARALLELISM,
    "Loading": LOADING,
    "Scheduling and kernels": SCHEDULING,
    "Other models": (OTHERS,),
}
FEATURES = [row for rows in SECTIONS.values() for row in rows]

NO_GROUPS = {
    "vllm": ("positional arguments", "options", "Frontend", "MultiModalConfig", "LoggingConfig", "ObservabilityConfig"),
    "sglang": ("other", "mm", "observability", "serving", "device"),
}
"""Groups of flags that touch none of it, as the engine names them."""

ASIDE = {
    "vllm": (
        "additional-config allowed-local-media-path allowed-media-domains code-revision config-format "
        "cpu-distributed-timeout-seconds device-ids distributed-timeout-seconds dtype enable-fault-tolerance "
        "enable-shm-tensor-arena enable-trace-replay fault-tolerance-config hf-config-path hf-overrides hf-token "
        "io-processor-plugin max-parallel-loading-workers model model-class-overrides model-impl numa-bind "
        "numa-bind-cpus numa-bind-nodes profiler-config ray-workers-use-nsight renderer-num-workers revision "
        "served-model-name skip-tokenizer-init stream-interval tokenizer tokenizer-mode tokenizer-revision "
        "trust-remote-code use-tqdm-on-load worker-cls worker-extension-cls"
    ),
    "sglang": (
        "decrypted-config-file decrypted-draft-config-file delete-ckpt-after-loading dtype engine-info-bootstrap-port "
        "json-model-override-args model-checksum model-config-parser model-impl model-path revision trust-remote-code "
        "dist-timeout gated-launch-port nccl-port enable-layerwise-nvtx-marker spec-trace-dir"
    ),
}
"""Flags of the other groups that touch none of it."""
