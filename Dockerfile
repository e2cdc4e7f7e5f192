# syntax=docker/dockerfile:1
# Two images from one build, compiled kernels baked in; both run as nobody, on a root that may be read-only.
#
#   docker build --target lambda -t esm2-lambda .      AWS Lambda, container form: push to ECR, no further settings
#   docker build --target serve  -t esm2 .             the HTTP service (the default target)
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -e NUMPYESM_API_KEYS=secret esm2
#
# WEIGHTS is a name (esm2-35m), a file below this folder (weights/esm2-35m.safetensors, for builds without a network),
# or synthetic:esm2-8m for trying out. The compiled kernels fit every CPU of the architecture; the image has no Numba.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG WEIGHTS=esm2-35m
ARG DTYPE=fp32
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && python -m venv /opt/venv
COPY pyproject.toml README.md LICENSE ./
COPY numpyesm/ numpyesm/
COPY weights/ weights/
COPY packaging/ packaging/
RUN pip install ".[serve]" ./packaging/kernels "awslambdaric>=3"
RUN mkdir -p /opt/weights \
 && case "$WEIGHTS" in \
      synthetic*|*/*|*.safetensors|*.pt) numpyesm convert "$WEIGHTS" -o /opt/weights --dtype "$DTYPE" ;; \
      *) numpyesm fetch "$WEIGHTS" -o /opt/weights --dtype "$DTYPE" --quiet ;; \
    esac
RUN find /opt/venv -name tests -type d -path '*/site-packages/*' -prune -exec rm -rf {} + \
 && python -m compileall -q /opt/venv/lib \
 && chmod -R a+rX /opt

FROM python:${PYTHON}-slim-bookworm AS runtime
COPY --from=build /opt /opt
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NUMPYESM_OFFLINE=1 \
    NUMPYESM_CACHE=/tmp/numpyesm
WORKDIR /opt
USER 65534:65534

# Lambda starts this as its own user, keeps the root read-only, and gives a /tmp.
FROM runtime AS lambda
ENV LAMBDA_TASK_ROOT=/opt
ENTRYPOINT ["python", "-m", "awslambdaric"]
CMD ["numpyesm.serverless.handler"]

# Beyond loopback the service wants keys: NUMPYESM_API_KEYS, or --allow-no-auth behind a proxy that asks for them.
FROM runtime AS serve
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["numpyesm", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8000", "--weights", "/opt/weights"]
