# Image of the daemon, in two variants: docs/container.md.
#   docker build --build-arg VARIANT=cuda --tag kronos-stream:cuda .
#
# A release names its base by digest: --build-arg BASE=docker.io/library/python:…@sha256:…
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# ------------------------------------------------------------------------------ build tools
FROM ${BASE} AS build
SHELL ["/bin/sh", "-euc"]
ARG PIP_VERSION=26.3
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build
COPY constraints.txt pyproject.toml ./
# pip has a separate environment, so that the daemon's does not contain it.
RUN python3 -m venv pip; \
    pip/bin/python -m pip install "pip==${PIP_VERSION}"; \
    pip/bin/python -m pip install --constraint constraints.txt setuptools; \
    python3 -m venv --without-pip /opt/kronos-stream

# ------------------------------------------------------------------ dependencies, gigabytes
FROM build AS dependencies
ARG VARIANT=cpu
ARG PIP_INDEX_URL
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# torch on PyPI is the CUDA build. The CPU build comes from PyTorch's index, without its dependencies:
# those follow from PyPI, pinned like all others.
RUN install() { \
        pip/bin/python -m pip --python /opt/kronos-stream/bin/python install \
            --constraint constraints.txt --only-binary :all: --no-compile "$@"; \
    }; \
    case "${VARIANT}" in \
        cpu) install --no-deps --index-url "${TORCH_CPU_INDEX}" torch ;; \
        cuda) ;; \
        *) echo "VARIANT is cpu or cuda, not ${VARIANT}" >&2; exit 1 ;; \
    esac; \
    pip/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb")); \
        print(*project["project"]["dependencies"], sep="\n")' >requirements.txt; \
    install --requirement requirements.txt
# Remove tests of other packages and static libraries. Bytecode is unchecked hash-based, because nothing
# can be written at run time and builds must be reproducible. Files for a newer Python (torch has one)
# do not compile and are not needed.
RUN find /opt/kronos-stream \( -type d -name tests -o -type f -name "*.a" \) -prune -exec rm -r {} +; \
    /opt/kronos-stream/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/kronos-stream/lib || true

# --------------------------------------------------------------------------- the wheel itself
FROM build AS wheel
ARG SOURCE_DATE_EPOCH
COPY LICENSE README.md ./
COPY connectors connectors
COPY kronos_stream kronos_stream
RUN pip/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# -------------------------------------------------------------------------------- final image
FROM ${BASE}
SHELL ["/bin/sh", "-euc"]
# Remove all installers and set-uid programs. The user is numeric, so that an orchestrator can verify
# that it is not root; the date of its creation is removed for reproducible builds.
RUN rm -rf /usr/local/lib/python3*/site-packages/* /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip* /usr/local/bin/wheel /usr/lib/python3*/ensurepip \
        /usr/share/python-wheels /root/.cache; \
    find / -xdev -type f -perm /6000 -exec chmod a-s {} +; \
    groupadd --gid 10001 kronos; \
    SOURCE_DATE_EPOCH=86400 useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/kronos-stream \
        --shell /usr/sbin/nologin --no-log-init kronos; \
    install --directory --owner 10001 --group 10001 /var/lib/kronos-stream

COPY --from=dependencies /opt/kronos-stream /opt/kronos-stream
# A separate layer: a new version of the daemon is a pull of some megabytes.
RUN --mount=type=bind,from=wheel,source=/build,target=/mnt \
    /mnt/pip/bin/python -m pip --python /opt/kronos-stream/bin/python install \
        --disable-pip-version-check --no-cache-dir --no-compile --no-deps --no-index \
        --root-user-action ignore /mnt/dist/*.whl; \
    /opt/kronos-stream/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/kronos-stream/lib/python3*/site-packages/kronos_*
COPY --chmod=0555 deploy/image/healthcheck.py /opt/kronos-stream/healthcheck.py

# Files are written to the volume (state, models from the hub) and to /tmp only.
ENV PATH=/opt/kronos-stream/bin:$PATH \
    HOME=/var/lib/kronos-stream \
    HF_HOME=/var/lib/kronos-stream/huggingface \
    STATE_DIRECTORY=/var/lib/kronos-stream \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/kronos-stream
VOLUME /var/lib/kronos-stream
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-I", "/opt/kronos-stream/healthcheck.py"]
ENTRYPOINT ["kronos-stream"]
CMD ["run"]

ARG BASE
ARG VARIANT=cpu
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kronos-stream" \
      org.opencontainers.image.description="Streaming probabilistic candlestick forecasts" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      io.kronos-stream.variant="${VARIANT}"
