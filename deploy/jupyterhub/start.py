"""A learner's server on a hub: their notebooks brought up to date in ~/kv-cache-labs, then JupyterHub's own server.

Runs as the learner. A notebook that they changed is never overwritten (`labkit.course.workspace`). Arguments are those
of jupyterhub-singleuser.
"""

import os
import sys
from pathlib import Path

from labkit.course.cli import jupyter_environment
from labkit.course.workspace import WorkspaceError, refresh
from labkit.places import course_folder


def main() -> None:
    """Become the server."""
    work = Path.home() / "kv-cache-labs"
    try:
        for line in refresh(course_folder("notebooks"), work):
            print(line, flush=True)
    except WorkspaceError as error:  # as of a full disk, which a learner can clear once the server is there
        print(error, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "jupyterhub.singleuser", *sys.argv[1:]]
    os.execve(command[0], command, jupyter_environment(dict(os.environ), work))


if __name__ == "__main__":
    main()
