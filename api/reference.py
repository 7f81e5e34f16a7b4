"""Parts of the OpenAPI document that the routes' signatures do not give: bodies, links, headers."""

from __future__ import annotations

from typing import Any

from api.schemas import MadeKey, PriorityIn, SearchOut
from nas.planning.accepted import schema_of
from nas.planning.recipe import SETTINGS
from nas.planning.request import SearchRequest
from nas.service.asking import Ask, Tell
from nas.service.confirm import ConfirmRequest
from nas.service.keys import NewKey, Rotation
from nas.service.labels import Labels


def _body(schema: dict[str, Any], *, required: bool = True, **examples: Any) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": named}}
    return {"requestBody": {"required": required, "content": content}}


_SEARCH = schema_of(SearchRequest)
#: Confirmations have a route of their own; null is what other searches show.
_SEARCH = {**_SEARCH, "properties": {**_SEARCH["properties"], "confirm": {"type": "null"}}}
_CHANGES = {k: v for k, v in _SEARCH.items() if k not in ("required", "description")}
_SMALL = {"task": "text", "train_flops": 2e11, "trials": 2, "seed": 1}

SEARCH_BODY = _body(
    _SEARCH,
    text=_SMALL,
    settings={"task": "regression", "train_flops": 2e11, "overrides": {"depth": 6}},
    space={**_SMALL, "space": {"families": ["einsum", "btt-moe"], "factors": [2, 3]}},
    total={"task": "text", "train_flops": 2e11, "total_train_flops": 1e13},
    limits={**_SMALL, "limits": {"seconds": 3600, "total_train_flops": 2e12}, "priority": 5},
)
CONFIRM_BODY = _body(schema_of(ConfirmRequest), top={"top": 1, "seeds": 2})
CLONE_BODY = _body(
    _CHANGES, required=False, same={}, longer={"trials": 32}, again={"seed": 2, "priority": -1}
)
LABELS_BODY = _body(
    schema_of(Labels), named={"name": "text, widths 64 to 128", "tags": ["paper"]},
    archived={"archived": True},
)  # fmt: skip
ASK_BODY = _body(schema_of(Ask), required=False, any={"holder": "node-7", "lease_seconds": 600})
TELL_BODY = _body(
    schema_of(Tell),
    point={
        "token": "0" * 32, "points": [{"step": 40, "losses": [0.4, 0.6], "seconds": 1.5}],
    },
    renewal={"token": "0" * 32},
    end={"token": "0" * 32, "outcome": "complete"},
    failure={"token": "0" * 32, "outcome": "failed", "error": "out of memory"},
)  # fmt: skip
PRIORITY_BODY = _body(schema_of(PriorityIn), first={"priority": 10})
KEY_BODY = _body(
    schema_of(NewKey), ci={"name": "ci", "scopes": ["read"]},
    month={"name": "ada's laptop", "lifetime_seconds": 2_592_000},
)  # fmt: skip
ROTATION_BODY = _body(
    schema_of(Rotation), required=False, day={"grace_seconds": 86_400}, now={"grace_seconds": 0}
)

