"""The ROS 2 node without a launch file: configured and activated from Python, in a process of your own.

python examples/node.py --ros-args -r image:=/camera/image_raw -r camera_info:=/camera/camera_info
"""

import rclpy
from densegeo_ros.node import GeometryNode
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn


def main() -> None:
    rclpy.init()
    node = GeometryNode()
    for step in (node.trigger_configure, node.trigger_activate):
        if step() != TransitionCallbackReturn.SUCCESS:
            raise SystemExit(f"{step.__name__} failed: see the log, and /diagnostics")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.trigger_shutdown()


if __name__ == "__main__":
    main()
