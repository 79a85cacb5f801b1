"""The replication study of residual Koopman profiling: task, models, one run, the grid."""
