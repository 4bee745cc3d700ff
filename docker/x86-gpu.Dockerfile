# The ROS 2 node on x86-64 with an NVIDIA GPU. From the repository's root:
#   docker build -f docker/x86-gpu.Dockerfile -t densegeo .
#   docker run --rm --gpus all --network host densegeo
# ROS 2 is Jazzy's packages (Ubuntu 24.04, Python 3.12); densegeo has an environment of its own that sees them. They are
# built with numpy 1, so numpy stays below 2.
FROM ros:jazzy-ros-base

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      python3-venv ros-jazzy-diagnostic-msgs ros-jazzy-sensor-msgs ros-jazzy-tf2-ros-py \
 && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/densegeo
ENV PATH=/opt/densegeo/bin:$PATH
RUN python3 -m venv --system-site-packages "$VIRTUAL_ENV"

WORKDIR /src/densegeo
COPY . .
RUN grep -v '^numpy==' constraints.txt > ../constraints.txt \
 && python -m pip install --no-cache-dir -c ../constraints.txt ".[gpu,tensorrt-rtx]" "numpy>=1.26,<2" \
 && python -m pip install --no-cache-dir --no-deps ./ros2/densegeo_ros \
 && densegeo doctor

RUN useradd --create-home --uid 1001 robot
USER 1001
WORKDIR /home/robot
ENTRYPOINT ["/ros_entrypoint.sh"]
CMD ["python", "-m", "densegeo_ros.node"]
