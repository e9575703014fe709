from cuda_graph import recorded as record_cuda_graph  # noqa: F401
