"""For tests of plugins and stacks: a fleet in one process, as a context manager and as the pytest fixture `dynamo`."""
