"""Requests that schemathesis draws from the OpenAPI file, sound and broken: each answer is one that the file describes,
and none is a 5xx. `python -m benchmarks.serving schema` does the same, at length, with a real server."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pixrec.config import ServeConfig
from pixrec.serving.http import create_api

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_every_answer_is_a_described_one(backend: Any) -> None:
    api = schemathesis.openapi.from_asgi("/openapi.json", create_api(backend, ServeConfig(api_key="k")))
    asked: Counter[str] = Counter()
    for operation in api.get_all_operations():

        @hypothesis.settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(operation.ok().as_strategy())
        def answered(case: Any) -> None:
            case.call_and_validate(headers={"X-API-Key": "k"}, checks=CHECKS)
            asked[case.operation.label] += 1

        answered()
    assert asked["POST /v1/recommend"] >= 10
    assert len(asked) >= 13
