#!/bin/bash
set -e
. /opt/ros/humble/setup.bash
exec "$@"
