"""A detector behind gRPC. Knows nothing of labels or of how a probe is fitted."""
