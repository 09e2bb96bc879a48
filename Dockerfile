# NVIDIA's Triton with this package beside it; docs/docker.md says how to build and run it.

# The full image: the python, onnxruntime and tensorrt backends. 26.09 is Triton 2.73 on CUDA 13, as the onnxruntime-gpu
# of the lock, and its Python is 3.12, as the lock allows.
ARG TRITON=26.09-py3

FROM nvcr.io/nvidia/tritonserver:${TRITON} AS build
# An environment of our own, so that no package of the image is replaced; TensorRT's is the image's. pip fills it from
# outside: the image's Python has no ensurepip.
ENV VIRTUAL_ENV=/opt/florence2 \
    PIP_PYTHON=/opt/florence2/bin/python \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv --system-site-packages --without-pip "$VIRTUAL_ENV"
COPY docker/requirements.txt docker/
RUN pip install --require-hashes -r docker/requirements.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM nvcr.io/nvidia/tritonserver:${TRITON}
COPY --from=build /opt/florence2 /opt/florence2
# 1000 is NVIDIA's triton-server, which has no home. /cache is its home and keeps what a GPU's first start compiles.
RUN install --directory --owner=1000 --group=1000 /models /cache
# A __pycache__ beside a model.py would count as a change of the model.
ENV PATH=/opt/florence2/bin:$PATH \
    HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
VOLUME ["/models", "/cache"]
EXPOSE 8000 8001 8002 8003
# TensorRT may build engines first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8003/ready"]
# The entrypoint stays NVIDIA's, which checks the driver and then execs this, so that SIGTERM reaches it and it drains.
CMD ["florence2", "serve", "--repository", "/models", "--host", "0.0.0.0", "--profile", "cuda"]
