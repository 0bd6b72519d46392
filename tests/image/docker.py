"""Docker's engine from Debian's packages and the images that the Compose file names, without a registry.

The engine is unpacked, not installed, and runs on a socket and data folder of its own; it changes no firewall rule of
the machine (no iptables, no default bridge). Images of others have stand-ins, built by buildah from the same base with
Debian's PostgreSQL and Redis and the pinned Label Studio: their names, users, ports, folders and variables are the real
images' own. Needs root, a control group hierarchy, ``iptables`` and ``docker-compose`` or ``docker compose``.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from ppal_backend.launcher import dies_with_parent
from tests.image.buildah import BASE, ROOT
from tests.servers import wait_for

PACKAGES = ("docker.io", "containerd", "runc", "tini")
NO_START = "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d"
INSTALL = "apt-get update && apt-get install -y --no-install-recommends"
POSTGRES_ENTRY = """#!/bin/bash
set -eu
export PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if [ "$(id -u)" = 0 ]; then
    chown postgres "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups bash "$0"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    echo "$POSTGRES_PASSWORD" >/tmp/password
    initdb -U "$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 -E UTF8
    rm /tmp/password
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    pg_ctl -w start -o "-c listen_addresses=''"
    createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
    for script in /docker-entrypoint-initdb.d/*.sh; do sh "$script"; done
    pg_ctl -w stop
fi
exec postgres -c "listen_addresses=*"
"""
STAND_INS = {
    "postgres:17-alpine": f"""FROM {BASE}
RUN {NO_START} && {INSTALL} postgresql
COPY entry.sh /entry.sh
ENV PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
CMD ["bash", "/entry.sh"]
""",
    "redis:7-alpine": f"""FROM {BASE}
RUN {NO_START} && {INSTALL} redis-server && install -d -o redis -g redis /data
WORKDIR /data
VOLUME /data
""",
    "heartexlabs/label-studio:1.23.2": f"""FROM {BASE}
RUN useradd --uid 1001 --gid 0 label-studio && install -d -o 1001 -g 0 /label-studio/data
WORKDIR /opt/label-studio
COPY requirements-label-studio.txt ./
COPY setup.sh versions.env scripts/
RUN scripts/setup.sh label-studio
ENV PATH=/opt/label-studio/.venv-label-studio/bin:$PATH HOME=/label-studio \\
    LABEL_STUDIO_BASE_DATA_DIR=/label-studio/data COLLECT_ANALYTICS=false \\
    LATEST_VERSION_CHECK=false SENTRY_DSN= FRONTEND_SENTRY_DSN=
USER 1001
VOLUME /label-studio/data
CMD ["label-studio", "start", "--no-browser", "--internal-host", "0.0.0.0", "--port", "8080"]
""",
}


def what_is_missing():
    """Why Compose cannot be run here; empty where it can."""
    if compose_command() is None:
        return "expected docker-compose, got none (apt-get install --no-install-recommends docker-compose)"
    if shutil.which("iptables") is None:
        return "expected iptables, with which Docker resolves names inside containers (apt-get install iptables)"
    if not Path("/sys/fs/cgroup").is_mount():
        return "expected control groups at /sys/fs/cgroup, got none"
    return ""


def compose_command():
    """The words before Compose's own, or None."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = (
        subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if shutil.which("docker")
        else None
    )
    return ["docker", "compose"] if plugin is not None and plugin.returncode == 0 else None


def build_stand_ins(buildah, folder):
    """Names of the stand-ins in buildah's store, by the name of the image each stands for."""
    built = {}
    for name, text in STAND_INS.items():
        context = folder / name.split(":")[0].replace("/", "-")
        context.mkdir(parents=True)
        (context / "Dockerfile").write_text(text)
        (context / "entry.sh").write_text(POSTGRES_ENTRY)
        for file in ("requirements-label-studio.txt", "scripts/setup.sh", "scripts/versions.env"):
            shutil.copy2(ROOT / file, context)  # its date counts for what buildah built before
        built[name] = f"localhost/ppal-test-{context.name}"
        buildah(
            "bud",
            "--format=docker",
            "--isolation=chroot",
            "--layers",
            *buildah.indexes(),
            "-t",
            built[name],
            str(context),
        )
    return built


class Engine:
    """A running dockerd.

    Args:
        packages: folder for the unpacked packages; they are fetched when it is empty.
        folder: for images, containers and volumes; short, since sockets lie in it.
    """

    def __init__(self, packages, folder):
        self.packages, self.folder = packages, folder
        # Compose takes a variable of its own environment before that of .env: the tests' own settings stay outside.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PPAL_", "COMPOSE_"))}
        self.environment = {**inherited, "DOCKER_HOST": f"unix://{folder}/docker.sock",
                            "PATH": f"{packages}/usr/bin:{packages}/usr/sbin:{os.environ['PATH']}"}  # fmt: skip

    def start(self):
        if not (self.packages / "usr/sbin/dockerd").is_file():
            fetched = self.packages / "fetched"
            fetched.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=fetched, check=True, capture_output=True)
            for package in fetched.glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(package), str(self.packages)], check=True)
            shutil.rmtree(fetched)
        self.folder.mkdir(exist_ok=True)
        options = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        command = ["dockerd", f"--host=unix://{self.folder}/docker.sock",
                   "--iptables=false", "--ip-masq=false", "--bridge=none",
                   f"--userland-proxy-path={self.packages}/usr/sbin/docker-proxy",
                   f"--init-path={self.packages}/usr/bin/tini-static",
                   *(f"--{name}={self.folder / value}" for name, value in options.items())]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            options = {"env": self.environment, "stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(command, preexec_fn=dies_with_parent(), **options)
        wait_for(lambda: self("info"), "Docker's engine answers", 60)

    def stop(self):
        """End the engine with what still runs in it, and take its folder away."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for path in reversed([path for path in mounted if path.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(self.folder)

    def __call__(self, *words, **options):
        """What ``docker …`` prints.

        Raises:
            AssertionError: it failed.
        """
        return self.run(["docker", *words], **options)

    def run(self, command, **options):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    def take(self, buildah, image, name):
        """An image of buildah's store, under a name of Docker's."""
        archive = self.folder / "image.tar"
        buildah("push", "-q", image, f"docker-archive:{archive}:{name}")
        self("load", "-q", "-i", str(archive))
        archive.unlink()
