# A service on CPU.
#
#   docker build -t scalerec .
#   docker run --rm -v "$PWD/data:/data" scalerec key add web /data/keys.json
#   docker run -p 8000:8000 -v "$PWD/data:/data" scalerec serve /data/bundle --host 0.0.0.0 \
#       --state /data/state --keys /data/keys.json --exposures /data/exposures
#
# /data is the one place that is written to, by user 10001: bundle, state, keys and exposures lie there.
FROM python:3.12-slim AS build
WORKDIR /build
RUN python -m venv /opt/scalerec
ENV PATH=/opt/scalerec/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock ./
# torch from its own index first: the one on PyPI brings CUDA along
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.lock)"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c requirements.lock '.[serve]'

FROM python:3.12-slim
# libgomp: torch's threads; g++ is left out, so models run as they are and not compiled
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin scalerec \
    && mkdir /data && chown scalerec /data
COPY --from=build /opt/scalerec /opt/scalerec
ENV PATH=/opt/scalerec/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib
USER scalerec
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a container is not to be killed because its store is away.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
ENTRYPOINT ["scalerec"]
CMD ["--help"]
