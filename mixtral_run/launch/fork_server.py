"""First import of the fork server (processes.py): it ends with the command that started it.

By itself it would live as long as any process of the job holds the pipe that all of them inherit.
"""

import os

from mixtral_run.launch.parent_death import FORK_SERVER_PARENT, JOB_PARENT, end_with_parent

end_with_parent(FORK_SERVER_PARENT)
os.environ[JOB_PARENT] = str(os.getpid())
