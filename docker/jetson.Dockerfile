# The ROS 2 node on a Jetson (JetPack 6: Ubuntu 22.04, Python 3.10, CUDA 12, TensorRT 10.3). On the board:
#   docker build -f docker/jetson.Dockerfile -t densegeo .
#   docker run --rm --runtime nvidia --network host -v /path/to/bundle:/bundle:ro densegeo \
#     python3 -m densegeo_ros.node --ros-args -p bundle:=/bundle -p backend:=tensorrt
# TensorRT and CUDA are the board's own, so the bindings are those of CUDA 12. ROS 2 is Humble's packages, built with
# numpy 1, so numpy stays below 2.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl python3-pip \
 && curl -sSL https://raw.githubusercontent.com/ros/rosdistro/master/ros.key -o /usr/share/keyrings/ros.gpg \
 && echo "deb [signed-by=/usr/share/keyrings/ros.gpg] http://packages.ros.org/ros2/ubuntu jammy main" \
      > /etc/apt/sources.list.d/ros2.list \
 && apt-get update \
 && apt-get install -y --no-install-recommends \
      ros-humble-diagnostic-msgs ros-humble-lifecycle-msgs ros-humble-rclpy ros-humble-rmw-fastrtps-cpp \
      ros-humble-sensor-msgs ros-humble-tf2-ros-py \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src/densegeo
COPY . .
RUN grep -vE '^(numpy|cuda-bindings)==' constraints.txt > ../constraints.txt \
 && python3 -m pip install --no-cache-dir -c ../constraints.txt ".[cpu,tensorrt]" "cuda-bindings<13" "numpy>=1.26,<2" \
 && python3 -m pip install --no-cache-dir --no-deps ./ros2/densegeo_ros

RUN useradd --create-home --uid 1001 --groups video robot \
 && mv docker/entrypoint.sh /entrypoint.sh
USER 1001
WORKDIR /home/robot
ENTRYPOINT ["/entrypoint.sh"]
CMD ["python3", "-m", "densegeo_ros.node"]
