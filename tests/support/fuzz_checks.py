"""Checks of the REST service that schemathesis does not bring: loaded by it as its hooks."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, Response
from schemathesis.core.failures import Failure

LONGEST_PROBLEM_BYTES = 4096
_PROBLEM = "application/problem+json"
#: No text that it matches stands here: problems repeat what was sent, and schemathesis sends the
#: texts that it finds in this file too.
_TRACEBACK = re.compile(rb'File "[^"]+", line \d+')


class UndocumentedRefusal(Failure):
    """A request that the schema takes was refused for a reason that the document does not name."""


class BadProblem(Failure):
    """An error that is no small problem document."""


@schemathesis.check
def refusals_follow_a_rule(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """422 for a request that the schema takes names a field with a rule in the document."""
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if response.status_code != HTTPStatus.UNPROCESSABLE_ENTITY or not positive:
        return
    documented = case.operation.definition.raw["responses"]["422"]
    problem = response.json()
    field = str(problem.get("field"))
    if problem["type"] == "urn:einsum-nas:idempotency-conflict":
        field = "Idempotency-Key"
    if not any(
        field == rule or field.startswith((f"{rule}.", f"{rule}["))
        for rule in documented["x-rules"]
    ):
        raise UndocumentedRefusal(
            operation=case.operation.label,
            title="Refused without a documented rule",
            message=f"{field}: {problem['detail']}",
        )


@schemathesis.check
def errors_are_small_problems(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """Every error is application/problem+json of less than 4 KB without a traceback."""
    if response.status_code < HTTPStatus.BAD_REQUEST:
        return
    kind = (response.headers.get("content-type") or [""])[0]
    body = response.content or b""
    empty = response.request.method == "HEAD"
    if not empty and (
        kind != _PROBLEM or len(body) >= LONGEST_PROBLEM_BYTES or _TRACEBACK.search(body)
    ):
        raise BadProblem(
            operation=case.operation.label,
            title="No small problem document",
            message=f"{response.status_code} {kind}, {len(body)} bytes: {body[:200]!r}",
        )
