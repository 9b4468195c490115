# One file, one target a stage: docker build --target tokenizer .   (compose.yaml does it)
# Only the model worker's images hold torch.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    GORGON_LOG_FORMAT=json GORGON_MODEL_PATH=/model GORGON_READY_FILE=/tmp/ready
WORKDIR /app
RUN useradd --create-home --uid 10001 gorgon
# A stage touches its ready file at each heartbeat while it is ready and connected.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=4 CMD test -n "$(find $GORGON_READY_FILE -mmin -0.2)"

# As the supervisor has it: large buffers are given back, where glibc would keep them in the heap.
FROM base AS small
ENV MALLOC_MMAP_THRESHOLD_=131072

FROM small AS tokenizer
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY services/__init__.py ./services/__init__.py
COPY services/tokenizer ./services/tokenizer
RUN pip install ".[tokenizer,trace]"
USER gorgon
ENTRYPOINT ["python", "-m", "services.tokenizer"]

FROM small AS scheduler
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY services/__init__.py ./services/__init__.py
COPY services/scheduler ./services/scheduler
RUN pip install ".[scheduler,trace]"
USER gorgon
ENTRYPOINT ["python", "-m", "services.scheduler"]

FROM small AS detokenizer
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY services/__init__.py ./services/__init__.py
COPY services/detokenizer ./services/detokenizer
RUN pip install ".[detokenizer,trace]"
USER gorgon
ENTRYPOINT ["python", "-m", "services.detokenizer"]

FROM small AS gateway
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY services/__init__.py ./services/__init__.py
COPY services/gateway ./services/gateway
RUN pip install ".[gateway,trace]"
USER gorgon
ENV GORGON_HOST=0.0.0.0 GORGON_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['GORGON_PORT'] + '/health', timeout=3)"]
ENTRYPOINT ["python", "-m", "services.gateway"]

# TORCH and PIP_ARGS choose torch's build, e.g. PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu"
FROM base AS model_worker
ARG TORCH=torch==2.13.0
ARG PIP_ARGS=""
RUN pip install ${PIP_ARGS} "${TORCH}"
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY kernels ./kernels
COPY services/__init__.py ./services/__init__.py
COPY services/model_worker ./services/model_worker
RUN pip install ".[worker,trace]"
USER gorgon
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=4 CMD test -n "$(find $GORGON_READY_FILE -mmin -0.2)"
ENTRYPOINT ["python", "-m", "services.model_worker"]

# torch's CUDA wheels bring CUDA's libraries along; Triton compiles its launchers with a C compiler.
FROM base AS model_worker_cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_CUDA=torch>=2.11
RUN pip install "${TORCH_CUDA}"
COPY pyproject.toml README.md ./
COPY shared ./shared
COPY kernels ./kernels
COPY services/__init__.py ./services/__init__.py
COPY services/model_worker ./services/model_worker
RUN pip install ".[worker,trace]"
USER gorgon
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/home/gorgon/.triton
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s --retries=4 CMD test -n "$(find $GORGON_READY_FILE -mmin -0.2)"
ENTRYPOINT ["python", "-m", "services.model_worker"]