#: Rules between several fields, which a schema cannot express.
_KEY = {"Idempotency-Key": "not used before with another request"}
SEARCH_RULES = {
    **_KEY,
    "train_flops": "enough for the recipe's smallest runs and the references; see GET /v1/tasks",
    "data": "a file or folder inside the service's data folder that the task can read",
    "recipe": "a recipe of the task",
    "overrides": "settings of the recipe, with valid values",
    **dict.fromkeys(SETTINGS, "valid together with the recipe's other settings"),
    "min_width, max_width": "multiples of head_dim",
    "active": "at most `experts`",
    "shared": "less than `active`",
    "granularity": "at most the hidden dimension of the recipe's narrowest feed-forward block",
    "space.heads": "aligned only for models with attention",
    "stopping": "not none with a total budget; none for candidates that are given, and for recipes "
    "whose schedule is not constant",
    "sampler": "surrogate with stopping frontier",
    "trials": "the number of `candidates`, where these are given",
    "design": "text without NUL and lone surrogates",
    "candidates": "designs that can be read, at widths of the recipe that the budget admits; null "
    "for a confirmation",
    "total_train_flops": "at least the train FLOPs of the references, three candidates and six "
    "runs that confirm, and neither total_seconds nor limits.total_train_flops beside it",
    "total_seconds": "no total_train_flops and no limits.total_train_flops beside it",
    "limits.total_train_flops": "at least the train FLOPs of the references and one candidate",
    "limits.trial_seconds": "null with trainer client",
}
LIST_RULES = {"task": "a task that there is; see GET /v1/tasks"}
CLONE_RULES = {**SEARCH_RULES, "changes": "only limits and priority for a confirmation"}
LABELS_RULES = {
    "name": "printable characters, not all of them spaces",
    "tags": "different printable texts without commas",
    "labels": "at least one of them",
}
TELL_RULES = {
    "step": "at most the last step of the trial",
    "losses": "as many as for the other points of the search",
    "outcome": "complete once the last step was told",
    "error": "null unless the outcome is failed",
}
KEYS_RULES = {"cursor": "the `next` of an earlier page"}
KEY_RULES = {
    **_KEY,
    "name": "printable characters only",
    "scopes": "each once",
}
ROTATION_RULES = _KEY
CONFIRM_RULES = {
    **_KEY,
    "top": "at most the number of distinct completed candidates",
    "longer": "no run may exceed the greatest accepted budget",
}

_ACTS = (
    "cancel",
    "pause",
    "resume",
    "retry",
    "priority",
    "labels",
    "clone",
    "confirm",
    "delete",
    "ask",
)


def link(method: str, path: str, **parameters: str) -> dict[str, Any]:
    escaped = path.replace("~", "~0").replace("/", "~1")
    return {"operationRef": f"#/paths/{escaped}/{method}", "parameters": parameters}


def _links(found: str = "") -> dict[str, Any]:
    """Links from a response to all routes that take a search's id; `found` points to the search."""
    one = "/v1/searches/{search_id}"
    search = f"$response.body#{found}/id"
    budget = f"$response.body#{found}/request/train_flops"
    return {
        **{act: link("post", f"{one}/{act}", search_id=search) for act in _ACTS},
        "read": link("get", one, search_id=search),
        "trials": link("get", f"{one}/trials", search_id=search),
        "events": link("get", f"{one}/events", search_id=search),
        "export": link("get", f"{one}/export", search_id=search),
        "best": link("get", "/v1/best", search=search, train_flops=budget),
        "frontier": link("get", "/v1/frontier", search=search),
    }


_LOCATION = {"Location": {"description": "the search", "required": True, "schema": {
    "type": "string", "pattern": "^(/[A-Za-z0-9._~-]+)*/v1/searches/[0-9a-f]{32}$",
}}}  # fmt: skip
_MADE: dict[str, Any] = {"headers": _LOCATION, "links": _links()}
#: `responses=` of routes that make a search.
MADE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Created before with the same key", "model": SearchOut, **_MADE},
    201: {"description": "Queued", **_MADE},
}
KEY_MADE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Made before with the same Idempotency-Key", "model": MadeKey},
    201: {"description": "Made; `key` is its secret"},
}
for _answer in KEY_MADE.values():
    _answer["headers"] = {"Location": {"description": "the key", "required": True, "schema": {
        "type": "string", "pattern": "^(/[A-Za-z0-9._~-]+)*/v1/keys/[0-9a-f]{12}$",
    }}}  # fmt: skip
SEARCH_FOUND: dict[int | str, dict[str, Any]] = {
    200: {"description": "The search", "links": _links()}
}
#: The links are those of the newest search.
SEARCHES_FOUND: dict[int | str, dict[str, Any]] = {
    200: {"description": "A page of searches", "links": _links("/items/0")}
}
