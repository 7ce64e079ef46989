"""Annotation for TRACE (arXiv 2605.10194): who marks the decisive spans of a rollout, and how text becomes a mask."""

from trl_ext.annotate.base import (
    ERROR_TYPES,
    MAX_SEGMENTS_PER_SPAN,
    MAX_SPANS,
    STEP_TYPES,
    Annotator,
    AnnotatorError,
    Request,
    Span,
)
from trl_ext.annotate.endpoint import EndpointAnnotator
from trl_ext.annotate.factory import make_annotator
from trl_ext.annotate.policy import PolicyAnnotator
from trl_ext.annotate.prompts import annotation_messages, parse_annotation, teacher_messages, teacher_note
from trl_ext.annotate.segments import segment, span_token_mask, token_offsets

__all__ = [
    "ERROR_TYPES",
    "MAX_SEGMENTS_PER_SPAN",
    "MAX_SPANS",
    "STEP_TYPES",
    "Annotator",
    "AnnotatorError",
    "EndpointAnnotator",
    "PolicyAnnotator",
    "Request",
    "Span",
    "annotation_messages",
    "make_annotator",
    "parse_annotation",
    "segment",
    "span_token_mask",
    "teacher_messages",
    "teacher_note",
    "token_offsets",
]
