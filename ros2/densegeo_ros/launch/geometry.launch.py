"""Start the node and bring it to `active`: ros2 launch densegeo_ros geometry.launch.py image:=/camera/image_raw"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

TOPICS = {
    "image": "/camera/image_raw",
    "image/compressed": "/camera/image_raw/compressed",
    "camera_info": "/camera/camera_info",
    "anchors": "/scan",
    "imu": "/imu/data_raw",
}


def generate_launch_description() -> LaunchDescription:
    """The node in the namespace of the argument `namespace`, with the parameters of the file `parameters`."""
    names = {topic: topic.replace("/", "_") for topic in TOPICS}
    defaults = PathJoinSubstitution([FindPackageShare("densegeo_ros"), "config", "geometry.yaml"])
    node = LifecycleNode(
        package="densegeo_ros",
        executable="geometry",
        name="geometry",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("parameters")],
        remappings=[(topic, LaunchConfiguration(name)) for topic, name in names.items()],
        output="screen",
    )

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))

    configured = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(Transition.TRANSITION_ACTIVATE)],
    )
    arguments = {"namespace": "", "parameters": defaults, **{names[topic]: TOPICS[topic] for topic in TOPICS}}
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=value) for name, value in arguments.items()),
            node,
            RegisterEventHandler(configured),
            change(Transition.TRANSITION_CONFIGURE),
        ]
    )
