from google.rpc import status_pb2 as _status_pb2
from lapwing.v1 import detection_pb2 as _detection_pb2
from lapwing.v1 import model_pb2 as _model_pb2
from lapwing.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
    FINISH_REASON_FLAGGED: _ClassVar[FinishReason]

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_LOADING: _ClassVar[ServerState]
    SERVER_STATE_SERVING: _ClassVar[ServerState]
    SERVER_STATE_FAILED: _ClassVar[ServerState]
    SERVER_STATE_STOPPING: _ClassVar[ServerState]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
FINISH_REASON_FLAGGED: FinishReason
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_LOADING: ServerState
SERVER_STATE_SERVING: ServerState
SERVER_STATE_FAILED: ServerState
SERVER_STATE_STOPPING: ServerState

class ScoreRequest(_message.Message):
    __slots__ = ("prompt", "response", "false_positive_rate", "probe")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    prompt: _detection_pb2.Prompt
    response: _detection_pb2.Response
    false_positive_rate: float
    probe: str
    def __init__(self, prompt: _Optional[_Union[_detection_pb2.Prompt, _Mapping]] = ..., response: _Optional[_Union[_detection_pb2.Response, _Mapping]] = ..., false_positive_rate: _Optional[float] = ..., probe: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("detection",)
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    detection: _detection_pb2.Detection
    def __init__(self, detection: _Optional[_Union[_detection_pb2.Detection, _Mapping]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt", "response")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    prompt: _detection_pb2.Prompt
    response: _detection_pb2.Response
    def __init__(self, prompt: _Optional[_Union[_detection_pb2.Prompt, _Mapping]] = ..., response: _Optional[_Union[_detection_pb2.Response, _Mapping]] = ...) -> None: ...

class ScoreBatchRequest(_message.Message):
    __slots__ = ("items", "false_positive_rate", "probe")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    false_positive_rate: float
    probe: str
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., false_positive_rate: _Optional[float] = ..., probe: _Optional[str] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("detection", "error")
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    detection: _detection_pb2.Detection
    error: _status_pb2.Status
    def __init__(self, detection: _Optional[_Union[_detection_pb2.Detection, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ScoreBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "max_new_tokens", "temperature", "top_p", "seed", "false_positive_rate", "stop_strings", "stop_when_probability_above", "minimum_tokens", "score_every", "contributions", "probe")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_WHEN_PROBABILITY_ABOVE_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORE_EVERY_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    prompt: _detection_pb2.Prompt
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    false_positive_rate: float
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_when_probability_above: float
    minimum_tokens: int
    score_every: int
    contributions: bool
    probe: str
    def __init__(self, prompt: _Optional[_Union[_detection_pb2.Prompt, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., false_positive_rate: _Optional[float] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_when_probability_above: _Optional[float] = ..., minimum_tokens: _Optional[int] = ..., score_every: _Optional[int] = ..., contributions: bool = ..., probe: _Optional[str] = ...) -> None: ...

class GeneratedToken(_message.Message):
    __slots__ = ("index", "token_id", "text", "log_probability", "probability", "logit", "token_contributions")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_id: int
    text: str
    log_probability: float
    probability: float
    logit: float
    token_contributions: _tensor_pb2.Tensor
    def __init__(self, index: _Optional[int] = ..., token_id: _Optional[int] = ..., text: _Optional[str] = ..., log_probability: _Optional[float] = ..., probability: _Optional[float] = ..., logit: _Optional[float] = ..., token_contributions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("text", "prompt_token_ids", "token_ids", "finish_reason", "detection")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    text: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: FinishReason
    detection: _detection_pb2.Detection
    def __init__(self, text: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., detection: _Optional[_Union[_detection_pb2.Detection, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("token", "generation")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    token: GeneratedToken
    generation: Generation
    def __init__(self, token: _Optional[_Union[GeneratedToken, _Mapping]] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class AttentionHeader(_message.Message):
    __slots__ = ("model", "layers", "heads", "prompt_tokens", "response_tokens", "false_positive_rate", "probe", "attention_sinks", "weight_sample")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_SINKS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelIdentity
    layers: _containers.RepeatedScalarFieldContainer[int]
    heads: int
    prompt_tokens: int
    response_tokens: int
    false_positive_rate: float
    probe: str
    attention_sinks: bool
    weight_sample: _tensor_pb2.Tensor
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., heads: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., response_tokens: _Optional[int] = ..., false_positive_rate: _Optional[float] = ..., probe: _Optional[str] = ..., attention_sinks: bool = ..., weight_sample: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class AttentionSummarySlice(_message.Message):
    __slots__ = ("first_layer", "first_head", "first_token", "diagonal", "received")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    first_head: int
    first_token: int
    diagonal: _tensor_pb2.Tensor
    received: _tensor_pb2.Tensor
    def __init__(self, first_layer: _Optional[int] = ..., first_head: _Optional[int] = ..., first_token: _Optional[int] = ..., diagonal: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., received: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class AttentionRowsSlice(_message.Message):
    __slots__ = ("first_layer", "first_head", "first_token", "weights", "diagonal")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    first_head: int
    first_token: int
    weights: _tensor_pb2.Tensor
    diagonal: _tensor_pb2.Tensor
    def __init__(self, first_layer: _Optional[int] = ..., first_head: _Optional[int] = ..., first_token: _Optional[int] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., diagonal: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class AttentionScoreNow(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScoreAttentionRequest(_message.Message):
    __slots__ = ("header", "summary", "rows", "score_now")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SCORE_NOW_FIELD_NUMBER: _ClassVar[int]
    header: AttentionHeader
    summary: AttentionSummarySlice
    rows: AttentionRowsSlice
    score_now: AttentionScoreNow
    def __init__(self, header: _Optional[_Union[AttentionHeader, _Mapping]] = ..., summary: _Optional[_Union[AttentionSummarySlice, _Mapping]] = ..., rows: _Optional[_Union[AttentionRowsSlice, _Mapping]] = ..., score_now: _Optional[_Union[AttentionScoreNow, _Mapping]] = ...) -> None: ...

class ScoreAttentionResponse(_message.Message):
    __slots__ = ("detection", "running")
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    detection: _detection_pb2.Detection
    running: bool
    def __init__(self, detection: _Optional[_Union[_detection_pb2.Detection, _Mapping]] = ..., running: bool = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("identity", "max_tokens")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    identity: _model_pb2.ModelIdentity
    max_tokens: int
    def __init__(self, identity: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_request_bytes", "max_batch_items", "max_new_tokens", "max_generate_streams", "max_heatmap_pixels", "max_messages", "max_characters_per_token", "max_streams_per_client", "max_stop_strings", "max_stop_string_characters", "max_stream_seconds", "max_attention_streams", "max_attention_bytes")
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATE_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_HEATMAP_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHARACTERS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRING_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTENTION_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTENTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_request_bytes: int
    max_batch_items: int
    max_new_tokens: int
    max_generate_streams: int
    max_heatmap_pixels: int
    max_messages: int
    max_characters_per_token: int
    max_streams_per_client: int
    max_stop_strings: int
    max_stop_string_characters: int
    max_stream_seconds: float
    max_attention_streams: int
    max_attention_bytes: int
    def __init__(self, max_request_bytes: _Optional[int] = ..., max_batch_items: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_generate_streams: _Optional[int] = ..., max_heatmap_pixels: _Optional[int] = ..., max_messages: _Optional[int] = ..., max_characters_per_token: _Optional[int] = ..., max_streams_per_client: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_stop_string_characters: _Optional[int] = ..., max_stream_seconds: _Optional[float] = ..., max_attention_streams: _Optional[int] = ..., max_attention_bytes: _Optional[int] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "state", "message", "model", "limits", "probe_name", "probe_revision", "library_versions")
    class LibraryVersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PROBE_NAME_FIELD_NUMBER: _ClassVar[int]
    PROBE_REVISION_FIELD_NUMBER: _ClassVar[int]
    LIBRARY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    state: ServerState
    message: str
    model: ModelInfo
    limits: Limits
    probe_name: str
    probe_revision: str
    library_versions: _containers.ScalarMap[str, str]
    def __init__(self, version: _Optional[str] = ..., state: _Optional[_Union[ServerState, str]] = ..., message: _Optional[str] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., probe_name: _Optional[str] = ..., probe_revision: _Optional[str] = ..., library_versions: _Optional[_Mapping[str, str]] = ...) -> None: ...
