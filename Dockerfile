# PixRec's image, for clusters with and without GPUs:
#   docker build --target gpu --tag my-registry/pixrec:0.1.0 .
#   docker build --target cpu --tag my-registry/pixrec:0.1.0-cpu .
# The last layer holds PixRec itself, some MB. The one before it, what PixRec depends on, changes with constraints.txt
# and pyproject.toml alone.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv /opt/pixrec

# An empty package of PixRec's name has PixRec's dependencies.
FROM build AS dependencies
RUN mkdir pixrec && touch pixrec/__init__.py

FROM dependencies AS dependencies-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/pixrec/bin/pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)" \
    && /opt/pixrec/bin/pip install --constraint constraints.txt ".[pretrained]" "ray[default]" \
    && /opt/pixrec/bin/pip uninstall --yes pixrec

# PyPI's torch for Linux brings CUDA's libraries; of the machine it needs the driver alone.
FROM dependencies AS dependencies-gpu
RUN /opt/pixrec/bin/pip install --constraint constraints.txt ".[pretrained,nf4]" "ray[default]" \
    && /opt/pixrec/bin/pip uninstall --yes pixrec

FROM build AS application
COPY pixrec pixrec
RUN /opt/pixrec/bin/pip install --no-deps --target /app .
COPY serve /app/serve
COPY jobs /app/jobs

FROM ${BASE} AS base
# wget: KubeRay's probes and the health check below call it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
ENV PATH=/app/bin:/opt/pixrec/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
WORKDIR /app
USER 1000
# Asks the Ray node that `ray start --block` keeps in this container; one that runs something else is not asked.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD grep --quiet --text -- --block /proc/[0-9]*/cmdline || exit 0; \
    wget --quiet --tries=1 --timeout=5 --output-document=- http://127.0.0.1:52365/api/local_raylet_healthz | grep --quiet success
CMD ["pixrec", "--help"]

FROM base AS cpu
COPY --from=dependencies-cpu /opt/pixrec /opt/pixrec
COPY --from=application /app /app

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-gpu /opt/pixrec /opt/pixrec
COPY --from=application /app /app
