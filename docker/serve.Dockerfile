# `densegeo serve`, and the nodes of a Ray cluster, on x86-64 with an NVIDIA GPU. From the repository's root:
#   docker build -f docker/serve.Dockerfile -t densegeo-serve .
#   docker run --rm --gpus all -p 8000:8000 -v /path/to/bundles:/bundles:ro densegeo-serve serve /bundles/fe2e --host 0.0.0.0
# CUDA and cuDNN come with ONNX Runtime's packages; the driver is the machine's.
FROM python:3.12-slim

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src/densegeo
COPY . .
RUN python -m pip install --no-cache-dir -c constraints.txt ".[gpu,serve,ray]" \
 && densegeo doctor

RUN useradd --create-home --uid 1001 densegeo
USER 1001
WORKDIR /home/densegeo
ENTRYPOINT ["densegeo"]
CMD ["serve", "fe2e-tiny", "--host", "0.0.0.0"]
