"""Lists of jobs: many videos, by many processes that may die."""
