# docker build -t skygate .
# docker run -p 8000:8000 -e GATEWAY_API_KEYS=me=$(openssl rand -hex 24) -v skygate:/home/gateway skygate
#
# The image listens on all addresses, so it starts only with API keys (or GATEWAY_INSECURE_OPEN=1). Without a file it serves
# the embedded simulated service; for a real one build it for your cloud, and add the YAML and the credentials:
#   docker build --build-arg CLOUDS=aws -t skygate .         (aws, gcp, azure, kubernetes, ...; several: aws,gcp)
#   -v ./config/qwen3-8b.yaml:/service.yaml -v ~/.aws:/home/gateway/.aws:ro skygate up /service.yaml
FROM python:3.12-slim AS build
# The user of the image cannot write beside the code: not compiled here, it would be compiled at each start (1 s).
ENV UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir uv \
 && apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /src
COPY requirements.lock .
RUN uv venv /opt/skygate \
 && uv pip install --no-cache --python /opt/skygate/bin/python --require-hashes -r requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY gateway gateway
COPY replicas replicas
COPY config config
RUN HATCH_BUILD_HOOK_ENABLE_CUSTOM=true /opt/skygate/bin/python -m hatchling build -t wheel -d /dist \
 && uv pip install --no-cache --python /opt/skygate/bin/python --no-deps /dist/*.whl
ARG CLOUDS=
RUN [ -z "$CLOUDS" ] || uv pip install --no-cache --python /opt/skygate/bin/python --find-links /dist "skygate[$CLOUDS]"

FROM python:3.12-slim
# SkyPilot reaches its clusters by ssh and rsync, and pods through socat and nc.
RUN apt-get update \
 && apt-get install -y --no-install-recommends netcat-openbsd openssh-client rsync socat \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 gateway \
 && install -d -m 0700 -o gateway -g gateway /home/gateway/.gateway
COPY --from=build /opt/skygate /opt/skygate
ENV PATH=/opt/skygate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_HOST=0.0.0.0
USER gateway
WORKDIR /home/gateway
# State and SkyPilot's own files (.gateway, .sky, .ssh) must outlive the container, or running replicas are forgotten.
VOLUME /home/gateway
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", \
  "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('GATEWAY_PORT', '8000')}/health\", timeout=4)"]
ENTRYPOINT ["gateway"]
CMD ["up"]
