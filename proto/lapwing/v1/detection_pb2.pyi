from lapwing.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DetectionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DETECTION_STATE_UNSPECIFIED: _ClassVar[DetectionState]
    DETECTION_STATE_SCORED: _ClassVar[DetectionState]
    DETECTION_STATE_UNSCORED: _ClassVar[DetectionState]

class UnscoredReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNSCORED_REASON_UNSPECIFIED: _ClassVar[UnscoredReason]
    UNSCORED_REASON_TOO_SHORT: _ClassVar[UnscoredReason]
    UNSCORED_REASON_NON_FINITE: _ClassVar[UnscoredReason]
    UNSCORED_REASON_TRUNCATED: _ClassVar[UnscoredReason]
DETECTION_STATE_UNSPECIFIED: DetectionState
DETECTION_STATE_SCORED: DetectionState
DETECTION_STATE_UNSCORED: DetectionState
UNSCORED_REASON_UNSPECIFIED: UnscoredReason
UNSCORED_REASON_TOO_SHORT: UnscoredReason
UNSCORED_REASON_NON_FINITE: UnscoredReason
UNSCORED_REASON_TRUNCATED: UnscoredReason

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "messages", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class HeadContribution(_message.Message):
    __slots__ = ("layer", "head", "contribution")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    contribution: float
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., contribution: _Optional[float] = ...) -> None: ...

class Detection(_message.Message):
    __slots__ = ("state", "reason", "message", "probability", "logit", "bias", "flagged", "false_positive_rate", "flagged_at", "probe_name", "probe_revision", "prompt_tokens", "response_tokens", "token_ids", "token_contributions", "strongest_heads", "stage_seconds", "heads_contribution", "statistic_contributions")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class StatisticContributionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    FLAGGED_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    FLAGGED_AT_FIELD_NUMBER: _ClassVar[int]
    PROBE_NAME_FIELD_NUMBER: _ClassVar[int]
    PROBE_REVISION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    STRONGEST_HEADS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEADS_CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    state: DetectionState
    reason: UnscoredReason
    message: str
    probability: float
    logit: float
    bias: float
    flagged: bool
    false_positive_rate: float
    flagged_at: _containers.RepeatedScalarFieldContainer[float]
    probe_name: str
    probe_revision: str
    prompt_tokens: int
    response_tokens: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_contributions: _tensor_pb2.Tensor
    strongest_heads: _containers.RepeatedCompositeFieldContainer[HeadContribution]
    stage_seconds: _containers.ScalarMap[str, float]
    heads_contribution: float
    statistic_contributions: _containers.ScalarMap[str, float]
    def __init__(self, state: _Optional[_Union[DetectionState, str]] = ..., reason: _Optional[_Union[UnscoredReason, str]] = ..., message: _Optional[str] = ..., probability: _Optional[float] = ..., logit: _Optional[float] = ..., bias: _Optional[float] = ..., flagged: bool = ..., false_positive_rate: _Optional[float] = ..., flagged_at: _Optional[_Iterable[float]] = ..., probe_name: _Optional[str] = ..., probe_revision: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., response_tokens: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_contributions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., strongest_heads: _Optional[_Iterable[_Union[HeadContribution, _Mapping]]] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., heads_contribution: _Optional[float] = ..., statistic_contributions: _Optional[_Mapping[str, float]] = ...) -> None: ...
