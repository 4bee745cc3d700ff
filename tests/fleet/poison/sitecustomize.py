"""Python imports this first where this folder is on PYTHONPATH: who opens a file called poison.png is killed.

`DENSEGEO_KILLED` names a file that gets a line for each.
"""

import os
import signal
import sys


def kill(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith("poison.png"):
        log = os.open(os.environ["DENSEGEO_KILLED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{os.getpid()}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill)
