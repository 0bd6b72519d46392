"""What polls keep right in Label Studio, against a double that behaves as 1.24 will: it counts failed deliveries."""

import json

import httpx
import pytest
from pydantic import SecretStr

from ppal_backend.label_studio.publish import QueueItem, publish
from ppal_backend.operations import upkeep
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import Settings
from ppal_backend.store import Lease, ModelVersion, SeenAnnotation, open_store
from ppal_backend.worker import sync
from ppal_backend.worker.sync import RemoteProjects, Synchroniser
from tests.doctor.conftest import BACKEND, CONFIG, LabelStudio

GUARDED = {"basic_auth_user": "ls", "basic_auth_pass": SecretStr("a-long-password")}


class NextLabelStudio(LabelStudio):
    """Switches a webhook off after 50 deliveries that failed; activating it again starts the count anew."""

    def __init__(self):
        super().__init__()
        self.project |= {"task_number": 2, "num_tasks_with_annotations": 0}

    def fail_deliveries(self, count=50):
        hook = self.hooks[0]
        hook["consecutive_failures"] = hook.get("consecutive_failures", 0) + count
        hook["is_active"] = hook["consecutive_failures"] < 50

    def _webhooks(self, request, body):
        answer = super()._webhooks(request, body)
        if request.method == "PATCH" and body.get("is_active"):
            answer.json()  # read before it changes
            self.hooks[0]["consecutive_failures"] = 0
        return answer


@pytest.fixture
def world(tmp_path, monkeypatch):
    class World:
        server = NextLabelStudio()
        settings = Settings(LABEL_STUDIO_API_KEY="k", LABEL_STUDIO_URL="http://ls.test:8080", MODEL_DIR=tmp_path)

        def poll(self, **changes):
            """Poll once; what is wrong afterwards, by topic."""
            self.settings = self.settings.model_copy(update=changes)
            remote = RemoteProjects(self.settings, self.store)
            Synchroniser(self.store, self.settings, remote, lambda project_id: None).poll(1)
            return self.store.projects.get(1).problems

        def publish(self, task_ids=(2, 1), number=1):
            for task_id in set(task_ids) - set(self.server.tasks):
                self.server.add_task(task_id)
            version = publish(self.server.client(), 1, f"r{number}", [QueueItem(i) for i in task_ids]).version
            self.store.versions.activate(ModelVersion(1, version, number, "d", "", ("Cat",), None, {}))
            folder = tmp_path / "projects" / "1" / "rounds" / str(number)
            folder.mkdir(parents=True)
            (folder / "query_set.json").write_text(json.dumps({"queue": list(task_ids)}))
            return version

        def patches(self):
            return [json.loads(r.content) for r in self.server.requests
                    if (r.method, r.url.path) == ("PATCH", "/api/projects/1/")]  # fmt: skip

    world = World()
    world.server.connect()
    world.store = open_store(world.settings)
    monkeypatch.setattr(sync, "open_client", lambda *args, **options: world.server.client(tries=1))
    world.store.projects.connect(1, "1.5", CONFIG, "http://ls.test:8080", {})
    yield world
    world.store.close()


