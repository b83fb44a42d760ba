# vLLM with qnext-plugin. Linted, not built yet.
#
#     docker build -f docker/vllm.Dockerfile --target gpu -t qnext-vllm .
#     docker run --gpus all --ipc=host -p 8000:8000 -v ~/.cache/huggingface:/root/.cache/huggingface qnext-vllm MODEL
#
# --target cpu serves without a GPU, on the port and with the arguments of vllm serve too.
FROM python:3.11-slim AS cpu
# What vLLM's operators load, and the compiler that torch.compile and Triton call.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
ENV QNEXT_ENVS=/opt/qnext PIP_NO_CACHE_DIR=1
WORKDIR /opt/qnext-plugin
COPY scripts/setup scripts/requirements-* scripts/
COPY pyproject.toml README.md LICENSE ./
COPY qnext_plugin qnext_plugin
COPY vllm_ext vllm_ext
COPY sglang_ext sglang_ext
COPY sglang_cpu sglang_cpu
RUN scripts/setup vllm
ENV VLLM_CPU_OMP_THREADS_BIND=nobind
EXPOSE 8000
ENTRYPOINT ["bash", "-c", "source .qnext/vllm/activate && exec vllm serve \"$@\"", "vllm"]

FROM vllm/vllm-openai:v0.33.0 AS gpu
WORKDIR /opt/qnext-plugin
COPY pyproject.toml README.md LICENSE ./
COPY qnext_plugin qnext_plugin
COPY vllm_ext vllm_ext
COPY sglang_ext sglang_ext
# The image has all that it requires.
RUN python3 -m pip install --no-cache-dir --no-deps --break-system-packages .
