# syntax=docker/dockerfile:1
# CPU jobs and MLflow: `python -m sharding`, `mlflow server`, `ray job submit`. No torch.
#   docker buildx build -f docker/cpu.Dockerfile --build-arg BASE=debian:bookworm-slim@sha256:… --output type=local,dest=sbom \
#     --target sbom .          the bill of materials; without --target sbom, the image
# The base by the digest that a registry says: docker buildx imagetools inspect debian:bookworm-slim
ARG BASE=debian:bookworm-slim@UNSET

FROM ${BASE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY docker/cpu.lock /src/docker/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r /src/docker/cpu.lock
COPY pyproject.toml README.md LICENSE /src/
COPY cdssl_dist /src/cdssl_dist
COPY sharding /src/sharding
COPY configs /src/configs
# setuptools comes out of the lock, not out of a build environment that nothing pins
RUN /opt/venv/bin/pip install --no-cache-dir --no-build-isolation --no-deps /src \
    && /opt/venv/bin/python -m sharding --help > /dev/null

FROM build AS sbom-build
COPY docker/sbom.py /src/docker/
RUN /opt/venv/bin/python /src/docker/sbom.py > /sbom.cdx.json

FROM scratch AS sbom
COPY --from=sbom-build /sbom.cdx.json /

FROM ${BASE}
LABEL org.opencontainers.image.title="cdssl-cpu" \
    org.opencontainers.image.description="Sharding of crystal databases, and MLflow" \
    org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget is what KubeRay's probes call
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 ca-certificates wget tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin cdssl
COPY --from=build /opt/venv /opt/venv
COPY --from=sbom-build /sbom.cdx.json /opt/cdssl/
COPY docker/mlflow_prepare.py /opt/cdssl/
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token
USER 10001:10001
WORKDIR /tmp
# Of docker run; Kubernetes has probes of its own
HEALTHCHECK --interval=60s --timeout=30s CMD ["python", "-c", "import sharding, mlflow, ray"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "sharding", "--help"]
