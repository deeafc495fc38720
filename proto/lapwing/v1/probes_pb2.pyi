from google.protobuf import struct_pb2 as _struct_pb2
from lapwing.v1 import model_pb2 as _model_pb2
from lapwing.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROBE_STATE_UNSPECIFIED: _ClassVar[ProbeState]
    PROBE_STATE_ACTIVE: _ClassVar[ProbeState]
    PROBE_STATE_LOADED: _ClassVar[ProbeState]
    PROBE_STATE_REJECTED: _ClassVar[ProbeState]
    PROBE_STATE_SHADOW: _ClassVar[ProbeState]

class Statistic(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATISTIC_UNSPECIFIED: _ClassVar[Statistic]
    STATISTIC_P_VALUE: _ClassVar[Statistic]
    STATISTIC_Q_VALUE: _ClassVar[Statistic]
    STATISTIC_AUROC: _ClassVar[Statistic]
    STATISTIC_EFFECT_SIZE: _ClassVar[Statistic]
    STATISTIC_WEIGHT: _ClassVar[Statistic]
    STATISTIC_SELECTED: _ClassVar[Statistic]
    STATISTIC_HEAD_PROBE: _ClassVar[Statistic]

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_SVG: _ClassVar[ImageFormat]
PROBE_STATE_UNSPECIFIED: ProbeState
PROBE_STATE_ACTIVE: ProbeState
PROBE_STATE_LOADED: ProbeState
PROBE_STATE_REJECTED: ProbeState
PROBE_STATE_SHADOW: ProbeState
STATISTIC_UNSPECIFIED: Statistic
STATISTIC_P_VALUE: Statistic
STATISTIC_Q_VALUE: Statistic
STATISTIC_AUROC: Statistic
STATISTIC_EFFECT_SIZE: Statistic
STATISTIC_WEIGHT: Statistic
STATISTIC_SELECTED: Statistic
STATISTIC_HEAD_PROBE: Statistic
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_SVG: ImageFormat

class RejectedRevision(_message.Message):
    __slots__ = ("revision", "message")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    revision: str
    message: str
    def __init__(self, revision: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("slope", "intercept", "knots")
    SLOPE_FIELD_NUMBER: _ClassVar[int]
    INTERCEPT_FIELD_NUMBER: _ClassVar[int]
    KNOTS_FIELD_NUMBER: _ClassVar[int]
    slope: float
    intercept: float
    knots: _containers.RepeatedCompositeFieldContainer[CalibrationKnot]
    def __init__(self, slope: _Optional[float] = ..., intercept: _Optional[float] = ..., knots: _Optional[_Iterable[_Union[CalibrationKnot, _Mapping]]] = ...) -> None: ...

class CalibrationKnot(_message.Message):
    __slots__ = ("logit", "probability")
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    logit: float
    probability: float
    def __init__(self, logit: _Optional[float] = ..., probability: _Optional[float] = ...) -> None: ...

class Threshold(_message.Message):
    __slots__ = ("false_positive_rate", "logit", "realised_rate", "negatives")
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    REALISED_RATE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVES_FIELD_NUMBER: _ClassVar[int]
    false_positive_rate: float
    logit: float
    realised_rate: float
    negatives: int
    def __init__(self, false_positive_rate: _Optional[float] = ..., logit: _Optional[float] = ..., realised_rate: _Optional[float] = ..., negatives: _Optional[int] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("layer", "head")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ...) -> None: ...

class HeatmapName(_message.Message):
    __slots__ = ("feature", "statistic")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    feature: str
    statistic: Statistic
    def __init__(self, feature: _Optional[str] = ..., statistic: _Optional[_Union[Statistic, str]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("name", "revision", "state", "state_message", "features", "k", "layers", "heads", "width", "selected_heads", "calibration", "thresholds", "metrics", "training", "model", "heatmaps", "needed_tokens", "revisions", "rejected_revisions", "statistic_weights")
    class StatisticWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SELECTED_HEADS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HEATMAPS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_REVISIONS_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    state: ProbeState
    state_message: str
    features: _containers.RepeatedScalarFieldContainer[str]
    k: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    heads: int
    width: int
    selected_heads: _containers.RepeatedCompositeFieldContainer[Head]
    calibration: Calibration
    thresholds: _containers.RepeatedCompositeFieldContainer[Threshold]
    metrics: _struct_pb2.Struct
    training: _struct_pb2.Struct
    model: _model_pb2.ModelIdentity
    heatmaps: _containers.RepeatedCompositeFieldContainer[HeatmapName]
    needed_tokens: int
    revisions: _containers.RepeatedScalarFieldContainer[str]
    rejected_revisions: _containers.RepeatedCompositeFieldContainer[RejectedRevision]
    statistic_weights: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[ProbeState, str]] = ..., state_message: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., k: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., heads: _Optional[int] = ..., width: _Optional[int] = ..., selected_heads: _Optional[_Iterable[_Union[Head, _Mapping]]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., thresholds: _Optional[_Iterable[_Union[Threshold, _Mapping]]] = ..., metrics: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., training: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., model: _Optional[_Union[_model_pb2.ModelIdentity, _Mapping]] = ..., heatmaps: _Optional[_Iterable[_Union[HeatmapName, _Mapping]]] = ..., needed_tokens: _Optional[int] = ..., revisions: _Optional[_Iterable[str]] = ..., rejected_revisions: _Optional[_Iterable[_Union[RejectedRevision, _Mapping]]] = ..., statistic_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListProbesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListProbesResponse(_message.Message):
    __slots__ = ("probes", "next_page_token", "total_size")
    PROBES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    next_page_token: str
    total_size: int
    def __init__(self, probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total_size: _Optional[int] = ...) -> None: ...

class GetProbeRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetProbeResponse(_message.Message):
    __slots__ = ("probe",)
    PROBE_FIELD_NUMBER: _ClassVar[int]
    probe: Probe
    def __init__(self, probe: _Optional[_Union[Probe, _Mapping]] = ...) -> None: ...

class GetHeatmapRequest(_message.Message):
    __slots__ = ("probe", "feature", "statistic", "image_format")
    PROBE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    probe: str
    feature: str
    statistic: Statistic
    image_format: ImageFormat
    def __init__(self, probe: _Optional[str] = ..., feature: _Optional[str] = ..., statistic: _Optional[_Union[Statistic, str]] = ..., image_format: _Optional[_Union[ImageFormat, str]] = ...) -> None: ...

class GetHeatmapResponse(_message.Message):
    __slots__ = ("probe_name", "probe_revision", "feature", "statistic", "values", "layers", "column_label", "row_label", "value_label", "image_format", "image")
    PROBE_NAME_FIELD_NUMBER: _ClassVar[int]
    PROBE_REVISION_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COLUMN_LABEL_FIELD_NUMBER: _ClassVar[int]
    ROW_LABEL_FIELD_NUMBER: _ClassVar[int]
    VALUE_LABEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    probe_name: str
    probe_revision: str
    feature: str
    statistic: Statistic
    values: _tensor_pb2.Tensor
    layers: _containers.RepeatedScalarFieldContainer[int]
    column_label: str
    row_label: str
    value_label: str
    image_format: ImageFormat
    image: bytes
    def __init__(self, probe_name: _Optional[str] = ..., probe_revision: _Optional[str] = ..., feature: _Optional[str] = ..., statistic: _Optional[_Union[Statistic, str]] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., column_label: _Optional[str] = ..., row_label: _Optional[str] = ..., value_label: _Optional[str] = ..., image_format: _Optional[_Union[ImageFormat, str]] = ..., image: _Optional[bytes] = ...) -> None: ...

class ActivateProbeRequest(_message.Message):
    __slots__ = ("name", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class ActivateProbeResponse(_message.Message):
    __slots__ = ("active", "previous_name", "previous_revision")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_NAME_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_REVISION_FIELD_NUMBER: _ClassVar[int]
    active: Probe
    previous_name: str
    previous_revision: str
    def __init__(self, active: _Optional[_Union[Probe, _Mapping]] = ..., previous_name: _Optional[str] = ..., previous_revision: _Optional[str] = ...) -> None: ...

class ReloadProbesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadProbesResponse(_message.Message):
    __slots__ = ("probes",)
    PROBES_FIELD_NUMBER: _ClassVar[int]
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    def __init__(self, probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ...) -> None: ...
