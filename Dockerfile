# Serves the embedded model, or one of yours that is mounted, as a user without rights, on the CPU.
#
#   docker build -t lapwing .
#   docker run --rm -p 127.0.0.1:50051:50051 lapwing
#   docker run --rm -p 50051:50051 -v "$PWD/tls:/tls:ro" lapwing --host 0.0.0.0 --tls-cert /tls/server.pem --tls-key /tls/server.key
#
# For a torch without CUDA, a tenth of the size: --build-arg PIP_EXTRA_INDEX_URL=... (the README says which).
# The tests do not build this image unless asked to (LAPWING_IMAGE=1), because that needs a container engine and the
# network; they say so when they pass it over.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY client client
COPY detector detector
COPY training training
COPY server server
RUN python -m venv /opt/lapwing && /opt/lapwing/bin/pip install --constraint constraints.txt '.[server]'

FROM python:3.12-slim
RUN useradd --system --uid 10001 --create-home lapwing
COPY --from=build /opt/lapwing /opt/lapwing
ENV PATH=/opt/lapwing/bin:${PATH} HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp/matplotlib GRPC_VERBOSITY=NONE
USER 10001
EXPOSE 50051
STOPSIGNAL SIGTERM
# Inside a container loopback reaches nobody: the port is published by whoever runs it, to loopback unless with TLS.
ENTRYPOINT ["lapwing", "serve"]
CMD ["--host", "0.0.0.0", "--insecure"]
