"""Is the trained model better than the one it started from? Statistics, tasks and graders."""
