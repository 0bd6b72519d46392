"""Every failure that ``ppal doctor`` can tell of, provoked."""

import io
import urllib.error

import httpx
import pytest
from pydantic import SecretStr

from ppal_backend.doctor import failed, ok, warning
from ppal_backend.doctor.installation import address, usable_host
from ppal_backend.doctor.run import CAUSES, cause_first, diagnose
from ppal_backend.errors import DetectorError, StoreUnavailable
from ppal_backend.service.auth import webhook_token
from ppal_backend.store import Lease, ModelVersion
from ppal_backend.structures.round import DetectorChoice
from tests.doctor.conftest import BACKEND
from tests.label_studio.fake import LEGACY, jwt

GUARDED = {"basic_auth_user": "ls", "basic_auth_pass": SecretStr("a-long-password")}
WITH_AUTH = {"auth_method": "BASIC_AUTH", "basic_auth_user": "ls"}


def test_a_healthy_installation(examine, label_studio, settings):
    token = webhook_token(settings.model_copy(update=GUARDED), 1)
    label_studio.connections[0] |= WITH_AUTH
    label_studio.hooks[0]["headers"] = {"Authorization": f"Bearer {token}"}
    found = examine(**GUARDED)
    assert {check: f.state for check, f in found.items() if f.state != "ok"} == {}
    assert list(found) == [
        "credentials", "database", "worker", "disk", "queue", "detector", "weights", "service", "address",
        "label studio", "token", "clock", "project 1: connection", "project 1: webhook", "project 1: sampling",
        "project 1: model version", "project 1: detector",
    ]  # fmt: skip
    assert "1.23.2" in found["label studio"].seen and "a@example.com" in found["token"].seen
    assert {r.method for r in label_studio.requests if "/token/refresh" not in r.url.path} == {"GET"}  # changes nothing


def test_no_secret_in_any_finding(examine, label_studio):
    from tests.label_studio.fake import PAT

    label_studio.hooks.clear()
    for finding in examine(**GUARDED).values():
        assert "a-long-password" not in f"{finding}" and PAT not in f"{finding}"


def said(finding, state, seen, advice):
    assert (finding.state, seen in finding.seen, advice in finding.advice) == (state, True, True), finding


class TestMachine:
    def test_credentials(self, examine):
        said(examine()["credentials"], "warning", "anybody", "BASIC_AUTH_USER")
        half = examine(basic_auth_user="only")
        said(half["credentials"], "failed", "both set or both unset", "set both")

    def test_database(self, examine, store, monkeypatch):
        monkeypatch.setattr(store.database, "check", lambda: 1 / 0)
        said(examine()["database"], "failed", "does not answer", "log")

    def test_worker(self, examine, store):
        for name in store.workers.ages_s():
            store.workers.leave(name)
        said(examine()["worker"], "failed", "no worker", "ppal worker")

    def test_a_worker_that_has_fallen_silent(self, examine, store, monkeypatch):
        monkeypatch.setattr(store.workers, "age_s", lambda: 90.0)
        said(examine()["worker"], "failed", "a sign of life for 90 s", "start it again")

    def test_whether_a_worker_lives_is_not_known_without_the_database(self, examine, store, monkeypatch):
        def gone():
            raise StoreUnavailable("the state database is locked; try again")

        monkeypatch.setattr(store.workers, "age_s", gone)
        said(examine()["worker"], "failed", "nobody knows while the state database does not answer", "log")

    def test_disk(self, examine):
        said(examine(min_free_gib=2.0**40)["disk"], "failed", "GiB are free", "make room")

    def test_parked_events(self, examine, store):
        store.events.settle(store.events.add(1, "START_TRAINING", {}), "because")
        said(examine()["events"], "warning", "1 events", "log")

    def test_the_bucket(self, examine, tmp_path):
        found = examine(artifacts=f"file://{tmp_path}/bucket")["artifacts"]
        assert found.state == "ok" and list((tmp_path / "bucket").iterdir()) == [], "and nothing is left there"
        (tmp_path / "file").touch()
        said(examine(artifacts=f"file://{tmp_path}/file")["artifacts"], "failed", "to answer", "check that it is up")
        said(examine(artifacts="nosuch://bucket")["artifacts"], "failed", "expected PPAL_ARTIFACTS", "")

    def test_the_queue_is_down(self, examine):
        found = examine(queue_url=SecretStr("redis://:word-4@127.0.0.1:9/0"))["queue"]
        said(found, "failed", "does not answer", "Redis is up")
        assert "word-4" not in f"{found}"

    def test_no_queue_at_all(self, examine):
        said(examine(queue_url=SecretStr("amqp://h"))["queue"], "failed", "another kind", "PPAL_QUEUE_URL")

    def test_service_is_down(self, examine, service):
        service.answer = httpx.ConnectError("refused")
        said(examine()["service"], "failed", f"nothing answers at {BACKEND}/health", "ppal up")

    @pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(404, json={})])
    def test_something_else_is_there(self, examine, service, answer):
        service.answer = answer
        assert examine()["service"].state == "failed"

    def test_another_kind_of_backend_is_there(self, examine, service):
        service.answer = httpx.Response(200, json={"status": "UP", "model_class": "YOLO"})
        said(examine()["service"], "failed", f"something else answers at {BACKEND}/health", "correct PPAL_PUBLIC_URL")

    def test_the_service_is_looked_for_on_this_machine_without_an_address(self, examine, service, label_studio):
        examine(public_url="")
        assert service.asked == "http://127.0.0.1:9090/health"


