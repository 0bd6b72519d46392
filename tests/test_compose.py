"""The compose file, its example of settings and the image say the same as the code."""

import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import yaml

from ppal_backend.settings import Settings
from tests.servers import wait_for

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
EXAMPLE = dict(
    line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
)
OURS = ("ppal", "worker", "ppal-gpu", "worker-gpu", "ppal-ray", "worker-ray")
SETUP = "scripts/setup.sh"
NOT_SETTINGS = {"RAY_USAGE_STATS_ENABLED"}


def names_of_settings():
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        yield from alias.choices if hasattr(alias, "choices") else [alias or f"PPAL_{name.upper()}"]


def test_our_variables_are_settings():
    for name in OURS:
        assert set(SERVICES[name]["environment"]) - NOT_SETTINGS <= set(names_of_settings())


def test_every_variable_of_the_file_is_in_the_example_or_has_a_default():
    for name, rest in re.findall(r"(?<!\$)\$\{(\w+)(:[-?])?", TEXT):
        assert name in EXAMPLE or rest == ":-", name


def test_no_password_is_shipped():
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert required == {"POSTGRES_PASSWORD", "PPAL_DB_PASSWORD", "REDIS_PASSWORD", "BASIC_AUTH_PASS"}
    assert all(EXAMPLE[name] == "" for name in required)
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            assert "PASS" not in name or value.startswith("${"), name


