"""A ROS 2 lifecycle node that turns a camera's images into depth, normals and points."""
