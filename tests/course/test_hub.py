"""A class on a hub: two learners on JupyterHub with its proxy, each with files, a lab and progress of their own."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import nbformat
import psutil
import pytest
import requests
import websocket
import yaml
from traitlets.config import PyFileConfigLoader

from tests import npm
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
START = Path("deploy/jupyterhub/start.py")
LAB = "01_attention_basics.ipynb"
STUB = 'raise NotImplementedError("01.1")'
ANSWER = "return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)"

# What a test may not need: accounts of the system, systemd. The rest is the configuration that a class gets.
TEST_CONFIG = """
load_subconfig({config!r})
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {homes!r}
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allow_all = True
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}"
c.JupyterHub.hub_port = {ports[1]}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.ConfigurableHTTPProxy.command = {proxy!r}
c.Spawner.environment |= {environment!r}
c.Spawner.args += ["--allow-root"]
"""


@contextmanager
def hub(folder: Path, password: str, model: Path) -> Iterator[str]:
    """The address of a hub with all its files in `folder`; every process of it is gone afterwards, or this fails."""
    ports = free_ports(3)
    proxy = [npm.node(), str(npm.package("configurable-http-proxy") / "bin/configurable-http-proxy")]
    settings = {
        "config": str(DEPLOY / "jupyterhub/jupyterhub_config.py"),
        "homes": str(folder / "homes/{username}"),
        "password": password,
        "ports": ports,
        "proxy": proxy,
        "environment": {"LABKIT_CACHE": str(model.parent), "PYTHONPATH": str(ROOT)},
    }
    (folder / "config.py").write_text(TEST_CONFIG.format(**settings))
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), "CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(16)}
    command = [sys.executable, "-m", "jupyterhub", "-f", str(folder / "config.py")]
    log = folder / "log"
    with open(log, "w") as written:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=written, stderr=written)
    running = [psutil.Process(process.pid)]
    try:
        address = f"http://127.0.0.1:{ports[0]}"
        wait_for(lambda: answers(f"{address}/hub/api/"), process, log)
        yield address
        running += running[0].children(recursive=True)
    except BaseException:
        print(log.read_text())
        raise
    finally:
        left = end(process, running)
    assert len(running) >= 6, "the hub, its proxy, two servers and two kernels run until the hub ends"
    assert not left


def end(process: subprocess.Popen, running: list[psutil.Process]) -> list[psutil.Process]:
    """Ask the hub to end; returns what it left running, which is ended too."""
    with_children = {*running, *running[0].children(recursive=True)} if process.poll() is None else set(running)
    process.terminate()
    _, left = psutil.wait_procs(with_children, timeout=120)
    for one in left:
        one.kill()
    process.wait()
    return left


def wait_for(happens, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Return when it has happened; fail with the log when the hub ends, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=2).ok
    except requests.RequestException:
        return False


class Learner:
    """Someone with a browser, whose cookies it keeps, and a token of their own for the kernel's channel."""

    def __init__(self, address: str, name: str, password: str) -> None:
        self.address, self.name, self.browser = address, name, requests.Session()
        self.server = f"{address}/user/{name}"
        self.browser.get(f"{address}/hub/login").raise_for_status()
        form = {"username": name, "password": password, "_xsrf": self.xsrf()}
        self.landed = self.browser.post(f"{address}/hub/login", data=form, allow_redirects=False)

    def xsrf(self) -> str:
        return next(
            cookie.value for cookie in self.browser.cookies if cookie.name == "_xsrf" and cookie.path == "/hub/"
        )

    def ask_hub(self, method: str, path: str) -> requests.Response:
        """The hub's API, as its pages call it."""
        headers = {"X-XSRFToken": self.xsrf(), "Referer": f"{self.address}/hub/home"}
        return self.browser.request(method, f"{self.address}/hub/api/{path}", headers=headers)

    def start(self) -> None:
        """Start the server and open its first page, as a browser does."""
        made = self.ask_hub("POST", f"users/{self.name}/server")
        assert made.status_code in (201, 202), made.text
        deadline = time.monotonic() + 120
        while not self.ask_hub("GET", f"users/{self.name}").json()["servers"].get("", {}).get("ready"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        page = self.browser.get(f"{self.server}/")
        assert page.ok
        assert page.url.endswith(f"/user/{self.name}/lab/tree/kv-cache-labs/{LAB}")
        self.token = self.ask_hub("POST", f"users/{self.name}/tokens").json()["token"]

    def ask(self, method: str, path: str, **more) -> requests.Response:
        """Their own server's API, by token."""
        headers = {"Authorization": f"token {self.token}"}
        return requests.request(method, f"{self.server}/api/{path}", headers=headers, timeout=60, **more)

    def run(self, cells: list[str]) -> list[str]:
        """What each cell prints, run in one kernel in the folder of the notebooks. Fails at the first error."""
        made = self.ask("POST", "sessions", json=SESSION)
        assert made.status_code == 201, made.text
        where = f"{self.server}/api/kernels/{made.json()['kernel']['id']}/channels".replace("http", "ws", 1)
        header = [f"Authorization: token {self.token}"]
        with closing(websocket.create_connection(where, header=header, timeout=120)) as channel:
            return [execute(channel, cell) for cell in cells]


SESSION = {"path": f"kv-cache-labs/{LAB}", "name": LAB, "type": "notebook", "kernel": {"name": "python3"}}


def execute(channel: websocket.WebSocket, code: str) -> str:
    """Run one cell over a kernel's channel; returns what it prints and shows as text."""
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "execute_request",
        "username": "",
        "session": "s",
        "version": "5.4",
    }
    channel.send(
        json.dumps({"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content})
    )
    said = []
    while True:
        message = json.loads(channel.recv())
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", content
        if kind == "stream":
            said.append(content["text"])
        elif kind in ("display_data", "execute_result"):
            said.append(content["data"].get("text/plain", "") + content["data"].get("text/html", ""))
        elif kind == "status" and content["execution_state"] == "idle":
            return "".join(said)


def first_cells(answer: str | None) -> list[str]:
    """Lab 01's cells up to its first check, with this answer in the blank; None leaves it blank."""
    cells = [
        cell.source for cell in nbformat.read(ROOT / "notebooks" / LAB, as_version=4).cells if cell.cell_type == "code"
    ]
    last = next(place for place, source in enumerate(cells) if STUB in source)
    return [*cells[:last], cells[last].replace(STUB, answer or STUB)]


@pytest.mark.timeout(900)
def test_two_learners_on_a_hub_have_files_labs_and_progress_of_their_own(
    tmp_path: Path, lab_model: Path, monkeypatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    password = secrets.token_hex(8)
    with hub(tmp_path, password, lab_model) as address:
        assert "_xsrf" in requests.get(f"{address}/hub/login", timeout=60).cookies
        assert Learner(address, "ada", "a wrong one").landed.status_code == 403
        ada, ben = learners = [Learner(address, name, password) for name in ("ada", "ben")]
        with ThreadPoolExecutor(2) as both:
            list(both.map(Learner.start, learners))
            said = list(both.map(Learner.run, learners, [first_cells(ANSWER), first_cells(None)]))
        homes = {one.name: tmp_path / "homes" / one.name / "kv-cache-labs" for one in learners}

        # Each ran the lab in a kernel of their own, and the check spoke to what each wrote.
        assert "SmolLM2-135M" in said[0][0]
        assert "pass" in said[0][-1]
        assert "pending" in said[1][-1]
        for one, passed in ((ada, True), (ben, False)):
            progress = json.loads((homes[one.name] / "progress.json").read_text())
            assert progress["exercises"].get("01.1", {}).get("passed", False) is passed

        # The files are there, and a change stays with who made it.
        names = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
        for one in learners:
            listed = [entry["name"] for entry in one.ask("GET", "contents/kv-cache-labs").json()["content"]]
            assert [name for name in sorted(listed) if name.endswith(".ipynb")] == names
        note = {"type": "file", "format": "text", "content": "my notes"}
        assert ada.ask("PUT", "contents/kv-cache-labs/notes.md", json=note).status_code == 201
        assert (homes["ada"] / "notes.md").read_text() == "my notes"
        assert not (homes["ben"] / "notes.md").exists()
        assert ben.ask("GET", "contents/kv-cache-labs/notes.md").status_code == 404
        assert ben.ask("GET", "contents/../ada/kv-cache-labs/notes.md").status_code in (403, 404)
        assert ben.ask("GET", f"contents/{quote('../ada/kv-cache-labs/notes.md', safe='')}").status_code in (403, 404)

        # Nobody gets at the other's server or at what the hub knows of them; a stranger gets at nothing.
        for one, other in ((ada, ben), (ben, ada)):
            refuses(one, other)
        for path in ("/api/contents", "/api/kernels", "/lab"):
            page = requests.get(f"{ada.server}{path}", timeout=60)
            assert page.status_code == 403 or "/hub/login" in page.url


def refuses(one: Learner, other: Learner) -> None:
    """No way from one learner to another's server, by token or by a browser that is logged in."""
    header = {"Authorization": f"token {one.token}"}
    for path in ("/api/contents/kv-cache-labs/progress.json", "/api/kernels", "/api/sessions", "/files/.bashrc"):
        assert requests.get(f"{other.server}{path}", headers=header, timeout=60).status_code == 403, path
    started = requests.post(f"{other.server}/api/sessions", headers=header, json=SESSION, timeout=60)
    assert started.status_code == 403
    (kernel,) = other.ask("GET", "kernels").json()
    where = f"{other.server}/api/kernels/{kernel['id']}/channels".replace("http", "ws", 1)
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        websocket.create_connection(where, header=[f"Authorization: token {one.token}"], timeout=60)
    page = one.browser.get(f"{other.server}/lab")
    assert page.status_code == 403
    for method, path in (
        ("GET", ""),
        ("GET", "/tokens"),
        ("POST", "/tokens"),
        ("POST", "/server"),
        ("DELETE", "/server"),
    ):
        assert one.ask_hub(method, f"users/{other.name}{path}").status_code in (403, 404), path
    assert one.ask_hub("GET", "users").status_code == 403


def test_a_server_brings_the_notebooks_up_to_date_and_starts_also_where_it_cannot(tmp_path: Path) -> None:
    """start.py with a single-user server in its place that only says how it was called."""
    fake = tmp_path / "fake/jupyterhub/singleuser.py"
    fake.parent.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    fake.write_text("import os, sys; print('server', sys.argv[1:], os.environ['JUPYTER_CONFIG_PATH'])")
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(DEPLOY / "jupyterhub/start.py"), "--a=b"]

    def start() -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    said = start()
    assert f"{LAB}: copied" in said
    assert re.search(r"server \['--a=b'\] .*jupyter$", said.strip())
    (home / "kv-cache-labs" / LAB).write_text("what a learner wrote")
    assert "copied" not in start()
    assert (home / "kv-cache-labs" / LAB).read_text() == "what a learner wrote"
    shutil.rmtree(home / "kv-cache-labs")
    (home / "kv-cache-labs").write_text("a file in its place")
    assert "server ['--a=b']" in start()


def test_the_link_names_what_there_is() -> None:
    text = (DEPLOY / "README.md").read_text()
    pulled = urlsplit(re.search(r"https://HUB(/hub/user-redirect/git-pull\S+)", text)[1])
    asked = {name: values[0] for name, values in parse_qs(pulled.query, strict_parsing=True).items()}
    assert set(asked) == {"repo", "branch", "targetpath", "urlpath"}
    assert asked["targetpath"] != "kv-cache-labs"  # where start.py keeps its own
    inside = asked["urlpath"].removeprefix(f"lab/tree/{asked['targetpath']}/")
    assert (ROOT / inside).is_file()
    opened = re.search(r"https://HUB/hub/user-redirect/lab/tree/kv-cache-labs/(\S+)", text)[1]
    assert (ROOT / "notebooks" / opened).is_file()


@pytest.fixture
def machine() -> dict:
    """The configuration of one machine, read as JupyterHub reads it."""
    return PyFileConfigLoader(str(DEPLOY / "jupyterhub/jupyterhub_config.py")).load_config()


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((DEPLOY / "kubernetes/values.yaml").read_text())


def test_one_machine_and_a_cluster_give_a_learner_the_same(machine, cluster) -> None:
    server = cluster["singleuser"]
    assert server["memory"]["limit"] == machine.Spawner.mem_limit
    assert server["cpu"]["limit"] == machine.Spawner.cpu_limit
    assert server["defaultUrl"] == machine.Spawner.default_url
    assert (ROOT / "notebooks" / Path(server["defaultUrl"]).name).is_file()
    assert Path(server["cmd"][1]).relative_to("/opt/kv-cache-labs") == START
    assert Path(machine.Spawner.cmd[1]) == ROOT / START
    assert f"--ServerApp.shutdown_no_activity_timeout={cluster['cull']['timeout']}" in machine.Spawner.args
    assert server["extraEnv"]["LABKIT_DEVICE"] == machine.Spawner.environment["LABKIT_DEVICE"] == "cpu"


def test_the_image_has_what_the_cluster_starts_and_the_hub_that_its_chart_has(cluster) -> None:
    image = (DEPLOY / "kubernetes/Dockerfile").read_text()
    assert f"CMD {json.dumps(cluster['singleuser']['cmd'])}" in image
    assert "WORKDIR /opt/kv-cache-labs\nCOPY . .\n" in image
    readme, values = ((DEPLOY / "kubernetes" / name).read_text() for name in ("README.md", "values.yaml"))
    chart, hub_version = re.search(r"chart (\d+\.\d+\.\d+) \(JupyterHub (\d+\.\d+\.\d+)\)", readme).groups()
    assert f"--version {chart} " in readme
    assert f"chart {chart}," in values
    assert f"chart {chart}:" in image
    assert f"ARG JUPYTERHUB={hub_version}\n" in image


def test_only_the_machine_itself_reaches_its_hub_and_only_two_groups_log_in(machine) -> None:
    assert machine.JupyterHub.bind_url.startswith("http://127.0.0.1:")
    assert "allow_all" not in machine.Authenticator
    assert machine.PAMAuthenticator.allowed_groups == {"kv-cache-labs", "kv-cache-labs-teachers"}
    assert machine.PAMAuthenticator.admin_groups == {"kv-cache-labs-teachers"}
    setup = (DEPLOY / "jupyterhub/README.md").read_text()
    assert all(f"groupadd {group}" in setup for group in machine.PAMAuthenticator.allowed_groups)
    assert f"{machine.Spawner.environment['LABKIT_CACHE']} .venv/bin/labkit model" in setup.replace("LABKIT_CACHE=", "")
    service = (DEPLOY / "jupyterhub/kv-cache-labs-hub.service").read_text()
    assert "/opt/kv-cache-labs/deploy/jupyterhub/jupyterhub_config.py\n" in service


def test_every_setting_is_one_that_jupyterhub_has(machine) -> None:
    """A misspelt setting is passed over without a word. SystemdSpawner is not installed here: its names stand below."""
    from jupyterhub.app import JupyterHub
    from jupyterhub.auth import Authenticator, PAMAuthenticator
    from jupyterhub.spawner import Spawner

    known = {"SystemdSpawner": {"isolate_tmp", "isolate_devices", "disable_user_sudo", "unit_extra_properties"}}
    known |= {one.__name__: set(one.class_traits(config=True)) for one in (JupyterHub, Authenticator, PAMAuthenticator)}
    known["Spawner"] = set(Spawner.class_traits(config=True))
    for name, settings in machine.items():
        assert set(settings) <= known[name], name


def test_a_cluster_is_told_only_what_its_chart_knows(cluster) -> None:
    """Names and kinds as the schema of chart 4.4 has them; a name that it does not know makes Helm refuse all."""
    assert_within(cluster, CHART, "values")


NUMBER, SWITCH = (int, float), bool
CHART: dict = {
    "hub": {
        "config": {
            "JupyterHub": {"authenticator_class": str, "admin_access": SWITCH},
            "NativeAuthenticator": {"minimum_password_length": int, "check_common_password": SWITCH},
            "Authenticator": {"admin_users": list, "allow_all": SWITCH},
        },
        "activeServerLimit": int,
        "concurrentSpawnLimit": int,
    },
    "proxy": {"https": {"enabled": SWITCH, "hosts": list, "letsencrypt": {"contactEmail": str}}},
    "singleuser": {
        "image": {"name": str, "tag": str},
        "cmd": list,
        "defaultUrl": str,
        "extraEnv": {"LABKIT_DEVICE": str},
        "memory": {"limit": str, "guarantee": str},
        "cpu": {"limit": NUMBER, "guarantee": NUMBER},
        "storage": {"capacity": str},
        "startTimeout": int,
        "networkPolicy": {"egressAllowRules": {"nonPrivateIPs": SWITCH}},
        "profileList": list,
    },
    "cull": {"enabled": SWITCH, "timeout": int, "every": int},
    "prePuller": {"hook": {"enabled": SWITCH}},
    "scheduling": {
        "userScheduler": {"enabled": SWITCH},
        "podPriority": {"enabled": SWITCH},
        "userPlaceholder": {"enabled": SWITCH, "replicas": int},
    },
}


def assert_within(given: dict, known: dict, where: str) -> None:
    """Every name of `given` is known, and what it has is of the known kind."""
    for name, value in given.items():
        assert name in known, f"{where}.{name}"
        if isinstance(known[name], dict):
            assert_within(value, known[name], f"{where}.{name}")
        else:
            assert isinstance(value, known[name]), f"{where}.{name}"
