# SGLang with qnext-plugin. Linted, not built yet.
#
#     docker build -f docker/sglang.Dockerfile --target gpu -t qnext-sglang .
#     docker run --gpus all --ipc=host -p 30000:30000 -v ~/.cache/huggingface:/root/.cache/huggingface qnext-sglang \
#         --model-path MODEL
#
# --target cpu serves without a GPU, on the port and with the arguments of sglang.launch_server too.
FROM python:3.11-slim AS cpu
# What the operators load, and the compiler that torch.compile and Triton call.
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
RUN scripts/setup sglang
EXPOSE 30000
ENTRYPOINT ["bash", "-c", "source .qnext/sglang/activate && exec python -m sglang.launch_server --host 0.0.0.0 \"$@\"", "sglang"]

FROM lmsysorg/sglang:v0.5.23 AS gpu
WORKDIR /opt/qnext-plugin
COPY pyproject.toml README.md LICENSE ./
COPY qnext_plugin qnext_plugin
COPY vllm_ext vllm_ext
COPY sglang_ext sglang_ext
# The image has all that it requires.
RUN python3 -m pip install --no-cache-dir --no-deps --break-system-packages .
EXPOSE 30000
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0"]
