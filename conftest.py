"""Its place puts the root of the repository on pytest's path, so that tests can import `tests.<helper>`."""
