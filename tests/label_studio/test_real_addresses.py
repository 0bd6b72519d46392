"""A real Label Studio that calls itself otherwise than the backend does: its images are had all the same."""

from __future__ import annotations

import pytest
from PIL import Image

from ppal_backend.datasets.images import ImageCache
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.image_source import ImageSource
from ppal_backend.rig.label_studio_server import LabelStudioServer, free_port
from ppal_backend.settings import load_settings
from tests.conftest import ROOT

pytestmark = pytest.mark.e2e

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="Cat"/></RectangleLabels></View>"""


@pytest.mark.parametrize("host", ["http://localhost:{port}", "http://people.test/label-studio"])
def test_images_of_a_label_studio_with_another_name(tmp_path, host):
    """Tasks of local files name ``localhost`` or a path in front of it: refused as a foreign host, 401 or 404."""
    port, files = free_port(), tmp_path / "files"
    (files / "a").mkdir(parents=True)
    Image.new("RGB", (30, 20), (200, 10, 10)).save(files / "a" / "one.png")
    Image.new("RGB", (20, 30), (10, 200, 10)).save(tmp_path / "two.png")
    host = host.format(port=port)
    environment = {"HOST": host, "LOCAL_FILES_SERVING_ENABLED": "true", "LOCAL_FILES_DOCUMENT_ROOT": str(files)}
    server = LabelStudioServer(
        ROOT / ".venv-label-studio" / "bin" / "label-studio",
        tmp_path / "label-studio",
        port=port,
        template_cache=load_settings().cache_dir / "label-studio",
        environment=environment,
    )
    with server:
        project = server.create_project("two names", CONFIG)
        server.import_images(project, [tmp_path / "two.png"])
        storage = {"project": project, "path": str(files / "a"), "use_blob_urls": True}
        made = server.session.post("/api/storages/localfiles", json=storage)
        server.session.post(f"/api/storages/localfiles/{made['id']}/sync")
        client = LabelStudioClient(server.url, server.token, other_urls=[host])
        tasks = dict(client.unlabelled_tasks(project))
        assert any(data["image"].startswith(host) for data in tasks.values()), "no task names it otherwise"
        images = ImageCache(tmp_path / "cache", ImageSource(client), namespace=client.url)
        sizes = {(info.width, info.height) for i, data in tasks.items() for info in [images.get(i, data["image"])]}
        assert sizes == {(30, 20), (20, 30)}
