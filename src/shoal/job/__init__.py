"""A job is layout × sync × recipe: torch-free frozen dataclasses, one file of options per room."""

from shoal.job.job import Job
from shoal.job.layout import Layout
from shoal.job.toml import blame, parse, read, read_run, write

__all__ = ["Job", "Layout", "blame", "parse", "read", "read_run", "write"]
