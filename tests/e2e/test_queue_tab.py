"""The Data Manager tab on a real Label Studio: it lists the queue in order and follows the next one."""

from dataclasses import replace

import pytest

from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.publish import TAB_TITLE, LabelStudioPublisher
from ppal_backend.rounds.ports import QueueEntry
from tests.place import CONFIG
from tests.rounds.fakes import rank_spec

pytestmark = pytest.mark.e2e


def spec_of(project):
    """A ranking round of a project."""
    return replace(rank_spec(), project_id=project.id)


class Tabs:
    """A project with tasks, and what its Data Manager shows."""

    def __init__(self, server, count):
        self.server, self.session = server, server.session
        self.id = server.create_project("queue tab", CONFIG)
        rows = [{"data": {"image": f"/data/upload/1/{i}.jpg"}} for i in range(count)]
        self.session.post(f"/api/projects/{self.id}/import", json=rows)
        self.client = LabelStudioClient(server.url, server.token)
        self.tasks = list(self.client.task_ids(self.id))

    def publish(self, order):
        spec = replace(rank_spec(), project_id=self.id)
        LabelStudioPublisher(self.client).publish(
            spec, None, [QueueEntry(i, None) for i in order], None, lambda _: None
        )

    def titles(self):
        return [v["data"]["title"] for v in self.session.get("/api/dm/views", params={"project": self.id})]

    def view(self, title=TAB_TITLE):
        views = self.session.get("/api/dm/views", params={"project": self.id})
        return next(v["id"] for v in views if v["data"]["title"] == title)

    def listed(self, title=TAB_TITLE):
        params = {"view": self.view(title), "project": self.id, "page_size": 100}
        return [t["id"] for t in self.session.get("/api/tasks", params=params)["tasks"]]


def test_the_tab_shows_the_queue_in_order_and_follows_the_next_one(label_studio):
    tabs = Tabs(label_studio, 14)
    order = tabs.tasks[7:] + tabs.tasks[:7]
    tabs.publish(order)
    assert tabs.titles() == ["Default", TAB_TITLE]
    assert tabs.listed() == order
    assert tabs.listed("Default") == tabs.tasks

    tabs.session.post(f"/api/tasks/{order[0]}/annotations", json={"result": []})
    assert tabs.listed() == order[1:], "a labelled task is still listed"
    again = order[:0:-1]
    tabs.publish(again)
    assert tabs.listed() == again
    assert tabs.titles() == ["Default", TAB_TITLE]

    tabs.client.transport.write("DELETE", f"/api/dm/views/{tabs.view()}/")
    assert tabs.titles() == ["Default"]
    tabs.publish(order[1:])
    assert tabs.titles() == ["Default", TAB_TITLE] and tabs.listed() == order[1:]
