"""The JSON Schemas of the built-in workload with structured answers.

Documents as services ask models for, no two alike in shape. Each demands so much that its shortest instance has over
2,000 characters, about 500 tokens: it is the limit that ends an answer, so that every server has the same work,
whatever the model would say. Knows shapes. Leaves what is sent to :mod:`~pytest_gpulayout.workload`.

Only keywords that vLLM's default back end (xgrammar) enforces are used: no ``format``, ``uniqueItems`` or
``multipleOf``, no ``pattern`` beside a length (vLLM 0.32, ``vllm/v1/structured_output/backend_xgrammar.py``,
``has_xgrammar_unsupported_json_features``).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _text(least: int, most: int) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _choice(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _listed(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _record(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_NUMBER: Schema = {"type": "number"}
_YES_OR_NO: Schema = {"type": "boolean"}
_DATE: Schema = {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"}

_ADDRESS = _record(
    street=_text(20, 80), city=_text(8, 40), postal_code=_text(5, 10), country=_choice("DE", "FR", "JP", "PE", "US")
)

_ORDER = _record(
    order_id={"type": "string", "pattern": "^ORD-[0-9]{8}$"},
    placed=_DATE,
    customer=_record(name=_text(12, 60), email=_text(16, 80), address=_ADDRESS),
    lines=_listed(
        _record(
            sku={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            description=_text(60, 200),
            quantity=_whole(1, 500),
            unit_price=_NUMBER,
            gift=_YES_OR_NO,
        ),
        14,
        40,
    ),
    currency=_choice("EUR", "JPY", "USD"),
    status=_choice("new", "paid", "shipped", "returned"),
)

_PERSON = _record(
    full_name=_text(12, 60),
    born=_DATE,
    languages=_listed(_choice("de", "en", "es", "fr", "ja", "quz"), 2, 6),
    summary=_text(500, 1200),
    positions=_listed(
        _record(
            employer=_text(12, 60),
            title=_text(12, 60),
            since=_DATE,
            until={"anyOf": [_DATE, {"type": "null"}]},
            duties=_text(160, 400),
        ),
        6,
        12,
    ),
    home=_ADDRESS,
)

_LOG_EVENTS = _record(
    service=_choice("api", "billing", "search", "worker"),
    events=_listed(
        _record(
            sequence=_whole(0, 1_000_000),
            level=_choice("DEBUG", "INFO", "WARNING", "ERROR"),
            logger=_text(12, 40),
            message=_text(80, 240),
            context=_record(
                request_id={"type": "string", "pattern": "^[0-9a-f]{16}$"}, user=_text(8, 24), retries=_whole(0, 9)
            ),
        ),
        12,
        40,
    ),
)

_PRODUCTS = _record(
    category=_choice("audio", "garden", "kitchen", "office", "sports"),
    products=_listed(
        _record(
            name=_text(16, 60),
            price=_NUMBER,
            in_stock=_YES_OR_NO,
            rating=_whole(1, 5),
            tags=_listed(_text(6, 16), 4, 8),
            pitch=_text(120, 300),
        ),
        9,
        20,
    ),
)

_INVOICE = _record(
    number={"type": "string", "pattern": "^20[0-9]{2}/[0-9]{5}$"},
    seller=_record(company=_text(12, 60), address=_ADDRESS),
    buyer=_record(company=_text(12, 60), address=_ADDRESS),
    positions=_listed(
        _record(text=_text(70, 160), hours=_NUMBER, rate=_whole(40, 400), tax_percent=_whole(0, 25)), 14, 40
    ),
    payable_until=_DATE,
    terms=_text(200, 500),
)

_ITINERARY = _record(
    travellers=_whole(1, 8),
    days=_listed(
        _record(
            date=_DATE,
            place=_text(8, 40),
            morning=_text(90, 240),
            evening=_text(90, 240),
            transport=_choice("bus", "car", "on foot", "train"),
        ),
        8,
        21,
    ),
)

_EXTRACTION = _record(
    title=_text(30, 120),
    entities=_listed(
        _record(
            kind=_choice("company", "date", "person", "place"),
            text=_text(10, 60),
            evidence=_text(70, 200),
            confidence=_NUMBER,
        ),
        16,
        40,
    ),
    sentiment=_choice("negative", "neutral", "positive"),
)

_QUIZ = _record(
    subject=_choice("biology", "geography", "history", "music"),
    questions=_listed(
        _record(
            question=_text(70, 200),
            answers=_listed(_text(16, 60), 4, 4),
            right_answer=_whole(0, 3),
            explanation=_text(80, 240),
        ),
        8,
        20,
    ),
)

ANSWER_SCHEMAS = (_ORDER, _PERSON, _LOG_EVENTS, _PRODUCTS, _INVOICE, _ITINERARY, _EXTRACTION, _QUIZ)
"""An order, a person, log events, products, an invoice, a journey, facts of a text and a quiz."""