class TestDetector:
    @pytest.fixture
    def stack(self, settings):
        from ppal_backend.doctor.installation import detector_stack

        return lambda device: detector_stack(settings.model_copy(update={"device": device}))[0]

    def test_mmcvs_operators_run(self, stack):
        said(stack("cpu"), "ok", "operators run on cpu", "")

    def test_no_gpu(self, stack, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        said(stack("cuda"), "failed", "finds none", "DEVICE=cpu")
        said(stack("auto"), "warning", "run on cpu", "GPU")

    @pytest.mark.parametrize("error", [RuntimeError("nms_impl: implementation for device cuda:0 not found"),
                                       ImportError("no _ext")])  # fmt: skip
    def test_operators_that_are_not_compiled(self, stack, monkeypatch, error):
        def broken(*_):
            raise error

        monkeypatch.setattr("mmcv.ops.nms", broken)
        said(stack("cpu"), "failed", str(error), "make setup")

    def test_operators_that_compute_nonsense(self, stack, monkeypatch):
        monkeypatch.setattr("mmcv.ops.nms", lambda boxes, scores, threshold: (boxes, None))
        said(stack("cpu"), "failed", "wrong results", "make setup")

    def test_packages_that_are_missing(self, stack, monkeypatch):
        def broken(device):
            raise ImportError("No module named 'torch'")

        monkeypatch.setattr("ppal_backend.detector.environment.check_environment", broken)
        said(stack("cpu"), "failed", "No module named 'torch'", "make setup")

    def test_a_detector_error_is_told_with_its_advice(self, stack, monkeypatch):
        def broken(device):
            raise DetectorError("it is broken; mend it")

        monkeypatch.setattr("ppal_backend.detector.environment.check_environment", broken)
        said(stack("cpu"), "failed", "it is broken", "mend it")


class TestWeights:
    @pytest.fixture
    def weights(self, settings, tmp_path):
        from ppal_backend.doctor.installation import detector_weights

        empty = {"cache_dir": tmp_path / "cache"}  # which the settings must know as given
        return lambda device="cpu", **changes: detector_weights(settings.model_copy(update=empty | changes), device)

    @pytest.fixture
    def offline(self, monkeypatch):
        def away(*_arguments, **_options):
            raise urllib.error.URLError("no network")

        monkeypatch.setattr("urllib.request.urlopen", away)

    def test_what_new_projects_train(self, weights, monkeypatch):
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
        said(weights(detector="auto"), "ok", "auto: yolox_tiny (trains on a CPU; its weights can be downloaded)", "")
        said(weights("cuda:0", detector="auto"), "ok", "auto: rtmdet_s (trains on a GPU", "")
        said(weights(), "ok", "new projects train retinanet_tiny (named by the settings)", "")

    def test_nothing_but_the_detector_for_trying_out(self, weights, offline, tmp_path):
        seen = (
            "new projects would get retinanet_tiny, which is for trying out and not for photographs (trains on a CPU;"
        )
        advice = f"run `ppal zoo fetch yolox_tiny --from FILE --to {tmp_path / 'cache' / 'weights'}` (FILE: https://"
        said(weights(detector="auto"), "warning", seen, advice)

    def test_a_default_whose_weights_cannot_be_had(self, weights, offline):
        seen = "initial weights of yolox_tiny cannot be had: there is no file"
        said(weights(detector="yolox_tiny"), "failed", seen, "run `ppal zoo fetch yolox_tiny --from FILE")
        said(weights(detector="yolox_tiny", init_weights="random"), "ok", "train yolox_tiny", "")
        said(weights(detector="yolo99"), "failed", "expected a detector of the zoo", "choose one")


class TestProjectsDetector:
    """``project 1: detector``; what it says comes from the state and, for weights, from this machine."""

    @pytest.fixture
    def check(self, examine, store):
        return lambda **changes: examine(**changes)["project 1: detector"]

    def test_one_that_is_named_or_not_chosen_yet(self, check, store):
        said(check(), "ok", "retinanet_tiny (named by the settings)", "")
        assert "the first round chooses it" in check(detector="auto").seen

    def test_the_one_for_trying_out(self, check, store, monkeypatch):
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
        store.projects.set_choice(1, DetectorChoice("retinanet_tiny", "trial", "trains on a CPU", "cpu"))
        seen = "retinanet_tiny was made for trying out; it will not work on photographs (trains on a CPU)"
        said(check(detector="auto"), "warning", seen, "the next round then changes over by itself")

    def test_weights_that_went_missing(self, check, store, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        store.projects.set_choice(1, DetectorChoice("yolox_nano", "rule", "trains on a CPU", "cpu"))
        seen = "the initial weights of yolox_nano cannot be had: there is no file"
        said(check(detector="auto"), "failed", seen, "run `ppal zoo fetch yolox_nano --from FILE")

    def test_what_another_machine_said_of_its_weights(self, check, store, monkeypatch):
        store.workers.leave(str(Lease.mine()))
        store.workers.beat("elsewhere:1:2.00")
        assert check().state == "ok"
        store.projects.set_problem(1, "detector", "the initial weights of x cannot be had: there is no file; get it")
        said(check(), "failed", "the initial weights of x cannot be had", "get it")


class TestAddress:
    @pytest.mark.parametrize("url", ["http://ppal:9090", "http://ml_backend.local:9090", "http://vm"])
    def test_names_without_a_webhook(self, url):
        assert "no webhook" in usable_host(url) or "makes no webhook" in usable_host(url)
        said(address(url), "failed", "no dot", "name with a dot")

    @pytest.mark.parametrize(
        "url", ["http://localhost:9090", "http://10.0.0.5:9090", "http://[::1]:9090", "https://ppal.example.com"]
    )
    def test_names_that_work(self, url):
        assert usable_host(url) == ""

    def test_the_whole_examination_looks_at_the_address(self, examine):
        said(examine(public_url="http://ppal:9090")["address"], "failed", "no dot", "give the backend a name")

    def test_unset(self):
        said(address(""), "warning", "PPAL_PUBLIC_URL", "ppal.local")

    def test_unknown_here(self):
        def unknown(host, port):
            raise OSError

        said(address(BACKEND, unknown), "warning", "cannot be resolved", "correct PPAL_PUBLIC_URL")

    def test_private_networks_name_label_studios_switches(self):
        assert (
            "ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"
            in address(BACKEND, lambda *_: ["10.0.0.5"]).seen
        )
        assert "SSRF" not in address(BACKEND, lambda *_: ["93.184.216.34"]).seen


class TestLabelStudio:
    def test_down(self, examine, label_studio):
        def down(request):
            raise httpx.ConnectError("refused")

        label_studio.fault = down
        found = examine()
        said(found["label studio"], "failed", "cannot reach Label Studio at http://ls.test:8080", "check that it is up")
        assert "token" not in found and "project 1: webhook" not in found

    def test_something_else_answers(self, examine, label_studio):
        label_studio.release = ""
        said(examine()["label studio"], "failed", "tells no version", "LABEL_STUDIO_URL")

    def test_an_old_version(self, examine, label_studio):
        label_studio.release = "1.9.1"
        said(examine()["label studio"], "warning", "1.9.1", "tested with 1.23")
        label_studio.release = "2.0.0"
        assert examine()["label studio"].state == "ok"

    def test_a_token_that_was_revoked(self, examine):
        said(examine(jwt("refresh", tag="revoked"))["label studio"], "failed", "refused", "create a new one")

    def test_a_legacy_token_where_they_are_switched_off(self, examine, label_studio):
        label_studio.fault = lambda request: (
            httpx.Response(401, json={"detail": "legacy token authentication has been disabled"})
            if "whoami" in request.url.path
            else None
        )
        found = examine(LEGACY)
        said(found["token"], "failed", "legacy token authentication has been disabled", "personal access token")
        assert "project 1: webhook" not in found

    def test_a_legacy_token_that_works(self, examine):
        said(examine(LEGACY)["token"], "warning", "legacy token", "personal access token")

    def test_no_token(self, settings, store, service):
        chosen = settings.model_copy(update={"label_studio_api_key": SecretStr(""), "device": "cpu"})
        found = {f.check: f for f in diagnose(chosen, store)}
        said(found["settings"], "failed", "LABEL_STUDIO_API_KEY", "set it")

    def test_an_access_token_in_its_place(self, settings, store, service):
        chosen = settings.model_copy(update={"label_studio_api_key": SecretStr(jwt("access"))})
        found = {f.check: f for f in diagnose(chosen, store)}
        said(found["token"], "failed", "lives five minutes", "LABEL_STUDIO_API_KEY")

    @pytest.mark.parametrize(("clock_s", "which"), [(600, "behind"), (-600, "ahead of")])
    def test_clocks_that_differ(self, examine, label_studio, clock_s, which):
        label_studio.clock_s = clock_s
        said(examine()["clock"], "failed", f"s {which} Label Studio's", "NTP")

    def test_clocks_that_nearly_agree(self, examine, label_studio):
        label_studio.clock_s = 20
        assert examine()["clock"].state == "ok"

    def test_label_studio_goes_away_meanwhile(self, examine, label_studio):
        asked = []

        def down(request):
            asked.append(request.url.path)
            return httpx.Response(502) if asked.count("/api/version") > 1 else None

        label_studio.fault = down
        said(examine()["clock"], "failed", "502", "try again")

    def test_no_date(self, examine, label_studio):
        label_studio.date = "none"
        said(examine()["clock"], "warning", "no date", "by hand")


class TestProject:
    def test_none_connected(self, examine, store):
        from ppal_backend.store.tables import ProjectRow, VersionRow

        with store.projects._database.transaction() as session:
            session.query(VersionRow).delete()
            session.query(ProjectRow).delete()
        said(examine()["projects"], "failed", "no project", "ppal connect")

    def test_deleted_in_label_studio(self, examine, store):
        store.projects.connect(2, "2.5", "<View/>", "http://ls.test:8080", {})
        said(examine()["project 2"], "failed", "no such project", "connect it again")

    def test_label_studio_fails_in_between(self, examine, label_studio):
        label_studio.fault = lambda request: httpx.Response(500) if "/api/ml" in request.url.path else None
        said(examine()["project 1"], "failed", "500", "try again")

    def test_not_connected_there(self, examine, label_studio):
        label_studio.connections[0]["url"] = "http://other.local:9090"
        found = examine()["project 1: connection"]
        said(found, "failed", "there: http://other.local:9090", "ppal connect")

    def test_connected_twice(self, examine, label_studio):
        label_studio.connect(hook=False)
        said(examine()["project 1: connection"], "warning", "2 connections", "delete all but one")

    def test_a_host_without_a_dot(self, examine, label_studio):
        label_studio.connections[0]["url"] = "http://ppal:9090"
        label_studio.hooks.clear()
        found = examine(public_url="")
        said(found["project 1: connection"], "failed", "no dot", "name with a dot")

    def test_without_credentials(self, examine):
        said(examine(**GUARDED)["project 1: connection"], "failed", "no credentials", "Basic auth")

    def test_the_backend_does_not_answer_label_studio(self, examine, label_studio):
        label_studio.connections[0] |= {"state": "DI", "error_message": "Connection refused"}
        said(
            examine()["project 1: connection"],
            "failed",
            "Label Studio cannot use it: Connection refused",
            "where Label Studio reaches it",
        )

    def test_a_blocked_network(self, examine, label_studio):
        text = "URL resolves to a reserved network address (block: 127.0.0.0/8)"
        label_studio.connections[0] |= {"state": "ER", "error_message": text}
        said(examine()["project 1: connection"], "failed", "reserved network", "SSRF_PROTECTION_ENABLED=false")

    def test_connected_but_no_webhook(self, examine, label_studio):
        """What one of the two switches alone leaves behind."""
        label_studio.hooks.clear()
        said(examine()["project 1: webhook"], "failed", "no webhook", "ML_BLOCK_LOCAL_IP=false")

    def test_no_webhook_and_no_connection(self, examine, label_studio):
        label_studio.hooks.clear()
        label_studio.connections.clear()
        said(examine()["project 1: webhook"], "failed", "no webhook", "host name with a dot")

    @pytest.mark.parametrize(
        ("change", "seen", "advice"),
        [
            ({"is_active": False}, "switched off", "switch it on"),
            ({"send_payload": False}, "no payload", "Send payload"),
            ({"actions": ["TASKS_CREATED"]}, "lacks ANNOTATIONS_CREATED", "ppal connect"),
            ({"url": "http://old.local:9090/webhook"}, "no webhook", "ppal connect"),
        ],
    )
    def test_a_webhook_that_does_not_do(self, examine, label_studio, change, seen, advice):
        label_studio.hooks[0] |= change
        said(examine()["project 1: webhook"], "failed", seen, advice)

    def test_deliveries_that_failed_are_told_before_the_webhook_is_switched_off(self, examine, label_studio):
        label_studio.hooks[0]["consecutive_failures"] = 12
        said(examine()["project 1: webhook"], "warning", "last 12 deliveries failed; after 50 in a row", "its log")
        label_studio.hooks[0] |= {"consecutive_failures": 50, "is_active": False}
        said(examine()["project 1: webhook"], "failed", "switched off after 50 failed deliveries", "ppal connect")

    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer 1.other"}])
    def test_a_webhook_without_our_header(self, examine, label_studio, headers):
        label_studio.hooks[0]["headers"] = headers
        said(examine(**GUARDED)["project 1: webhook"], "failed", "no credentials", "ppal connect")

    def test_all_actions_are_enough(self, examine, label_studio):
        label_studio.hooks[0] |= {"actions": [], "send_for_all_actions": True}
        assert examine()["project 1: webhook"].state == "ok"

    def test_sampling(self, examine, label_studio):
        label_studio.project["sampling"] = "Sequential sampling"
        said(examine()["project 1: sampling"], "failed", "'Sequential sampling'", "uncertainty sampling")

    @pytest.mark.parametrize(
        ("shown", "seen", "advice"),
        [
            ("", "random order", "prelabel"),
            (None, "random order", "ppal round 1 --rank"),
            ("PPAL", "live model", "ppal round 1 --rank"),
            ("ppal-1-r0", "not the version in force 'ppal-1-r1'", "ppal round 1 --rank"),
        ],
    )
    def test_model_version(self, examine, label_studio, shown, seen, advice):
        label_studio.project["model_version"] = shown
        said(examine()["project 1: model version"], "failed", seen, advice)

    def test_a_version_that_ranks_nothing_is_shown_by_nobody(self, examine, store, label_studio):
        empty = "ppal-p1-r2-empty"
        store.versions.activate(ModelVersion(1, empty, 2, "retinanet_tiny", "x.pth", ("Cat",), None, {}))
        label_studio.project["model_version"] = ""
        said(examine()["project 1: model version"], "ok", empty, "")

    def test_no_round_yet(self, examine, store, label_studio):
        store.projects.connect(
            1, "1.6", "<View/>", "http://ls.test:8080", {}
        )  # another project: everything is forgotten
        said(examine()["project 1: model version"], "warning", "no round", "ppal status")

    def test_trouble_that_the_worker_met(self, examine, store):
        store.projects.set_problem(1, "poll", "Label Studio answered 500; try again")
        store.projects.set_problem(1, "webhook", "of yesterday; gone")
        store.projects.set_problem(1, "queue", "of yesterday; gone")
        store.projects.set_problem(1, "order", "tasks come in another order; label with Label All Tasks")
        store.projects.set_problem(1, "images", "none of the 4 images can be used: gone (4 x); make them readable")
        store.projects.set_problem(1, "annotations", "left out of the training: 2 regions; correct these annotations")
        found = examine()
        said(found["project 1: images"], "failed", "none of the 4 images can be used", "make them readable")
        said(found["project 1: annotations"], "warning", "left out of the training: 2 regions", "correct these")
        said(found["project 1: poll"], "failed", "Label Studio answered 500", "try again")
        said(found["project 1: order"], "failed", "another order", "Label All Tasks")
        assert found["project 1: webhook"].state == "ok" and "project 1: queue" not in found

    def test_a_failed_round(self, examine, store):
        record = store.rounds.request(1, "train", "test")
        store.rounds.claim(1, Lease.mine())
        store.rounds.fail(record.id, "only 1 image is annotated")
        said(examine()[f"project 1: round {record.number}"], "failed", "only 1 image", "ppal round")


def test_the_cause_is_named_before_what_comes_of_it():
    found = [ok("credentials", "x"), warning("token", "x", "y"), failed("project 1: webhook", "x", "y"),
             failed("worker", "x", "y"), failed("service", "x", "y"), ok("disk", "x")]  # fmt: skip
    assert [f.check for f in cause_first(found)] == [
        "service", "worker", "project 1: webhook", "token", "credentials", "disk",
    ]  # fmt: skip


def test_every_check_has_its_place(examine):
    checks = [check for check in examine() if not check.startswith("project ")]
    assert set(checks) <= set(CAUSES)
