"""From a feature store to a probe directory: the whole way."""
