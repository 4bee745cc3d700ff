"""A bag at its own pace, as a robot would have seen it: which images the network had time for.

python examples/bag_replay.py BAG /camera/image_raw        # needs the extra bags; no ROS
"""

import sys
import threading
import time
from pathlib import Path

from densegeo import Estimator
from densegeo.ros.bag_input import Bag
from densegeo.ros.images import read_image


def main(path: Path, topic: str) -> None:
    bag = Bag.open(path)
    with Estimator("fe2e-tiny") as estimator, estimator.stream() as stream:

        def replay() -> None:
            began, first = time.time(), None
            for item in bag.messages([topic]):
                first = first or item.time
                time.sleep(max(0.0, began + (item.time - first) / 1e9 - time.time()))
                picture = read_image(bag.decode(item))
                stream.put(picture.image, stamp=time.time(), frame_id=item.time)
            stream.close()

        threading.Thread(target=replay).start()
        done = 0
        for result in stream:
            done += 1
            print(f"{result.frame_id / 1e9:.3f}: {1e3 * (time.time() - result.stamp):.0f} ms after it came")
    print(f"{done} of {bag.counts[topic]} images; {stream.dropped} were replaced by newer ones")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