def test_label_studio_reaches_a_backend_with_a_dot_in_its_name():
    for name in ("ppal", "ppal-gpu", "ppal-ray"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["ppal.local"]
        assert SERVICES[name]["environment"]["PPAL_PUBLIC_URL"] == "http://ppal.local:9090"
    switches = SERVICES["label-studio"]["environment"]
    assert (switches["ML_BLOCK_LOCAL_IP"], switches["SSRF_PROTECTION_ENABLED"]) == ("false", "false")


def test_people_and_the_backend_reach_label_studio_by_an_address_of_their_own():
    """Label Studio's pages load their scripts from LABEL_STUDIO_HOST: no browser knows the name inside."""
    for_people = "${LABEL_STUDIO_PUBLIC_URL:-http://localhost:8080}"
    assert SERVICES["label-studio"]["environment"]["LABEL_STUDIO_HOST"] == for_people
    for name in OURS:
        assert SERVICES[name]["environment"]["LABEL_STUDIO_PUBLIC_URL"] == for_people
        assert SERVICES[name]["environment"]["LABEL_STUDIO_URL"] == "http://label-studio.local:8080"
    assert EXAMPLE["LABEL_STUDIO_PUBLIC_URL"] == "http://localhost:${LABEL_STUDIO_PORT}", "it follows the port"
    assert list(EXAMPLE).index("LABEL_STUDIO_PORT") < list(EXAMPLE).index("LABEL_STUDIO_PUBLIC_URL")


def test_everything_has_a_health_check_and_listens_on_this_machine_only():
    for name, service in SERVICES.items():
        assert "healthcheck" in service or name in ("ppal", "ppal-gpu", "ppal-ray"), name  # theirs is the image's
        for port in service.get("ports", ()):
            assert ":-127.0.0.1}" in port


def test_profiles():
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "label-studio": None, "postgres": None, "redis": None,
        "ppal": ["cpu"], "worker": ["cpu"], "ppal-gpu": ["gpu"], "worker-gpu": ["gpu"],
        "ppal-ray": ["ray"], "worker-ray": ["ray"], "ray-head": ["ray"], "ray-node": ["ray"],
    }  # fmt: skip
    for name in ("ppal-gpu", "worker-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert SERVICES[name]["environment"]["DEVICE"] == "cuda"


def test_the_ray_cluster_has_one_address_and_no_secret():
    worker, head, node = (SERVICES[name] for name in ("worker-ray", "ray-head", "ray-node"))
    address = worker["environment"]["RAY_ADDRESS"]
    assert worker["environment"]["PPAL_ENGINE"] == "ray" and address == "ray-head:6379"
    assert "--head" in head["command"] and f"--port={address.split(':')[1]}" in head["command"]
    for command in (node["command"], worker["command"][2].split()):
        assert f"--address={address}" in command, "all join the same head"
    for name in ("ray-head", "ray-node"):
        assert set(SERVICES[name]["environment"]) == NOT_SETTINGS and "ports" not in SERVICES[name]
        assert SERVICES[name]["volumes"] == worker["volumes"], "trainings write to the worker's folder"
    starting = worker["command"][2].split("&&")[0]
    hidden = {name for name, value in worker["environment"].items() if "PASS" in str(value) or "KEY" in str(value)}
    assert hidden == set(re.findall(r"-u (\w+)", starting)), "what Ray starts inherits its environment"
    assert all(SERVICES[name]["build"]["args"]["RAY"] == "1" for name in ("worker-ray", "ray-head", "ray-node"))
    (device,) = node["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "deploy" not in head


def test_a_workers_health_is_asked_by_a_command_there_is():
    from typer.testing import CliRunner

    from ppal_backend.cli import app

    for name in ("worker", "worker-gpu", "worker-ray"):
        kind, program, *words = SERVICES[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "ppal")
        assert words[1] in CliRunner().invoke(app, [words[0], "--help"]).output


def is_ignored(path):
    """Whether .dockerignore keeps a file from the build: the last line that fits it or a folder above it says so."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").removeprefix("**/")
        if line and not line.startswith("#"):
            above = [path, *path.parents][:-1]
            names = {str(p) for p in above} | ({p.name for p in above} if "**/" in line else set())
            if any(fnmatch(name, pattern) for name in names):
                ignored = not line.startswith("!")
    return ignored


def copied():
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            yield from line.split()[1:-1]


def test_everything_that_is_copied_into_the_image_reaches_its_build():
    files = [path.relative_to(ROOT) for name in copied() for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    assert {"requirements-ray.txt", "requirements-s3.txt", "pyproject.toml"} <= {str(path) for path in files}
    left_out = {str(path) for path in files if is_ignored(path) and "__pycache__" not in path.parts}
    assert {path.split("/")[1] for path in left_out} == {"demo", "rig"}, "they need a checkout"
    for name in re.findall(r"requirements[\w-]*\.txt", (ROOT / SETUP).read_text()):
        assert name in copied() or name in ("requirements-dev.txt", "requirements-label-studio.txt")
    # A change of them must not install the packages again.
    assert is_ignored(Path("README.md")) and is_ignored(Path("docs"))
    assert all(is_ignored(Path(name)) for name in (".env", ".git", "ppal.toml", "tests", "demo-run"))


def test_toolkit_torch_and_gpus_of_the_image_fit_together():
    """torch 2.13 is built for CUDA 12.6, 13.0 and 13.2; the compiler must be of the same version."""
    for name in ("Dockerfile", "docker-compose.yml", "docs/gpu.md"):
        text = (ROOT / name).read_text()
        toolkits = set(re.findall(r"nvidia/cuda:(\d+\.\d+)\.\d+-(?:devel|base)", text))
        builds = set(re.findall(r"/whl/cu(\d+)", text))
        assert {version.replace(".", "") for version in toolkits} == builds <= {"126", "130", "132"}, name
    assert "nvidia/cuda:12.6.3-devel" in TEXT and "nvidia/cuda:12.6.3-base" in TEXT
    told = (ROOT / "docs/gpu.md").read_text()
    for name, argument in SERVICES["ppal-gpu"]["build"]["args"].items():
        for variable in re.findall(r"\$\{(\w+)", argument):
            assert f"`{variable}`" in told, f"how to choose {name} with Compose"


def test_torch_knows_the_architectures(monkeypatch):
    from torch.utils import cpp_extension

    (line,) = [row for row in (ROOT / "scripts/versions.env").read_text().splitlines() if "CUDA_ARCHITECTURES" in row]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", line.split("=")[1].strip('"'))
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    assert set(re.findall(r",code=(\w+)", flags)) == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"}


def test_redis_itself_is_sent_the_signal_to_stop(tmp_path):
    """Its shell is gone, or the signal would end at the shell and Redis be killed after ten seconds."""
    redis = tmp_path / "redis-server"
    redis.write_text("#!/bin/sh\n[ \"$1\" = - ] && cat >config\ntrap 'echo saved >saved; exit 0' TERM\n"
                     "touch ready\nwhile :; do sleep 0.05; done\n")  # fmt: skip
    redis.chmod(0o755)
    command = [word.replace("$$", "$") for word in SERVICES["redis"]["command"]]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "pass$word"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "ready").exists(), "it runs", 20)
    process.terminate()
    assert process.wait(10) == 0 and (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "config").read_text() == "requirepass pass$word\nappendonly yes\n"
    assert not any("REDIS_PASSWORD}" in word for word in command), "it stands in no command line"


def test_signals_reach_ours_from_the_start_on():
    for name in (*OURS, "ray-head", "ray-node"):
        assert SERVICES[name]["init"] is True


def test_up_starts_a_backend_after_the_example_is_copied():
    assert EXAMPLE["COMPOSE_PROFILES"] == "cpu"
    assert SERVICES["ppal"]["profiles"] == SERVICES["worker"]["profiles"] == ["cpu"]
    assert (EXAMPLE["PPAL_PORT"], EXAMPLE["LABEL_STUDIO_PORT"]) == ("9090", "8080")
    assert SERVICES["ppal"]["ports"] == ["${PPAL_BIND:-127.0.0.1}:${PPAL_PORT:-9090}:9090"]


def test_relative_paths_of_commands_lead_into_the_volume():
    """`ppal backup x.tar` has to land where the image's user may write and where it stays."""
    final = (ROOT / "Dockerfile").read_text().split(" AS runtime")[1]
    assert re.findall(r"^WORKDIR (\S+)", final, re.M)[-1] == re.findall(r"MODEL_DIR=(\S+)", final)[0] == "/data"
    assert final.index("WORKDIR") < final.index("USER 10001"), "made by root, owned by the user that is named before"
    assert "install -d -o ppal -g ppal /data" in final


def test_the_image_runs_as_an_ordinary_user_and_is_built_by_the_same_script():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in final and any(line.startswith("HEALTHCHECK") for line in final)
    assert any("scripts/setup.sh backend" in line for line in lines)
    assert any('if [ "${RAY}" = 1 ]; then scripts/setup.sh ray; fi' in line for line in lines)
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()}
    needed = {name for name in ("requirements.txt", "requirements-ray.txt") if name in (ROOT / SETUP).read_text()}
    assert needed == {"requirements.txt", "requirements-ray.txt"} <= copied


def test_the_kubernetes_example_says_the_same_as_the_compose_file():
    documents = list(yaml.safe_load_all((ROOT / "docs/deploy/kubernetes.yaml").read_text()))
    kinds = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    settings = set(names_of_settings())
    assert set(kinds["ConfigMap", "ppal"]["data"]) <= settings
    address = kinds["ConfigMap", "ppal"]["data"]["PPAL_PUBLIC_URL"]
    assert "." in address.split("/")[2].split(":")[0], "Label Studio makes no webhook for a name without a dot"
    readme = (ROOT / "docs/deploy/README.md").read_text()
    secrets = set(re.findall(r"--from-literal=(\w+)=", readme))
    assert {"LABEL_STUDIO_API_KEY", "BASIC_AUTH_PASS", "PPAL_DATABASE_URL", "PPAL_QUEUE_URL"} <= secrets
    assert secrets <= settings and not secrets & set(kinds["ConfigMap", "ppal"]["data"])
    for name, twin in (("ppal", "ppal"), ("ppal-worker", "worker")):
        deployment = kinds["Deployment", name]["spec"]
        pod = deployment["template"]
        assert deployment["selector"]["matchLabels"] == pod["metadata"]["labels"]
        (container,) = pod["spec"]["containers"]
        assert container["command"] == SERVICES[twin]["command"]
        assert f"{pod['spec']['terminationGracePeriodSeconds']}s" == SERVICES[twin]["stop_grace_period"]
        assert pod["spec"]["securityContext"]["runAsUser"] == pod["spec"]["securityContext"]["fsGroup"] == 10001
        assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
        assert {name for source in container["envFrom"] for name in source} == {"configMapRef", "secretRef"}
    selected = kinds["Service", "ppal"]["spec"]["selector"]
    assert selected == kinds["Deployment", "ppal"]["spec"]["template"]["metadata"]["labels"]
    (service,) = kinds["Deployment", "ppal"]["spec"]["template"]["spec"]["containers"]
    assert service["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert service["livenessProbe"]["httpGet"]["path"] == "/health"
    (worker,) = kinds["Deployment", "ppal-worker"]["spec"]["template"]["spec"]["containers"]
    assert ["CMD", *worker["livenessProbe"]["exec"]["command"]] == SERVICES["worker"]["healthcheck"]["test"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
