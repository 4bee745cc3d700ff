"""ROS 2 messages and bags, without ROS: nothing here imports rclpy, so the node and `densegeo bag` share it.

Messages are taken as they come from rclpy, rosbags or anything else with their fields as attributes.
"""