class TestQueue:
    @pytest.mark.parametrize("shown", ["", None, "PPAL", "ppal-older"])
    def test_a_model_version_that_nobody_chose_is_set_right_within_a_poll(self, world, shown):
        world.store.versions.activate(ModelVersion(1, "ppal-older", 0, "d", "", (), None, {}))
        version = world.publish()
        world.server.project["model_version"] = shown  # what switching prelabelling off, or connecting anew, does
        assert world.poll() == {}
        assert world.server.project["model_version"] == version and world.server.served() == [2, 1]

    def test_who_switches_prelabelling_off_twice_is_told_and_not_fought(self, world):
        world.publish()
        for _ in range(2):
            world.server.project["model_version"] = ""
            problems = world.poll()
        assert "tasks come in random order" in problems["queue"] and "so it stays" in problems["queue"]
        assert "prelabel" in problems["queue"].rpartition("; ")[2]
        assert world.poll()["queue"] == problems["queue"], "and again nothing is changed"
        assert world.server.project["model_version"] == ""

    def test_the_next_version_is_set_right_again(self, world):
        world.publish()
        for _ in range(2):
            world.server.project["model_version"] = ""
            world.poll()
        second = world.publish(number=2)
        assert world.poll() == {}
        world.server.project["model_version"] = ""
        assert world.poll() == {} and world.server.project["model_version"] == second

    def test_another_model_that_somebody_chose_is_told_and_left(self, world):
        version = world.publish()
        world.server.predictions.append({"task": 1, "score": 0.5, "model_version": "yolo-v8"})
        world.server.project["model_version"] = "yolo-v8"
        world.server.requests.clear()
        assert f"shows 'yolo-v8', not the version in force {version!r}" in world.poll()["queue"]
        assert world.patches() == []

    def test_the_live_model_beside_another_one_may_have_been_chosen(self, world):
        world.publish()
        world.server.connect("http://yolo.local:9090", hook=False, title="YOLO")
        world.server.project["model_version"] = "YOLO"
        assert "shows the live model" in world.poll()["queue"]
        assert world.server.project["model_version"] == "YOLO"

    def test_sampling_is_set_right_once(self, world):
        world.publish()
        world.server.project["sampling"] = "Sequential sampling"
        assert world.poll() == {} and world.server.project["sampling"] == "Uncertainty sampling"
        world.server.project["sampling"] = "Uniform sampling"
        assert "'Uniform sampling'" in world.poll()["queue"]
        assert world.server.project["sampling"] == "Uniform sampling"

    def test_a_sampling_that_people_insist_on_is_left_by_the_next_round_too(self, world):
        world.publish()
        assert not upkeep.keeps_own_sampling(world.store.projects.get(1))
        for _ in range(2):
            world.server.project["sampling"] = "Sequential sampling"
            world.poll()
        assert upkeep.keeps_own_sampling(world.store.projects.get(1))
        client = world.server.client()
        version = publish(client, 1, "r2", [QueueItem(1), QueueItem(2)], set_sampling=False).version
        assert world.server.project["sampling"] == "Sequential sampling"
        assert world.server.project["model_version"] == version
        world.server.project["sampling"] = "Uncertainty sampling"  # a person changed his mind
        world.poll()
        assert not upkeep.keeps_own_sampling(world.store.projects.get(1))

    def test_both_at_once_are_told_together(self, world):
        world.publish()
        world.server.project |= {"sampling": "Sequential sampling", "model_version": ""}
        told = world.poll(repair_queue=False)["queue"]
        assert "'Sequential sampling'" in told and "random order" in told

    def test_the_setting_off_only_tells(self, world):
        world.publish()
        world.server.project["model_version"] = ""
        world.server.requests.clear()
        for _ in range(2):
            assert "random order" in world.poll(repair_queue=False)["queue"]
        assert world.patches() == []
        world.server.project["model_version"] = world.store.versions.active(1).version
        assert world.poll() == {}, "and it is taken back once it is right"

    def test_a_round_that_publishes_is_not_interfered_with(self, world):
        world.publish()
        record = world.store.rounds.request(1, "rank", "test")
        world.store.rounds.claim(1, Lease.mine())
        world.store.rounds.report(record.id, "publish", {})
        world.server.predictions.append({"task": 1, "score": 0.5, "model_version": "ppal-r2-new"})
        world.server.project["model_version"] = "ppal-r2-new"
        world.server.requests.clear()
        assert world.poll() == {}
        assert world.patches() == []

    def test_a_version_that_ranks_nothing_asks_for_nothing(self, world):
        world.store.versions.activate(ModelVersion(1, "ppal-p1-r1-empty", 1, "", "", (), None, {}))
        world.server.project["model_version"] = ""
        assert world.poll() == {}

    def test_a_refusal_is_told_and_the_rest_of_the_poll_stands(self, world):
        world.publish()
        world.server.project["model_version"] = ""
        world.server.fault = lambda r: (
            httpx.Response(403, json={"detail": "no rights"}) if r.method == "PATCH" else None
        )
        assert "no rights" in world.poll()["queue"]
        assert world.store.projects.get(1).polled_at is not None


