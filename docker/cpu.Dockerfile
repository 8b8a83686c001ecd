# syntax=docker/dockerfile:1
# CPU jobs and MLflow: `python -m sharding`, `mlflow server`, `ray job submit`. No torch. To build: docs/kubernetes.md.
# Pin the base by the digest that the registry reports: docker buildx imagetools inspect debian:bookworm-slim
ARG BASE=debian:bookworm-slim@sha256:UNSET

FROM ${BASE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY docker/build.lock docker/cpu.lock /src/docker/
# bibtexparser, a dependency of pymatgen, has no wheel
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /src/docker/build.lock \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-build-isolation --no-deps \
        --only-binary :all: --no-binary bibtexparser -r /src/docker/cpu.lock
COPY pyproject.toml README.md LICENSE /src/
COPY cdssl_dist /src/cdssl_dist
COPY sharding /src/sharding
COPY configs /src/configs
RUN /opt/venv/bin/pip install --no-cache-dir --no-build-isolation --no-deps /src
COPY docker/sbom.py docker/mlflow_prepare.py docker/mlflow_users.py /opt/cdssl/
RUN /opt/venv/bin/python /opt/cdssl/sbom.py > /opt/cdssl/sbom.cdx.json

# The contents of the image, for scanners: docker buildx build --target sbom --output sbom …
FROM scratch AS sbom
COPY --from=build /opt/cdssl/sbom.cdx.json /

FROM ${BASE}
LABEL org.opencontainers.image.title="cdssl-cpu" \
    org.opencontainers.image.description="Sharding of crystal databases, and an MLflow server" \
    org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget is used by the probes that the operator adds to Ray's pods
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin cdssl
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/cdssl /opt/cdssl
ENV PATH=/opt/venv/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token
USER 10001:10001
WORKDIR /tmp
# For docker run; Kubernetes has probes of its own
HEALTHCHECK --interval=60s --timeout=30s CMD ["python", "-c", "import mlflow, ray, sharding"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "sharding", "--help"]
