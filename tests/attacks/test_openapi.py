"""The routes against their description: whatever fits it or nearly fits it, no 5xx and no undescribed answer."""

from pathlib import Path

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.conftest import activate, setup_payload

pytestmark = pytest.mark.attacks
load_all_checks()

DESCRIPTION = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OF_THE_PROTOCOL = {"label_studio"}  # the blueprint whose routes are described


current = {}


def app_of_the_test(environ, start_response):
    return current["app"](environ, start_response)


schema = schemathesis.openapi.from_dict(DESCRIPTION)
schema.app = app_of_the_test


@pytest.fixture(autouse=True)
def _app(make_app, store, healthy_worker):
    current["app"] = make_app()
    assert current["app"].test_client().post("/setup", json=setup_payload()).status_code == 200
    activate(store)


@schema.parametrize()
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_every_operation(case):
    case.call_and_validate(checks=CHECKS)


def test_every_route_is_described(app):
    described = {(path, method.upper()) for path, item in DESCRIPTION["paths"].items() for method in item}
    served = {
        (rule.rule, method)
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint.split(".")[0] in OF_THE_PROTOCOL
    }
    assert served == described
