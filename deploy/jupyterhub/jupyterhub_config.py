"""JupyterHub for a class on one Linux machine: learners are system accounts, systemd holds each to their share.

README.md beside this file says how to set it up; the lines in capitals are what a class decides.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

MEMORY = "4G"  # for each learner: the largest lab needs about 3
CORES = 2.0  # for each learner at most; a busy machine shares its cores evenly
LEARNERS = 15  # servers at the same time: memory of the machine / MEMORY, less one for the hub
GPU = False  # True: everyone may use the machine's GPUs, whose memory nobody divides between them
IDLE = 3600  # seconds without activity after which a server ends and its memory is free again; files stay
MODEL = "/var/cache/kv-cache-labs"  # the lab model, fetched once by who sets this up; learners only read it
LEARNERS_GROUP, TEACHERS_GROUP = "kv-cache-labs", "kv-cache-labs-teachers"
HERE = Path(__file__).resolve().parent

c = get_config()  # noqa: F821

# Only this machine reaches the hub; a web server in front of it brings TLS, see README.md.
c.JupyterHub.bind_url = "http://127.0.0.1:8000"
c.JupyterHub.active_server_limit = LEARNERS

# Who may log in: members of these groups of the system, with the password of the system.
c.JupyterHub.authenticator_class = "pam"
c.PAMAuthenticator.allowed_groups = {LEARNERS_GROUP, TEACHERS_GROUP}
c.PAMAuthenticator.admin_groups = {TEACHERS_GROUP}

# Each server is a unit of systemd, run as the learner: their files are theirs by the system's own rules.
c.JupyterHub.spawner_class = "systemd"
c.Spawner.mem_limit = MEMORY
c.Spawner.cpu_limit = CORES
c.SystemdSpawner.isolate_tmp = True
c.SystemdSpawner.isolate_devices = not GPU
c.SystemdSpawner.disable_user_sudo = True
c.SystemdSpawner.unit_extra_properties = {"TasksMax": "512"}  # processes and threads: a fork bomb ends in its own unit

c.Spawner.cmd = [sys.executable, str(HERE / "start.py")]
c.Spawner.default_url = "/lab/tree/kv-cache-labs/01_attention_basics.ipynb"
c.Spawner.environment = {"LABKIT_CACHE": MODEL, "LABKIT_DEVICE": "auto" if GPU else "cpu"}
c.Spawner.args = [
    f"--ServerApp.shutdown_no_activity_timeout={IDLE}",
    f"--MappingKernelManager.cull_idle_timeout={IDLE}",
    "--MappingKernelManager.cull_connected=True",  # a tab that was left open keeps no server alive
    f"--TerminalManager.cull_inactive_timeout={IDLE}",
]
if find_spec("jupyter_resource_usage"):  # the memory panel, where it is installed
    c.Spawner.args.append("--ResourceUseDisplay.track_cpu_percent=True")
c.Spawner.start_timeout = 120
c.Spawner.http_timeout = 120