class TestWebhook:
    @pytest.mark.parametrize("public_url", ["", BACKEND])
    def test_one_that_switched_itself_off_comes_back_every_time(self, world, public_url):
        for _ in range(3):
            world.server.fail_deliveries()
            assert world.server.hooks[0]["is_active"] is False
            assert world.poll(public_url=public_url) == {}
            assert world.server.hooks[0]["is_active"] is True
        assert len(world.server.hooks) == 1

    def test_one_that_a_person_switches_off_twice_stays_off_and_is_told(self, world):
        for topics in ([], ["webhook"]):
            world.server.hooks[0]["is_active"] = False
            assert list(world.poll()) == topics
        assert world.server.hooks[0]["is_active"] is False
        assert "switched off" in world.poll()["webhook"]
        world.server.hooks[0]["is_active"] = True
        assert world.poll() == {}

    def test_one_without_our_token_gets_it(self, world):
        world.server.connections[0] |= {"auth_method": "BASIC_AUTH", "basic_auth_user": "ls"}
        assert world.poll(**GUARDED) == {}
        token = webhook_token(world.settings, 1)
        assert world.server.hooks[0]["headers"] == {"Authorization": f"Bearer {token}"}

    @pytest.mark.parametrize("row", [{"basic_auth_user": "somebody-else"}, None])
    def test_anothers_webhook_is_not_touched(self, world, row):
        """Whose address it is nobody knows: two connections, or one that calls with another name."""
        world.server.fail_deliveries()
        if row is None:
            world.server.connect("http://other.local:9090", hook=False)
        else:
            world.server.connections[0] |= row
        assert "after 50 failed deliveries" in world.poll()["webhook"]
        assert world.server.hooks[0]["is_active"] is False

    def test_one_that_is_gone_is_made_again_once(self, world):
        world.server.hooks.clear()
        assert world.poll(public_url=BACKEND) == {}
        assert [hook["url"] for hook in world.server.hooks] == [f"{BACKEND}/webhook"]
        world.server.hooks.clear()
        assert "no webhook" in world.poll(public_url=BACKEND)["webhook"] and world.server.hooks == []

    def test_credentials_in_the_address_are_credentials(self, world):
        world.server.hooks[0]["url"] = "http://ls:a-long-password@ppal.local:9090/webhook"
        assert world.poll(**GUARDED) == {}


class TestServedOrder:
    QUEUE = tuple(range(1000, 1300))

    def annotate(self, world, task_ids):
        world.store.ledger.see(1, [SeenAnnotation(task_id, task_id) for task_id in task_ids])
        world.server.project["num_tasks_with_annotations"] = len(task_ids)
        for task_id in task_ids:
            row = {"id": task_id, "created_at": "", "updated_at": "", "was_cancelled": False}
            world.server.add_task(task_id, [row])

    def test_tasks_from_the_front_are_as_published(self, world):
        world.publish(self.QUEUE)
        self.annotate(world, self.QUEUE[:20])
        assert world.poll() == {}

    def test_an_order_of_its_own_is_told(self, world):
        """Label Studio Enterprise with several annotators picks at random."""
        version = world.publish(self.QUEUE)
        self.annotate(world, self.QUEUE[::15])
        told = world.poll()["order"]
        assert f"16 of the first 20 tasks annotated since {version} was published stood behind place 60" in told
        assert "Label Tasks As Displayed" in told
        assert world.poll()["order"] == told, "it stays until the next queue"
        world.publish(self.QUEUE, number=2)
        assert world.poll() == {}

    def test_few_annotations_or_a_short_queue_tell_nothing(self, world):
        world.publish(self.QUEUE)
        self.annotate(world, self.QUEUE[:19:-15])
        assert world.poll() == {}

    def test_a_short_queue_tells_nothing(self, world):
        world.publish(self.QUEUE[:100])
        self.annotate(world, self.QUEUE[99:79:-1])
        assert world.poll() == {}

    def test_what_was_annotated_before_the_queue_does_not_count(self, world):
        self.annotate(world, self.QUEUE[::-10])
        world.publish(self.QUEUE)
        assert world.poll() == {}
        assert len(world.store.ledger.usable(1)) == 30
