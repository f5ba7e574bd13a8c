# instructft and what it needs, on a CPU or on CUDA, as a user without root's rights.
#
#   docker build -t instructft .                                        # the CPU build of torch
#   docker build -t instructft --build-arg TORCH_INDEX=https://pypi.org/simple .   # torch with CUDA, from PyPI
#   docker run --rm -v "$PWD:/work" instructft train recipe.yaml        # with CUDA: add --gpus all
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=2.13.0

# one layer for torch alone: it changes least and weighs most
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH"

WORKDIR /opt/instructft
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY instructft instructft
COPY recipes recipes
COPY docs docs
RUN pip install --no-cache-dir --constraint constraints.txt '.[ui,quant]' \
    && useradd --create-home --uid 1000 user \
    && mkdir /work && chown user:user /work

USER 1000
WORKDIR /work
ENTRYPOINT ["instructft"]
CMD ["--help"]
